"""Mutual information of a unit with itself one sublayer later, in nats (paper 2.5, Fig. 1G and H, METHOD section 6)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from rsdyn.dynamics import kernel_density as density
from rsdyn.threads import side_by_side

NEIGHBOURS = 3  # the k of ksg

# Below these an estimate does not exist; well above them its bias may still exceed the information. Show the floor.
MIN_SAMPLES = {
    "kde": 3,  # two samples lie on a line: no covariance to smooth with
    "kde_resub": 3,
    "copula": 3,  # two ranks are always perfectly correlated
    "ksg": NEIGHBOURS + 1,  # k neighbours besides the sample itself
    "paper_literal": 3,
}


def copula(rows: Tensor, pairing: Tensor | None = None) -> Tensor:
    """Mutual information ``(U, S - 1)`` of Gaussian copulas, ``-ln(1 - r²) / 2`` with ``r`` of the normal scores.

    Exact for pairs that monotone maps make jointly Gaussian, a lower bound on what ranks share in others; unmoved by
    outliers. Tied values share their average rank.
    """
    scores, n = _normal_scores(rows), rows.shape[-1]
    mean = scores.mean(-1)  # 0 but for ties, so that nothing is lost by taking it out of the sums
    norm = (scores.square().sum(-1) - n * mean.square()).sqrt()  # 0 for a constant row, which becomes NaN
    earlier = scores[:, :-1]
    later = scores[:, 1:] if pairing is None else scores[:, 1:].index_select(-1, pairing)
    r = ((earlier * later).sum(-1) - n * mean[:, :-1] * mean[:, 1:]) / (norm[:, :-1] * norm[:, 1:])
    rest = 1 - r.square()
    close = rest < 1e-4  # whose last digits 1 - r² has lost: from the residuals
    if close.any():
        a = (earlier[close] - mean[:, :-1][close][:, None]) / norm[:, :-1][close][:, None]
        b = (later[close] - mean[:, 1:][close][:, None]) / norm[:, 1:][close][:, None]
        rest[close] = (b - r[close][:, None] * a).square().sum(-1)
    return (-rest.log() / 2).masked_fill_(rest < density.COLLINEAR, torch.inf)


def _normal_scores(rows: Tensor) -> Tensor:
    """Normal quantiles of ``rank / (N + 1)``, float64, of rows ``(U, S, N)``; NaN among a row's if not all finite."""
    n = rows.shape[-1]
    order, keys = _sort(rows)
    tied = torch.zeros_like(keys, dtype=torch.bool)  # with the one before
    torch.eq(keys[..., 1:], keys[..., :-1], out=tied[..., 1:])
    # average ranks are multiples of a half, so a table holds all their quantiles
    ranks = torch.arange(2 * n - 1, dtype=torch.float64, device=rows.device) / 2 + 1
    table = torch.special.ndtri(ranks / (n + 1))
    if tied.any():
        place = torch.arange(n, dtype=torch.int32, device=rows.device)
        first = (place * ~tied).cummax(-1).values
        followed = tied.roll(-1, -1)  # the first is never tied, so that the last is never followed
        last = n - 1 - (place * ~followed.flip(-1)).cummax(-1).values.flip(-1)
        ordered = table.index_select(0, (first + last).flatten()).view(rows.shape)
    else:
        ordered = table[::2].expand(rows.shape)
    scores = torch.empty(rows.shape, dtype=torch.float64, device=rows.device).scatter_(-1, order, ordered)
    ends = rows.gather(-1, order[..., :: n - 1])  # where the sort puts whatever is not finite
    scores[..., :1] += (ends - ends).sum(-1, keepdim=True)  # 0, or NaN
    return scores


def _sort(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The order of each row ``(U, S, N)``, and keys in that order that are equal where values are.

    A value of 16 or 32 bits goes into one integer with its index, which sorts 4 or 2 times faster than an argsort.
    """
    n = rows.shape[-1]
    if rows.dtype in (torch.bfloat16, torch.float16) and n > 1 << 16:
        rows = rows.to(torch.float32)
    if rows.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        order = torch.from_numpy(np.argsort(rows.numpy(), axis=-1)) if rows.device.type == "cpu" else rows.argsort(-1)
        return order, rows.gather(-1, order)
    width = torch.finfo(rows.dtype).bits
    small, large = (torch.int16, torch.int32) if width == 16 else (torch.int32, torch.int64)
    bits = (rows + 0.0).view(small)  # 0 and -0 are equal
    keys = (bits ^ ((bits >> (width - 1)) & torch.iinfo(small).max)).to(large) << width  # in the order of the values
    keys |= torch.arange(n, dtype=large, device=rows.device)
    if rows.device.type == "cpu":
        keys.numpy().sort(axis=-1)  # in place, and for rows of a thousand three times faster than torch's on a CPU
    else:
        keys = keys.sort(-1).values
    return (keys & ((1 << width) - 1)).to(torch.int64), keys >> width


def ksg(rows: Tensor, pairing: Tensor | None = None) -> Tensor:
    """Mutual information ``(U, S - 1)`` from distances to the third neighbour (Kraskov et al. 2004, first form).

    At least 0. Both rows are scaled to unit variance and distances are the larger of the two coordinates', as in
    scikit-learn's ``mutual_info_regression``, which it equals on data without ties; ties bias it (scikit-learn breaks
    them by noise). The reference for heavy tails. Runs on the CPU whatever the device.
    """
    data = density.pairs(rows, pairing)
    n = rows.shape[-1]
    psi = torch.special.digamma(torch.arange(n + 1, dtype=torch.float64)).numpy()
    regular = data.regular.tolist()
    z = data.z.cpu().numpy()
    order = slice(None) if pairing is None else pairing.cpu().numpy()
    ordered = np.sort(z, axis=-1)
    information = torch.full_like(data.rest_variance, torch.nan)
    for unit in range(rows.shape[0]):
        for s in [s for s, good in enumerate(regular[unit]) if good]:
            pair = np.stack([z[unit, s], z[unit, s + 1, order]], axis=1)
            radius = cKDTree(pair).query(pair, k=[NEIGHBOURS + 1], p=np.inf)[0][:, 0]
            counted = 0.0
            for axis, sorted_axis in zip(pair.T, ordered[unit, s : s + 2], strict=True):
                # neighbours nearer than the radius. A sample at the radius itself is not nearer, however its distance
                # rounds; where the radius is 0, samples at the same place are counted
                margin = 4 * np.finfo(np.float64).eps * np.abs(sorted_axis[[0, -1]]).max()
                reach = np.maximum(radius - margin, margin)
                up_to = np.searchsorted(sorted_axis, axis + reach, "right")
                counted += psi[up_to - np.searchsorted(sorted_axis, axis - reach)].mean()
            information[unit, s] = max(0.0, psi[n] + psi[NEIGHBOURS] - counted)
    return data.flagged(information)


_ESTIMATORS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "kde": density.kde,
    "kde_resub": density.kde_resub,
    "copula": copula,
    "ksg": ksg,
    "paper_literal": density.paper_literal,
}
ESTIMATORS = tuple(_ESTIMATORS)


def mutual_information(x: Tensor, y: Tensor, estimator: str = "kde") -> Tensor:
    """Mutual information in nats of each column of ``x`` ``(N, U)`` with the same column of ``y``; ``(U,)`` float64.

    Estimators: ``kde`` (:func:`rsdyn.dynamics.kernel_density.kde`), ``kde_resub``, ``copula``, ``ksg``, and
    ``paper_literal``, which reproduces the paper's sum and is not a mutual information. A unit with a constant or
    non-finite ``x`` or ``y`` gives NaN, one whose ``y`` is a linear map of ``x`` (a monotone one for ``copula``) gives
    inf; neither touches other units. Independent samples give more than 0 as well, by a bias that falls with ``N``:
    compare with a permuted pairing, see :func:`consecutive_information` (METHOD section 6).

    Raises:
        ValueError: unknown estimator, shapes that differ or are not ``(N, U)``, fewer samples than
            ``MIN_SAMPLES[estimator]``.
    """
    if x.ndim != 2 or x.shape != y.shape:
        raise ValueError(
            f"x is {tuple(x.shape)} and y {tuple(y.shape)}: both must have the same shape (N samples, U units); "
            "give the same sequences and units of two sublayers."
        )
    x, y = x.detach(), y.detach()
    _check(estimator, x.shape[0])

    def rows(units: slice) -> Tensor:
        return torch.stack([x[:, units].T, y[:, units].T], dim=1)

    return _by_block(rows, (x.shape[0], 2, x.shape[1]), x.device, estimator, None, None)[0]


def consecutive_information(
    trajectories: Tensor,
    estimator: str = "kde",
    *,
    pairing: Tensor | None = None,
    on_block: Callable[[int], object] | None = None,
) -> Tensor:
    """Mutual information in nats of each unit between consecutive sublayers, ``(S - 1, U)`` float64.

    As :func:`mutual_information` of ``trajectories[:, s]`` and ``trajectories[:, s + 1]``, faster: what belongs to one
    sublayer is computed once for both its pairs. Works on the cache's bfloat16, cast to float64 a few units at a time,
    on as many cores as torch has threads, with the same bits whatever their number.

    Args:
        trajectories: ``(N, S, U)``, any floating dtype.
        estimator: one of :data:`ESTIMATORS`.
        pairing: ``(N,)`` a permutation of the sequences at the later sublayer of each pair. With a random one the
            truth is 0, and the result is the floor that finite samples leave.
        on_block: called in the caller's thread with the number of units just finished, for a progress bar.

    Raises:
        ValueError: unknown estimator, another shape, one sublayer only, fewer samples than ``MIN_SAMPLES[estimator]``,
            a pairing that is not a permutation.
    """
    if trajectories.ndim != 3:
        raise ValueError(
            f"trajectories is {tuple(trajectories.shape)}: it must be (N sequences, S sublayers, U units); "
            "add the missing axis or flatten the others."
        )
    n, n_sublayers = trajectories.shape[:2]
    if n_sublayers < 2:
        raise ValueError(
            f"trajectories has {n_sublayers} sublayers, and a pair of consecutive ones takes at least 2; "
            "record more sites of the stream."
        )
    _check(estimator, n)
    trajectories = trajectories.detach()
    if pairing is not None:
        expected = torch.arange(n, device=pairing.device)
        if (
            pairing.is_floating_point()
            or pairing.shape != (n,)
            or not torch.equal(pairing.sort().values.long(), expected)
        ):
            raise ValueError(
                f"pairing is {pairing.dtype} of shape {tuple(pairing.shape)}: it must hold each of the integers "
                f"0..{n - 1} once; take torch.randperm({n})."
            )
        pairing = pairing.to(trajectories.device, torch.long)

    def rows(units: slice) -> Tensor:
        # whole cache lines first, then one matrix to transpose: 4 times faster than a permuted copy
        lines = trajectories[:, :, units].reshape(n, -1)
        return lines.T.contiguous().view(n_sublayers, -1, n).transpose(0, 1)

    return _by_block(rows, tuple(trajectories.shape), trajectories.device, estimator, pairing, on_block)


def _check(estimator: str, n: int) -> None:
    if estimator not in _ESTIMATORS:
        raise ValueError(f"estimator={estimator!r} is unknown; choose one of {', '.join(ESTIMATORS)}.")
    if n < MIN_SAMPLES[estimator]:
        raise ValueError(
            f"estimator={estimator!r} needs at least {MIN_SAMPLES[estimator]} samples and got N = {n}; "
            "give more sequences (1000 in the paper)."
        )


def _by_block(
    rows: Callable[[slice], Tensor],
    shape: tuple[int, ...],
    device: torch.device,
    estimator: str,
    pairing: Tensor | None,
    on_block: Callable[[int], object] | None,
) -> Tensor:
    """``(S - 1, U)`` from ``rows(units)`` ``(units, S, N)``, in blocks of units that run side by side."""
    n, n_sublayers, n_units = shape
    cells = n * n_sublayers
    # blocks: 32 bfloat16 are a cache line; at most 8 Mi values, at least 8 blocks to share out where there are units
    size = max(1, min(32, n_units // 8, (1 << 23) // cells))
    # groups within a block: 512 KiB of float64 stay in a core's cache, an accelerator wants more at a time
    group = max(1, (1 << (16 if device.type == "cpu" else 24)) // cells)
    blocks = [slice(start, min(n_units, start + size)) for start in range(0, n_units, size)]
    measure = _ESTIMATORS[estimator]

    def work(units: slice) -> Tensor:
        # a caller's autocast would turn the products into half precision, on its own thread only
        with torch.autocast(device.type, enabled=False):
            return torch.cat([measure(part.contiguous(), pairing) for part in rows(units).split(group)])

    out = torch.empty(n_sublayers - 1, n_units, dtype=torch.float64, device=device)
    for units, part in zip(blocks, side_by_side(work, blocks, device), strict=True):
        out[:, units] = part.T
        if on_block is not None:
            on_block(units.stop - units.start)
    return out
