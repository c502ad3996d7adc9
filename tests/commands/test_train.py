"""`train.py` as a user meets it: from the command line to the run folder, on a tiny model and real text."""

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded_streams import recorded
from safetensors.torch import load_file, save_file

from rsdyn.autoencoder.model import CompressingAutoencoder

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from rsdyn.commands import train  # noqa: E402
from rsdyn.config.command_line import load_config  # noqa: E402
from rsdyn.run.opening import find_source, make_stream  # noqa: E402
from rsdyn.run.run import Run  # noqa: E402
from rsdyn.stream.text.tokens import split  # noqa: E402
from rsdyn.tracking.session import finish  # noqa: E402

N = 64
FILES = ["config.yaml", "provenance.json", "summary.json", "results.npz", "checkpoints/best.ckpt"]
FIGURES = ["fig3a_shape", "fig3b_latent_trajectory", "fig3c_latent_distance", "fig3d_explained_variance", "loss"]


@pytest.fixture(scope="module")
def words(tiny_llama, tmp_path_factory):
    """The words every run here has in common: tiny model, little text, one cache."""
    cache = tmp_path_factory.mktemp("cache")
    return {
        "lm.name": str(tiny_llama), "data.limit": N, "data.l_max": 220, "cache.dir": str(cache),
        "cache.shard_sequences": 8, "cae.layers": 3, "trainer.max_epochs": 2, "data.batch_size": 64,
        "tracking.mode": "disabled",
        "trainer.accelerator": "cpu",
    }  # fmt: skip


def argv_of(words, **more):
    return [f"{k}={v}" for k, v in {**words, **more}.items()]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    monkeypatch.setenv("RSDYN_RUN_DIR", "")


@pytest.fixture(scope="module")
def runs(words, tmp_path_factory):
    """The same run twice, the first with an empty cache, the second at a terminal: (folder, output) of each.

    Secrets are planted in what both are given; the second finds neither key nor network and chooses W&B's mode itself.
    """
    out = []
    preset = tmp_path_factory.mktemp("preset") / "mine.yaml"
    preset.write_text(
        f"perturb: {{prompt: 'Authorization: Bearer {SECRETS[0]}', prompts: 'https://me:{SECRETS[1]}@h/x'}}"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB") and not k.endswith("_proxy")}
    environment |= {
        "HOME": str(tmp_path_factory.mktemp("home")),
        "MY_SERVICE_TOKEN": SECRETS[2],
        "HF_TOKEN": SECRETS[5],
    }
    for name, mode in (("first", "offline"), ("second", "auto")):
        folder = tmp_path_factory.mktemp("runs") / name
        more = {"run.dir": folder, "tracking.mode": mode, "run.name": f"{SECRETS[2]} {SECRETS[3]} {SECRETS[4]}"}
        command = [sys.executable, str(ROOT / "train.py"), "--config", str(preset), *argv_of(words, **more)]
        said = run_at_terminal(command, environment) if name == "second" else run_alone(command, environment)
        out.append((folder, said))
    return out


SECRETS = [
    "bearer-5f1c9e0a7b",  # in a config file
    "passw0rd-in-address",
    "correct-horse-battery",  # in the environment, and on the command line
    "hf_" + "AbCdEfGhIjKlMnOpQrSt",  # known by its shape
    "0123456789abcdef" * 2 + "01234567",  # a W&B key
    "hf-token-of-another-shape",  # in the environment alone
]


def run_alone(command, environment):
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_at_terminal(command, environment):
    """As a person starts it: stdin, stdout and stderr are a terminal, at which nobody answers."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    )
    os.close(slave)
    said = b""
    with contextlib.suppress(OSError):  # EIO when the last end of the terminal is closed
        while chunk := os.read(master, 65536):
            said += chunk
    os.close(master)
    assert process.wait(300) == 0, said.decode()
    return said.decode().replace("\r\n", "\n")


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


# -- the default way ---------------------------------------------------------------------------------------------------


def test_the_run_folder_is_complete(runs):
    folder, _ = runs[0]
    for file in [*FILES, *(f"figures/{name}.{kind}" for name in FIGURES for kind in ("png", "pdf"))]:
        assert (folder / file).stat().st_size > 0
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["seed"] == 0
    assert len(provenance["caches"]["original"]["cache_key"]) == 32
    assert provenance["versions"]["torch"] == torch.__version__


def test_no_secret_is_in_the_run_folder_or_in_what_was_printed(runs):
    for folder, said in runs:
        files = [p for p in folder.rglob("*") if p.is_file()]
        assert len(files) > 10 and any("wandb" in p.parts for p in files)
        for secret in SECRETS:
            assert secret not in said
            assert [p for p in files if secret.encode() in p.read_bytes() or secret in p.name] == []


def test_at_a_terminal_without_key_or_network_nothing_is_asked(runs):
    said = runs[1][1]
    assert "W&B: offline (no API key)" in said
    assert "wandb:" not in said and "paste" not in said.lower()
    summary = summary_of(runs[1][0])
    # the start: all but the fit; imports, folder, W&B, model, text, figures. It takes 4 s, a prompt would take for ever
    assert summary["seconds"]["total"] - summary["seconds"]["fit"] < 60


def test_the_closing_table_is_the_summary(runs):
    folder, output = runs[0]
    summary = summary_of(folder)
    assert f"{summary['test']['test_mse']:.5g}" in output
    assert f"{summary['test']['r2_cae_raw']:.4f}" in output
    assert f"{summary['test']['r2_pca_raw']:.4f}" in output
    n = len(summary["test"]["massive_units"])
    assert (f"without the {n} massive unit" in output) == (n > 0)
    assert str(folder) in output
    assert "Warning" not in output or summary["test"]["collapsed"]


def test_the_second_run_reads_the_cache_and_gives_the_same_numbers(runs):
    (first, said), (second, said_again) = runs
    assert f"{N} of {N} sequences to record" in said
    assert "the LM is not loaded" in said_again
    a, b = summary_of(first), summary_of(second)
    assert a["sequences_recorded"] == N
    assert b["sequences_recorded"] == 0
    assert not b["lm_loaded"]
    for key in ("test", "history", "explained_variance", "explained_variance_pca2", "latent_distance"):
        assert a[key] == b[key]


def test_results_are_what_the_checkpoint_computes(runs, words):
    """Rebuilt without a Trainer, the saved autoencoder gives the saved latents and the reported explained variance."""
    folder, _ = runs[0]
    results = np.load(folder / "results.npz")
    model = CompressingAutoencoder.from_checkpoint(folder / "checkpoints" / "best.ckpt")
    assert results["widths"].tolist() == model.widths
    activations = recorded(words["cache.dir"])
    assert len(activations) == N
    test = activations[results["latent_sample_sequences"]].float()
    with torch.no_grad():
        latents = model.encode(test)
        reconstruction = model.decode(latents)
    np.testing.assert_allclose(results["latent_samples"], latents, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(results["mean_latents"], latents.double().mean(0), rtol=1e-4, atol=1e-5)
    distance = (latents[:, 1:] - latents[:, :-1]).norm(dim=-1).mean(0)
    np.testing.assert_allclose(results["latent_distance"], distance, rtol=1e-4)
    summary = summary_of(folder)
    mse = float((test - reconstruction).double().square().mean())
    assert summary["test"]["test_mse"] == pytest.approx(mse, rel=1e-5)
    from sklearn.metrics import r2_score

    constant = bool((test[:, 0] == test[0, 0]).all())  # as where every last token is a full stop: nothing to explain
    assert (summary["explained_variance_raw"][0] is None) == constant
    for s in (1, 3, 5):
        expected = r2_score(test[:, s].numpy(), reconstruction[:, s].numpy(), multioutput="variance_weighted")
        assert summary["explained_variance_raw"][s] == pytest.approx(expected, abs=1e-4)


def test_pca_beside_it_is_sklearns(runs, words):
    from sklearn.decomposition import PCA

    from rsdyn.stream.text.tokens import split

    folder, _ = runs[0]
    parts = split(N, val_size=0.1, test_size=0.15, seed=0)
    x = recorded(words["cache.dir"]).double().numpy()
    pca = PCA(2, svd_solver="full").fit(x[parts["train"]].reshape(-1, x.shape[-1]))
    test = x[parts["test"]].reshape(-1, x.shape[-1])
    error = (pca.inverse_transform(pca.transform(test)) - test) ** 2
    summary = summary_of(folder)
    assert summary["test"]["test_mse_pca"] == pytest.approx(error.mean(), rel=1e-5)
    assert summary["test"]["r2_pca_raw"] == pytest.approx(1 - error.mean() / test.var(0).mean(), abs=1e-5)


def test_checkpoint_holds_the_autoencoder_and_nothing_of_the_lm(runs):
    content = torch.load(runs[0][0] / "checkpoints" / "best.ckpt", weights_only=True)
    assert all(k.startswith("autoencoder.") for k in content["state_dict"])
    n_parameters = summary_of(runs[0][0])["n_parameters"]
    n_buffers = sum(content["state_dict"][f"autoencoder.{b}"].numel() for b in ("mean", "scale"))
    assert sum(t.numel() for t in content["state_dict"].values()) == n_parameters + n_buffers
    optimiser = sum(t.numel() for s in content["optimizer_states"][0]["state"].values() for t in s.values() if t.ndim)
    assert optimiser == 2 * n_parameters


def test_wandb_shows_losses_curves_images_and_summary(runs):
    """What a dashboard would show, read back from the offline run by W&B's own reader."""
    folder, _ = runs[0]
    run = next((folder / "wandb").glob("offline-run-*"))
    wandb = Path(sys.executable).with_name("wandb")

    def read(*words):
        command = [wandb, "leet", "inspect", *words, "--json", run]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    rows = [json.loads(line) for line in read().splitlines() if line.strip()]
    text = json.dumps(rows)
    for name in ("train/loss", "val/loss", "depth/explained_variance/pca", "depth/latent_distance/autoencoder"):
        assert name in text
    for name in FIGURES:
        assert f"figures/{name}" in text
    summary = json.loads(read("--summary"))
    assert summary["summary"]["test/r2_cae"] == pytest.approx(summary_of(folder)["test"]["r2_cae"])
    assert summary["config"]["cae"]["layers"] == 3


# -- options and mistakes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_run(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    assert train.main(argv_of(words, **{"run.dir": folder})) == 0
    return summary_of(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"cae.lr": 1e-2}, {"cae.bottleneck": 3}, {"cae.layers": 4}, {"cae.count": "maps"}, {"cae.standardise": "none"},
        {"cae.standardise": "unit_sublayer"}, {"cae.bias_init": "mean"}, {"cae.warmup_steps": 10},
        {"data.batch_by": "sequence"}, {"data.batch_size": 32}, {"data.condition": "shuffled"}, {"data.l_min": 120},
        {"data.limit": 40}, {"data.val_size": 0.3}, {"data.test_size": 20}, {"data.shuffle_shards": 1}, {"seed": 1},
        {"trainer.max_epochs": 1}, {"trainer.precision": "bf16-mixed"}, {"trainer.precision": "64-true"},
        {"trainer.precision": "bf16-true"}, {"trainer.options.gradient_clip_val": 1e-3},
        {"lm.dtype": "bfloat16"}, {"cache.dtype": "float32"},
    ],
    ids=str,
)  # fmt: skip
def test_every_option_changes_something(words, plain_run, tmp_path, change):
    if "data.batch_by" in change:
        change = {**change, "data.batch_size": 1}
    assert train.main(argv_of(words, **change, **{"run.dir": tmp_path / "run"})) == 0
    found = summary_of(tmp_path / "run")
    assert found["test"] != plain_run["test"] or found["history"] != plain_run["history"]


@pytest.mark.parametrize("schedule", ["plateau", "constant"])
def test_the_rate_falls_by_the_factor_asked_for_or_stays(words, tmp_path, schedule):
    more = {
        "cae.lr": 0.3, "cae.warmup_steps": 0, "cae.schedule": schedule, "cae.plateau_factor": 0.1,
        "cae.plateau_patience": 0, "trainer.max_epochs": 6, "run.dir": tmp_path / "run",
    }  # fmt: skip
    assert train.main(argv_of(words, **more)) == 0
    history = summary_of(tmp_path / "run")["history"]
    losses, rates = ([value for _, value in history[key]] for key in ("val", "lr"))
    steps = {round(a / b) for a, b in pairwise([0.3, *rates])}
    assert steps == ({1} if schedule == "constant" else {1, 10})
    if schedule == "plateau":
        worse = [loss >= 0.9999 * min(losses[:i], default=float("inf")) for i, loss in enumerate(losses)]
        assert worse == [round(a / b) == 10 for a, b in pairwise([0.3, *rates])]


@pytest.mark.parametrize(("layers", "last"), [("null", 8), ("paper", 5), (5, 4)])
def test_widths_that_starve_the_latents_are_warned_of(words, tmp_path, capsys, layers, last):
    assert train.main(argv_of(words, **{"cae.layers": layers, "run.dir": tmp_path / "run"})) == 0
    said, summary = capsys.readouterr().out, summary_of(tmp_path / "run")
    assert summary["widths"][-2] == last
    warned = f"the narrowest inner layer has {last} units, and latents behind fewer than 6" in said
    assert warned == ("Lower cae.layers to" in said) == (last < 6)


def test_a_collapse_is_told_in_words(words, tmp_path, capsys, monkeypatch):
    """Of an autoencoder whose two latents are the same: in the table, the summary and on the page."""
    from rsdyn.autoencoder.training import LitAutoencoder

    def flatten(module):
        last = module.autoencoder.encoder[-1]
        last.weight.data[1], last.bias.data[1] = last.weight[0], last.bias[0]
        real(module)

    real = LitAutoencoder.on_test_start
    monkeypatch.setattr(LitAutoencoder, "on_test_start", flatten)
    assert train.main(argv_of(words, **{"run.dir": tmp_path / "run"})) == 0
    said, test = capsys.readouterr().out, summary_of(tmp_path / "run")["test"]
    reason = "its latents lie on a line (they fill 1.000 of 2 dimensions)"
    assert test["collapsed"] and reason in test["collapse"]
    assert test["latent_participation"] == pytest.approx(1, abs=1e-5)
    assert f"Warning:     the autoencoder collapsed: {reason}" in said and "             Try cae." in said
    assert f"The autoencoder collapsed: {reason}" in (tmp_path / "run" / "report.html").read_text()


def test_a_three_dimensional_bottleneck_is_compared_with_three_components(words, tmp_path):
    assert train.main(argv_of(words, **{"cae.bottleneck": 3, "run.dir": tmp_path / "run"})) == 0
    assert np.load(tmp_path / "run" / "results.npz")["mean_latents"].shape == (6, 3)
    assert summary_of(tmp_path / "run")["widths"][-1] == 3


def test_without_a_cache_the_numbers_are_the_same(words, plain_run, tmp_path):
    assert train.main(argv_of(words, **{"cache.enabled": "false", "run.dir": tmp_path / "run"})) == 0
    found = summary_of(tmp_path / "run")
    assert found["test"] == plain_run["test"]
    assert found["sequences_recorded"] > N  # it went through the LM in each epoch


def test_early_stopping_keeps_the_best(words, tmp_path):
    more = {
        "cae.lr": 0.3,
        "cae.warmup_steps": 0,
        "trainer.max_epochs": 40,
        "trainer.patience": 2,
        "run.dir": tmp_path / "run",
    }
    assert train.main(argv_of(words, **more)) == 0
    summary = summary_of(tmp_path / "run")
    losses = dict(summary["history"]["val"])
    assert summary["stopped_early"]
    assert summary["best_epoch"] == min(losses, key=losses.get)
    assert summary["epochs"] == summary["best_epoch"] + 2
    assert summary["best_val_loss"] == pytest.approx(min(losses.values()), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cae.bottelneck": 3}, ["cae.bottelneck", "cae.bottleneck"]),
        ({"cae.lr": "fast"}, ["cae.lr", "fast", "number"]),
        ({"trainer.max_epochs": -1}, ["trainer.max_epochs", "-1", ">= 1"]),
        ({"data.path": "no/such/file.txt"}, ["data.path=no/such/file.txt"]),
        ({"data.l_min": 0, "data.l_max": 2}, ["data.l_min=0", "data.l_max=2"]),
        ({"data.limit": 1}, ["data.limit", "1"]),
        ({"data.test_size": 60}, ["data.test_size", "60"]),
        ({"cae.bottleneck": 32}, ["cae.bottleneck=32", "32"]),
        ({"cae.layers": 1}, ["cae.layers=1", ">= 2"]),
        ({"lm.name": "/no/such/folder"}, ["lm.name=/no/such/folder", "no such folder"]),
        ({"data.l_max": 5000, "data.limit": "null", "data.l_min": 900}, ["data.truncate=true", "256"]),
        ({"run.dir": "/proc/version/run"}, ["run.dir=/proc/version/run"]),
        ({"cache.dir": "/proc/version/cache"}, ["cache.dir=/proc/version/cache", "cannot write"]),
        ({"trainer.options.gradient_clip": 1}, ["trainer.options.gradient_clip", "trainer.options.gradient_clip_val"]),
        ({"trainer.options.limit_train_batches": -1}, ["limit_train_batches"]),
        ({"trainer.accelerator": "cuda"}, ["accelerator=cuda"]),
        ({"tracking.mode": "online"}, ["tracking.mode=online", "WANDB_API_KEY"]),
        ({"tracking.mode": "offline", "trainer.options.gradient_clip": 1}, ["trainer.options.gradient_clip_val"]),
        ({"tracking.mode": "offline", "trainer.accelerator": "cuda"}, ["accelerator=cuda"]),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_mistake_is_one_message(words, tmp_path, capfd, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train.main(argv_of({**words, "run.dir": tmp_path / "run"}, **change)) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    message = next(line for line in error.splitlines() if line.startswith("train.py: error: "))
    for word in said:
        assert word in message
    assert not (tmp_path / "run").exists()  # so the corrected command can have the folder


@pytest.mark.parametrize(("earlier", "kept"), [({}, False), ({"resumed": []}, True)])
def test_what_an_earlier_session_told_wandb_is_not_discarded(tmp_path, earlier, kept):
    run = Run("train", load_config([], "train"), tmp_path / "run", 0.0, provenance=earlier)
    (run.folder / "wandb" / "offline-run-1").mkdir(parents=True)
    (run.folder / "config.yaml").touch()
    run.discard_if_unused(2)
    assert run.folder.exists() == kept


def test_losses_that_wandb_was_given_are_not_discarded(tmp_path):
    run = Run("train", load_config(["tracking.mode=offline"], "train"), tmp_path / "run", 0.0)
    run.folder.mkdir()
    run.start_tracking(group="g", tags=[])
    run.logger.log_metrics({"train/loss": 1.0}, step=1)
    run.discard_if_unused(3)
    assert run.logger.variables is not None and list(run.folder.glob("wandb/offline-run-*"))
    finish(run.logger, 3)


def test_truncate_cuts_and_says_so(words, tmp_path, capsys):
    more = {
        "data.l_max": 5000,
        "data.l_min": 900,
        "data.limit": 30,
        "data.truncate": "true",
        "run.dir": tmp_path / "run",
    }
    assert train.main(argv_of(words, **more)) == 0
    assert re.search(r"30 sequences were cut", capsys.readouterr().out)


def test_hub_name_without_network(words, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("rsdyn.lm.source.hub_reachable", lambda: False)
    assert train.main(argv_of({**words, "lm.name": "nobody/nothing", "run.dir": tmp_path / "run"})) == 2
    assert "lm.name=nobody/nothing" in capfd.readouterr().err


def test_not_a_number_in_the_lm_stops_the_run(words, tmp_path, capfd):
    folder = shutil.copytree(words["lm.name"], tmp_path / "lm")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    more = {"lm.name": folder, "cache.dir": tmp_path / "cache", "run.dir": tmp_path / "run"}
    assert train.main(argv_of({**words, **more})) == 3
    error = capfd.readouterr().err
    assert "sublayer 4 (resid_pre of layer 2)" in error
    assert "Traceback" not in error
    assert list(tmp_path.glob("cache/*/shard-*")) == []


def test_a_loss_that_diverges_stops_the_run(words, tmp_path, capfd):
    assert train.main(argv_of({**words, "cae.lr": 1e30, "run.dir": tmp_path / "run"})) == 3
    assert "cae.lr" in capfd.readouterr().err
    assert not (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()


def test_help_and_print_config(capsys):
    for flag, word in (("--help", "cae.standardise"), ("--print-config", "standardise: unit")):
        with pytest.raises(SystemExit) as caught:
            sys.exit(train.main([flag]))
        assert not caught.value.code
        assert word in capsys.readouterr().out


# -- processes (signals are in test_signals.py) ------------------------------------------------------------------------


def test_two_processes_do_the_work_of_one(words, plain_run, tmp_path):
    """Each sequence is recorded and tested once; PCA, which does not depend on the training, is equal to 1e-6."""
    more = {"trainer.devices": 2, "cache.dir": tmp_path / "cache", "run.dir": tmp_path / "run"}
    command = [sys.executable, str(ROOT / "train.py"), *argv_of(words, **more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    found = summary_of(tmp_path / "run")
    assert found["processes"] == 2
    assert found["sequences_recorded"] == N
    assert found["test"]["n_test_sequences"] == plain_run["test"]["n_test_sequences"]
    for key in ("test_mse_pca", "r2_pca_raw"):
        assert found["test"][key] == pytest.approx(plain_run["test"][key], rel=1e-6)
    assert found["test"]["test_mse"] == pytest.approx(plain_run["test"]["test_mse"], rel=0.3)
    ours, theirs = (sorted(Path(d).glob("*/shard-*")) for d in (tmp_path / "cache", words["cache.dir"]))
    assert len(recorded(tmp_path / "cache")) == N
    by_name = {p.parent.name + p.name: p for p in theirs}
    for path in ours:
        assert path.read_bytes() == by_name[path.parent.name + path.name].read_bytes()


def test_drawn_tokens_are_trained_and_tested_on(words, tmp_path, capsys):
    options = {"data.positions": "{sample: 2}", "run.dir": tmp_path / "run", "analysis.on_train": "true",
               "analysis.measures": "[cosine,mutual_information]", "analysis.samples": 40}  # fmt: skip
    assert train.main(argv_of(words, **options)) == 0
    said = capsys.readouterr().out
    summary = summary_of(tmp_path / "run")
    assert summary["n_trajectories"] == {part: 2 * n for part, n in summary["n_sequences"].items()}
    assert summary["positions"] == {"sample": 2} and summary["sequences_recorded"] == N
    assert summary["test"]["n_test_sequences"] == summary["n_sequences"]["test"]
    assert f"2 tokens drawn of each sequence, {2 * N} trajectories of {N} sequences" in said
    with np.load(tmp_path / "run" / "results.npz") as file:
        assert len(file["latent_samples"]) == 2 * summary["n_sequences"]["test"]
        numbers = file["latent_sample_sequences"].tolist()
    # the mean over all test tokens, through the autoencoder of the checkpoint
    config = load_config(argv_of(words, **options), "train")
    run = Run("train", config, tmp_path, 0.0)
    stream = make_stream(run, find_source(run), "original")
    tested = split(N, val_size=config.data.val_size, test_size=config.data.test_size, seed=config.seed)["test"]
    assert numbers == sorted([*tested.tolist()] * 2)
    shards = [stream.shard(k) for k in range(stream.n_shards)]
    assert not stream.lm_loaded
    rows = torch.isin(torch.cat([s.index for s in shards]), torch.from_numpy(tested))
    x = torch.cat([s.activations for s in shards])[rows]
    module = CompressingAutoencoder.from_checkpoint(tmp_path / "run" / summary["checkpoint"]).eval()
    sublayer = torch.arange(x.shape[1]).expand(len(x), -1)
    with torch.no_grad():
        standardised = module.standardise(x.float(), sublayer)
        loss = (module(standardised)[1] - standardised).square().mean()
    assert summary["test"]["test_loss"] == pytest.approx(float(loss), rel=1e-4)
