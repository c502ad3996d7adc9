"""How wide the autoencoder's layers are (paper 2.7, Fig. 3A), and how many there are."""

from __future__ import annotations

import math
from typing import Literal, get_args

from rsdyn.errors import UserError

Count = Literal["widths", "maps"]

# Units that an inner layer has beyond the bottleneck's, at least. LayerNorm takes out the mean and fixes the norm, and
# ReLU cuts off what is negative, layer after layer. On two real language models (576 and 640 units) two latents behind
# a last inner layer of 4 lay on a line, behind one of 5 nearly so, and behind 6 and 8 they filled the plane.
MARGIN = 4


def paper_layers(d_in: int, d_bottle: int) -> int:
    """The paper's ``k`` for these widths: 10 for 4096 to 2, and for others the ``k`` whose ratio is nearest to that.

    The paper says that k is determined by the two widths and gives one example; ``r = 2048^(-1/9) = 0.43`` per layer is
    what carries over. Its last inner layer has 4 or 5 units before a bottleneck of 2: :func:`is_starved`.
    """
    if not 1 <= d_bottle < d_in:  # geometric_widths says what is wrong with them
        return 2
    return max(2, 1 + round(9 * math.log(d_in / d_bottle) / math.log(2048)))


def default_layers(d_in: int, d_bottle: int, count: Count = "widths") -> int:
    """The largest ``k``, up to the paper's, that leaves every inner layer at least ``d_bottle + MARGIN`` units.

    8 for 4096 to 2 and 6 for 576 to 2. Where no inner layer of that width fits between the two, the autoencoder has
    none and is linear. With ``count="maps"`` linear maps are counted, up to as many as the paper has widths. The
    arguments are those of :func:`geometric_widths`, which raises where they allow no progression.
    """
    least = 2 if count == "widths" else 1
    for k in range(paper_layers(d_in, d_bottle), least, -1):
        if not is_starved(geometric_widths(d_in, d_bottle, k, count)):
            return k
    return least


def is_starved(widths: list[int]) -> bool:
    """Whether an inner layer is too narrow for the latents behind it to fill their space: see ``MARGIN``."""
    inner = widths[1:-1]
    return bool(inner) and min(inner) < widths[-1] + MARGIN


def geometric_widths(d_in: int, d_bottle: int, k: int, count: Count = "widths") -> list[int]:
    """Widths of the encoder, input and bottleneck included: ``d_i = d_in r^i``, rounded (paper 2.7).

    Rounded and not truncated, never below ``d_bottle``, and the last is exactly ``d_bottle``: truncation gives 1
    instead of 2 for some ``d_in``.

    Args:
        d_in: width of the stream, ``D``.
        d_bottle: width of the bottleneck, ``K``; below ``d_in``.
        k: how many widths (``count="widths"``) or how many linear maps (``"maps"``, one width more) in each half.
        count: what ``k`` counts.

    Raises:
        UserError: no such progression exists.
    """
    if count not in get_args(Count):
        raise ValueError(f"count={count!r}: must be widths or maps.")
    n = k if count == "widths" else k + 1
    if n < 2:
        least = 2 if count == "widths" else 1
        raise UserError(
            f"layers={k}: with count={count} at least {least}, since the input and the bottleneck are a width "
            "each. The paper has 10."
        )
    if not 1 <= d_bottle < d_in:
        raise UserError(
            f"bottleneck={d_bottle}: must be at least 1 and below the width of the stream, {d_in}. The paper has 2."
        )
    ratio = (d_bottle / d_in) ** (1 / (n - 1))
    inner = [max(d_bottle, round(d_in * ratio**i)) for i in range(1, n - 1)]
    return [d_in, *inner, d_bottle]
