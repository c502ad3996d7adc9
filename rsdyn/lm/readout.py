"""Read states of the stream as next-token distributions, through the model's own final norm and head or a lens.

A vocabulary has tens of thousands of tokens, so the logits of all sublayers are never held: some sequences at one
sublayer per thread at a time, of which a few numbers are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rsdyn.dynamics.readout import Readout, commit_depth
from rsdyn.errors import NonFiniteError, UserError
from rsdyn.lm.lens import JacobianLens
from rsdyn.lm.model import LanguageModel
from rsdyn.threads import side_by_side

BLOCK_BYTES = 1 << 24  # of logits that are made together; about four such blocks are held per thread


class Lens(Protocol):
    """Carries a state from a sublayer to the end of the depth, where the model's final norm and head read it."""

    @property
    def name(self) -> str:
        """What it is called, for people."""
        ...

    def reads(self, sublayer: int) -> bool:
        """Whether it can read there."""
        ...

    def transport(self, sublayer: int, states: Tensor) -> Tensor:
        """States ``(..., D)`` at a sublayer, as they would stand behind the last layer."""
        ...


@dataclass(frozen=True)
class LogitLens:
    """A state as it is (nostalgebraist 2020)."""

    name: str = "logit lens"

    def reads(self, sublayer: int) -> bool:
        return True

    def transport(self, sublayer: int, states: Tensor) -> Tensor:
        return states


@dataclass(frozen=True)
class StreamJacobianLens:
    """A Jacobian lens, which reads behind whole layers, at the sublayers of a stream."""

    lens: JacobianLens
    sites_per_layer: int
    name: str = "J-lens"

    def reads(self, sublayer: int) -> bool:
        layer, site = divmod(sublayer, self.sites_per_layer)
        return site == 0 and layer - 1 in self.lens.j

    def transport(self, sublayer: int, states: Tensor) -> Tensor:
        return self.lens.transport(sublayer // self.sites_per_layer - 1, states)


@dataclass(frozen=True)
class AffineLens:
    """A given affine map per sublayer, such as a tuned lens (Belrose et al. 2023).

    Attributes:
        weight: ``(S, D, D)``; a state ``h`` is read as ``weight h + bias``.
        bias: ``(S, D)``.
    """

    weight: Tensor
    bias: Tensor
    name: str = "affine lens"

    def reads(self, sublayer: int) -> bool:
        return True

    def transport(self, sublayer: int, states: Tensor) -> Tensor:
        weight, bias = (t[sublayer].to(states.device, torch.float32) for t in (self.weight, self.bias))
        return states.to(torch.float32) @ weight.T + bias


def open_lens(path: str | None, *, n_sublayers: int, n_units: int, sites_per_layer: int) -> Lens:
    """The lens of a file, for a stream of these sizes; None is the logit lens.

    A ``.safetensors`` file holds an affine map per sublayer, ``weight (S, D, D)`` and ``bias (S, D)``; any other a
    Jacobian lens in the published layout. Raises ``UserError`` for a file that is neither, or is of another model.
    """
    if path is None:
        return LogitLens()
    file = Path(path).expanduser()
    if file.suffix == ".safetensors":
        return _affine(file, n_sublayers, n_units)
    lens = JacobianLens.load(file)
    n_layers = n_sublayers // sites_per_layer
    if lens.d_model != n_units:
        raise UserError(f"{file}: a lens of {lens.d_model} units, and this model has {n_units}. Fit one for it.")
    if lens.source_layers[-1] > n_layers - 1:
        raise UserError(
            f"{file}: a lens of layers up to {lens.source_layers[-1]}, and this model has {n_layers}, from 0 on. Fit "
            "one for this model."
        )
    return StreamJacobianLens(lens, sites_per_layer)


def _affine(file: Path, n_sublayers: int, n_units: int) -> AffineLens:
    if not file.is_file():
        raise UserError(f"{file}: no such file.")
    try:
        with safe_open(file, framework="pt") as content:
            missing = {"weight", "bias"} - set(content.keys())
            if missing:
                raise UserError(f"{file}: not an affine lens; it lacks {', '.join(sorted(missing))}.")
            weight, bias = (content.get_tensor(name).to(torch.float32) for name in ("weight", "bias"))
    except SafetensorError as error:
        raise UserError(f"{file}: not a safetensors file ({error}).") from error
    wanted = (n_sublayers, n_units, n_units)
    if weight.shape != wanted or bias.shape != wanted[:2]:
        raise UserError(
            f"{file}: weight {tuple(weight.shape)} and bias {tuple(bias.shape)}, and this model's stream takes "
            f"{wanted} and {wanted[:2]}: an affine map per sublayer. Give a lens of this model."
        )
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise UserError(f"{file}: it holds NaN or infinities.")
    return AffineLens(weight, bias)


@torch.inference_mode()
def stream_readout(lm: LanguageModel, states: Tensor, final: Tensor, lens: Lens) -> Readout:
    """What trajectories say at each sublayer, against what they say at the end.

    Args:
        lm: with its head.
        states: ``(N, S, D)``, at the sublayers from 0 on.
        final: ``(N, D)``, behind the last layer.
        lens: how they are read; NaN, and rank -1, where it does not, and where what it reads is beyond the model's
            number format.

    Returns:
        As :func:`rsdyn.dynamics.readout.readout`; ``commit`` is over the sublayers that the lens reads, ``S`` where
        the top token is not the final one at the last of them. On the CPU.

    Raises ``NonFiniteError`` where the model's own distribution is NaN, as half precision can make it.
    """
    n, s, _ = states.shape
    reads = [k for k in range(s) if lens.reads(k)]
    shape = (n, s)
    kl, entropy, probability = (torch.full(shape, torch.nan) for _ in range(3))
    rank, agrees = torch.full(shape, -1, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    tops = torch.empty(n, dtype=torch.int64)
    size = max(1, BLOCK_BYTES // (4 * lm.config.vocab_size))
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        end = lm.log_probs(final[rows].to(lm.device, lm.dtype))
        if end.isnan().any():
            raise NonFiniteError(
                f"readout: the next-token distribution of {lm.name} is NaN in {lm.dtype}. Compute in a wider type "
                "(dtype=float32)."
            )
        top, probs = end.argmax(-1), end.exp()
        tops[rows] = top.cpu()
        sure = torch.linalg.vecdot(probs, end.clamp(min=torch.finfo(end.dtype).min))  # of p log p
        work = partial(_compare_at, lm, lens, states[rows], top, probs, sure)
        for k, found in zip(reads, side_by_side(work, reads, lm.device), strict=True):
            for out, value in zip((kl, entropy, rank, probability), found, strict=True):
                out[rows, k] = value.to("cpu", out.dtype)
            agrees[rows, k] = rank[rows, k] == 0
    commit = torch.full((n,), s)
    if reads:
        places = torch.tensor([*reads, s])
        commit = places[commit_depth(agrees[:, reads])]
    return Readout(kl, entropy, rank, probability, agrees, commit, tops)


@torch.inference_mode()  # a thread has its own mode
def _compare_at(
    lm: LanguageModel, lens: Lens, states: Tensor, top: Tensor, probs: Tensor, sure: Tensor, sublayer: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`_compare` of states ``(n, S, D)`` at a sublayer."""
    logits = lm.logits(lens.transport(sublayer, states[:, sublayer].to(lm.device)).to(lm.dtype))
    return _compare(logits, top, probs, sure)


def _compare(logits: Tensor, top: Tensor, probs: Tensor, sure: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL from ``probs``, entropy, and rank and probability of ``top``, ``(n,)`` each, of logits ``(n, V)``."""
    here = logits.gather(1, top[:, None])
    rank = (logits > here).sum(1, dtype=torch.int32)  # twice as fast as in int64
    highest = logits.amax(1, keepdim=True)
    logits = (logits - highest).clamp_(min=-1e4)  # of a probability below any number; 0 x inf would be NaN
    weights = logits.exp()
    total = weights.sum(1)
    rank = torch.where(total.isfinite(), rank, -1)  # to NaN nothing is larger
    log_total = total.log()
    entropy = log_total - torch.linalg.vecdot(weights, logits) / total
    kl = sure - torch.linalg.vecdot(probs, logits) + log_total
    return kl.clamp(min=0), entropy, rank, (here - highest).squeeze(1).exp() / total


class TopTokens(NamedTuple):
    """The likeliest tokens at each sublayer and at the end.

    Attributes:
        tokens: ``(S + 1, k)`` int64, likeliest first; -1 where the lens does not read.
        probability: ``(S + 1, k)``; NaN there.
    """

    tokens: Tensor
    probability: Tensor


@torch.inference_mode()
def top_tokens(lm: LanguageModel, states: Tensor, final: Tensor, lens: Lens, k: int = 5) -> TopTokens:
    """The ``k`` likeliest tokens of one trajectory ``(S, D)`` at each sublayer, and at its end ``(D,)``."""
    k = min(k, lm.config.vocab_size)
    tokens = torch.full((len(states) + 1, k), -1, dtype=torch.int64)
    probability = torch.full((len(states) + 1, k), torch.nan)
    reads = [s for s in range(len(states)) if lens.reads(s)]
    ends = [lens.transport(s, states[s].to(lm.device)).to(lm.dtype) for s in reads] + [final.to(lm.device, lm.dtype)]
    rows = max(1, BLOCK_BYTES // (4 * lm.config.vocab_size))
    parts = [lm.log_probs(torch.stack(ends[i : i + rows])).topk(k) for i in range(0, len(ends), rows)]
    places = torch.tensor([*reads, len(states)])
    tokens[places] = torch.cat([best.indices for best in parts]).cpu()
    probability[places] = torch.cat([best.values for best in parts]).exp().cpu()
    return TopTokens(tokens, probability)
