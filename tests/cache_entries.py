"""A small cache entry of ten sequences, and the shards that go into it."""

import numpy as np
import torch

from rsdyn.stream.cache import Shard, TrajectoryCache, sequence_keys

N, S, D, PER_SHARD = 10, 4, 6, 4
FIELDS = {"lm": "tiny", "weights": "xxh3 0", "tokens": "1", "condition": "original"}


def new_cache(root, fields=None, *, n_sequences=N, first=0, **options):
    """A cache of sequences ``first`` to ``first + n_sequences`` of an endless text."""
    sizes = {"n_sublayers": S, "n_units": D, "shard_sequences": PER_SHARD, **options}
    made_from = {**FIELDS, **(fields or {})}
    corpus = {name: made_from.pop(name) for name in ("tokens", "text") if name in made_from}
    which = range(first, first + n_sequences)
    keys = sequence_keys((np.array([i, 3]) for i in which), (b"last" for _ in which))
    return TrajectoryCache(
        root, made_from, label=f"{made_from['lm']}-{made_from['condition']}", keys=keys, corpus=corpus, **sizes
    )


def shard_of(cache, k):
    start, stop = cache.bounds(k)
    generator = torch.Generator().manual_seed(k)
    activations = torch.randn(stop - start, S, D, generator=generator).to(cache.dtype)
    return Shard(activations, torch.arange(start, stop), torch.full((stop - start,), 7, dtype=torch.int32))
