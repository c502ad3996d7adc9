"""Shards on disk: whole or not at all, the same bytes each time, and damage found."""

import errno
import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file

from rsdyn.errors import UserError
from rsdyn.stream.cache import DamagedShardError, Shard, TrajectoryCache, cache_key, default_cache_dir

N, S, D, PER_SHARD = 10, 4, 6, 4
FIELDS = {"lm": "tiny", "weights": "xxh3 0", "tokens": "1", "condition": "original"}


def new_cache(root, fields=None, **options):
    sizes = {"n_sequences": N, "n_sublayers": S, "n_units": D, "shard_sequences": PER_SHARD, **options}
    return TrajectoryCache(root, {**FIELDS, **(fields or {})}, label="tiny-original", **sizes)


def shard_of(cache, k):
    start, stop = cache.bounds(k)
    generator = torch.Generator().manual_seed(k)
    activations = torch.randn(stop - start, S, D, generator=generator).to(cache.dtype)
    return Shard(activations, torch.arange(start, stop), torch.full((stop - start,), 7, dtype=torch.int32))


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
            assert torch.equal(plain[name], getattr(expected, name))
    assert [again.bounds(k) for k in range(3)] == [(0, 4), (4, 8), (8, 10)]


def test_a_shard_written_again_has_the_same_bytes(cache):
    before = [cache.path(k).read_bytes() for k in range(3)]
    for k in (2, 0, 1):
        cache.discard(k)
        cache.write(k, shard_of(cache, k))
    assert [cache.path(k).read_bytes() for k in range(3)] == before


def test_manifest_says_what_made_it(cache):
    manifest = json.loads((cache.folder / "manifest.json").read_text())
    assert manifest["key"] == cache.key
    assert FIELDS.items() <= manifest["made_from"].items()
    assert manifest["made_from"]["shape"] == [N, S, D]
    assert stat.S_IMODE((cache.folder / "manifest.json").stat().st_mode) & 0o444 == 0o444 & ~_umask()


def _umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_every_field_is_in_the_key(tmp_path):
    keys = {new_cache(tmp_path).key}
    changes = [{"lm": "b"}, {"weights": "b"}, {"tokens": "b"}, {"condition": "shuffled"}, {"new field": None}]
    keys |= {new_cache(tmp_path, change).key for change in changes}
    options = [{"n_sequences": 9}, {"n_sublayers": 2}, {"n_units": 5}, {"dtype": "float32"}, {"shard_sequences": 5}]
    keys |= {new_cache(tmp_path, **option).key for option in options}
    assert len(keys) == 1 + len(changes) + len(options)
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
    path = cache.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["made_from"]["weights"] = "xxh3 other"
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"weights is 'xxh3 other' there and 'xxh3 0' here"):
        new_cache(cache.root).open()


def test_another_format_version_is_refused(cache):
    path = cache.folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(UserError, match="has format 99"):
        new_cache(cache.root).open()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_a_broken_manifest_is_refused(cache, text):
    (cache.folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="cannot be read"):
        new_cache(cache.root).open()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cache\.dir=.*cannot write"):
        new_cache(tmp_path / "file" / "cache").open()


def test_free_space_is_compared_before_any_work(cache, monkeypatch):
    free = 500
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": free}))
    cache.check_free_space()  # nothing is missing
    cache.discard(0)
    with pytest.raises(UserError, match=r"data\.limit=\d+ would fit"):
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
    assert calls == ["fsync", "replace", "fsync"]


def test_wrong_contents_are_not_written(cache):
    shard = shard_of(cache, 0)
    for wrong in (
        Shard(shard.activations[:, :-1], shard.index, shard.n_tokens),
        Shard(shard.activations.double(), shard.index, shard.n_tokens),
        Shard(shard.activations, shard.index + 1, shard.n_tokens),
    ):
        with pytest.raises(ValueError, match=r"activations is|index is not"):
            cache.write(0, wrong)


def test_names_cannot_leave_the_root(tmp_path):
    cache = TrajectoryCache(
        tmp_path / "root", FIELDS, label="../../etc/passwd", n_sequences=N, n_sublayers=S, n_units=D
    )
    assert cache.folder.parent == tmp_path / "root"


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.delenv("RSDYN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "rsdyn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_cache_dir() == tmp_path / "x" / "rsdyn"
    monkeypatch.setenv("RSDYN_CACHE", str(tmp_path / "y"))
    assert default_cache_dir() == tmp_path / "y"
