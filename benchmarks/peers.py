"""Other ways to record a residual stream, each as its own documentation shows it.

Each takes an open model and gives ``run(sequences, batch)``: the last token's stream ``(N, S, D)`` at every sublayer,
``batch`` sequences at a time in the order given. TransformerLens and nnsight are there where they are installed.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsdyn.lm.model import LanguageModel

Run = Callable[[Sequence[np.ndarray], int], Tensor]


def _batches(sequences: Sequence[np.ndarray], batch: int, side: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Where each batch belongs, its ids ``(B, T)`` and which of them are tokens, padded on a side."""
    for start in range(0, len(sequences), batch):
        some = sequences[start : start + batch]
        ids = torch.zeros(len(some), max(map(len, some)), dtype=torch.int64)
        real = torch.zeros_like(ids)
        for row, (sequence, to) in enumerate(zip(some, map(len, some), strict=True)):
            columns = slice(0, to) if side == "right" else slice(ids.shape[1] - to, None)
            ids[row, columns] = torch.from_numpy(np.asarray(sequence, dtype=np.int64))
            real[row, columns] = 1
        yield slice(start, start + len(some)), ids, real


def transformers(lm: LanguageModel) -> Run:
    """The causal LM with hooks, padded on the left with a mask and positions, as generation has it."""

    @torch.inference_mode()
    def run(sequences: Sequence[np.ndarray], batch: int) -> Tensor:
        out = torch.empty(len(sequences), lm.n_sublayers, lm.n_units, dtype=lm.dtype)
        for where, ids, real in _batches(sequences, batch, "left"):

            def take(s: int, where: slice = where) -> Callable[..., None]:
                def hook(module: Any, args: tuple[Tensor, ...]) -> None:
                    out[where, s] = args[0][:, -1]

                return hook

            handles = [m.register_forward_pre_hook(take(s)) for s, m in enumerate(lm.sites.modules)]
            if batch == 1:
                lm.causal(input_ids=ids)
            else:
                lm.causal(input_ids=ids, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp(min=0))
            for handle in handles:
                handle.remove()
        return out

    return run


def bridge(lm: LanguageModel) -> Any:
    """TransformerLens' model over a copy of the weights."""
    from transformer_lens.model_bridge import TransformerBridge

    from rsdyn.lm.source import find_lm

    with tempfile.TemporaryDirectory() as folder:
        lm.config.save_pretrained(folder)
        return TransformerBridge.boot_transformers(
            folder, hf_model=copy.deepcopy(lm.causal), tokenizer=find_lm().tokenizer(), device="cpu", dtype=lm.dtype
        )


def transformer_lens(lm: LanguageModel) -> Run:
    """``run_with_cache`` with a filter of names; padded on the right, where a causal model does not look."""
    model = bridge(lm)
    names = [f"blocks.{i}.hook_resid_{site}" for i in range(lm.n_layers) for site in ("pre", "mid")]

    @torch.inference_mode()
    def run(sequences: Sequence[np.ndarray], batch: int) -> Tensor:
        out = torch.empty(len(sequences), lm.n_sublayers, lm.n_units, dtype=lm.dtype)
        for where, ids, real in _batches(sequences, batch, "right"):
            _, cache = model.run_with_cache(ids, names_filter=names, return_type=None)
            rows, last = torch.arange(len(ids)), real.sum(1) - 1
            for s, name in enumerate(names):
                out[where, s] = cache[name][rows, last]
        return out

    return run


def nnsight(lm: LanguageModel) -> Run:
    """A ``trace`` that saves the last token at each site."""
    from nnsight import NNsight

    model = NNsight(copy.deepcopy(lm.causal))  # it leaves wrappers around every module

    @torch.inference_mode()
    def run(sequences: Sequence[np.ndarray], batch: int) -> Tensor:
        out = torch.empty(len(sequences), lm.n_sublayers, lm.n_units, dtype=lm.dtype)
        for where, ids, real in _batches(sequences, batch, "right"):
            rows, last = torch.arange(len(ids)), real.sum(1) - 1
            with model.trace(input_ids=ids):
                streams = [].save()  # type: ignore[attr-defined]
                for layer in model.model.layers:
                    streams.append(layer.input[rows, last].clone())
                    streams.append(layer.post_attention_layernorm.input[rows, last].clone())
            out[where] = torch.stack(streams, 1)
        return out

    return run


PEERS: dict[str, Callable[[LanguageModel], Run]] = {
    "transformers": transformers,
    "transformer_lens": transformer_lens,
    "nnsight": nnsight,
}


def installed() -> dict[str, Callable[[LanguageModel], Run]]:
    """The ways that are at hand here; says which are not."""
    found = {name: build for name, build in PEERS.items() if importlib.util.find_spec(name) is not None}
    for name in PEERS.keys() - found.keys():
        print(f"{name}: not installed, skipped.\n")
    return found
