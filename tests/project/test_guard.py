"""The guard of speed: a gross loss is found, noise is not, and the works it measures are really done."""

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def guard(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import guard

    return guard


def spin(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def work(ours, theirs, scale=1.0):
    @contextmanager
    def make():
        yield "a known time", lambda: spin(ours), lambda: spin(theirs), scale

    return make


def test_the_ratio_is_that_of_the_times(guard):
    found, lost, rows = guard.examine({"a": work(0.01, 0.04), "b": work(0.02, 0.01, 10)}, {"a": 4, "b": 5})
    assert found["a"] == pytest.approx(4, rel=0.3) and found["b"] == pytest.approx(5, rel=0.3)
    assert lost == [] and [row[-1] for row in rows] == ["kept", "kept"]


def test_what_is_below_half_of_the_record_is_lost(guard):
    works = {"slow": work(0.02, 0.02), "fast": work(0.01, 0.02)}
    _, lost, rows = guard.examine(works, {"slow": 3, "fast": 3})
    assert lost == ["slow"] and [row[-1] for row in rows] == ["LOST", "kept"]


def test_one_slow_moment_is_not_a_loss(guard):
    calls = []

    @contextmanager
    def make():
        def ours():  # slow in all turns of the first look
            calls.append(0)
            spin(0.05 if len(calls) <= 4 else 0.01)

        yield "a known time", ours, lambda: spin(0.02), 1.0

    found, lost, _ = guard.examine({"a": make}, {"a": 2})
    assert lost == [] and found["a"] == pytest.approx(2, rel=0.3)


def test_everything_measured_is_recorded(guard):
    recorded = json.loads((BENCHMARKS / "guard.json").read_text())
    assert recorded.keys() == guard.WORKS.keys() and all(value > 0 for value in recorded.values())


def test_a_loss_ends_with_an_error_that_names_it(guard, tmp_path, monkeypatch, capsys):
    (tmp_path / "guard.json").write_text(json.dumps({"correlation": 1e6}))
    monkeypatch.setattr(guard, "RECORDED", tmp_path / "guard.json")
    monkeypatch.setattr(guard, "WORKS", {"correlation": work(0.01, 0.02)})
    monkeypatch.setattr(sys, "argv", ["guard.py"])
    assert guard.main() == 1
    said = capsys.readouterr()
    assert "LOST" in said.out and said.err.startswith("guard.py: error: correlation is below half")


def test_an_unknown_work_is_refused():
    done = subprocess.run([sys.executable, str(BENCHMARKS / "guard.py"), "corelation"], capture_output=True, text=True)
    assert done.returncode == 2 and "corelation: must be of recording" in done.stderr
