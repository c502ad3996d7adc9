"""What a change of the model does to its predictions of a text: losses, and means over tokens with their intervals."""

from __future__ import annotations

import torch
from scipy.stats import t as student
from torch import Tensor

from rsdyn.dynamics.resampling import Interval


def next_token_losses(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-probability of each token that follows, in nats: ``(T - 1,)`` float64.

    Args:
        log_probs: ``(T, V)``, of the next token after each of ``tokens``; any floating dtype.
        tokens: ``(T,)`` whole numbers. The first is predicted from nothing and has no loss.

    Raises ``ValueError`` for other shapes.
    """
    if log_probs.ndim != 2 or tokens.ndim != 1 or len(log_probs) != len(tokens) or tokens.is_floating_point():
        raise ValueError(
            f"log_probs of shape {tuple(log_probs.shape)} and tokens of shape {tuple(tokens.shape)}: give (T, V) and "
            "the T token ids."
        )
    return -log_probs[:-1].gather(1, tokens[1:, None]).squeeze(1).to(torch.float64)


def mean_per_token(sums: Tensor, n_tokens: Tensor, level: float = 0.95) -> Interval:
    """Mean over all tokens of several texts, with its interval over texts: ``(...)`` each.

    Args:
        sums: ``(texts, ...)``, of what is averaged, over each text's tokens.
        n_tokens: ``(texts,)``.
        level: of confidence.

    Long texts count for more, as in a perplexity. The interval is the delete-one-text jackknife of this ratio of sums,
    with Student's t; NaN for a single text. Raises ``ValueError`` for other shapes.
    """
    if sums.ndim < 1 or n_tokens.shape != sums.shape[:1] or len(sums) == 0:
        raise ValueError(
            f"sums of shape {tuple(sums.shape)} and n_tokens of shape {tuple(n_tokens.shape)}: give (texts, ...) and "
            "(texts,), with at least one text."
        )
    m = len(sums)
    sums, n_tokens = sums.to(torch.float64), n_tokens.to(torch.float64)
    count = n_tokens.reshape(-1, *[1] * (sums.ndim - 1))
    value = sums.sum(0) / count.sum(0)
    if m < 2:
        return Interval(value, torch.full_like(value, torch.nan), torch.full_like(value, torch.nan))
    without = (sums.sum(0) - sums) / (count.sum(0) - count)
    spread = (without - without.mean(0)).square().sum(0)
    error = (spread * (m - 1) / m).sqrt() * float(student.ppf(0.5 + level / 2, m - 1))
    return Interval(value, value - error, value + error)
