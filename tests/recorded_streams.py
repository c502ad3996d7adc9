"""What lies in a cache, read with safetensors alone: the trajectories of a corpus, in its order."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def recorded(root: str | Path) -> Tensor:
    """``(N, S, D)``, one trajectory per sequence, of the one corpus that lies below ``root``."""
    [index] = Path(root).rglob("corpora/*.safetensors")
    found = {}
    for path in index.parents[1].glob("shard-*.safetensors"):
        shard = load_file(path)
        assert shard["trajectories"].eq(1).all()
        found |= {bytes(key.tolist()): state for key, state in zip(shard["keys"], shard["activations"], strict=True)}
    keys = load_file(index)["keys"]
    assert len(found) == len(keys), "each sequence is recorded once, and nothing else is there"
    return torch.stack([found[bytes(key.tolist())] for key in keys])
