"""Shards on disk: whole or not at all, the same bytes each time, and damage found."""

import errno
import importlib.util
import itertools
import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_entries import FIELDS, D, N, S, new_cache, shard_of
from safetensors.torch import load_file, save

from rsdyn.errors import UserError
from rsdyn.stream.cache import (
    DamagedShardError,
    Shard,
    ShardStore,
    TrajectoryCache,
    cache_key,
    default_cache_dir,
    sequence_keys,
    store,
)
from rsdyn.stream.cache.corpus import read_index
from rsdyn.stream.cache.manifest import DamagedManifestError
from rsdyn.stream.cache.shard import Form, Recorded, pack


@pytest.fixture
def cache(tmp_path):
    cache = new_cache(tmp_path / "cache")
    cache.open()
    for k in range(cache.n_shards):
        cache.write(k, shard_of(cache, k))
    return cache


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_round_trip_and_the_format_is_plain_safetensors(tmp_path, dtype):
    cache = new_cache(tmp_path, dtype=dtype)
    cache.open()
    assert cache.missing() == [0, 1, 2]
    for k in range(3):
        cache.write(k, shard_of(cache, k))
    assert cache.missing() == []
    again = new_cache(tmp_path, dtype=dtype)
    again.open()
    for k in range(3):
        expected, found, plain = shard_of(cache, k), again.read(k), load_file(cache.path(k))
        for name in ("activations", "index", "n_tokens"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
        assert torch.equal(plain["activations"], expected.activations)
        assert torch.equal(plain["n_tokens"], expected.n_tokens)
        assert plain["position"].tolist() == [6] * len(expected.index)  # the last of seven tokens
        assert np.array_equal(plain["keys"].numpy(), cache.keys[slice(*cache.bounds(k))])
    assert [again.bounds(k) for k in range(3)] == [(0, 4), (4, 8), (8, 10)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bytes_are_those_of_safetensors_and_no_tensor_is_copied(dtype):
    for n, s, d in ((1, 1, 3), (7, 4, 6), (8, 2, 8)):
        x, each = torch.randn(n, s, d).to(dtype), torch.ones(n, dtype=torch.int32)
        recorded = Recorded(x, torch.full((n, 16), 3, dtype=torch.uint8), each, 9 * each, 4 * each)
        parts = pack(recorded, Form("k" * 32, s, d, dtype))
        whole = b"".join(parts)
        text = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
        assert whole == save(vars(recorded), metadata=text)
        assert any(np.shares_memory(np.asarray(part), x.view(torch.uint8).numpy()) for part in parts[1:])


def test_reading_ahead_brings_a_shard_into_memory_and_passes_over_what_is_none(cache, tmp_path):
    cache.discard(1)
    os.mkfifo(cache.path(1))
    for k in (0, 1, 2, 1000):
        cache.read_ahead(k)
    if not hasattr(os, "RWF_NOWAIT"):
        pytest.skip("the system does not say what is in memory")
    large = new_cache(tmp_path / "large", n_units=65536)
    large.open()
    large.write(0, Shard(torch.ones(4, S, 65536).bfloat16(), torch.arange(4), torch.full((4,), 7, dtype=torch.int32)))
    with large.path(0).open("rb", buffering=0) as file:

        def is_in_memory():
            try:
                size = os.fstat(file.fileno()).st_size
                return all(os.preadv(file.fileno(), [bytearray(1)], at, os.RWF_NOWAIT) for at in range(0, size, 65536))
            except BlockingIOError:
                return False

        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if is_in_memory():
            pytest.skip("this file system is memory")
        large.read_ahead(0)
        assert is_in_memory()


def test_a_shard_written_again_has_the_same_bytes(cache):
    before = [cache.path(k).read_bytes() for k in range(3)]
    for k in (2, 0, 1):
        cache.discard(k)
        cache.write(k, shard_of(cache, k))
    assert [cache.path(k).read_bytes() for k in range(3)] == before


def test_manifest_says_what_made_it(cache):
    manifest = json.loads((cache.folder / "manifest.json").read_text())
    assert manifest["key"] == cache.store.key
    sizes = {"n_sublayers": S, "n_units": D, "dtype": "bfloat16"}
    assert manifest["made_from"] == {"lm": "tiny", "weights": "xxh3 0", "condition": "original"} | sizes
    facts, keys = read_index(cache.index_path)
    assert facts == {"tokens": "1", "n_sequences": N, "n_trajectories": N}
    assert np.array_equal(keys, cache.keys)
    assert stat.S_IMODE((cache.folder / "manifest.json").stat().st_mode) & 0o444 == 0o444 & ~_umask()


def _umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_every_field_is_in_the_key(tmp_path):
    keys = {new_cache(tmp_path).key}
    changes = [{"lm": "b"}, {"weights": "b"}, {"tokens": "b"}, {"condition": "shuffled"}, {"new field": None}]
    keys |= {new_cache(tmp_path, change).key for change in changes}
    options = [{"n_sequences": 9}, {"n_sublayers": 2}, {"n_units": 5}, {"dtype": "float32"}, {"first": 1}]
    keys |= {new_cache(tmp_path, **option).key for option in options}
    assert len(keys) == 1 + len(changes) + len(options)
    assert new_cache(tmp_path, shard_sequences=5).key in keys  # how many are recorded together is no part of the text
    stores = {new_cache(tmp_path, change).folder for change in ({}, {"tokens": "b"})}
    assert stores == {new_cache(tmp_path).folder}
    assert len({new_cache(tmp_path, c).folder for c in ({}, {"weights": "b"}, {"new field": None})}) == 3
    assert cache_key({"a": 1, "b": 2}) == cache_key({"b": 2, "a": 1})


@pytest.mark.parametrize("where", range(12))
def test_a_flipped_bit_anywhere_is_found(cache, where):
    """One bit in each of twelve places, header included; safetensors itself loads flipped data silently."""
    data = bytearray(cache.path(1).read_bytes())
    place = where * (len(data) - 1) // 11
    data[place] ^= 1 << (where % 8)
    cache.path(1).write_bytes(data)
    with pytest.raises(DamagedShardError, match="shard 1"):
        new_cache(cache.root).read(1)
    new_cache(cache.root).read(0)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_shard_is_found(cache, keep):
    data = cache.path(2).read_bytes()
    cache.path(2).write_bytes(data[:keep])
    with pytest.raises(DamagedShardError, match="shard 2"):
        new_cache(cache.root).read(2)


def test_a_shard_in_the_wrong_place_is_found(cache):
    cache.path(0).write_bytes(cache.path(1).read_bytes())
    with pytest.raises(DamagedShardError, match="shard 0"):
        new_cache(cache.root).read(0)
    other = new_cache(cache.root, {"weights": "other"})
    other.open()
    other.path(1).write_bytes(cache.path(1).read_bytes())
    with pytest.raises(DamagedShardError, match="another cache"):
        other.read(1)


def test_a_missing_shard_is_not_damage(cache):
    cache.discard(1)
    assert cache.missing() == [1]
    with pytest.raises(FileNotFoundError):
        cache.read(1)


def test_a_folder_made_by_another_model_is_refused(cache):
    other = new_cache(cache.root, {"weights": "xxh3 other"})
    shutil.move(cache.folder, other.folder)
    with pytest.raises(UserError, match=r"weights is 'xxh3 0' there and 'xxh3 other' here"):
        other.open()


def test_another_format_version_is_refused(cache):
    """Another format hashes to another key; here its folder has been given this one's name."""
    path = cache.folder / "manifest.json"
    theirs = {"format": 99, "key": "0" * 32, "what": "nobody knows"}
    path.write_text(json.dumps(theirs))
    for _ in range(2):
        with pytest.raises(UserError, match=r"has format 99, this rsdyn reads format \d"):
            new_cache(cache.root).open()
    assert json.loads(path.read_text()) == theirs


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"format": null}', "[" * 100_000, "\xff"])
def test_a_broken_manifest_is_written_again_and_nothing_is_lost(cache, text):
    before = [cache.path(k).read_bytes() for k in range(3)]
    (cache.folder / "manifest.json").write_text(text, encoding="latin-1")
    again = new_cache(cache.root)
    (note,) = again.open({"torch": "2"})
    assert "manifest.json" in note and "is damaged" in note
    assert again.manifest()["made_from"] == cache.store.fields and again.manifest()["made_by"]["torch"] == "2"
    assert again.missing() == [] and [again.path(k).read_bytes() for k in range(3)] == before
    assert new_cache(cache.root).open() == []


def test_a_manifest_of_absurd_size_is_not_read(cache):
    path = cache.folder / "manifest.json"
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # sparse: it takes no room
    with pytest.raises(DamagedManifestError, match=r"1099511627776 bytes"):
        cache.manifest()
    assert len(new_cache(cache.root).open()) == 1 and path.stat().st_size < 5000


def test_entries_are_added_to_the_manifest_without_changing_the_key(cache):
    cache.add_to_manifest("certificate", {"residual": 1e-7})
    cache.add_to_manifest("café", ["a", 1])
    again = new_cache(cache.root)
    assert again.open() == [] and again.key == cache.key
    assert again.manifest()["certificate"] == {"residual": 1e-7} and again.manifest()["café"] == ["a", 1]
    cache.add_to_manifest("certificate", None)
    assert again.manifest()["certificate"] is None
    for name in ("key", "made_from", "checksum"):
        with pytest.raises(ValueError, match="by itself"):
            cache.add_to_manifest(name, 1)
    (cache.folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json .* is damaged"):
        cache.add_to_manifest("certificate", 1)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"dir=.*cannot write"):
        new_cache(tmp_path / "file" / "cache").open()


def test_a_complete_cache_that_cannot_be_written_is_read(cache, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    again = new_cache(cache.root)
    monkeypatch.setattr(store, "try_to_write", refuse)
    assert again.open() == []
    assert torch.equal(again.read(1).activations, shard_of(cache, 1).activations)
    cache.discard(2)
    assert new_cache(cache.root).open(wanted=[0, 1]) == []
    for wanted in (None, [2]):
        with pytest.raises(UserError, match=r"cannot write there \(Read-only file system\)"):
            new_cache(cache.root).open(wanted=wanted)


def test_what_dead_writers_left_is_cleared_away_and_what_live_ones_write_is_not(cache):
    names = ["manifest.json", cache.path(1).name, cache.path(2).name]
    strays = [cache.folder / f".{name}.{'0123456789abcdef'}.tmp" for name in names]
    kept = [cache.folder / name for name in (f".{names[1]}.tmp", ".x.0123456789abcdef.tmp", "notes.txt")]
    for path in strays + kept:
        path.write_text("half a fil")
    with cache.store.holding(names[2]):
        new_cache(cache.root).open()
        assert [path.exists() for path in strays] == [False, False, True]
    new_cache(cache.root).open()
    assert not any(path.exists() for path in strays) and all(path.exists() for path in kept)
    assert cache.missing() == []


def test_a_temporary_file_that_somebody_removes_is_written_again(cache, monkeypatch):
    """As another host's sweep may, on a disk whose locks reach no further than one host."""
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(source)
        if len(calls) == 1:
            os.unlink(source)
        return real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    cache.discard(1)
    cache.write(1, shard_of(cache, 1))
    assert len(set(calls)) == 2 and new_cache(cache.root).read(1)


def test_a_file_system_that_cannot_reserve_space_is_written_all_the_same(cache, monkeypatch):
    def cannot(*args):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    before = cache.path(1).read_bytes()
    cache.write(1, shard_of(cache, 1))
    assert cache.path(1).read_bytes() == before


def test_a_shard_that_cannot_be_read_is_not_thrown_away(cache, monkeypatch):
    """Too many open files says nothing about the shard."""

    def refuse(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"shard-[0-9a-f]{32}\.safetensors .*Too many open files"):
        new_cache(cache.root).read(1)


def test_a_shard_written_to_after_it_was_verified_is_verified_again(cache):
    assert cache.read(1)
    data = bytearray(cache.path(1).read_bytes())
    data[-1] ^= 1
    with cache.path(1).open("r+b") as file:
        file.write(data)
    with pytest.raises(DamagedShardError, match="checksum"):
        cache.read(1)


def test_free_space_is_compared_before_any_work(cache, monkeypatch):
    free = 500
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": free}))
    cache.check_free_space()  # nothing is missing
    cache.discard(0)
    with pytest.raises(UserError, match=r"limit=\d+ would fit"):
        cache.check_free_space()


def test_a_disk_that_fills_up_leaves_no_trace(cache, monkeypatch):
    cache.discard(1)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="disk is full"):
        cache.write(1, shard_of(cache, 1))
    assert cache.missing() == [1]
    assert [p.name for p in cache.folder.iterdir() if ".tmp" in p.name] == []


def test_a_shard_is_published_in_the_right_order(cache, monkeypatch):
    """File fsync, then replace, then folder fsync: any other order can lose the shard in a power cut."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    cache.write(0, shard_of(cache, 0))
    cache.add_to_manifest("certificate", 1)
    assert calls == ["fsync", "replace", "fsync"] * 2


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
from cache_entries import new_cache, shard_of
cache = new_cache({root!r})
cache.open()
for k in range(3):
    cache.write(k, shard_of(cache, k))
cache.add_to_manifest("certificate", 1)
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_the_kernel_sees_that_order(tmp_path):
    """The same from outside, of the manifest, three shards and an entry added to the manifest."""
    log, script = tmp_path / "calls", SCRIPT.format(tests=str(Path(__file__).parents[1]), root=str(tmp_path / "cache"))
    watched = "trace=openat,write,fsync,fdatasync,rename,renameat,renameat2"
    words = ["strace", "-f", "-y", "-e", watched, "-o", str(log), sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    if "ptrace" in done.stderr and done.returncode:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    ours = [line for line in log.read_text().splitlines() if str(tmp_path / "cache") in line]
    folder = re.escape(str(new_cache(tmp_path / "cache").folder))
    kinds = [
        (rf"write\(\d+<{folder}/\.[^/>]+\.tmp>", "write"),
        (rf"fsync\(\d+<{folder}/\.[^/>]+\.tmp>\)", "fsync file"),
        (rf'rename(at2?)?\(.*"{folder}/\.[^/"]+\.tmp".*"{folder}/[^./][^/"]*"', "replace"),
        (rf"fsync\(\d+<{folder}>\)", "fsync folder"),
    ]
    seen = [next((name for pattern, name in kinds if re.search(pattern, line)), None) for line in ours]
    seen = [name for name, _ in itertools.groupby(s for s in seen if s)]
    assert (
        seen == ["write", "fsync file", "replace", "fsync folder"] * 5
    )  # the corpus' index lies in a folder of its own


def test_wrong_contents_are_not_written(cache):
    shard = shard_of(cache, 0)
    for wrong in (
        Shard(shard.activations[:, :-1], shard.index, shard.n_tokens),
        Shard(shard.activations.double(), shard.index, shard.n_tokens),
        Shard(shard.activations, shard.index + 1, shard.n_tokens),
        Shard(shard.activations, shard.index.flip(0), shard.n_tokens),
    ):
        with pytest.raises(ValueError, match=r"activations is|index is not"):
            cache.write(0, wrong)


HOSTILE_LABELS = ["../../etc/passwd", "/etc", "..", ".", "a/../../b", "a\0b", "a\nb", "-rf", "~", "", "x" * 500, "ü/ß"]


@pytest.mark.parametrize("label", HOSTILE_LABELS)
def test_names_cannot_leave_the_root(tmp_path, label):
    root = tmp_path / "root"
    keys = sequence_keys([np.array([1])], [b"last"])
    facts = {"text": label}
    cache = TrajectoryCache(root, FIELDS, label=label, keys=keys, n_sublayers=S, n_units=D, corpus=facts)
    assert cache.folder.parent == root and re.fullmatch(r"[A-Za-z0-9._-]+", cache.folder.name)
    cache.open()
    assert [p.name for p in tmp_path.iterdir()] == ["root"] and cache.folder.resolve().parent == root.resolve()
    assert cache.index_path.resolve().parent == (cache.folder / "corpora").resolve()
    assert ShardStore.from_folder(cache.folder).key == cache.store.key


def lying_files(good):
    """A shard's file and 13 lies about it."""
    n = int.from_bytes(good[:8], "little")
    header, payload = json.loads(good[8 : 8 + n]), good[8 + n :]

    def with_header(change):
        text = json.dumps(change(json.loads(json.dumps(header)))).encode()
        return len(text).to_bytes(8, "little") + text + payload

    def entry(name, **changes):
        return with_header(lambda h: {**h, name: {**h[name], **changes}})

    size = len(payload)
    return {
        "header longer than the file": (2**62).to_bytes(8, "little") + good[8:],
        "header of 2^64 - 1 bytes": b"\xff" * 8 + good[8:],
        "header of no bytes": bytes(8) + good[8:],
        "header cut": (n - 9).to_bytes(8, "little") + good[8:],
        "header that is not JSON": good[:8] + b"\x80" * n + payload,
        "header nested without end": (50_000).to_bytes(8, "little") + b"[" * 50_000 + payload,
        "no tensors": with_header(lambda h: {"__metadata__": h["__metadata__"]}),
        "offsets behind the end": entry("activations", data_offsets=[0, size * 1000]),
        "offsets backwards": entry("activations", data_offsets=[size, 0]),
        "negative shape": entry("activations", shape=[-1, S, D]),
        "shape of 2^62": entry("activations", shape=[2**62, S, D]),
        "another type": entry("activations", dtype="F64"),
        "names swapped": with_header(lambda h: {**h, "position": h["trajectories"], "trajectories": h["position"]}),
    }


def test_files_that_lie_are_damage_and_run_nothing(cache, tmp_path):
    good = cache.path(1).read_bytes()
    proof = tmp_path / "executed"
    lies = lying_files(good)
    assert len(lies) == 13
    lies["pickle"] = pickle.dumps(Bomb(proof))
    torch.save({"activations": Bomb(proof)}, tmp_path / "bomb.pt")
    lies["pickle of torch.save"] = (tmp_path / "bomb.pt").read_bytes()
    for name, data in lies.items():
        cache.path(1).write_bytes(data)
        with pytest.raises(DamagedShardError, match="shard 1"):
            new_cache(cache.root).read(1)
        assert not proof.exists(), name
    cache.path(1).write_bytes(good)
    assert new_cache(cache.root).read(1)
    pickle.loads(lies["pickle"])  # the bomb is one
    assert proof.exists()


class Bomb:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


def test_links_are_not_followed(cache, tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(cache.path(1).read_bytes())
    before = outside.read_bytes()
    cache.path(1).unlink()
    cache.path(1).symlink_to(outside)  # what it leads to would be right: it is not read all the same
    again = new_cache(cache.root)
    again.open()
    with pytest.raises(DamagedShardError, match="it is a link"):
        again.read(1)
    again.discard(1)
    again.write(1, shard_of(cache, 1))
    assert not again.path(1).is_symlink() and outside.read_bytes() == before
    manifest = cache.folder / "manifest.json"
    outside.write_bytes(manifest.read_bytes())
    manifest.unlink()
    manifest.symlink_to(outside)
    (note,) = new_cache(cache.root).open({"torch": "new"})
    assert "it is a link" in note and not manifest.is_symlink() and b'"new"' not in outside.read_bytes()


@pytest.mark.parametrize("what", ["folder", "locks", "lock"])
def test_a_cache_that_leads_out_of_its_root_is_refused(cache, tmp_path, what):
    outside = tmp_path / "outside"
    locks = cache.folder / "locks"
    if what == "folder":
        shutil.move(cache.folder, outside)
        cache.folder.symlink_to(outside)
    elif what == "locks":
        shutil.rmtree(locks)
        outside.mkdir()
        locks.symlink_to(outside)
    else:
        (locks / "manifest.lock").unlink()
        outside.write_text("precious")
        (locks / "manifest.lock").symlink_to(outside)
    before = sorted(p.name for p in outside.iterdir()) if outside.is_dir() else outside.read_text()
    again = new_cache(cache.root)
    if what != "folder":
        again.discard(1)  # a complete one is read without writing
    with pytest.raises(UserError, match=r"dir=.*link"):
        again.open()
    assert before == (sorted(p.name for p in outside.iterdir()) if outside.is_dir() else outside.read_text())


@pytest.mark.parametrize("what", ["folder", "fifo"])
def test_what_is_no_file_is_named(cache, what):
    cache.discard(1)
    if what == "folder":
        cache.path(1).mkdir()
    else:
        os.mkfifo(cache.path(1))
    with pytest.raises(DamagedShardError, match=r"it is (a folder|not a file)"):
        new_cache(cache.root).read(1)
    if what == "folder":
        with pytest.raises(UserError, match="cannot be removed"):
            cache.discard(1)
    else:
        cache.discard(1)
        assert cache.missing() == [1]


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.delenv("RSDYN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "rsdyn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_cache_dir() == tmp_path / "x" / "rsdyn"
    monkeypatch.setenv("RSDYN_CACHE", str(tmp_path / "y"))
    assert default_cache_dir() == tmp_path / "y"


def test_the_locks_are_imported_where_there_is_no_fcntl(monkeypatch):
    """On Windows; filelock's own import minds that too."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("rsdyn_locks_anew", Path(store.__file__).with_name("lock.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.Locks is not store.Locks
