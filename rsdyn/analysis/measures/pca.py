"""Principal components of the stream, and how many dimensions each sublayer fills (paper 2.8, Fig. 4A-C)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from itertools import chain

import torch
from torch import Tensor

from rsdyn.analysis.collected import Collected
from rsdyn.analysis.intervals import with_interval, without_each
from rsdyn.analysis.measure import Measure, Row, trend
from rsdyn.analysis.results import AnalysisResults, Measured, OverDepth, Plane, PrincipalComponents
from rsdyn.dynamics import dimension
from rsdyn.dynamics.dimension import Spectra
from rsdyn.dynamics.moments import Comoments, Moments, explained_variance, merge
from rsdyn.dynamics.projection import PCA
from rsdyn.dynamics.resampling import group_of
from rsdyn.dynamics.walks import smoothed_random_walks
from rsdyn.metrics.processes import from_all
from rsdyn.metrics.samples import UnitShare
from rsdyn.threads import side_by_side

N_CONTROL = 100  # random walks beside the trajectories
CONTROL_D = 256
N_DRAWN = 10  # components whose loadings are kept
N_GROUPS = 10  # left out one at a time, where each takes eigenvalues or neighbours of its own at every sublayer


def pca(collected: Collected, seed: int) -> PrincipalComponents:
    """The common components, what they explain at each sublayer, and each sublayer's own ones."""
    fitted, few = collected.pca, collected.pca_without_massive
    assert fitted is not None
    halves = None
    if len(collected.half_pca) == 2:
        a, b = (half.components for half in collected.half_pca)
        halves = torch.rad2deg(torch.arccos(torch.linalg.svdvals(a.T @ b).clamp(-1, 1)))
    ratio = fitted.explained_variance_ratio
    latents = None
    if collected.latents is not None:
        latents = Plane(collected.latents.mean, collected.latent_samples, ratio)
    return PrincipalComponents(
        ratio=Measured(ratio, without_massive=None if few is None else Measured(few.explained_variance_ratio)),
        components=fitted.components.T[:N_DRAWN],
        massive_loadings=fitted.components[collected.massive].T.square(),
        control=_control(collected, seed),
        components_without_massive=None if few is None else few.components.T[:N_DRAWN],
        half_angles=halves,
        latents=latents,
        over_depth=None if latents is None else _over_depth(collected),
    )


def _over_depth(collected: Collected) -> OverDepth:
    share = collected.share
    assert share is not None
    usable = ~collected.unusable

    def of_units(units: Tensor, m: Comoments) -> Moments:
        return Moments(m.n, m.mean[:, units], m.m2[:, units])

    def unexplained(groups: list[Moments], of: Moments) -> Tensor:
        missed = reduce(merge, groups)
        own, _, _ = explained_variance(
            (missed.mean * of.n)[:, None], Moments(of.n, of.mean.new_zeros(len(of.mean), 1), of.m2.sum(1, keepdim=True))
        )
        return own

    parts = [of_units(usable, m) for m in collected.groups]
    explained = unexplained(collected.residual, of_units(usable, collected.total))
    others = zip(without_each(collected.residual, merge), without_each(parts, merge), strict=True)
    measured = with_interval(explained, [unexplained([missed], of) for missed, of in others])
    rest = None
    if collected.residual_without_massive:
        few = usable & ~collected.massive
        rest = Measured(unexplained(collected.residual_without_massive, of_units(few, collected.total)))
    spectra = spectra_of(collected, share)
    return OverDepth(
        replace(measured, left_out=torch.stack([explained, *_explained_left_out(collected)]), without_massive=rest),
        _ofspectra_of(dimension.participation, spectra, len(share.x)),
        _ofspectra_of(dimension.components_for, spectra, len(share.x)),
    )


def _ofspectra_of(of: Callable[[Tensor], Tensor], spectra: Spectra, n: int) -> Measured:
    """A measure of all sequences' variances, with its variants."""
    few = spectra.without_massive
    return replace(
        with_interval(of(spectra.all), list(of(spectra.groups))),
        left_out=of(spectra.left_out),
        n=n,
        without_massive=None if few is None else Measured(of(few), n=n),
    )


def spectra_of(collected: Collected, share: UnitShare) -> Spectra:
    """The variances of each sublayer, computed once for all measures; each sublayer is done by one process, whole."""
    if collected.spectra is None:
        collected.spectra = _spectra(collected, share)
    return collected.spectra


def _spectra(collected: Collected, share: UnitShare) -> Spectra:
    largest = collected.known_largest
    group = group_of(collected.group_of(share.sequence), N_GROUPS)
    usable, x = ~collected.unusable, share.by_sublayer()
    known = group.unique()
    chosen = torch.stack([group != g for g in known]) if len(known) > 1 else known.new_zeros(0, len(group)).bool()
    counts, massive = largest.counts, int(collected.massive.sum())
    wanted = list(dict.fromkeys([*counts, massive]))  # massive units are the largest ones
    by_size = largest.ratios[usable].argsort(descending=True, stable=True)[: max(wanted)]
    with collected.bar(f"{collected.name}: dimensions", x.shape[1]) as done:

        def one(s: int) -> tuple[Tensor, Tensor]:
            here = dimension.centred(x[:, s] if usable.all() else x[:, s, usable])
            products = dimension.products_of(here)
            groups = dimension.spectra_of_rows(here, chosen, products)
            return groups, dimension.spectra_without_largest(here, by_size, wanted, products)

        mine = []
        for found in side_by_side(one, range(x.shape[1]), x.device):
            mine.append(found)
            done(1)
    of_all = chain.from_iterable(from_all(mine, x.device))
    groups, left_out = (torch.stack(values, dim=1) for values in zip(*of_all, strict=True))
    few = left_out[wanted.index(massive)] if massive else None
    return Spectra(left_out[0], groups, left_out[: len(counts)], few)


def _explained_left_out(collected: Collected) -> list[Tensor]:
    """What as many components explain at each sublayer ``(S,)`` without 1, 2, ... of the largest units."""
    if collected.residual_left_out is None:
        return []
    largest, found = collected.known_largest, []
    for count, missed in zip(largest.counts[1:], collected.residual_left_out, strict=True):
        units = largest.without(count, ~collected.unusable)
        total = collected.total.m2[:, units].sum(1) / collected.total.n
        found.append(1 - missed / torch.where(total > 0, total, torch.nan))
    return found


def _control(collected: Collected, seed: int) -> Plane:
    """Random walks with the steps of the stream, and the plane of PCA that they make."""
    usable, total = ~collected.unusable, collected.total
    mean = total.mean[:, usable]
    common = (mean[1:] - mean[:-1]).norm(dim=1)
    # the spread of the steps about the mean step, from variances and covariances of successive sublayers
    own = ((total.m2[1:] + total.m2[:-1] - 2 * total.cross)[:, usable].sum(1) / total.n).clamp(min=0).sqrt()
    walks = smoothed_random_walks(common, own, n=N_CONTROL, d=CONTROL_D, seed=seed)
    plane = PCA.fit(walks.reshape(-1, walks.shape[-1]), 2)
    latents = plane.encode(walks)
    return Plane(latents.mean(0), latents, plane.explained_variance_ratio)


def n_components(found: AnalysisResults) -> int:
    """How many common components were kept; 100 where none were asked for."""
    measured = [r.pca for r in found.conditions.values() if r.pca is not None]
    return len(measured[0].ratio.value) if measured else 100


def rows(found: AnalysisResults) -> list[Row[PrincipalComponents]]:
    """METHOD section 0.8: "fewer components" has three translations, which have three answers."""
    return [
        *trend("dimensions", "dimensions filled (participation ratio)",
               lambda r: r.over_depth.dimensions if r.over_depth else None, relative=True,
               claim="later layers need fewer components", paper="fewer"),
        *trend("components_90", "components for 90 % of a sublayer's variance",
               lambda r: r.over_depth.components_90 if r.over_depth else None, relative=True),
        *trend("explained", f"variance that {n_components(found)} common components explain (rises if fewer)",
               lambda r: r.over_depth.explained if r.over_depth else None),
    ]  # fmt: skip


MEASURE = Measure(lambda collected, how: pca(collected, how.seed), rows, keeps_samples=True)
