"""Signals: what was done is saved, all processes leave, in time, with the right exit code."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rsdyn.run.signals import PARENT_VARIABLE, SIGNALS, Interrupted, Stop, exit_code_of, how_it_ended

ROOT = Path(__file__).parents[2]
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 138}


@pytest.fixture
def stop():
    stop = Stop()
    stop.install()
    yield stop
    stop.restore()


def send(name):
    os.kill(os.getpid(), getattr(signal, name))
    time.sleep(0.05)  # where a handler that is pending runs


@pytest.mark.parametrize("name", CODES)
def test_where_nothing_defers_it_a_signal_raises(stop, name):
    with pytest.raises(Interrupted) as caught:
        send(name)
    assert caught.value.exit_code == CODES[name]
    assert not isinstance(caught.value, Exception)  # so that nothing swallows it
    with pytest.raises(Interrupted):
        stop.check()  # if something did


@pytest.mark.parametrize("name", CODES)
def test_where_it_is_deferred_it_is_noted_and_the_second_changes_nothing(stop, name, capfd):
    stop.deferred = True
    send(name)
    send("SIGTERM")
    send("SIGINT")
    stop.check()
    assert stop.signum == getattr(signal, name)
    assert capfd.readouterr().err.count("saving after this step") == 1
    stop.deferred = False
    with pytest.raises(Interrupted) as caught:
        stop.check()
    assert caught.value.exit_code == CODES[name]


def test_the_signals_are_given_back():
    before = [signal.getsignal(s) for s in SIGNALS]
    stop = Stop()
    stop.install()
    assert os.environ[PARENT_VARIABLE] == str(os.getpid())
    assert [signal.getsignal(s) for s in SIGNALS] != before
    stop.restore()
    assert [signal.getsignal(s) for s in SIGNALS] == before
    assert PARENT_VARIABLE not in os.environ


CHILD = """import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print("up", flush=True)
time.sleep({})
"""


def children(*seconds):
    found = [
        subprocess.Popen([sys.executable, "-c", CHILD.format(s)], stdout=subprocess.PIPE, text=True) for s in seconds
    ]
    for child in found:
        child.stdout.readline()  # it is up
    return found


def test_a_signal_is_passed_on_and_none_outlives_the_run(stop):
    obedient, deaf = children(60, 60)
    deaf_pid = deaf.pid
    os.kill(deaf_pid, signal.SIGSTOP)
    stop.deferred = True
    stop._children = [obedient, deaf]
    send("SIGTERM")
    assert obedient.wait(10) == 7
    began = time.monotonic()
    stop.end_children(grace=0.5)
    assert deaf.returncode == -signal.SIGKILL and time.monotonic() - began < 5
    for child in (obedient, deaf):
        child.stdout.close()


def test_the_failure_of_another_process_is_told(stop):
    good, bad = children(0, 60)
    assert good.wait(10) == 0
    stop._children = [good, bad]
    assert stop.failure() is None
    bad.send_signal(signal.SIGTERM)
    assert stop.failure(wait=10) == (2, 7)
    for child in (good, bad):
        child.stdout.close()
    assert how_it_ended(7) == "ended with code 7" and exit_code_of(7) == 7
    assert how_it_ended(-9) == "was killed (SIGKILL)" and exit_code_of(-9) == 1


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    monkeypatch.setenv("RSDYN_RUN_DIR", "")


@pytest.fixture(scope="module")
def words(tiny_llama, tmp_path_factory):
    """A run that does not end by itself."""
    return {
        "lm.name": tiny_llama, "data.limit": 64, "data.l_max": 220, "cache.shard_sequences": 8, "cae.layers": 4,
        "cache.dir": tmp_path_factory.mktemp("cache"), "trainer.max_epochs": 100_000, "trainer.patience": 100_000,
        "data.batch_size": 16, "tracking.mode": "disabled", "trainer.accelerator": "cpu",
    }  # fmt: skip


def argv_of(words, **more):
    return [f"{k}={v}" for k, v in {**words, **more}.items()]


def check_left_in_order(folder, answer, name):
    assert answer["codes"] == [CODES[name]] * len(answer["codes"]), answer["said"]
    assert answer["seconds"] < 15
    assert "Traceback" not in answer["said"]
    assert answer["said"].count("interrupted;") == 1
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] > 0
    assert not list(folder.rglob("*.tmp"))


WHO = {"one": (1, [0]), "rank 0": (2, [0]), "rank 1": (2, [1]), "all": (2, [0, 1])}


@pytest.mark.parametrize(("who", "name"), [("one", "SIGINT"), ("rank 1", "SIGUSR1")])
def test_processes_save_and_leave(nursery, words, tmp_path, who, name):
    ranks, to = WHO[who]
    log, folder = tmp_path / "log", tmp_path / "run"
    argv = argv_of(words, **{"run.dir": folder, "trainer.devices": ranks})
    answer = nursery.run(argv=argv, ranks=ranks, log=log, to=to, after=30, signal=name)
    check_left_in_order(folder, answer, name)


@pytest.mark.slow
@pytest.mark.parametrize("who", WHO)
def test_ten_times_each_signal(nursery, words, tmp_path, who):
    """Each after another number of batches, a third of them in the first epoch, which records."""
    ranks, to = WHO[who]
    times = []
    for trial, name in itertools.product(range(10), CODES):
        log, folder = tmp_path / f"log{trial}{name}", tmp_path / f"run{trial}{name}"
        more = {"run.dir": folder, "trainer.devices": ranks}
        if trial % 3 == 0:
            more["cache.dir"] = tmp_path / f"cache{trial}{name}"
        argv = argv_of(words, **more)
        answer = nursery.run(argv=argv, ranks=ranks, log=log, to=to, after=2 + 7 * trial, signal=name)
        check_left_in_order(folder, answer, name)
        times.append(answer["seconds"])
    print(f"{who}: {len(times)} signals, {max(times):.1f} s at most from the signal to the last process' end")


@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_process_is_killed_the_other_ends_and_says_why(nursery, words, tmp_path, killed):
    argv = argv_of(words, **{"run.dir": tmp_path / "run", "trainer.devices": 2})
    answer = nursery.run(argv=argv, ranks=2, log=tmp_path / "log", to=[killed], after=10, signal="SIGKILL")
    expected = [1, 1]
    expected[killed] = -9
    assert answer["codes"] == expected, answer["said"]
    assert answer["seconds"] < 10
    assert "Traceback" not in answer["said"] and "waited for the others in vain" in answer["said"]


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("rsdyn.commands.train:find_source", "nothing was recorded yet"),
        ("rsdyn.lm.model:LanguageModel._record_batch", "0 of 64 sequences are in the cache"),
        ("rsdyn.run.checkpoints:publish", "the same command resumes from"),  # twice: in the middle of saving
    ],
)
def test_a_signal_that_comes_twice_at_an_awkward_moment(nursery, words, tmp_path, where, kept):
    more = {"run.dir": tmp_path / "run", "cache.dir": tmp_path / "cache"}
    answer = nursery.run(argv=argv_of(words, **more), every=3, where=where, then=1, signal="SIGTERM")
    assert answer["code"] == 143, answer["said"]
    assert f"interrupted; {kept}" in answer["said"] or f"; {kept}" in answer["said"]
    assert "Traceback" not in answer["said"]
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert checkpoint.exists() == ("same command" in kept)
    if checkpoint.exists():
        torch.load(checkpoint, weights_only=True)


# -- as Lightning starts the processes: the first starts the second ----------------------------------------------------


class Started:
    """`python train.py trainer.devices=2`, until it has saved for the first time."""

    def __init__(self, words, folder, **more):
        self.folder = folder
        argv = argv_of(words, **{"run.dir": folder, "trainer.devices": 2}, **more)
        self.output = open(folder.with_suffix(".txt"), "w+")  # noqa: SIM115
        self.first = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *argv], stdout=self.output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 240
        while not (folder / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
            assert self.first.poll() is None, self.said()
            time.sleep(0.05)
        time.sleep(0.5)
        listed = Path(f"/proc/{self.first.pid}/task/{self.first.pid}/children").read_text().split()
        is_run = lambda pid: b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()  # noqa: E731
        (self.second,) = [int(pid) for pid in listed if is_run(pid)]

    def send(self, rank, name):
        os.kill(self.first.pid if rank == 0 else self.second, getattr(signal, name))

    def wait_for_second(self, seconds):
        deadline = time.monotonic() + seconds
        while self.second_lives() and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self.second_lives()

    def second_lives(self):
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.second}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False

    def said(self):
        self.output.seek(0)
        return self.output.read()

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.first.pid, signal.SIGKILL)
        self.first.wait()
        self.output.close()


@pytest.fixture
def start(words, tmp_path):
    started = []

    def start(name="run", **more):
        started.append(Started(words, tmp_path / name, **more))
        return started[-1]

    yield start
    for one in started:
        one.close()


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks processes up in /proc")


@needs_proc
def test_a_signal_to_the_second_process_ends_both(start):
    run = start()
    began = time.monotonic()
    run.send(1, "SIGTERM")
    assert run.first.wait(15) == 143, run.said()
    assert run.wait_for_second(15 - (time.monotonic() - began))
    said = run.said()
    assert "Traceback" not in said and said.count("interrupted;") == 1
    torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)


@needs_proc
@pytest.mark.parametrize(
    ("rank", "name", "timeout"),
    [
        pytest.param(1, "SIGKILL", 1800, marks=pytest.mark.slow),
        pytest.param(0, "SIGKILL", 1800, marks=pytest.mark.slow),
        pytest.param(1, "SIGSTOP", 45, marks=pytest.mark.slow),  # it hangs
        pytest.param(0, "SIGSTOP", 45, marks=pytest.mark.slow),
    ],
)
def test_when_one_process_is_killed_or_hangs_all_end(start, rank, name, timeout):
    run = start(**{"trainer.timeout": timeout})
    limit = 10 + (timeout if name == "SIGSTOP" else 0)
    began = time.monotonic()
    run.send(rank, name)
    if rank == 0:
        assert run.wait_for_second(limit)
        run.send(0, "SIGCONT")
    assert run.first.wait(limit) != 0
    assert run.wait_for_second(max(0.1, limit - (time.monotonic() - began)))
    said = run.said()
    assert "Traceback" not in said
    print(f"rank {rank} {name}: {time.monotonic() - began:.1f} s")
    if rank == 1:
        reason = "process 2 was killed (SIGKILL)" if name == "SIGKILL" else "trainer.timeout=45"
        assert reason in said and "the same command resumes from" in said


# -- the other scripts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["analyze", "perturb"])
def test_the_other_scripts_leave_with_the_right_code_and_keep_the_cache(nursery, script, tiny_llama, tmp_path):
    words = {"lm.name": tiny_llama, "data.limit": 64, "data.l_max": 220, "cache.shard_sequences": 8,
             "cache.dir": tmp_path / "cache", "run.dir": tmp_path / "run", "tracking.mode": "disabled"}  # fmt: skip
    answer = nursery.run(script=script, argv=argv_of(words), at_shard=3, signal="SIGUSR1")
    assert answer["code"] == 138, answer["said"]
    assert "Traceback" not in answer["said"] and "interrupted; 24" in answer["said"]
    assert len(list(tmp_path.glob("cache/*/shard-*.safetensors"))) == 3
