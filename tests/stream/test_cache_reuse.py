"""No sequence goes through a model twice: a smaller or larger corpus, another order or cut finds what is there."""

import threading

import numpy as np
import pytest
import torch

from rsdyn.lm.source import find_lm
from rsdyn.stream.cache import ShardStore, sequence_keys
from rsdyn.stream.text.tokens import Sequences
from rsdyn.stream.trajectories import TrajectoryStream

PER_SHARD = 8


def part_of(sequences, rows):
    """Some rows of a corpus, in this order, as a corpus of its own."""
    parts = [sequences[i].astype(np.int32) for i in rows]
    offsets = np.cumsum([0, *map(len, parts)]).astype(np.int64)
    return Sequences(np.concatenate(parts), offsets, len(parts), 0, 0, None)


@pytest.fixture(scope="module")
def lm(tiny_llama):
    return find_lm(str(tiny_llama))


@pytest.fixture
def stream_of(lm, make_sequences, tmp_path):
    """The stream of some rows of a text of 60 sequences, opened."""
    text = make_sequences(60)

    def make(rows, **options):
        sequences = part_of(text, rows)
        settings = {"cache_dir": tmp_path / "cache", "shard_sequences": PER_SHARD, "batch_tokens": 128, **options}
        stream = TrajectoryStream(lm, sequences, dtype="float32", **settings)
        stream.open()
        return stream

    return make


def alone(lm, stream):
    """Every trajectory of a stream, each sequence through the model by itself."""
    rows = [stream.sequences[i] for i in range(stream.n_sequences)]
    at = None if stream.positions.is_last else [stream.positions.of(i) for i in range(len(rows))]
    return lm.load().record(rows, positions=at, batch_tokens=1)


def test_more_and_fewer_sequences_of_one_text(stream_of, lm):
    """The issue's own figures, by 20: 26 recorded, then 50 record 24 more, then 15 record none."""
    first = stream_of(range(26))
    first.read()
    assert first.n_recorded == 26
    more = stream_of(range(50))
    assert more.n_missing() == 24 and more.missing() == [3, 4, 5, 6]
    x, index = more.read()
    assert more.n_recorded == 24 and torch.equal(index, torch.arange(50))
    fewer = stream_of(range(15))
    assert fewer.n_missing() == 0 and torch.equal(fewer.read()[0], x[:15])
    assert fewer.n_recorded == 0 and not fewer.lm_loaded
    assert torch.allclose(x, alone(lm, more), atol=1e-5)
    shard = more.shard(3)  # 24 and 25 from the first run, 26 to 31 from the second
    assert torch.equal(shard.index, torch.arange(24, 32)) and torch.equal(shard.activations, x[24:32])
    assert torch.equal(shard.n_tokens, torch.from_numpy(more.sequences.lengths[24:32]).int())


@pytest.mark.parametrize("positions", ["last", "all", {"sample": 3}])
def test_another_order_another_cut_and_partial_overlap(stream_of, lm, positions):
    stream_of(range(20), positions="last" if positions == "last" else "all").read()
    rows = [31, 3, 19, 40, *range(5, 12), 44, 0]
    stream = stream_of(rows, positions=positions, shard_sequences=5)
    known = sum(i < 20 for i in rows) if positions in ("last", "all") else 0  # a sample has positions of its own
    assert stream.n_missing() == len(rows) - known
    x, index = stream.read()
    assert stream.n_recorded == len(rows) - known
    assert torch.equal(index, torch.from_numpy(np.repeat(np.arange(len(rows)), stream.positions.counts)))
    assert torch.allclose(x, alone(lm, stream), atol=1e-5)
    for k in range(stream.n_shards):
        shard = stream.shard(k)
        numbers = range(*stream.bounds(k))
        lengths = np.repeat(stream.sequences.lengths[list(numbers)], stream.positions.counts[list(numbers)])
        assert shard.n_tokens.tolist() == lengths.tolist()
        if positions != "last":
            assert shard.position.tolist() == np.concatenate([stream.positions.of(i) for i in numbers]).tolist()
            assert len(shard.kind) == len(shard.index)


def test_a_control_and_other_positions_are_other_sequences(stream_of):
    stream_of(range(10)).read()
    assert stream_of(range(10), positions="all").n_missing() == 10
    shuffled = stream_of(range(10))
    text = shuffled.sequences.shuffled(0)
    assert TrajectoryStream(
        shuffled.lm, text, cache_dir=shuffled.cache.root, dtype="float32", batch_tokens=128
    ).n_missing() == sum(not np.array_equal(a, b) for a, b in zip(text, shuffled.sequences, strict=True))


@pytest.mark.parametrize("change", [{"batch_tokens": 64}, {"lm_dtype": "bfloat16"}, {"layout": "sorted"}])
def test_another_way_of_recording_is_another_folder(stream_of, change):
    stream_of(range(10)).read()
    assert stream_of(range(10), **change).n_missing() == 10


def test_a_sequence_that_a_text_has_three_times(stream_of):
    """Each time is recorded by itself, so that the result does not depend on which process is first."""
    rows = [0, 1, 0, 2, 3, 4, 5, 6, 0, 7]
    stream = stream_of(rows)
    assert len({key.tobytes() for key in stream.cache.keys}) == len(rows)
    x, _ = stream.read()
    assert stream.n_recorded == len(rows) and torch.allclose(x[0], x[8], atol=1e-5)
    assert stream_of([0, 0]).n_missing() == 0 and stream_of([0] * 4).n_missing() == 1


def test_a_bit_of_a_sequence_more_or_less_is_another():
    """Tokens and positions in one hash: what ends one must not pass for what begins the other."""
    ids = [np.array(tokens) for tokens in ([1, 2], [1, 2, 0], [1], [2, 1], [1, 2])]
    marks = [b"last", b"last", b"last", b"last", b"all"]
    keys = sequence_keys(ids, marks)
    assert keys.shape == (5, 16) and len({key.tobytes() for key in keys}) == 5
    again = sequence_keys([tokens.astype(np.int64) for tokens in ids], marks)
    assert np.array_equal(keys, again)  # whatever the integers are stored as


def test_two_runs_of_different_sizes_at_once_record_nothing_twice(stream_of):
    runs = [stream_of(range(44)), stream_of(range(30))]
    threads = [threading.Thread(target=run.read) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(run.n_recorded for run in runs) == 44 and stream_of(range(44)).n_missing() == 0


def test_a_damaged_shard_of_another_text_costs_only_what_is_wanted_of_it(stream_of):
    whole = stream_of(range(24))
    x, _ = whole.read()
    path = whole.cache.path(1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    fewer = stream_of(range(10))  # two of the eight
    with pytest.warns(UserWarning, match=rf"{path.name} in .* is damaged: its checksum .* is recorded again"):
        again, _ = fewer.read()
    assert fewer.n_recorded == 2 and torch.allclose(again, x[:10], atol=1e-5)
    later = stream_of(range(24))
    assert later.n_missing() == 6 and torch.allclose(later.read()[0], x, atol=1e-5)


def test_a_damaged_header_of_another_text_is_said_at_the_start(stream_of):
    whole = stream_of(range(24))
    whole.read()
    whole.cache.path(1).write_bytes(b"nothing")
    fewer = stream_of(range(10))
    (note,) = fewer.cache.open()
    assert whole.cache.path(1).name in note and "prune --damaged --yes" in note
    fewer.read()
    assert fewer.n_recorded == 2


def test_the_canary_looks_at_what_another_text_recorded(stream_of, monkeypatch, caplog):
    """Whole batches where there are some, which give the same bits; else a part of one, within rounding."""
    from rsdyn.stream import trajectories
    from rsdyn.stream.drift import compare

    stream_of(range(16)).read()
    found = []
    monkeypatch.setattr(trajectories, "compare", lambda *args: found.append(compare(*args)) or found[-1])
    stream_of([3, 40, 41]).read()  # one sequence of what went together: bits may differ, and nobody is told
    stream_of(range(30)).read()
    assert len(found) == 2 and found[0].difference < 1e-5 and found[1].difference == 0 and caplog.messages == []


def test_a_killed_recording_of_a_part_is_made_again_with_the_same_bytes(stream_of):
    stream_of(range(10)).read()
    rest = stream_of(range(16))
    rest.read()
    files = {path: path.read_bytes() for path in rest.cache.files()}
    assert len(files) == 3  # 0 to 7, 8 and 9, 10 to 15
    newest = max(files, key=lambda path: path.stat().st_mtime_ns)
    newest.unlink()
    again = stream_of(range(16))
    assert again.n_missing() == 6
    again.read()
    assert {path: path.read_bytes() for path in again.cache.files()} == files


def test_names_of_one_model(stream_of):
    """Another label finds the folder that the first made: the weights count, not what they are called."""
    stream = stream_of(range(4))
    stream.read()
    store = stream.cache.store
    fields = {name: value for name, value in store.fields.items() if name not in ("n_sublayers", "n_units", "dtype")}
    sizes = {"n_sublayers": stream.n_sublayers, "n_units": stream.n_units, "dtype": "float32"}
    again = ShardStore(store.root, fields, label="another name", **sizes)
    assert again.folder == store.folder and again.refresh() == {stream.cache.path(0).name}
