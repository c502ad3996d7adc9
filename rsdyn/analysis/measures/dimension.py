"""The measure ``dimension``: how many dimensions each sublayer's states fill, by spectrum and by nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor

from rsdyn.analysis.by_position import over_sublayers, states_by_range
from rsdyn.analysis.collected import Collected
from rsdyn.analysis.measure import Measure
from rsdyn.analysis.measures.pca import N_GROUPS, spectra_of
from rsdyn.analysis.over_sequences import with_interval
from rsdyn.analysis.results import Dimension, Measured, StepNull
from rsdyn.dynamics import dimension as of_states
from rsdyn.dynamics.resampling import group_of
from rsdyn.metrics.processes import from_all
from rsdyn.threads import side_by_side

BY_SPECTRUM: dict[str, Callable[[Tensor], Tensor]] = {
    "participation": of_states.participation,
    "components_90": of_states.components_for,
    "effective_rank": of_states.rank_of_variances,
    "matrix_entropy": of_states.entropy_of_variances,
}
N_NULLS = 200  # states that are held against a null model: each draw is a search for neighbours at every sublayer


def dimension(collected: Collected, *, intervals: bool = True, nulls: bool = True, seed: int = 0) -> Dimension:
    """Dimensions of the states that were kept, on every process; each sublayer is done by one of them.

    ``intervals`` of the two by nearest neighbours, and their null model (``nulls``), take searches that are as long as
    the rest.
    """
    assert collected.share is not None
    spectra, n = spectra_of(collected, collected.share), len(collected.share.number)

    def by_spectrum(of: Callable[[Tensor], Tensor]) -> Measured:
        without = None if spectra.without_massive is None else Measured(of(spectra.without_massive), n=n)
        left_out = of(spectra.left_out)
        return with_interval(of(spectra.all), of(spectra.groups), without_massive=without, left_out=left_out, n=n)

    twonn, mle, repeated = _by_neighbours(collected, intervals)
    at, n_at = _by_position(collected)
    return Dimension(
        **{name: by_spectrum(of) for name, of in BY_SPECTRUM.items()},
        twonn=twonn,
        mle=mle,
        repeated=repeated,
        by_position=at,
        n_by_position=n_at,
        nulls=_nulls(collected, seed) if nulls else {},
        n_nulls=min(n, N_NULLS) if nulls else 0,
    )


def _by_neighbours(collected: Collected, intervals: bool) -> tuple[Measured, Measured, Tensor]:
    share = collected.share
    assert share is not None
    x, usable, massive = share.by_sublayer(), ~collected.unusable, collected.massive
    group = group_of(collected.group_of(share.sequence), N_GROUPS)
    with collected.bar(f"{collected.name}: intrinsic dimensions", x.shape[1]) as done:

        def one(s: int) -> tuple[of_states.IntrinsicDimension, of_states.IntrinsicDimension | None]:
            here = x[:, s] if usable.all() else x[:, s, usable]
            few = of_states.intrinsic_dimension(x[:, s, usable & ~massive]) if massive.any() else None
            return of_states.intrinsic_dimension(here, group if intervals else None), few

        mine = []
        for found in side_by_side(one, range(x.shape[1]), x.device):
            mine.append(found)
            done(1)
    n = len(share.number)
    of_all = list(chain.from_iterable(from_all(mine, "cpu")))
    every, few = [pair[0] for pair in of_all], [pair[1] for pair in of_all if pair[1] is not None]

    def measured(name: str) -> Measured:
        value = torch.tensor([getattr(d, name) for d in every], dtype=torch.float64)
        groups = torch.stack([getattr(d, f"{name}_groups") for d in every], dim=1)
        rest = torch.tensor([getattr(d, name) for d in few], dtype=torch.float64)
        return with_interval(value, groups, without_massive=Measured(rest, n=n) if few else None, n=n)

    return measured("twonn"), measured("mle"), torch.tensor([d.repeated for d in every])


def _nulls(collected: Collected, seed: int) -> dict[str, StepNull]:
    """Both dimensions by neighbours of the first states, mean over sublayers, against Gaussian states."""
    assert collected.share is not None
    x, usable = collected.share.by_sublayer()[:N_NULLS], ~collected.unusable

    def one(s: int) -> Tensor:
        return of_states.of_mixed(x[:, s] if usable.all() else x[:, s, usable], seed=seed)

    mine = list(side_by_side(one, range(x.shape[1]), x.device))
    values = torch.stack(list(chain.from_iterable(from_all(mine, "cpu")))).nanmean(0)  # (n + 1, 2)
    return {
        name: StepNull(*of_states.against_mixed(of))
        for name, of in zip(("twonn", "mle"), values.unbind(-1), strict=True)
    }


def _by_position(collected: Collected) -> tuple[dict[str, Tensor], int]:
    """Each of the dimensions ``(P, S)`` of the states of each range of positions, and of how many they are."""
    states = states_by_range(collected)
    known = [len(x) for x in states if x is not None]
    if not known:
        return {}, 0

    def of(x: Tensor) -> list[float]:
        variances, near = of_states.spectrum(of_states.centred(x)), of_states.intrinsic_dimension(x)
        return [*(float(measure(variances)) for measure in BY_SPECTRUM.values()), near.twonn, near.mle]

    found = over_sublayers(states, of, collected.n_sublayers)
    return dict(zip((*BY_SPECTRUM, "twonn", "mle"), found.unbind(-1), strict=True)), known[0]


MEASURE = Measure(
    lambda collected, how: dimension(
        collected, intervals=how.main is None, nulls=how.nulls and how.main is None, seed=how.seed
    ),
    keeps_samples=True,
)
