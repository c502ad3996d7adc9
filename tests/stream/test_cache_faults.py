"""The cache under faults, by counting: a tenth here, the full number with ``pytest -m slow``."""

import errno
import fcntl
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from cache_entries import new_cache, shard_of

from rsdyn.errors import UserError
from rsdyn.lm.source import find_lm
from rsdyn.stream.cache import DamagedShardError, Shard
from rsdyn.stream.cache import lock as locks
from rsdyn.stream.cache.lock import Locks
from rsdyn.stream.cache.manifest import DamagedManifestError
from rsdyn.stream.trajectories import TrajectoryStream

HERE = Path(__file__).parents[1]


def mount_prefix():
    """How to run a command in which a tmpfs can be mounted; None where that is not allowed."""
    for words in (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"]):
        trial = [*words, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        if shutil.which("unshare") and subprocess.run(trial, capture_output=True, check=False).returncode == 0:
            return words
    return None


def run_faults(**numbers):
    """``tests/cache_faults.py``, in one process, since its start takes longer than the small sizes do."""
    prefix = mount_prefix()
    words = [f"{name}={n}" for name, n in numbers.items() if name != "full" or prefix is not None]
    command = [*(prefix or []), sys.executable, str(HERE / "cache_faults.py"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    lines = map(json.loads, done.stdout.splitlines())
    return {line["fault"]: line for line in lines}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param({"kills": 8, "writers": 1, "ranks": 1, "full": 2}, id="small"),
        pytest.param({"kills": 200, "writers": 20, "ranks": 3, "full": 20}, id="full", marks=pytest.mark.slow),
    ],
)
def counted(request):
    """What was asked for, and what the faults counted."""
    return request.param, run_faults(**request.param)


def test_killed_runs_lose_double_and_damage_nothing(counted):
    """SIGKILL after the first write, half at any time, half before a chosen system call of the publishing."""
    asked, out = counted[0]["kills"], counted[1]["kills"]
    assert out["kills"] >= asked and out["caches"] >= 1
    assert out["lost"] == out["corrupt"] == out["redone beyond one a kill"] == out["strays"] == 0
    assert asked < 100 or out["inside a write"] > asked // 20  # the kills met what they were meant to meet


def test_eight_writers_and_four_readers(counted):
    rounds, out = counted[0]["writers"], counted[1]["writers"]
    assert out["overlaps"] == out["partial reads"] == out["wrong"] == out["failed"] == 0
    assert out["recorded"] == out["shards"] + out["redone"] and out["redone"] <= rounds  # one writer a round was killed
    assert out["reads"] > 100
    if rounds >= 10:  # in a round or two the one to be killed may have finished; a test of its own is below
        assert out["taken over from the dead"] > 0


def test_processes_of_a_run_record_each_sequence_once(counted):
    """One to four processes and counts that do not divide; none waits for another."""
    texts, out = counted[0]["ranks"], counted[1]["ranks"]
    assert out["runs"] == 4 * texts and out["recorded"] == out["sequences"]
    assert out["waited"] == out["wrong"] == 0


def test_a_disk_that_is_full(counted):
    """On a tmpfs with room for this and that much; foreseen, and filled by others once the LM is at work."""
    if "full" not in counted[1]:
        pytest.skip("needs the right to mount a tmpfs")
    asked, out = counted[0]["full"], counted[1]["full"]
    assert out["foreseen"] == out["not foreseen"] == asked
    assert out["other ends"] == out["left behind"] == out["not kept"] == out["wrong"] == 0


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_a_file_that_may_not_grow(tmp_path, share):
    """A limit on the size of files, which needs no right to mount: EFBIG, as a quota or a full disk says it."""
    cache = new_cache(tmp_path, n_sequences=4000, shard_sequences=2000)
    cache.open()
    cache.write(0, big := big_shard(cache, 0))
    size = cache.path(0).stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * share), before[1]))
    try:
        with pytest.raises(UserError, match=r"dir=.*disk is full.*kept"):
            cache.write(1, big_shard(cache, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert cache.missing() == [1] and not list(cache.folder.glob(".*.tmp"))
    cache.write(1, big_shard(cache, 1))
    assert torch.equal(new_cache(tmp_path, n_sequences=4000, shard_sequences=2000).read(0).activations, big.activations)


def big_shard(cache, k):
    start, stop = cache.bounds(k)
    activations = torch.randn(stop - start, *cache.shape[1:]).to(cache.dtype)
    return Shard(activations, torch.arange(start, stop), torch.full((stop - start,), 7, dtype=torch.int32))


@pytest.mark.parametrize("n", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_flipped_bits_and_truncations(n, tiny_llama, make_sequences, tmp_path):
    """Each is found, named, and mended by recording that one shard, or writing the manifest, again."""

    def new_stream():
        return TrajectoryStream(find_lm(str(tiny_llama)), make_sequences(16), cache_dir=tmp_path, shard_sequences=4)

    stream = new_stream()
    stream.open()
    for k in range(4):
        stream.shard(k)
    model, folder, rng = stream._model, stream.cache.folder, random.Random(0)
    good = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    n_found = n_manifest = 0
    for _ in range(n):
        name = rng.choice(sorted(good))
        data = bytearray(good[name])
        if rng.random() < 0.5:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            del data[rng.randrange(len(data)) :]
        (folder / name).write_bytes(data)
        again = new_stream()
        again._model = model
        notes = again.cache.open()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for k in range(4):
                again.shard(k)
        is_manifest = name == "manifest.json"
        n_manifest += is_manifest
        n_found += len(notes) == is_manifest and len(said) == again.n_recorded / 4 == (not is_manifest)
        found = notes[0] if is_manifest else str(said[0].message)
        assert name in found and "damaged" in found
        assert {p.name: p.read_bytes() for p in folder.glob("shard-*")} == {
            k: v for k, v in good.items() if k[0] == "s"
        }
        good["manifest.json"] = (folder / "manifest.json").read_bytes()
    assert n_found == n and n_manifest > n // 10


def test_every_bit_of_a_header_and_of_a_manifest_counts(tmp_path):
    """Where a flip could pass for something else that is valid."""
    cache = new_cache(tmp_path)
    cache.open()
    cache.write(1, shard_of(cache, 1))
    good, path = cache.path(1).read_bytes(), cache.path(1)
    for bit in range(8 * (8 + int.from_bytes(good[:8], "little"))):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(DamagedShardError):
            new_cache(tmp_path).read(1)
    path.write_bytes(good)
    manifest = cache.folder / "manifest.json"
    good = manifest.read_bytes()
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(data)
        with pytest.raises(DamagedManifestError):
            cache.manifest()


HOLD = """
import sys, time
from pathlib import Path
from rsdyn.stream.cache import lock
if {soft}:
    import errno, fcntl
    def flock(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")
    fcntl.flock = flock
    lock.LEASE_SECONDS = 1.0
with lock.Locks(Path({folder!r})).hold("shard-00001"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("soft", [False, True])
def test_a_dead_holders_lock_is_taken_over(tmp_path, monkeypatch, soft):
    """At once where the kernel keeps it, and after the lease on a file system without flock."""
    if soft:

        def flock(*args):
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(fcntl, "flock", flock)
        monkeypatch.setattr(locks, "LEASE_SECONDS", 1.0)
    script = HOLD.format(soft=soft, folder=str(tmp_path))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert holder.stdout.readline() == "held\n"
        mine = Locks(tmp_path)
        with mine.hold_if_free("shard-00001") as is_free:
            assert not is_free
        with mine.hold_if_free("shard-00002") as is_free:
            assert is_free
        if not soft:
            assert f"process {holder.pid} on " in mine.holder("shard-00001")
        time.sleep(1.5 if soft else 0)  # a live holder renews its lease
        with mine.hold_if_free("shard-00001") as is_free:
            assert not is_free
    finally:
        holder.kill()
        holder.communicate()
    waited, start = [], time.monotonic()
    with mine.hold("shard-00001", on_wait=waited.append):
        assert time.monotonic() - start < 10
        with mine.hold("shard-00001"):  # what is held already is given at once
            pass
        with Locks(tmp_path).hold_if_free("shard-00001") as is_free:
            assert not is_free
    assert soft or waited == []
