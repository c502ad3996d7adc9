"""``rsdyn compare``: several models measured alike, resumed, with failures named, on one page and in one table."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from report_runs import altered
from tiny_models import tiny_lm

import rsdyn
from rsdyn.commands.compare import find_all, main, read_words
from rsdyn.dynamics.dynamical_similarity import dsa, linear_step
from rsdyn.report.compared import read_model
from rsdyn.run import comparing
from rsdyn.run.comparing import slug

ROOT = Path(__file__).parents[2]
QUICK = [
    "data.limit=40", "data.l_max=220", "tracking.mode=disabled",
    "analysis.measures=[correlation,cosine,rotation,similarity,curvature]",
    "analysis.rotation.nulls=[innovation_shuffle]", "analysis.rotation.surrogates=20", "analysis.untrained_seeds=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two checkpoints of one training and one without weights between them, and a wider, deeper model."""
    base = tmp_path_factory.mktemp("compared")
    for step, seed in ((0, 0), (64, 1)):
        (base / "training" / f"step-{step}").mkdir(parents=True)
        tiny_lm(base / "training" / f"step-{step}", seed=seed, layers=2)
    gap = base / "training" / "step-32"
    gap.mkdir()
    shutil.copy(base / "training" / "step-0" / "config.json", gap)
    (base / "wide").mkdir()
    tiny_lm(base / "wide", width=48, seed=2)
    return base


@pytest.fixture(scope="module")
def compared(models):
    """A comparison of all of them, and what it printed: made once, since each model takes seconds."""
    folder = models / "comparison"
    done = run(models, "training", "wide", f"run.dir={folder}")
    return folder, done


def run(where, *words, code=1, quick=QUICK):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "rsdyn", "compare", *words, *quick, f"cache.dir={where / 'cache'}"],
        cwd=where, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done


def written(folder):
    return json.loads((folder / "comparison.json").read_text())


def test_all_models_are_measured_and_the_one_without_weights_is_named(compared):
    folder, done = compared
    found = written(folder)
    labels = [model["label"] for model in found["models"]]
    assert labels[-1] == "training/step-32" and found["models"][-1]["status"] == "failed"
    assert found["models"][-1]["error"] == "it has no *.safetensors"
    assert labels[:-1] == ["training/step-0", "training/step-64", "training-untrained", "wide", "wide-untrained"]
    by_label = {model["label"]: model for model in found["models"]}
    assert by_label["wide"]["n_units"] == 48 and by_label["training/step-64"]["step"] == 64
    assert by_label["training-untrained"]["of"] == ["training/step-0", "training/step-64"]
    assert by_label["wide"]["bos"] == "<s>" and by_label["wide"]["n_sequences"] == 40
    rows = {row["key"]: row for row in found["rows"]}
    turns = rows["turns"]
    assert any("Depth" in reason for reason in turns["values"]["wide"]["not_comparable"])
    assert turns["values"]["training/step-64"]["not_comparable"] == []
    assert set(turns["values"]) == set(labels[:-1])
    assert "Failed:      training/step-32: it has no *.safetensors" in done.stdout
    assert [s["steps"] for s in found["series"]] == [[0, 64]]


def test_values_are_those_of_each_models_own_run(compared):
    folder, _ = compared
    found = written(folder)
    for model in found["models"]:
        if model["status"] == "failed":
            continue
        own = json.loads((Path(model["run"]) / "summary.json").read_text())
        for row in found["rows"]:
            mine = next((r["values"].get(model["condition"]) for r in own["findings"] if r["key"] == row["key"]), None)
            here = row["values"][model["label"]]
            assert here["value"] == (None if mine is None else mine["value"])
            assert mine is None or (here["low"], here["high"]) == (mine["low"], mine["high"])


def test_the_three_outputs_and_the_terminal_begin_with_the_answer(compared):
    folder, done = compared
    found = written(folder)
    first = found["answer"][0]
    assert first == "3 models on 40 sequences of embedded; 1 failed."
    page = (folder / "comparison.html").read_text()
    for output in (done.stdout, (folder / "comparison.md").read_text(), page):
        assert first in output and "wide" in output
    for warning in found["warnings"]:
        assert warning in done.stdout
    assert page.index(first) < page.index('id="findings"') < page.index('id="what"')
    pictures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert {"compare_correlation_trend", "depth_correlation_mean", "training_0_correlation_trend"} <= pictures
    assert {"depth_curvature_angle", "depth_similarity_adjacent", "similarity_between_models"} <= pictures


def test_models_of_other_widths_and_depths_are_compared_state_by_state(compared):
    """Every pair of models and twins, on all the texts; a random model of another shape is like none of them."""
    folder, _ = compared
    found = written(folder)
    labels = [model["label"] for model in found["models"] if model["status"] == "finished"]
    pairs = {tuple(pair["models"]): pair for pair in found["similarity"]}
    assert len(pairs) == len(labels) * (len(labels) - 1) // 2 and found["not_similar"] == []
    pair = pairs["training/step-0", "wide"]
    assert pair["n_sequences"] == 40 and (len(pair["map"]), len(pair["map"][0])) == (4, 6)
    assert pair["curve"]["depth"] == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=1e-4)
    assert pair["curve"]["value"][3] == pair["map"][3][5]
    assert -0.2 < pair["floor"] < 0.5 and pair["same_depth"]["low"] < pair["same_depth"]["value"]
    for row in json.loads((Path(found["models"][0]["run"]) / "summary.json").read_text())["findings"]:
        assert "grams" not in row["key"]


def test_how_models_move_over_depth_is_compared_from_the_command_line(tmp_path):
    """A model, a copy of it in another folder, and another one; distances are those of the states that runs keep."""
    pytest.importorskip("DSA", reason="dsa-metric is not installed: pip install -e '.[dsa]'")
    for name, seed in (("one", 3), ("other", 4)):
        tiny_lm(tmp_path / name, layers=7, seed=seed)
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    words = ["analysis.measures=[dsa]", "analysis.conditions=original", "data.limit=44", "data.l_max=220"]
    done = run(tmp_path, "one", "copy", "other", *words, "tracking.mode=disabled", "run.dir=run", code=0, quick=())
    assert "Comparing how the models move over depth" in done.stdout
    found = written(tmp_path / "run")
    pairs = {tuple(pair["models"]): pair for pair in found["dynamics"]["pairs"]}
    assert set(pairs) == {("one", "copy"), ("one", "other"), ("copy", "other")} and not found["no_dynamics"]
    states = {}
    for name in ("one", "copy", "other"):
        with np.load(tmp_path / "run" / "models" / name / "results.npz") as file:
            states[name] = torch.from_numpy(file["original/dsa/states/states"]).double()
    assert states["one"].shape[:2] == (44, 6) and torch.equal(states["one"], states["copy"])
    for names, pair in pairs.items():
        expected = dsa(*(linear_step(states[name]) for name in names))
        assert pair["distance"] == pytest.approx(expected, abs=1e-4), names
    same, apart = pairs["one", "copy"], pairs["one", "other"]
    assert same["distance"] < 0.01 < 0.05 < apart["distance"] and same["told_apart"] is False
    assert 'id="dynamics"' in (tmp_path / "run" / "comparison.html").read_text()
    assert "## Dynamics of the models over depth" in (tmp_path / "run" / "comparison.md").read_text()
    assert any(path.stem.startswith("dynamics") for path in (tmp_path / "run" / "figures").glob("*.png"))


def test_what_is_finished_is_not_run_again(compared, models):
    folder, _ = compared
    before = {path: path.stat().st_mtime_ns for path in folder.glob("models/*/summary.json")}
    table = written(folder)
    done = run(models, "training", "wide", f"run.dir={folder}")
    assert done.stdout.count("finished already") == 3 and "analyze, into" not in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("models/*/summary.json")}
    assert written(folder)["rows"] == table["rows"]


def test_other_settings_in_the_same_folder_are_refused(compared, models):
    folder, _ = compared
    done = run(models, "training", "wide", "seed=1", f"run.dir={folder}", code=2)
    assert "measured with other settings: seed is 0 there and 1 here" in done.stderr
    assert "Traceback" not in done.stderr


def test_weights_that_changed_since_are_refused(compared, models, tmp_path):
    folder, _ = compared
    copied = tmp_path / "comparison"
    shutil.copytree(folder, copied)
    other = tmp_path / "wide"
    other.mkdir()
    tiny_lm(other, width=48, seed=9)
    done = run(tmp_path, str(other), f"run.dir={copied}", f"cache.dir={models / 'cache'}", code=2)
    assert re.search(r"holds wide measured with other settings: .*its weights were xxh3 \w+ there", done.stderr)


def test_finished_runs_are_compared_without_running_anything(compared, tmp_path, capsys):
    folder, _ = compared
    runs = [str(folder / "models" / slug(label)) for label in ("training/step-64", "wide")]
    assert main([*runs, f"run.dir={tmp_path / 'again'}"]) == 0
    found = written(tmp_path / "again")
    here = {row["key"]: row["values"] for row in found["rows"]}
    there = {row["key"]: row["values"] for row in written(folder)["rows"]}
    wide = Path(runs[1]).name
    assert here["turns"][wide]["value"] == there["turns"]["wide"]["value"]
    assert "finished already" in capsys.readouterr().out


# -- runs of other versions and layouts, and what is broken ------------------------------------------------------------


@pytest.fixture
def runs(compared):
    folder, _ = compared
    return {label: folder / "models" / slug(label) for label in ("training/step-0", "training/step-64", "wide")}


def test_a_run_of_the_first_layout_is_compared_and_its_version_is_said(runs, tmp_path, capsys):
    def older(summary):
        del summary["layout"]
        for row in summary["findings"]:
            del row["detail"]
            for value in row["values"].values():
                del value["unit"], value["note"]

    def first(provenance):
        provenance["rsdyn"] = "0.1.0"
        del provenance["tokenizer"], provenance["bos"]

    def flat(arrays):
        names = {"correlation/mean": "r_mean", "cosine/mean": "cosine"}
        found = {}
        for key, value in arrays.items():
            for new, old in names.items():
                if key.endswith(f"/{new}") or key.endswith(f"/{new}/interval"):
                    found[key.replace(new, old).replace(f"{old}/interval", f"{old}_interval")] = value
        return found

    old = altered(runs["training/step-0"], tmp_path / "old", summary=older, provenance=first, arrays=flat)
    new = read_model(runs["training/step-0"])
    assert read_model(old).findings[0].values["original"].value == new.findings[0].values["original"].value
    for name in ("correlation/mean", "cosine/mean"):
        for part in ("at", "values", "low", "high"):
            ours, theirs = (getattr(m.curves["original"][name], part) for m in (read_model(old), new))
            np.testing.assert_allclose(ours, theirs)
    assert main([str(runs["wide"]), str(old), f"run.dir={tmp_path / 'both'}"]) == 0
    assert f"Version of rsdyn differs: {rsdyn.__version__}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("unfinished", lambda run: (run / "summary.json").unlink(), "is not finished"),
        ("no json", lambda run: (run / "summary.json").write_text("{"), "cannot be read"),
        ("no findings", lambda run: edit(run, "summary.json", findings=[]), "nothing that has findings"),
        ("no keys", lambda run: edit(run, "summary.json", findings=[{"claim": "x"}]), "it has no 'key'"),
        ("newer", lambda run: edit(run, "provenance.json", rsdyn="99.0"), "update rsdyn"),
        ("other script", lambda run: edit(run, "provenance.json", script="train"), "only analyze can be compared"),
        ("no arrays", lambda run: (run / "results.npz").write_bytes(b"PK"), "results.npz cannot be read"),
    ],
)
def test_a_finished_and_a_broken_run_are_one_compared_and_one_named(name, change, said, runs, tmp_path, capsys):
    broken = altered(runs["wide"], tmp_path / "broken")
    change(broken)
    assert main([str(runs["training/step-0"]), str(broken), f"run.dir={tmp_path / 'out'}"]) == 1
    out, err = capsys.readouterr()
    assert f"Failed:      broken: {broken}" in out and said in out and "Traceback" not in out + err
    assert written(tmp_path / "out")["models"][-1]["status"] == "failed"


def edit(run, name, **changed):
    found = json.loads((run / name).read_text()) | changed
    (run / name).write_text(json.dumps(found))


def test_runs_of_another_n_filter_position_or_bos_are_warned_of(runs, tmp_path, capsys):
    def other(summary):
        summary |= {"n_sequences": 30, "n_trajectories": 30, "positions": "all"}

    run = altered(runs["training/step-0"], tmp_path / "other", summary=other,
                  provenance=lambda made: made | {"bos": "nothing (lm.bos=none)"})  # fmt: skip
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("l_max: 220", "l_max: 300").replace("bos: auto", "bos: none"))
    assert main([str(runs["training/step-0"]), str(run), f"run.dir={tmp_path / 'out'}"]) == 0
    warned = " ".join(written(tmp_path / "out")["warnings"])
    for words in ("N differs", "Filter differs", "Positions differ", "What opens a sequence (BOS) differs"):
        assert words in warned
    assert all(value["not_comparable"] for row in written(tmp_path / "out")["rows"]
               for label, value in row["values"].items() if label.startswith("other"))  # fmt: skip


# -- the command line --------------------------------------------------------------------------------------------------


def test_words_are_sorted_and_shared_settings_have_compares_defaults():
    asked = read_words(["embedded", "org/model", "revision=[step0, step512]", "seed=3", "run.dir=x", "resume=never"])
    assert asked.models == ["embedded", "org/model"] and asked.revisions == ["step0", "step512"]
    assert asked.directory == "x" and not asked.resume and asked.words == ["seed=3"]
    entries, words, _ = find_all(asked)
    assert [e.label for e in entries] == ["embedded", "org/model@step0", "org/model@step512"]
    assert words[:2] == ["seed=3", "analysis.conditions=[original,untrained]"]
    assert words[2].startswith("analysis.measures=[activations,") and words[2].endswith(",pca,similarity]")
    given = ["embedded", "analysis.conditions=[original]", "analysis.measures=[cosine]"]
    assert find_all(read_words(given))[1] == given[1:]


def test_by_default_what_is_there_is_compared():
    entries, words, _ = find_all(read_words([]))
    assert entries[0].label == "embedded" and "analysis.samples=400" in words
    shipped = [entry for entry in entries if entry.series]
    assert len(shipped) == 6 and [e.step for e in shipped] == sorted(e.step for e in shipped)
    assert "analysis.samples=50" in find_all(read_words(["analysis.samples=50"]))[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["/nowhere/x"], "no such folder"),
        (["--what"], "there is no such flag"),
        (["lm.name=gpt2"], "words of their own"),
        (["revision=[a]"], "revision= needs the model"),
        (["embedded", "resume=x"], "resume=x is not allowed"),
        (["embedded", "data.limt=3"], "Did you mean data.limit"),
        (["embedded", "seed=x"], "seed=x"),
        (["embedded", "cae.lr=1"], "would change nothing"),
        (["embedded", "--config", "nope"], "no preset has this name"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_runs(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("rsdyn compare: error: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["embedded", f"run.dir={tmp_path}"]) == 2
    assert "is no comparison" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1


def test_help_is_quick_and_the_front_door_knows_it(capsys):
    assert main(["--help"]) == 0
    assert "usage: rsdyn compare" in capsys.readouterr().out
    from rsdyn.__main__ import PROGRAMS

    assert PROGRAMS["compare"] == "rsdyn.commands.compare"


def test_the_list_that_is_printed_is_read_back(capsys, tmp_path):
    words = ["embedded", "org/model@step5", "seed=3", "data.limit=50"]
    assert main([*words, "--print-config"]) == 0
    path = tmp_path / "list.yaml"
    path.write_text(capsys.readouterr().out)
    assert find_all(read_words([str(path)]))[:2] == find_all(read_words(words))[:2]


# -- running -----------------------------------------------------------------------------------------------------------


def pretend(monkeypatch, program):
    """Run a program of Python in the place of analyze: it is given the words of the command line."""
    popen = subprocess.Popen

    def started(command, **options):
        return popen([sys.executable, "-c", program, *command[4:]], **options)

    monkeypatch.setattr(comparing.subprocess, "Popen", started)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; sys.exit('analyze.py: error: lm.name=x: it is gated')", "lm.name=x: it is gated"),
        ("import os; os.kill(os.getpid(), 9)", "it was killed (SIGKILL) (out of memory?)"),
        ("raise ValueError('a bug')", "it ended with code 1: ValueError: a bug"),
        ("e = ValueError('a bug'); e.add_note('256 are kept'); raise e", "it ended with code 1: ValueError: a bug"),
        ("", "is no run folder of rsdyn"),
    ],
)
def test_why_a_run_failed_is_told_and_the_next_one_runs(program, said, monkeypatch, tmp_path, capsys):
    pretend(monkeypatch, program)
    folder = tmp_path / "out"
    assert main(["org/a", "org/b", f"run.dir={folder}"]) == 1
    out = capsys.readouterr().out
    assert out.count(f"failed: {said}") + out.count(f"{said}: it has") >= 2 or out.count(said) >= 2
    assert [m["status"] for m in written(folder)["models"]] == ["failed", "failed"]
    assert "Nothing was measured" in written(folder)["answer"][0]


def test_a_failed_comparison_is_found_again_and_a_finished_one_is_not(runs, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    pretend(monkeypatch, "raise SystemExit('analyze.py: error: no')")
    for _ in range(2):
        assert main(["org/a"]) == 1
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert main(["org/a", "resume=never"]) == 1
    assert len(list((tmp_path / "runs").iterdir())) == 2
    for n in (3, 4):
        assert main([str(runs["wide"])]) == 0
        assert len(list((tmp_path / "runs").iterdir())) == n
    capsys.readouterr()


def test_what_a_killed_run_left_is_cleared(monkeypatch, tmp_path, capsys):
    pretend(monkeypatch, "raise SystemExit('analyze.py: error: no')")
    folder = tmp_path / "out"
    assert main(["org/a", f"run.dir={folder}"]) == 1
    left = folder / "models" / slug("org/a")
    left.mkdir(parents=True)
    (left / "config.yaml").write_text("half: ")
    assert main(["org/a", f"run.dir={folder}"]) == 1
    assert not left.exists()
    capsys.readouterr()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_comparison_says_that_it_resumes_and_ends_its_run(signum, code, tmp_path):
    program = (
        "import signal, sys, subprocess, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's & lets its programs ignore it
        "from rsdyn.run import comparing\n"
        "from rsdyn.commands.compare import main\n"
        "popen = subprocess.Popen\n"
        "def start(command, **options):\n"
        "    process = popen([sys.executable, '-c', 'import time; time.sleep(600)'], **options)\n"
        "    print('started', process.pid, flush=True)\n"
        "    return process\n"
        "comparing.subprocess.Popen = start\n"
        f"sys.exit(main(['org/a', 'run.dir={tmp_path / 'out'}']))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    line = ""
    while not line.startswith("started"):
        line = process.stdout.readline()
        assert line, process.stderr.read()
    time.sleep(0.3)
    process.send_signal(signum)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code and "the same command resumes" in said and "Traceback" not in said
    with pytest.raises(ProcessLookupError):
        os.kill(int(line.split()[1]), 0)


def test_labels_are_harmless_names_of_folders():
    assert slug("embedded") == "embedded"
    assert slug("a/step-0") != slug("a-step-0") and "/" not in slug("a/step-0")
    assert slug("../..") not in ("", ".", "..") and slug("ü") and len(slug("x" * 500)) < 120


def test_a_comparison_that_is_still_going_is_not_joined(tmp_path, capsys, monkeypatch):
    pretend(monkeypatch, "raise SystemExit('analyze.py: error: no')")
    folder = tmp_path / "out"
    assert main(["org/a", f"run.dir={folder}"]) == 1
    held = comparing.hold(folder)
    try:
        assert main(["org/a", f"run.dir={folder}"]) == 2
        assert "still going" in capsys.readouterr().err
    finally:
        held.lock.release()
