"""What the stream says at each depth, beside what it says at the end (METHOD section 13).

The log-probabilities come from a lens: the model's own final norm and head on each sublayer's state (the logit lens),
or another map to the last state. Here they are only compared.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_NORMALISED = 0.1  # by which the logarithm of a sum of probabilities may miss 0, in half precision too


class Readout(NamedTuple):
    """The readout of each sublayer against the final one.

    Attributes:
        kl: ``(N, S)``, KL(final || here) in nats.
        entropy: ``(N, S)``, of the distribution here, in nats.
        rank: ``(N, S)`` int64, of the final top token here; 0 is first.
        probability: ``(N, S)``, of the final top token here.
        agrees: ``(N, S)`` bool, whether the top token here is the final one.
        commit: ``(N,)`` int64, the first sublayer from which the top token stays the final one; ``S`` where it is not
            so at the last sublayer either.
        top: ``(N,)`` int64, the final top token.
    """

    kl: Tensor
    entropy: Tensor
    rank: Tensor
    probability: Tensor
    agrees: Tensor
    commit: Tensor
    top: Tensor


def readout(final_log_probs: Tensor, log_probs: Tensor) -> Readout:
    """Compare the readout at each sublayer with the final distribution.

    Args:
        final_log_probs: ``(N, V)``, natural logarithms of probabilities.
        log_probs: ``(N, S, V)``, the same at each sublayer.

    Half precision is computed in float32.

    Raises:
        ValueError: for shapes that do not belong together, and for what are no logarithms of probabilities, such as
            logits, probabilities or NaN.
    """
    if final_log_probs.ndim != 2 or log_probs.ndim != 3 or log_probs.shape[::2] != final_log_probs.shape:
        raise ValueError(
            f"final_log_probs {tuple(final_log_probs.shape)} and log_probs {tuple(log_probs.shape)}: give (N, V) and "
            "(N, S, V)."
        )
    final_log_probs, log_probs = _log_probs("final_log_probs", final_log_probs), _log_probs("log_probs", log_probs)
    probs = final_log_probs.exp()[:, None]
    # a token of probability 0 at the end counts for nothing, whatever it has here
    terms = torch.where(probs > 0, probs * (final_log_probs[:, None] - log_probs), 0.0)
    top = final_log_probs.argmax(-1)
    here = log_probs.gather(-1, top[:, None, None].expand(-1, log_probs.shape[1], 1))
    rank = (log_probs > here).sum(-1)
    agrees = rank == 0
    return Readout(
        kl=terms.sum(-1),
        entropy=torch.special.entr(log_probs.exp()).sum(-1),
        rank=rank,
        probability=here.squeeze(-1).exp(),
        agrees=agrees,
        commit=commit_depth(agrees),
        top=top,
    )


def _log_probs(name: str, values: Tensor) -> Tensor:
    values = values.detach()
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    total = values.logsumexp(-1)
    wrong = ~(total.abs() < _NORMALISED)
    if wrong.any():
        raise ValueError(
            f"{name}: a row of probabilities sums to {float(total[wrong][0].exp()):.4g} and not to 1. Give natural "
            "logarithms of probabilities, as log_softmax does."
        )
    return values


def commit_depth(agrees: Tensor) -> Tensor:
    """The first sublayer from which on ``agrees`` ``(..., S)`` holds to the end; ``S`` where not even the last does."""
    to_the_end = agrees.to(torch.int64).flip(-1).cumprod(-1).sum(-1)
    return agrees.shape[-1] - to_the_end
