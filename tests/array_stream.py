"""A stream whose trajectories are given as one array."""

import torch

from rsdyn.stream.cache import Shard


class ArrayStream:
    """A stream whose trajectories ``(N, S, D)`` are given, in shards of 16."""

    def __init__(self, x, shard_sequences=16):
        self.x = x
        self.n_sequences, self.n_sublayers, self.n_units = x.shape
        self.dtype, self.device, self.cache = x.dtype, torch.device("cpu"), None
        self.shard_sequences = shard_sequences
        self.n_shards = -(-len(x) // shard_sequences)

    def bounds(self, k):
        return k * self.shard_sequences, min((k + 1) * self.shard_sequences, self.n_sequences)

    def rows_of(self, k, sequences):
        return torch.from_numpy(sequences - self.bounds(k)[0])

    def turns(self, k):
        return None  # one trajectory per sequence

    def shard(self, k, on_record=None):
        start, stop = self.bounds(k)
        n = stop - start
        return Shard(self.x[start:stop], torch.arange(start, stop), torch.full((n,), 5, dtype=torch.int32))
