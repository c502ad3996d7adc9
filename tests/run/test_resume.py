"""A run that was killed and started again goes on where it was: the same batches, the same losses, the same numbers."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from leet import sessions
from nursery import read_log

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from rsdyn.commands import train  # noqa: E402

N = 64
# what may differ: how long it took, and what only a run that went on has to tell
OWN = ("seconds", "resumed_at_step", "sequences_recorded", "lm_loaded")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    monkeypatch.setenv("RSDYN_RUN_DIR", "")


@pytest.fixture(scope="module")
def words(tiny_llama):
    return {
        "lm.name": str(tiny_llama), "data.limit": N, "data.l_max": 220, "cache.shard_sequences": 8, "cae.layers": 4,
        "trainer.max_epochs": 2, "data.batch_size": 16, "data.shuffle_shards": 3, "tracking.mode": "disabled",
        "trainer.accelerator": "cpu",
    }  # fmt: skip


def argv_of(words, **more):
    return [f"{k}={v}" for k, v in {**words, **more}.items()]


class Place:
    """Where a run is: its folder, cache and log."""

    def __init__(self, base, name):
        self.base, self.folder, self.cache, self.log = base, base / f"{name}-run", base / f"{name}-cache", base / name

    def words(self):
        return {"run.dir": self.folder, "cache.dir": self.cache}

    @property
    def summary(self):
        return json.loads((self.folder / "summary.json").read_text())

    def same_as(self, other, ranks=1):
        for rank in range(ranks):
            suffix = str(rank or "")
            mine, theirs = read_log(f"{self.log}{suffix}")[0], read_log(f"{other.log}{suffix}")[0]
            assert mine == theirs
        a, b = self.summary, other.summary
        assert {k: v for k, v in a.items() if k not in OWN} == {k: v for k, v in b.items() if k not in OWN}
        a, b = (torch.load(p.folder / "checkpoints" / "best.ckpt", weights_only=True) for p in (self, other))
        assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in b["state_dict"])


@pytest.fixture(scope="module")
def whole(nursery, words, tmp_path_factory):
    """The run that nobody interrupts, from an empty cache."""
    place = Place(tmp_path_factory.mktemp("whole"), "whole")
    answer = nursery.run(argv=argv_of(words, **place.words()), log=place.log)
    assert answer["code"] == 0, answer["said"]
    return place


def interrupted_and_gone_on(nursery, words, place, **how):
    """Interrupt a run as asked, start it again, and give what both said."""
    argv = argv_of(words, **place.words())
    first = nursery.run(argv=argv, log=place.log, **how)
    expected = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 138}[how["signal"]]
    assert first["codes"] == [expected] * len(first["codes"]), first["said"]
    assert "Traceback" not in first["said"]
    second = nursery.run(argv=argv, log=place.log, ranks=how.get("ranks", 1))
    assert second["code"] == 0, second["said"]
    return first["said"], second["said"]


@pytest.mark.parametrize(
    "how",
    [
        {"signal": "SIGKILL", "at_record": 20},  # in the first epoch, in the second window's recording
        pytest.param({"signal": "SIGTERM", "at_record": 30}, marks=pytest.mark.slow),
        {"signal": "SIGKILL", "at_step": 13, "every": 5},
        # the last step of the first epoch
        pytest.param({"signal": "SIGUSR1", "at_step": 17}, marks=pytest.mark.slow),
        {"signal": "SIGINT", "at_step": 34, "then": 1},  # saved before the last step of the second epoch
        pytest.param(
            {"signal": "SIGKILL", "where": "rsdyn.autoencoder.training:LitAutoencoder.test_step"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_it_goes_on_with_the_same_batches_to_the_same_numbers(nursery, words, whole, tmp_path, how):
    place = Place(tmp_path, "killed")
    _, said = interrupted_and_gone_on(nursery, words, place, **how)
    assert f"an unfinished run of the same settings, {place.folder}" in said
    place.same_as(whole)
    if how["signal"] != "SIGKILL":  # what a signal is given time to save is not done again
        assert read_log(place.log)[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "option",
    [
        {},
        {"cae.standardise": "none"},
        {"data.batch_by": "sequence", "data.batch_size": 3},
        {"cae.standardise": "unit_sublayer", "cae.warmup_steps": 20},
        {"cae.bias_init": "mean", "analysis.on_train": "true"},
        {"trainer.options.accumulate_grad_batches": 2},
        {"cache.enabled": "false"},
    ],
    ids=str,
)
def test_at_twenty_random_steps(nursery, words, tmp_path, option):
    words = {**words, "trainer.max_epochs": 3, **option}
    whole = Place(tmp_path, "whole")
    answer = nursery.run(argv=argv_of(words, **whole.words()), log=whole.log)
    assert answer["code"] == 0, answer["said"]
    steps = len(read_log(whole.log)[0]) // option.get("trainer.options.accumulate_grad_batches", 1)
    draw = random.Random(0)
    redone = 0
    for trial in range(20):
        how = {"at_step": draw.randrange(1, steps), "signal": draw.choice(("SIGKILL", "SIGTERM", "SIGINT"))}
        if trial % 4 == 0:
            how = {"at_record": draw.randrange(1, N), "signal": how["signal"]}
        place = Place(tmp_path, f"trial{trial}")
        interrupted_and_gone_on(nursery, words, place, every=draw.choice((1, 4, 7)), **how)
        place.same_as(whole)
        redone += read_log(place.log)[1]
        shutil.rmtree(place.folder)
        shutil.rmtree(place.cache, ignore_errors=True)
    print(f"{option}: 20 interruptions of {steps} steps, {redone} steps taken twice")


def test_two_processes_go_on_together(nursery, words, tmp_path):
    """Each with its own batches, to the last bit; the signal goes to the second alone."""
    words = {**words, "trainer.devices": 2}
    whole, place = Place(tmp_path, "whole"), Place(tmp_path, "stopped")
    answer = nursery.run(argv=argv_of(words, **whole.words()), log=whole.log, ranks=2)
    assert answer["codes"] == [0, 0], answer["said"]
    interrupted_and_gone_on(nursery, words, place, signal="SIGTERM", to=[1], after=5, ranks=2)
    place.same_as(whole, ranks=2)
    assert place.summary["resumed_at_step"] > 0


def test_in_wandb_both_sessions_are_one_run_and_the_second_has_all_that_was_found(nursery, words, tmp_path):
    place = Place(tmp_path, "tracked")
    words = {**words, "tracking.mode": "offline"}
    interrupted_and_gone_on(nursery, words, place, signal="SIGTERM", at_step=24)
    first, second = sessions(place.folder)
    wandb_id = json.loads((place.folder / "provenance.json").read_text())["wandb_id"]
    assert [each.run["run_id"] for each in (first, second)] == [wandb_id] * 2
    assert (first.summed["exit_code"], second.summed["exit_code"]) == (143, 0)
    losses = [[row["val/loss"] for row in each.history if "val/loss" in row] for each in (first, second)]
    assert [len(each) for each in losses] == [1, 1]  # an epoch each: the server has them under their steps
    assert [*losses[0], *losses[1]] == pytest.approx([v for _, v in place.summary["history"]["val"]])
    assert not any("sublayer" in row for row in first.history)
    curve = [v for _, v in second.curve("depth/latent_distance/autoencoder")]
    assert len(curve) == 5 and curve == pytest.approx(place.summary["latent_distance"], rel=1e-6)
    chart = json.loads((second.folder / "files" / second.media("charts/")["loss"]["path"]).read_text())
    assert [len(trace["x"]) for trace in chart["data"]] == [2, 2]  # both epochs, training and validation


def test_nothing_depends_on_global_random_numbers(nursery, words, whole, tmp_path):
    """No checkpoint needs the state of a generator, since none is drawn from after the weights are."""
    place = Place(tmp_path, "drawn")
    answer = nursery.run(argv=argv_of(words, **place.words()), log=place.log, draw=True)
    assert answer["code"] == 0, answer["said"]
    place.same_as(whole)


# -- which run is gone on with -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(nursery, words, tmp_path_factory):
    """A run stopped in its second epoch."""
    place = Place(tmp_path_factory.mktemp("stopped"), "stopped")
    answer = nursery.run(argv=argv_of(words, **place.words()), log=place.log, signal="SIGTERM", at_step=24)
    assert answer["code"] == 143, answer["said"]
    assert f"the same command resumes from {place.folder}" in answer["said"]
    return place


def test_a_checkpoint_between_two_steps_counts_finished_batches_alone(stopped):
    loops = torch.load(last_of(stopped), weights_only=True)["loops"]["fit_loop"]
    progress = loops["epoch_loop.batch_progress"]
    for counts, expected in ((progress["total"], 25), (progress["current"], 25 - 18)):
        assert set(counts.values()) == {expected}  # ready, started, processed, completed
    assert not progress["is_last_batch"]
    assert loops["epoch_loop.state_dict"]["_batches_that_stepped"] == 25


def last_of(place):
    return place.folder / "checkpoints" / "last.ckpt"


def error_of(capfd):
    error = capfd.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("train.py: error: ")]
    return line


def test_without_a_run_dir_the_newest_unfinished_run_of_the_same_settings_is_found(nursery, words, stopped, tmp_path):
    def again():
        answer = nursery.run(argv=argv_of(words, **{"cache.dir": stopped.cache}), cwd=tmp_path)
        assert answer["code"] == 0, answer["said"]
        return answer["said"]

    config = (stopped.folder / "config.yaml").read_text().replace(str(stopped.folder), "null")
    for name in ("20200101-000000-train-lm", "20200102-000000-train-lm"):
        shutil.copytree(stopped.folder, tmp_path / "runs" / name)
        (tmp_path / "runs" / name / "config.yaml").write_text(config)
    shutil.copytree(stopped.folder, tmp_path / "runs" / "20200103-000000-train-lm")  # other settings: newer, but not it
    path = tmp_path / "runs" / "20200103-000000-train-lm" / "config.yaml"
    path.write_text(config.replace("lr: 0.001", "lr: 0.002"))
    shutil.copytree(stopped.folder, tmp_path / "runs" / "20200104-000000-train-lm")  # finished
    (tmp_path / "runs" / "20200104-000000-train-lm" / "config.yaml").write_text(config)
    (tmp_path / "runs" / "20200104-000000-train-lm" / "summary.json").write_text("{}")
    said = again()
    assert "runs/20200102-000000-train-lm (resume=never starts anew)" in said and "after 1 epoch and" in said
    assert (tmp_path / "runs" / "20200102-000000-train-lm" / "summary.json").exists()
    assert not (tmp_path / "runs" / "20200101-000000-train-lm" / "summary.json").exists()
    # a run that is over, and one that is still going, are left alone
    from rsdyn.run.folder import hold

    held = hold(tmp_path / "runs" / "20200101-000000-train-lm")
    assert "Resume" not in again()
    held.lock.release()
    assert len(list((tmp_path / "runs").iterdir())) == 5


def test_a_checkpoint_goes_on_in_a_new_folder_and_may_train_longer(nursery, words, whole, stopped, tmp_path):
    place = Place(tmp_path, "further")
    more = {**place.words(), "cache.dir": stopped.cache, "resume": last_of(stopped), "trainer.max_epochs": 3}
    before = sorted((p.name, p.stat().st_mtime_ns) for p in stopped.folder.rglob("*"))
    shutil.copy(stopped.log, place.log)
    answer = nursery.run(argv=argv_of(words, **more), log=place.log)
    assert answer["code"] == 0, answer["said"]
    assert f"Resume: {last_of(stopped)}, after 1 epoch and " in answer["said"]
    assert sorted((p.name, p.stat().st_mtime_ns) for p in stopped.folder.rglob("*")) == before
    summary = place.summary
    assert summary["epochs"] == 3
    assert summary["history"]["train"][:2] == whole.summary["history"]["train"]
    log = read_log(place.log)[0]
    assert {k: v for k, v in log.items() if k[0] < 2} == read_log(whole.log)[0]


def test_early_stopping_and_the_best_epoch_are_not_forgotten(nursery, words, tmp_path):
    """Stopped in the test, after early stopping: the second start trains no further, and knows why it stopped."""
    words = {**words, "cae.lr": 0.3, "cae.warmup_steps": 0, "trainer.max_epochs": 40, "trainer.patience": 2}
    whole, place = Place(tmp_path, "whole"), Place(tmp_path, "stopped")
    assert nursery.run(argv=argv_of(words, **whole.words()), log=whole.log)["code"] == 0
    assert whole.summary["stopped_early"]
    how = {"signal": "SIGTERM", "where": "rsdyn.autoencoder.training:LitAutoencoder.test_step"}
    interrupted_and_gone_on(nursery, words, place, **how)
    place.same_as(whole)
    # more patience goes on where less had stopped
    (place.folder / "summary.json").unlink()
    more = {**words, "trainer.patience": 3, "resume": last_of(place), "run.dir": tmp_path / "patient",
            "cache.dir": place.cache}  # fmt: skip
    assert nursery.run(argv=argv_of(more))["code"] == 0
    patient = json.loads((tmp_path / "patient" / "summary.json").read_text())
    assert patient["epochs"] > whole.summary["epochs"]
    assert patient["best_val_loss"] <= whole.summary["best_val_loss"]


@pytest.mark.parametrize(
    "how",
    [
        {"signal": "SIGKILL", "at_step": 37},  # the last checkpoint is that of an epoch's end
        pytest.param({"signal": "SIGTERM", "at_step": 58}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_rate_that_fell_stays_fallen(nursery, words, tmp_path, how):
    """The epoch's checkpoint knows of a plateau that the epoch's validation showed."""
    words = {**words, "cae.lr": 2e-7, "cae.plateau_patience": 0, "trainer.max_epochs": 5, "cae.warmup_steps": 0}
    whole, place = Place(tmp_path, "whole"), Place(tmp_path, "gone-on")
    assert nursery.run(argv=argv_of(words, **whole.words()), log=whole.log)["code"] == 0
    rates = [rate for _, rate in whole.summary["history"]["lr"]]
    assert rates == pytest.approx([2e-7 / 2**i for i in range(5)])  # at each epoch's end: nothing is learnt
    interrupted_and_gone_on(nursery, words, place, **how)
    place.same_as(whole)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cae.lr": 0.01}, ["cae.lr is 0.001 there and 0.01 here"]),
        ({"cae.bottleneck": 3, "seed": 1}, ["cae.bottleneck is 2 there and 3 here", "seed is 0 there and 1 here"]),
    ],
    ids=str,
)
def test_a_run_of_other_settings_is_not_gone_on_with(words, stopped, tmp_path, capfd, change, said):
    more = {"cache.dir": stopped.cache, **change}
    assert train.main(argv_of(words, **more, resume=last_of(stopped), **{"run.dir": tmp_path / "run"})) == 2
    error = error_of(capfd)
    assert f"resume={last_of(stopped)}: made with other settings" in error and all(word in error for word in said)
    assert not (tmp_path / "run").exists()
    assert train.main(argv_of(words, **more, **{"run.dir": stopped.folder})) == 2
    error = error_of(capfd)
    assert "holds an unfinished run of other settings" in error and all(word in error for word in said)
    assert train.main(argv_of(words, **more, resume="never", **{"run.dir": stopped.folder})) == 2
    assert "exists and is not empty" in error_of(capfd)


def test_checkpoints_that_nothing_can_go_on_from(words, stopped, tmp_path, capfd):
    good = torch.load(last_of(stopped), weights_only=True)
    hostile = {**good, "callbacks": Hostile(tmp_path / "executed")}
    bad = {
        "other version": ({**good, "rsdyn": {**good["rsdyn"], "format": 99}}, "format 99"),
        "other text": ({**good, "rsdyn": {**good["rsdyn"], "tokens": "0"}}, "the text changed under the same name"),
        "other weights": ({**good, "rsdyn": {**good["rsdyn"], "weights": "0"}}, "weights changed under the same name"),
        "weights alone": ({"state_dict": good["state_dict"]}, "not a checkpoint of train.py"),
        "a list": ([1, 2], "not a checkpoint of train.py"),
        "hostile": (hostile, "holds more than tensors and plain values"),
    }
    for name, (content, said) in bad.items():
        path = tmp_path / f"{name}.ckpt"
        torch.save(content, path)
        more = {"cache.dir": stopped.cache, "run.dir": tmp_path / "run", "resume": path}
        assert train.main(argv_of(words, **more)) == 2, name
        error = error_of(capfd)
        assert f"resume={path}" in error and said in error and "resume=never" in error
    assert not (tmp_path / "executed").exists()
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(last_of(stopped).read_bytes()[:-3000])
    for path in (damaged, tmp_path / "nowhere.ckpt", tmp_path):
        assert train.main(argv_of(words, **{**more, "resume": path})) == 2
        assert f"resume={path}" in error_of(capfd)


class Hostile:
    """What executes code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))
