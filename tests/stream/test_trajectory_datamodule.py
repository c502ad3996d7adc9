"""Whole trajectories: each once a pass, in the corpus' order, whatever the processes and the tokens of a sequence."""

import pytest
import torch

from rsdyn.errors import UserError
from rsdyn.lm.source import find_lm
from rsdyn.stream.text.positions import BOS, sequence_of
from rsdyn.stream.trajectories import TrajectoryStream
from rsdyn.stream.trajectory_datamodule import TrajectoryDataModule

POSITIONS = pytest.mark.parametrize("positions", ["all", {"sample": 3}])


@pytest.fixture
def make_stream(tiny_llama, make_sequences, tmp_path):
    def make(n=45, cache=True, **options):
        folder = tmp_path / "cache" if cache else None
        options = {"shard_sequences": 8, "batch_tokens": 256, **options}
        stream = TrajectoryStream(find_lm(str(tiny_llama)), make_sequences(n), cache_dir=folder, **options)
        stream.open()
        return stream

    return make


def test_whole_trajectories_of_the_first_sequences(make_stream):
    stream = make_stream()
    data = TrajectoryDataModule(stream, samples=21, passes=2)
    first, second = data.test_dataloader()
    given = [list(first), list(second)]
    for batches in given:
        assert torch.equal(torch.cat([b.sequence for b in batches]), torch.arange(21))
    assert stream.n_recorded == 24 and stream.n_missing(21) == 0 and stream.n_missing() == 45 - 24
    whole = torch.cat([stream.shard(k).activations for k in range(3)])[:21]
    assert torch.equal(torch.cat([b.activations for b in given[1]]), whole)


def test_processes_share_the_sequences_out(make_stream):
    stream = make_stream()
    seen = []
    for rank in range(2):
        data = TrajectoryDataModule(stream, samples=37)
        data.set_process(rank, 2)
        assert data.n_own_missing() > 0
        (loader,) = data.test_dataloader()
        seen += [int(i) for batch in loader for i in batch.sequence]
    assert sorted(seen) == list(range(37))
    with pytest.raises(UserError, match="6 processes for 5 shards"):
        data.set_process(0, 6)


@POSITIONS
def test_a_pass_gives_the_first_sequences_in_pieces_with_their_numbers(make_stream, positions):
    stream = make_stream(positions=positions)
    data = TrajectoryDataModule(stream, samples=21, passes=1)
    (loader,) = data.test_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) and max(len(b.activations) for b in batches) <= 8
    shards = [stream.shard(k) for k in range(stream.n_shards)]
    x, index = torch.cat([s.activations for s in shards]), torch.cat([s.index for s in shards])
    rows = index < 21
    assert torch.equal(torch.cat([b.activations for b in batches]), x[rows])
    assert torch.equal(torch.cat([b.sequence for b in batches]), index[rows])
    number = torch.cat([b.number for b in batches])
    assert len(number.unique()) == len(number) and torch.equal(sequence_of(number), index[rows])
    assert stream.n_recorded == 45  # by whole shards, and the rest for the comparison
    assert int(sum((b.kind & BOS > 0).sum() for b in batches)) == sum(
        bool((stream.positions.of(i) == 0).any()) for i in range(21)
    )


@POSITIONS
def test_without_a_cache_a_second_pass_records_several_tokens_again(make_stream, positions):
    stream = make_stream(n=20, cache=False, positions=positions)
    data = TrajectoryDataModule(stream, passes=2)
    first, second = (list(loader) for loader in data.test_dataloader())
    pairs = [*zip(first, second, strict=True)]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs) and not data._kept
    assert stream.n_recorded == 40
