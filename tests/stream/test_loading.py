"""What the DataModules share: owners of shards, and a generator with a length."""

import numpy as np
from torch.utils.data import DataLoader

from rsdyn.stream.sharding import Batches, balanced_owners


def test_balanced_owners():
    counts = np.array([5, 5, 5, 5, 1, 1])
    owners = balanced_owners(counts, 2)
    assert np.bincount(owners, weights=counts).tolist() == [11, 11]
    assert balanced_owners(np.zeros(4, int), 2).tolist() == [0, 1, 0, 1]


def test_any_shard_has_one_owner_and_the_loads_differ_by_no_more_than_a_shard():
    rng = np.random.default_rng(0)
    for world_size in (1, 2, 3, 7):
        counts = rng.integers(0, 50, size=40)
        owners = balanced_owners(counts, world_size)
        assert len(owners) == 40 and set(owners) == set(range(world_size))
        loads = np.bincount(owners, weights=counts, minlength=world_size)
        assert loads.max() - loads.min() <= counts.max()


def test_a_generator_has_a_length_and_begins_anew():
    loader = DataLoader(Batches(lambda: iter("abc"), 3), batch_size=None)
    assert len(loader) == 3
    assert [*loader] == [*loader] == ["a", "b", "c"]
