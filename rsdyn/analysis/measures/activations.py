"""Mean activations, and how dense they are (paper 2.2, Fig. 1B)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rsdyn.analysis.collected import Collected
from rsdyn.analysis.intervals import left_out, means_without_each, of_means, with_interval
from rsdyn.analysis.measure import Measure, Row, trend
from rsdyn.analysis.results import Activations, AnalysisResults
from rsdyn.dynamics.moments import density, participation_ratio


def activations(collected: Collected, threshold: float | None = None) -> Activations:
    """Mean activations; ``threshold`` makes a unit active, None takes half the RMS of the last sublayer's."""
    usable, few = ~collected.unusable, ~(collected.massive | collected.unusable)
    mean, std = collected.total.mean, (collected.total.m2 / collected.total.n).sqrt()

    def limit(of: Tensor, units: Tensor) -> Tensor:
        """Half the RMS of the last sublayer, of the units that are counted: a massive unit would own it."""
        return 0.5 * of[..., -1, units].square().mean(-1).sqrt()

    def shares(units: Tensor) -> Callable[[Tensor], Tensor]:
        if threshold is not None:
            return lambda m: density(m[..., units], threshold)
        tiny = torch.finfo(mean.dtype).tiny
        return lambda m: density(m[..., units] / limit(m, units).clamp(min=tiny)[..., None, None], 1.0)

    def active_from(units: Tensor) -> float:
        return float(limit(mean, units)) if threshold is None else threshold

    means = means_without_each(collected)
    active = of_means(shares(usable), mean, means)
    shared = with_interval(participation_ratio(mean[:, usable]), [participation_ratio(m[:, usable]) for m in means])
    rest = sharing = None
    if collected.massive.any():
        rest = of_means(shares(few), mean, means)
        sharing = with_interval(participation_ratio(mean[:, few]), [participation_ratio(m[:, few]) for m in means])
    return Activations(
        mean=mean,
        std=std,
        density=replace(active, left_out=left_out(collected, lambda u: shares(u)(mean)), without_massive=rest),
        density_threshold=active_from(usable),
        participation=replace(
            shared, left_out=left_out(collected, lambda u: participation_ratio(mean[:, u])), without_massive=sharing
        ),
        density_threshold_without_massive=None if rest is None else active_from(few),
    )


def rows(found: AnalysisResults) -> list[Row[Activations]]:
    """Whether activations grow dense; METHOD section 0.9: the share of active units grows with the norm alone."""
    return [
        *trend("density", "share of active units", lambda a: a.density,
               claim="activations grow dense over the layers", paper="rises"),
        *trend("participation", "units that share the mean (participation ratio)", lambda a: a.participation,
               relative=True),
    ]  # fmt: skip


MEASURE = Measure(lambda collected, how: activations(collected, how.settings.density_threshold), rows)
