"""A small cache entry of ten sequences, and the shards that go into it."""

import torch

from rsdyn.stream.cache import Shard, TrajectoryCache

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
