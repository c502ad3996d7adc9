"""The stream over its cache: recorded once whoever asks, refused when its numbers changed, never with NaN."""

import json
import logging
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rsdyn.errors import NonFiniteError, UserError
from rsdyn.lm.batches import length_sorted_batches
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.source import LMSource, find_lm
from rsdyn.stream import trajectories
from rsdyn.stream.cache import ShardStore, cache_key
from rsdyn.stream.cache.manifest import DamagedManifestError, seal
from rsdyn.stream.drift import canary_rows, compare, tolerance
from rsdyn.stream.text.positions import kinds
from rsdyn.stream.trajectories import TrajectoryStream

N, PER_SHARD = 20, 8


@pytest.fixture
def make_stream(tiny_llama, make_sequences, tmp_path):
    def make(lm=None, *, cache="cache", **options):
        stream = TrajectoryStream(
            find_lm(str(lm or tiny_llama)),
            make_sequences(N),
            cache_dir=cache and tmp_path / cache,
            **{"shard_sequences": PER_SHARD, "batch_tokens": 128, **options},
        )
        stream.open()
        return stream

    return make


def shards_of(stream):
    return {k: stream.cache.path(k).read_bytes() for k in range(stream.n_shards) if stream.cache.has(k)}


@pytest.mark.parametrize("cache", ["cache", None])
@pytest.mark.parametrize("positions", ["last", {"sample": 3}])
def test_the_first_sequences_as_one_tensor(make_stream, cache, positions):
    whole = [make_stream(cache="other", positions=positions).shard(k) for k in range(3)]
    x, index = torch.cat([s.activations for s in whole]), torch.cat([s.index for s in whole])
    for samples, n_recorded in ((1, 8), (8, 8), (11, 16), (N, N), (None, N)):
        stream = make_stream(cache=cache, positions=positions)
        activations, sequence = stream.read(samples)
        rows = index < (samples or N)
        assert torch.equal(activations, x[rows]) and torch.equal(sequence, index[rows])
        assert activations.dtype == stream.dtype and (positions != "last" or len(activations) == (samples or N))
        assert cache or stream.n_recorded == n_recorded  # by whole shards, and no more of them
        activations.zero_()  # it is the caller's own, not the cache's
    stream = make_stream(cache=cache, positions=positions)
    stream.read(11)
    assert stream.n_recorded == (0 if cache else 16)  # all was there
    assert torch.equal(stream.read()[0], x)


@pytest.mark.parametrize("samples", [0, -1, N + 1])
def test_a_number_of_sequences_that_cannot_be_is_refused(make_stream, samples):
    with pytest.raises(UserError, match=rf"samples={samples}: the corpus has {N} sequences. Give .* from 1 to {N}"):
        make_stream().read(samples)


# -- several runs at once ----------------------------------------------------------------------------------------------


def test_a_run_waits_for_another_that_records_its_shard_and_says_so(make_stream, caplog):
    first, second = make_stream(), make_stream()
    seen = []
    with caplog.at_level(logging.WARNING), first.cache.lock(1):
        waiting = threading.Thread(target=lambda: seen.append(second.shard(1, seen.append)))
        waiting.start()
        until = time.monotonic() + 10
        while not caplog.messages and time.monotonic() < until:
            time.sleep(0.01)
        expected = first.shard(1)
        assert waiting.is_alive()
    waiting.join(10)
    (line,) = caplog.messages
    assert "Another run (process " in line and "recording shard 1 of 3" in line
    assert seen[0] == PER_SHARD  # its bar moves on all the same
    assert torch.equal(seen[1].activations, expected.activations)
    assert second.n_recorded == 0 and not second.lm_loaded


def test_two_threads_of_runs_share_one_cache(make_stream):
    """Both want all shards, in opposite orders: nothing is recorded twice, and both end."""
    runs = [make_stream(), make_stream()]
    orders = [range(3), reversed(range(3))]
    threads = [
        threading.Thread(target=lambda s=s, o=o: [s.shard(k) for k in o]) for s, o in zip(runs, orders, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(run.n_recorded for run in runs) == N and runs[0].n_missing() == 0


def test_entries_of_several_runs_are_all_in_the_manifest(make_stream):
    runs = [make_stream() for _ in range(8)]
    threads = [threading.Thread(target=run.cache.add_to_manifest, args=(f"entry {i}", i)) for i, run in enumerate(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    manifest = runs[0].cache.manifest()
    assert [manifest[f"entry {i}"] for i in range(8)] == list(range(8))


# -- other positions than the last -------------------------------------------------------------------------------------


def rows_by_place(stream):
    """Every trajectory by (sequence, position), and its kind."""
    found = {}
    for k in range(stream.n_shards):
        shard = stream.shard(k)
        places = zip(shard.index.tolist(), shard.position.tolist(), strict=True)
        found |= dict(zip(places, zip(shard.activations, shard.kind.tolist(), strict=True), strict=True))
    return found


def test_what_is_drawn_are_those_rows_of_all(make_stream, tiny_llama):
    every, drawn = make_stream(positions="all"), make_stream(positions={"sample": 3}, position_seed=4)
    whole, some = rows_by_place(every), rows_by_place(drawn)
    lengths = every.sequences.lengths
    assert set(whole) == {(i, t) for i, n in enumerate(lengths) for t in range(n)}
    assert set(some) == {(i, t) for i in range(N) for t in drawn.positions.of(i)}
    assert all(torch.equal(states, whole[place][0]) for place, (states, _) in some.items())
    assert all(bool(kind & 1) == (place[1] == 0) for place, (_, kind) in whole.items())
    last = make_stream()
    for k in range(last.n_shards):
        shard = last.shard(k)
        for i, n, states in zip(shard.index.tolist(), shard.n_tokens.tolist(), shard.activations, strict=True):
            assert torch.equal(states, whole[i, n - 1][0])
    assert every.n_recorded == drawn.n_recorded == N and every.n_missing() == 0
    shard = every.shard(1)
    assert torch.equal(shard.n_tokens, torch.from_numpy(lengths[shard.index.numpy()]).int())
    assert torch.equal(shard.kind, kinds(shard.activations, shard.position))
    places = zip(shard.index.tolist(), shard.position.tolist(), strict=True)
    assert [every.positions.turns(i)[t] for i, t in places] == every.turns(1).tolist()


@pytest.mark.parametrize("positions", ["all", {"sample": 2}])
def test_sizes_are_known_before_and_a_shard_made_again_has_the_same_bytes(make_stream, positions, monkeypatch):
    stream = make_stream(positions=positions)
    cache = stream.cache
    free = cache.n_bytes(np.arange(N))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    cache.check_free_space()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free - 1))
    with pytest.raises(UserError, match=r"the cache needs .* more .*fewer tokens of each \(`positions`\)"):
        cache.check_free_space()
    for k in range(3):
        stream.shard(k)
        size = cache.path(k).stat().st_size
        assert cache.shard_bytes(k) - 1024 < size <= cache.shard_bytes(k)
    counts = sum(min(n, positions["sample"]) if isinstance(positions, dict) else n for n in stream.sequences.lengths)
    assert stream.n_trajectories() == cache.n_trajectories == counts
    before = shards_of(stream)
    cache.discard(1)
    later = make_stream(positions=positions)
    later.shard(1)
    assert shards_of(later) == before and later.n_recorded == PER_SHARD
    known = ShardStore.from_folder(cache.folder)
    assert known.key == cache.store.key and known.refresh() == {path.name for path in cache.files()}
    for name in known.files:
        known.verify(name)


def test_positions_and_their_seed_are_in_the_key_where_they_count(make_stream):
    def key(**options):
        return make_stream(**options).cache.key

    keys = [key(), key(positions="all"), key(positions={"sample": 1}), key(positions={"sample": 2})]
    assert len({*keys, key(positions={"sample": 2}, position_seed=1)}) == 5
    assert key(positions="last", position_seed=1) == keys[0] and key(positions="all", position_seed=1) == keys[1]


def test_the_canary_knows_a_sequences_tokens(make_stream, monkeypatch, caplog):
    found = []
    monkeypatch.setattr(trajectories, "compare", lambda *args: found.append(compare(*args)) or found[-1])
    for positions in ("all", {"sample": 3}):
        make_stream(positions=positions).shard(1)
        with caplog.at_level(logging.WARNING):
            make_stream(positions=positions).shard(0)
    assert [canary.difference for canary in found] == [0.0, 0.0] and caplog.messages == []
    change_weights(monkeypatch, 1.05)
    stream = make_stream(positions="all")
    stream.cache.discard(0)  # so that shard 1, sequences 8 to 15, is compared
    with pytest.raises(UserError, match=r"sequence (8|9|1[0-5]) recorded again differs"):
        stream.shard(2)


def test_tokens_out_of_place_are_no_shard(make_stream):
    stream = make_stream(positions={"sample": 3})
    shard = stream.shard(0)
    for wrong in (
        replace(shard, position=shard.position.flip(0)),
        replace(shard, position=shard.position + 40),
        replace(shard, position=None),
        replace(shard, index=shard.index.clamp(max=PER_SHARD - 2)),
        replace(shard, index=shard.index.flip(0)),
    ):
        with pytest.raises(ValueError, match=r"position is|index is"):
            stream.cache.write(0, wrong)
    with pytest.raises(ValueError, match=r"index is"):
        make_stream().cache.write(0, shard)


@pytest.mark.parametrize("sizes", [{"n_units": 0}, {"n_sublayers": "six"}, {"dtype": "float64"}, {"n_units": True}])
def test_sizes_that_cannot_be_are_a_damaged_manifest(make_stream, sizes):
    folder = make_stream(positions="all").cache.folder
    contents = json.loads((folder / "manifest.json").read_text())
    contents["made_from"] |= sizes
    contents["key"] = cache_key(contents["made_from"])
    (folder / "manifest.json").write_bytes(seal(contents))
    with pytest.raises(DamagedManifestError, match="its sizes cannot be"):
        ShardStore.from_folder(folder)


# -- the canary --------------------------------------------------------------------------------------------------------


def test_the_same_machine_gives_the_same_bits(make_stream, caplog, monkeypatch):
    make_stream().shard(0)
    found = []
    monkeypatch.setattr(trajectories, "compare", lambda *args: found.append(compare(*args)) or found[-1])
    with caplog.at_level(logging.WARNING):
        later = make_stream()
        later.shard(1)
    assert [canary.difference for canary in found] == [0.0] and caplog.messages == []
    assert later.n_recorded == PER_SHARD  # the canary is not counted


def test_an_empty_or_complete_cache_needs_no_canary(make_stream, monkeypatch):
    monkeypatch.setattr(trajectories, "compare", lambda *args: pytest.fail("nothing to compare with"))
    stream = make_stream()
    for k in range(3):
        stream.shard(k)
    again = make_stream()
    for k in range(3):
        again.shard(k)
    make_stream(cache=None).shard(0)
    assert not again.lm_loaded


def change_weights(monkeypatch, factor):
    """Other numbers from the same files, as other libraries or a broken memory give them."""
    real = LMSource.load

    def load(self, **options):
        model = real(self, **options)
        with torch.no_grad():
            model.base.layers[1].mlp.down_proj.weight.mul_(factor)
        return model

    monkeypatch.setattr(LMSource, "load", load)


def test_other_numbers_are_refused_and_nothing_is_added(make_stream, monkeypatch):
    make_stream().shard(0)
    before = shards_of(make_stream())
    change_weights(monkeypatch, 1.05)
    later = make_stream()
    with pytest.raises(UserError, match=r"sequence \d+ recorded again differs .*prune .*--yes") as caught:
        later.shard(2)
    assert caught.value.exit_code == 2 and str(caught.value).count("\n") == 0
    assert "sublayer" in str(caught.value) and "dir" in str(caught.value)
    assert shards_of(later) == before and later.missing() == [1, 2]
    later.cache.discard(0)  # the cure
    later.shard(2)


def test_the_versions_that_differ_are_named(make_stream, monkeypatch):
    make_stream().shard(0)
    change_weights(monkeypatch, 2.0)
    monkeypatch.setattr(trajectories, "_versions", lambda: {"torch": "99", "transformers": "98"})
    with pytest.raises(UserError, match=r"torch \S+ there, 99 here, transformers \S+ there, 98 here"):
        make_stream().shard(1)


def test_rounding_passes_with_a_line(make_stream, monkeypatch, caplog):
    make_stream(dtype="float32").shard(0)
    change_weights(monkeypatch, 1 + 1e-6)
    with caplog.at_level(logging.WARNING):
        stream = make_stream(dtype="float32")
        stream.shard(1)
    (line,) = caplog.messages
    assert "which is rounding" in line and stream.missing() == [2]


def test_a_damaged_shard_is_no_canary(make_stream):
    first = make_stream()
    for k in (0, 1):
        first.shard(k)
    data = bytearray(first.cache.path(0).read_bytes())
    data[-1] ^= 1
    first.cache.path(0).write_bytes(data)
    make_stream().shard(2)
    first.cache.discard(1)
    make_stream().shard(1)


def test_the_canary_goes_through_the_model_as_it_did_before():
    """The rows of one batch of the shard, and by themselves one batch again, in the same order."""
    lengths = [9, 3, 40, 3, 5, 17, 40, 4]
    for batch_tokens in (16, 64, 128, 10_000):
        rows, is_whole = canary_rows(lengths, batch_tokens)
        assert is_whole
        assert rows in length_sorted_batches(lengths, batch_tokens)
        assert length_sorted_batches([lengths[i] for i in rows], batch_tokens) == [list(range(len(rows)))]


@pytest.mark.parametrize("lm_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_the_tolerance_lies_between_rounding_and_another_model(tiny_llama, make_sequences, lm_dtype, stored):
    """Rounding as between processors: the same sequences one at a time instead of in a batch."""
    dtype, sequences = getattr(torch, stored), list(make_sequences(N))
    model = find_lm(str(tiny_llama)).load(dtype=lm_dtype)
    together = model.record(sequences, batch_tokens=2000, dtype=dtype)
    alone = model.record(sequences, batch_tokens=1, dtype=dtype)
    rounding = compare(alone, together).difference
    with torch.no_grad():
        model.base.layers[0].self_attn.o_proj.weight.mul_(1.2)
    other = compare(model.record(sequences, batch_tokens=2000, dtype=dtype), together).difference
    allowed = tolerance(lm_dtype=lm_dtype, matmul_precision="highest", stored=dtype)
    assert rounding < allowed < other


def test_compare_is_the_largest_relative_distance():
    cached = torch.tensor([[[3.0, 4.0], [6.0, 8.0]], [[1.0, 0.0], [0.0, 0.0]]])
    again = cached.clone()
    assert compare(again, cached) == (0.0, 0, 0)
    again[0, 1] += torch.tensor([0.6, 0.8])
    assert compare(again, cached) == (pytest.approx(0.1), 0, 1)
    again[1, 1, 0] = 1e-3  # where the cache has nothing, anything is other
    assert compare(again, cached)[1:] == (1, 1)


# -- NaN and Inf -------------------------------------------------------------------------------------------------------

WEIGHTS = {  # planted where, and the first sublayer that has it: S = 2 a layer, three layers
    "embedding of one token": ("embed_tokens.weight", 0),
    "Inf in that embedding": ("embed_tokens.weight", 0),
    "norm before attention of layer 0": ("layers.0.input_layernorm.weight", 1),
    "values of layer 0": ("layers.0.self_attn.v_proj.weight", 1),
    "MLP of layer 0": ("layers.0.mlp.down_proj.weight", 2),
    "queries of layer 1": ("layers.1.self_attn.q_proj.weight", 3),
    "Inf in the MLP of layer 1": ("layers.1.mlp.up_proj.weight", 4),
    "output of attention of layer 2": ("layers.2.self_attn.o_proj.weight", 5),
}


def plant(tiny_llama, folder, weight, value, row=None):
    shutil.copytree(tiny_llama, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith(weight))
    tensors[name][0 if row is None else row] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def refuse_certificate(monkeypatch):
    """The certificate looks first, at two sequences; here the recording has to notice by itself."""
    monkeypatch.setattr(TrajectoryStream, "_certify", lambda self, model: None)


@pytest.mark.parametrize("where", WEIGHTS)
def test_what_is_not_finite_is_never_cached(make_stream, tiny_llama, tmp_path, monkeypatch, where):
    refuse_certificate(monkeypatch)
    weight, sublayer = WEIGHTS[where]
    value = float("inf") if "Inf" in where else float("nan")
    row, only = None, None
    if "embed" in weight:  # of a token that ends one sequence and is nowhere else: that one must be named
        sequences = [s.tolist() for s in make_stream().sequences]
        tokens = [token for s in sequences for token in s]
        only, row = next((i, s[-1]) for i, s in enumerate(sequences) if i > PER_SHARD and tokens.count(s[-1]) == 1)
    stream = make_stream(plant(tiny_llama, tmp_path / "planted", weight, value, row))
    with pytest.raises(NonFiniteError) as caught:
        all(stream.shard(k) for k in range(stream.n_shards))
    site = ("resid_pre", "resid_mid")[sublayer % 2]
    message = str(caught.value)
    assert caught.value.exit_code == 3 and f"sublayer {sublayer} ({site} of layer {sublayer // 2})" in message
    assert f"at sequence {only or 0}, " in message
    assert (only or 0) // PER_SHARD in stream.missing() and not list(stream.cache.folder.glob(".shard*"))
    assert all(torch.isfinite(stream.cache.read(k).activations).all() for k in set(range(3)) - set(stream.missing()))


@pytest.mark.parametrize("what", ["computing in float16", "storing in bfloat16"])
def test_an_overflow_is_never_cached(make_stream, tiny_llama, tmp_path, monkeypatch, what):
    refuse_certificate(monkeypatch)
    if what == "computing in float16":
        folder = plant(tiny_llama, tmp_path / "planted", "layers.1.mlp.down_proj.weight", 6e4)
        stream, expected = make_stream(folder, lm_dtype="float16"), "in torch.float16"
    else:  # the largest float32 numbers round to Inf in bfloat16
        folder = plant(tiny_llama, tmp_path / "planted", "embed_tokens.weight", 3.4e38, slice(None))
        stream, expected = make_stream(folder), "stored as torch.bfloat16"
    with pytest.raises(NonFiniteError, match=expected):
        stream.shard(0)
    assert stream.missing() == [0, 1, 2]


# -- the manifest ------------------------------------------------------------------------------------------------------


def test_the_manifest_says_what_recorded_it(make_stream):
    stream = make_stream()
    stream.shard(0)
    manifest = json.loads((stream.cache.folder / "manifest.json").read_text())
    assert manifest["made_by"] == {"lm": stream.lm.label, **trajectories._versions()}
    assert manifest["certificate"] == stream.certificate is not None
    later = make_stream()
    assert later.certificate == stream.certificate and not later.lm_loaded
    assert isinstance(stream._model, LanguageModel) and Path(stream.cache.folder).name.startswith("tiny-llama")
