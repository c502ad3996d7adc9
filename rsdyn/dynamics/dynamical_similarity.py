"""How alike two streams move from layer to layer, whatever basis each is written in (Ostrow et al. 2023).

Dynamical Similarity Analysis (arXiv 2306.10168) fits a linear step to each system and compares the two under the best
rotation. Any running sum steps by little more than the identity, so that two streams without anything in common come
out alike: what a distance means is said by the same steps in another order, and by two halves of one stream. The step
and the distance are the package ``dsa-metric``'s.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rsdyn.errors import UserError

COMPONENTS = 5  # of a stream: the most at which five random starts of the optimiser end alike to .001
DELAYS = 1  # states are whole, so a second delay predicts no better (by .001 of the variance), and doubles the rank
ITERATIONS, RATE = 100, 0.02  # of Adam; the default, 1500 of .005, ends at the same distance to .001
MOST_SIGNED = 12  # dimensions of which all signs are tried
_ROUNDING = 1e-12  # of the states' RMS, up to which they are one state
_RANK = 1e-6  # of the largest singular value, below which a direction is not there


def at_unit_size(states: Tensor) -> Tensor:
    """States ``(N, P, D)`` about their mean over sequences and over their RMS, place by place, float64.

    What is left is how sequences differ. NaN at a place where all of them are one state.
    """
    x = states.to(torch.float64)
    rms = (len(x) * x.shape[2]) ** -0.5
    rounding = _ROUNDING * rms * torch.linalg.vector_norm(x, dim=(0, 2), keepdim=True)
    x = x - x.mean(0)
    size = rms * torch.linalg.vector_norm(x, dim=(0, 2), keepdim=True)
    return x.div_(torch.where(size > rounding, size, torch.nan))


def rank_of(states: Tensor) -> int:
    """How many dimensions :func:`at_unit_size` states ``(N, P, D)`` fill; 0 where a place has one state alone."""
    x = at_unit_size(states).flatten(0, 1)
    if not x.isfinite().all():
        return 0
    sizes = torch.linalg.svdvals(x)
    return int((sizes > _RANK * sizes[0]).sum())


def linear_step(states: Tensor, *, delays: int = DELAYS) -> Tensor:
    """The linear map from each place's states to the next one's, in a basis in which the states are white.

    Args:
        states: ``(N, P, D)``, sequences by places by units or components; taken at unit size.
        delays: how many successive states make one, newest first.

    Returns:
        ``(D * delays, D * delays)`` float32, by ``DSA.DMD`` without a penalty.

    Raises:
        ValueError: for other shapes, fewer than two steps, or states that do not fill their dimensions.
        UserError: where dsa-metric is not installed.
    """
    if states.ndim != 3:
        raise ValueError(f"states of shape {tuple(states.shape)}: give (N, P, D), sequences by places by units.")
    if states.shape[1] < delays + 2:
        raise ValueError(
            f"delays={delays}: {states.shape[1]} places are too few, since two steps of {delays} states need "
            f"{delays + 2}. Give more places or fewer delays."
        )
    if (rank := rank_of(states)) < states.shape[2]:
        raise ValueError(f"states fill {rank} of {states.shape[2]} dimensions: keep that many of their components.")
    model = _dsa().DMD(at_unit_size(states).to(torch.float32).cpu(), n_delays=delays, lamb=0.0)
    model.fit()
    step: Tensor = model.A_v
    return step


def dsa(step: Tensor, other: Tensor, *, seed: int = 0, iterations: int = ITERATIONS, rate: float = RATE) -> float:
    """Distance of two :func:`linear_step` ``(n, n)`` under the best rotation, radians: 0 for turned copies.

    By ``DSA.SimilarityTransformDist`` with its score ``angular``. Its optimiser starts at random near the identity, can
    hardly turn a direction round, and may so end above the least distance, never below. The smaller one of two is
    taken: from the steps as they are, and with the signs of ``other`` that suit ``step`` best.
    :func:`dsa_at_least` bounds what may still be missed.
    """
    if step.shape != other.shape:
        raise ValueError(f"step of shape {tuple(step.shape)} and other of {tuple(other.shape)}: they must be equal.")
    starts = [other]
    if len(step) <= MOST_SIGNED:
        signs = _best_signs(step, other)
        starts.append(signs[:, None] * other * signs)
    return min(_optimised(step, start, seed, iterations, rate) for start in starts)


def _optimised(step: Tensor, other: Tensor, seed: int, iterations: int, rate: float) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # copies, since it scales its arguments in place
        measure = _dsa().SimilarityTransformDist(iters=iterations, lr=rate, score_method="angular")
        return float(measure.fit_score(step.clone(), other.clone()))


def _best_signs(step: Tensor, other: Tensor) -> Tensor:
    """Signs ``(n,)`` of the directions of ``other`` under which it is nearest to ``step``; the first is 1."""
    every = [(1.0, *rest) for rest in itertools.product((1.0, -1.0), repeat=len(step) - 1)]
    signs = torch.tensor(every, dtype=step.dtype, device=step.device)
    return signs[((signs @ (step * other)) * signs).sum(1).argmax()]


def dsa_at_least(step: Tensor, other: Tensor) -> Tensor:
    """A distance that no rotation can go below, from the spectra alone: ``(...)`` of steps ``(..., n, n)``.

    Symmetric and antisymmetric parts turn apart from each other, and the product of two matrices is at most that of
    their singular values in order (von Neumann), of symmetric ones that of their eigenvalues.
    """
    step, other = (x.to(torch.float64) for x in (step, other))
    sizes = torch.linalg.matrix_norm(step) * torch.linalg.matrix_norm(other)
    even = [torch.linalg.eigvalsh((x + x.mT) / 2) for x in (step, other)]
    odd = [torch.linalg.svdvals((x - x.mT) / 2) for x in (step, other)]
    most = (even[0] * even[1]).sum(-1) + (odd[0] * odd[1]).sum(-1)
    return torch.arccos((most / sizes).clamp(-1, 1))


def steps_shuffled(states: Tensor, n: int, *, seed: int = 0) -> Iterator[Tensor]:
    """``n`` paths ``(N, P, D)`` that make the steps of ``states`` in another order, the same for all sequences.

    Each step takes the size of its new place (RMS over sequences), so that a path grows and slows down where the
    stream does; only what is written when is another.
    """
    generator = torch.Generator().manual_seed(seed)
    x = states.to(torch.float64)
    steps = (x - x.mean(0)).diff(dim=1)
    size = steps.square().mean((0, 2), keepdim=True).sqrt()
    directions = steps / torch.where(size > 0, size, 1.0)
    for _ in range(n):
        order = torch.randperm(steps.shape[1], generator=generator).to(x.device)
        yield torch.cat([x[:, :1], x[:, :1] + (directions[:, order] * size).cumsum(1)], dim=1)


def halves(cluster: Tensor, n: int, *, seed: int = 0) -> Tensor:
    """``n`` ways of cutting sequences in two, ``(n, N)`` boolean: whole clusters, of about equal numbers on each side.

    ``cluster`` ``(N,)`` says which belong together; where all do, sequences are taken one by one.
    """
    generator = torch.Generator().manual_seed(seed)
    known, number = cluster.unique(return_inverse=True)
    if len(known) < 2:
        number = torch.arange(len(cluster))
    counts = number.bincount()
    found = torch.zeros(n, len(cluster), dtype=torch.bool)
    for row in found:
        order = torch.randperm(len(counts), generator=generator)
        before = counts[order].cumsum(0) - counts[order]
        row[:] = torch.isin(number.cpu(), order[before < len(cluster) // 2])
        if row.all():
            row[:] = number.cpu() != order[-1]
    return found


def explained_of_steps(states: Tensor, half: Tensor) -> float:
    """What share of the steps of half the sequences a linear map of the state predicts, fitted on the other half.

    At unit size; 0 where it says no more than that nothing moves, below where less.
    """
    x = at_unit_size(states)
    before, after = (part.flatten(0, 1) for part in (x[half, :-1], x[half, 1:]))
    found = torch.linalg.lstsq(before, after).solution
    before, after = (part.flatten(0, 1) for part in (x[~half, :-1], x[~half, 1:]))
    return 1 - float((after - before @ found).square().sum() / (after - before).square().sum())


def _dsa() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # PyDMD's docstrings, where it is compiled the first time
            warnings.simplefilter("ignore", DeprecationWarning)  # the same before Python 3.12
            import DSA
    except ImportError as error:
        raise UserError(
            "dynamical similarity needs the package dsa-metric: pip install dsa-metric, or leave dsa out of the "
            "measures."
        ) from error
    return DSA
