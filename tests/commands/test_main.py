"""``python -m rsdyn``: what there is and where it lies, without torch, whatever else lies there."""

import gc
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cache_entries import new_cache, shard_of

import rsdyn
import rsdyn.commands.analyze
from rsdyn import commands
from rsdyn.__main__ import SCRIPTS, cache_dir, find_runs, main
from rsdyn.config.command_line import preset_names
from rsdyn.stream.cache import default_cache_dir
from rsdyn.stream.cache.__main__ import main as cache_tool

ROOT = Path(__file__).parents[2]


def run_folder(root, name, script="train", started="2026-01-01T10:00:00+00:00", *, finished=True):
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "provenance.json").write_text(json.dumps({"script": script, "started": started}))
    if finished:
        (folder / "summary.json").write_text("{}")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty machine: a folder to stand in, and a home without a cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for variable in ("RSDYN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def said(capsys, *words):
    assert main(list(words)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_everything_that_there_is(here, capsys):
    out = said(capsys)
    assert out.startswith(f"rsdyn {rsdyn.__version__}\n")
    entries = re.findall(r"^  (\S+) {2,}\S", out, re.MULTILINE)
    assert entries == [f"{name}.py" for name in SCRIPTS] + preset_names()
    assert {path.stem for path in ROOT.glob("*.py")} == set(SCRIPTS)
    for command in ("rsdyn.report", "rsdyn.stream.cache", "rsdyn.tracking.workspace"):
        assert f"python -m {command} " in out
        assert importlib.util.find_spec(command)
    assert "wandb sweep configs/sweep-cae.yaml" in out
    assert all(len(line) <= 120 for line in out.splitlines() if str(here) not in line)


def test_each_thing_is_said_in_the_words_of_its_own_file(here, capsys):
    words = " ".join(said(capsys).split())
    for path in [ROOT / f"{name}.py" for name in SCRIPTS]:
        assert f"{path.name} {path.read_text().splitlines()[0].strip(chr(34))}" in words
    assert "gpt2 GPT-2, the smallest unless another is named, on the embedded text. " in words


def test_an_empty_machine_stays_empty(here, capsys):
    out = said(capsys)
    assert f"Runs: none yet in {here / 'runs'} (run.dir" in out
    assert f"Cache: none yet in {here / 'home' / '.cache' / 'rsdyn'} (cache.dir" in out
    assert list(here.iterdir()) == []


def test_runs_are_counted_by_script_and_the_newest_is_named(here, capsys):
    runs = here / "runs"
    for i in range(3):
        run_folder(runs, f"a{i}", "train", f"2026-03-0{i + 1}T00:00:00+00:00")
    run_folder(runs, "b", "analyze", "2026-03-09T00:00:00+00:00", finished=False)
    out = said(capsys)
    assert f"Runs: 4 in {runs}: 3 of train.py, 1 of analyze.py; 1 not finished\n" in out
    assert "the newest is b, not finished\n" in out
    run_folder(runs, "c", "perturb", "2026-03-10T00:00:00+00:00")
    assert "the newest is c\n" in said(capsys)


def test_what_is_not_ours_is_passed_over(here, capsys):
    runs = here / "runs"
    run_folder(runs, "ours")
    run_folder(runs, "a script of somebody", "their_train")
    for i, text in enumerate(
        ["", "{", "[]", "null", '{"script": ["train"]}', '{"script": {}}', "\ufeff\u2028", "[" * 10**5]
    ):
        folder = runs / f"broken{i}"
        folder.mkdir()
        (folder / "provenance.json").write_text(text)
    (runs / "binary").mkdir()
    (runs / "binary" / "provenance.json").write_bytes(b"\xff\xfe\x00")
    large = run_folder(runs, "large")
    (large / "provenance.json").write_text(json.dumps({"script": "train", "x": "y" * (1 << 22)}))
    os.mkfifo(run_folder(runs, "waits") / "fifo")
    (runs / "waits" / "provenance.json").unlink()
    os.rename(runs / "waits" / "fifo", runs / "waits" / "provenance.json")
    (runs / "link").symlink_to(runs / "ours")
    (runs / "loop").symlink_to(runs / "loop")
    (runs / "file").write_text("x")
    (runs / "nothing in it").mkdir()
    assert [run.folder.name for run in find_runs(runs)] == ["ours"]
    assert "Runs: 1 in" in said(capsys)
    shutil.rmtree(runs)
    runs.write_text("a file")
    assert "Runs: none yet" in said(capsys)


def test_a_name_that_no_terminal_can_print(here, capsys):
    folder = run_folder(here / "runs", "x")
    os.rename(os.fsencode(folder), os.fsencode(here / "runs") + b"/\xff\x1b[31m")
    assert "the newest is ??[31m\n" in said(capsys)


def test_the_cache_is_as_large_as_the_cache_tool_says(here, capsys, monkeypatch):
    root = here / "streams"
    monkeypatch.setenv("RSDYN_CACHE", str(root))
    for fields in ({}, {"lm": "other"}):
        cache = new_cache(root, fields)
        cache.open()
        for k in range(3):
            cache.write(k, shard_of(cache, k))
        cache.add_to_manifest("note", "x" * 200_000)
    (root / "not ours").mkdir()
    (root / "not ours" / "shard-00000.safetensors").write_bytes(b"x" * 10**6)
    (root / "not ours" / "manifest.json").write_text("{}")
    out = said(capsys)
    assert cache_tool(["list"]) == 0
    size = re.search(r"2 folders, 2 corpora, (\S+ MiB) in ", capsys.readouterr().out)[1]
    assert f"Cache: 2 recorded streams, {size}, in {root}\n" in out


@pytest.mark.parametrize(
    "variables", [{}, {"RSDYN_CACHE": "~/x"}, {"XDG_CACHE_HOME": "/tmp/y"}, {"RSDYN_CACHE": "z", "XDG_CACHE_HOME": "y"}]
)
def test_the_folder_of_the_cache_is_the_scripts_own(here, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == default_cache_dir()


def test_help_version_and_a_word_too_many(capsys):
    for words, expected in ((["--help"], "Presets ("), (["--version"], f"rsdyn {rsdyn.__version__}\n")):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 0
        assert expected in capsys.readouterr().out
    assert main(["trian"]) == 2
    assert "trian: no such program. Did you mean train?" in capsys.readouterr().err


def test_a_program_gets_the_words_behind_its_name(capsys):
    assert main(["train", "cae.lrr=1"]) == 2
    assert "cae.lr" in capsys.readouterr().err
    assert main(["cache", "list", "--dir", "/nowhere"]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_it_is_quick_and_needs_nothing_heavy(here):
    code = (
        "import runpy, sys, time; sys.argv = ['rsdyn']\n"
        "try: runpy.run_module('rsdyn', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(*sys.modules, file=sys.stderr); assert time.process_time() < 1"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0
    assert "Scripts" in done.stdout
    assert not {"torch", "numpy", "omegaconf", "wandb", "transformers", "lightning"} & set(done.stderr.split())


def test_a_package_without_its_checkout_says_so(here):
    """As it is installed: the package among others, and anybody's train.py and configs beside it."""
    site = here / "site"
    (site / "rsdyn").mkdir(parents=True)
    for name in ("__init__.py", "__main__.py"):
        shutil.copy(ROOT / "rsdyn" / name, site / "rsdyn")
    (site / "train.py").write_text('"""Somebody else\'s."""')
    (site / "configs").mkdir()
    (site / "configs" / "theirs.yaml").write_text("# a\n# b\n")
    command = [sys.executable, "-S", "-m", "rsdyn"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(site)}, cwd=here, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "do not come with the installed package" in done.stdout
    for word in ("Somebody", "theirs", "Presets", "sweep", "tour"):
        assert word not in done.stdout


def test_garbage_is_collected_while_a_program_works_and_after_it(monkeypatch):
    seen = []

    def run_script(script, work, argv):
        seen.append(gc.isenabled())
        work("a run")
        return 7

    def analyze(run):
        seen.append((run, gc.isenabled(), gc.get_freeze_count() > 0))

    monkeypatch.setattr("rsdyn.commands.run_script", run_script)
    monkeypatch.setattr("rsdyn.commands.analyze.analyze", analyze)
    try:
        assert commands.main("analyze", []) == 7
    finally:
        gc.unfreeze()
    assert seen == [False, ("a run", True, True)] and gc.isenabled()
