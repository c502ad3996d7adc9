"""What a run costs, from shapes alone: operations and memory of recording, training and measuring.

Counts of parameters, of operations and of bytes on disk are exact (their tests compare them with a counter, a module
and files); memory for what comes and goes during a run is an estimate, and is called so wherever it is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from torchmetrics import Metric

from rsdyn.lm.batches import PACKED, SORTED, length_sorted_batches
from rsdyn.lm.model import LanguageModel, longrope_length
from rsdyn.lm.source import LMSource
from rsdyn.lm.weights import empty_model
from rsdyn.stream.datamodule import KEPT_BYTES

# Python with torch, Lightning, transformers, datasets and W&B, before any model: 0.6 GiB resident (torch 2.13 on a
# CPU, a run on the embedded model). With CUDA a context of about half a GiB comes on top, on the GPU.
LIBRARIES = int(0.6 * 2**30)
_BYTES = {"32-true": 4, "64-true": 8, "bf16-true": 2, "16-mixed": 4, "bf16-mixed": 4}


class ForwardCost(NamedTuple):
    """Operations of recording a batch of ``B`` sequences, padded to ``T`` tokens: ``B (linear T + attention T²)``.

    A multiplication and an addition are two operations. Attention counts all ``T²`` pairs, as the kernels that do not
    skip what a causal mask hides. ``apart`` is the length that longrope keeps batches apart at.
    """

    linear: float
    attention: float
    apart: int | None = None

    def of(self, lengths: Sequence[int], batch_tokens: int, layout: str = SORTED) -> float:
        """Operations for sequences of these lengths, batched as :meth:`LanguageModel.record` does in a layout."""
        if layout == PACKED:
            return sum(self.linear * n + self.attention * n**2 for n in lengths)
        total = 0.0
        for rows in length_sorted_batches(lengths, batch_tokens, self.apart):
            longest = max(lengths[i] for i in rows)
            total += len(rows) * (self.linear * longest + self.attention * longest**2)
        return total


def forward_cost(lm: LMSource) -> ForwardCost:
    """The operations of recording, from the model's shapes: the forward stops at the last site of the last layer.

    Every matrix of a layer is applied once to each token, a mixture of experts' to as many as are chosen. Embeddings
    are looked up, and norms, biases and activation functions are left out: together under 1 % in real sizes.
    """
    config = lm.config.get_text_config()
    base = empty_model(lm.config, trust_remote_code=lm.trust_remote_code)
    sites = LanguageModel(base).sites
    reached = [*sites.layers[:-1], *([sites.attention[-1]] if len(sites.names) > 1 else [])]
    linear = _linear_flops(reached, config)
    heads = int(getattr(config, "num_attention_heads", None) or 0)  # a state space model has none
    head_size = int(getattr(config, "head_dim", None) or lm.n_units // max(1, heads))
    n_attending = lm.n_layers - (len(sites.names) == 1)
    return ForwardCost(linear, 4.0 * heads * head_size * n_attending, longrope_length(config))


def jacobian_flops(lm: LMSource) -> float:
    """Operations of one text's derivatives: each sublayer once forward and once backward for each of its ``D`` rows.

    All layers are, the last one to its end. Attention, whose context is shared, and norms are not counted.
    """
    layers = LanguageModel(empty_model(lm.config, trust_remote_code=lm.trust_remote_code)).sites.layers
    return 2 * _linear_flops(layers, lm.config.get_text_config()) * lm.n_units


def _linear_flops(modules: Iterable[nn.Module], config: Any) -> float:
    """Operations of all matrices in modules on one token."""
    chosen = getattr(config, "num_experts_per_tok", None)
    total = 0.0
    for parameter in (p for module in modules for p in module.parameters() if p.ndim > 1):
        share = chosen / parameter.shape[0] if parameter.ndim == 3 and chosen else 1.0  # (experts, in, out)
        total += 2 * parameter.numel() * share
    return total


def spectrum_flops(n_units: int, n_sublayers: int) -> float:
    """About what eigenvalues (10 D^3), singular values (3 D^3) and exponents (two QR sweeps, 8 D^3) take."""
    return 21.0 * n_units**3 * n_sublayers


def training_flops(widths: Sequence[int], n_vectors: int) -> float:
    """Operations of a training step on ``n_vectors``: forward, and backward but for the input's own gradient.

    ``widths`` are the encoder's; the decoder mirrors them. LayerNorm, ReLU and Adam are left out.
    """
    maps = [a * b for a, b in pairwise(widths)]
    return float(n_vectors) * (6 * 2 * sum(maps) - 2 * maps[0])


def evaluation_flops(widths: Sequence[int], n_vectors: int) -> float:
    """Operations of a forward alone on ``n_vectors``."""
    return float(n_vectors) * 2 * 2 * sum(a * b for a, b in pairwise(widths))


def optimiser_bytes(n_parameters: int, precision: str) -> int:
    """Weights, gradients and Adam's two moments, in the format that Lightning's ``precision`` keeps them in."""
    return 4 * n_parameters * _BYTES[precision]


def forward_bytes(lm: LMSource, *, dtype_bytes: int, batch_tokens: int, at_once: int) -> int:
    """About what the activations of a forward take, ``at_once`` batches side by side: the MLP's are the largest."""
    inner = int(getattr(lm.config.get_text_config(), "intermediate_size", None) or 4 * lm.n_units)
    return at_once * batch_tokens * (6 * lm.n_units + 3 * inner) * dtype_bytes


def shuffle_bytes(*, corpus_bytes: int, window_bytes: int, vector_bytes: int, kept: bool) -> int:
    """At most what the training vectors of a process take in memory, and the order that they come in.

    ``corpus_bytes`` are those of all it has, ``window_bytes`` of what is shuffled together; ``kept`` says whether they
    may stay in memory (``KEPT_BYTES`` of the DataModule). Batches, and what a window leaves over, are not counted.
    """
    held = min(corpus_bytes, max(window_bytes, KEPT_BYTES if kept else 0))
    return held + 2 * 8 * (window_bytes // vector_bytes)  # the order, and the order on its way from numpy's generator


def covariance_bytes(n_units: int, spaces: int) -> int:
    """About what PCA takes: a covariance in float64 for each space, a new part, and the eigenvectors' workspace."""
    return 8 * n_units**2 * (2 * spaces + 3)


def state_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters, buffers and metrics; a metric keeps its starting values beside them."""
    tensors: list[Any] = [*module.parameters(), *module.buffers()]
    for part in module.modules():
        if isinstance(part, Metric):
            tensors += [t for t in part._defaults.values() if isinstance(t, torch.Tensor)] * 2
    return sum(t.numel() * t.element_size() for t in tensors)
