"""The curves of many subsets of what was kept of a stream, by which groups of sequences are compared.

Trajectories are kept already, so nothing is read or recorded for a subset. What is a mean over sequences, or comes of
means and products, is made of all subsets at once (:mod:`rsdyn.dynamics.subsets`); information and dimensions take a
computation each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor

from rsdyn.analysis.collected import Collected
from rsdyn.analysis.measure import How
from rsdyn.dynamics import dimension
from rsdyn.dynamics.information import MIN_SAMPLES, consecutive_information
from rsdyn.dynamics.resampling import simulate
from rsdyn.dynamics.rotation import rotations
from rsdyn.dynamics.step_nulls import StepProducts, curvature_of, path_length_of, step_products, straightness_of
from rsdyn.dynamics.subsets import Subsets, subset_means, subset_spectra
from rsdyn.metrics.processes import from_all

N_UNITS = 8  # whose information is estimated for intervals and p, which take a thousand estimates


class Shown(NamedTuple):
    """What is given by group: a curve of the results, by its path.

    Attributes:
        measure: whose it is.
        key: what the keys of its rows and panels begin with.
        words: what it is.
    """

    measure: str
    key: str
    words: str


LINEAR = {
    "activations/density": Shown("activations", "density", "share of active units"),
    "activations/participation": Shown(
        "activations", "participation", "units that share the mean (participation ratio)"
    ),
    "correlation/mean": Shown("correlation", "correlation", "mean correlation"),
    "cosine/mean": Shown("cosine", "cosine", "mean cosine"),
    "velocity/speed": Shown("velocity", "speed", "mean speed"),
    "velocity/relative": Shown("velocity", "relative_speed", "mean speed over the state's norm"),
    "norm/mean": Shown("norm", "norm", "mean norm of the state"),
    "rotation/mean_abs": Shown("rotation", "turns", "mean |R| of the mean trajectory"),
    "pca/over_depth/explained": Shown("pca", "explained", "variance that common components explain"),
    "curvature/angle": Shown("curvature", "curvature", "angle between successive steps, radians"),
    "curvature/straightness": Shown("curvature", "straightness", "straightness of the way"),
    "curvature/length": Shown("curvature", "length", "length of the way"),
}
COSTLY = {
    "mutual_information/mean": Shown("mutual_information", "information", "mean information, nats"),
    "pca/over_depth/dimensions": Shown("pca", "dimensions", "dimensions filled (participation ratio)"),
    "pca/over_depth/components_90": Shown("pca", "components_90", "components for 90 % of a sublayer's variance"),
}
CURVES = LINEAR | COSTLY
OF_MEANS = ("activations/density", "activations/participation", "rotation/mean_abs")
TURNS = "rotation/mean_abs"  # jumps as means move: its interval is by simulation
SINGLE = ("rotation/mean_abs", "curvature/straightness", "curvature/length")  # numbers, and no curves
AT_EQUAL_N = (*OF_MEANS, *COSTLY)
EXPLAINED, INFORMATION = "pca/over_depth/explained", "mutual_information/mean"
SPECTRAL = ("pca/over_depth/dimensions", "pca/over_depth/components_90")
Found = dict[str, Tensor]


class Members(NamedTuple):
    """Subsets of the kept trajectories, ``(P, N)`` boolean each.

    Attributes:
        full: all of them.
        equal: as many of each as are compared at equal N.
        few: of these the ones whose dimensions are taken.
    """

    full: Tensor
    equal: Tensor
    few: Tensor

    def at(self, i: int) -> Members:
        """One subset, as the only one."""
        return Members(*(part[i : i + 1] for part in self))

    def joined(self, others: Sequence[Members]) -> Members:
        return Members(*(torch.cat(parts) for parts in zip(self, *others, strict=True)))

    def without(self, left: Tensor) -> Members:
        """The only subset without the trajectories ``left`` ``(G, N)`` in turn: ``(G, N)``."""
        return Members(*(part & ~left for part in self))

    def to(self, device: torch.device) -> Members:
        return Members(*(part.to(device) for part in self))


class SubsetCurves:
    """The curves of subsets of what was kept of a stream, all units or without massive ones, on every process."""

    def __init__(self, collected: Collected, how: How, paths: Sequence[str], units: Tensor, *, few: bool) -> None:
        share = collected.share
        assert share is not None
        self.share, self.how, self.collected, self.device = share, how, collected, share.x.device
        self.paths = [p for p in CURVES if p in paths]
        self.units, self.few = units, few
        mine = units[share.first_unit : share.first_unit + share.x.shape[-1]]
        self.x = share.x if bool(mine.all()) else share.x[..., mine]
        self.numbers = mine.nonzero().flatten() + share.first_unit
        self.subsets = Subsets(self.x)
        self.each = self._of_each()
        some = torch.linspace(0, int(units.sum()) - 1, min(N_UNITS, int(units.sum()))).round().long()
        chosen = units.nonzero().flatten()[some.to(units.device)]
        self.some = self.x[..., torch.isin(self.numbers, chosen)]
        self.gram: Tensor | None = None

    def _sum(self, values: Tensor) -> Tensor:
        """The sum over processes of what is a sum over units."""
        return reduce(add, from_all(values, self.device))

    def _of_each(self) -> Found:
        """The curves of each trajectory ``(N, ...)``, and what explained variance takes."""
        x, found = self.x, dict[str, Tensor]()
        n, s = x.shape[:2]
        sums = torch.zeros(3, n, s, dtype=torch.float64, device=self.device)
        for rows in torch.arange(n, device=self.device).split(64):
            part = x[rows].to(torch.float64)
            sums[0, rows] = part.square().sum(-1)
            sums[1, rows, 1:] = (part[:, 1:] * part[:, :-1]).sum(-1)
            sums[2, rows, 1:] = (part[:, 1:] - part[:, :-1]).square().sum(-1)
        size, dot, step = (self._sum(value) for value in sums)
        size, dot, step = size.sqrt(), dot[:, 1:], step[:, 1:].sqrt()
        before = torch.where(size[:, :-1] > 0, size[:, :-1], torch.nan)
        known = {
            "cosine/mean": (dot / before / size[:, 1:]).clamp(-1, 1),
            "velocity/speed": step,
            "velocity/relative": step / before,
            "norm/mean": size,
        }
        found = {path: value for path, value in known.items() if path in self.paths}
        if any(CURVES[path].measure == "curvature" for path in self.paths):
            products: StepProducts = reduce(add, from_all(step_products(x), self.device))
            found |= {
                "curvature/angle": curvature_of(products),
                "curvature/straightness": straightness_of(products)[:, None],
                "curvature/length": path_length_of(products)[:, None],
            }
        if EXPLAINED in self.paths:
            pca = self.collected.pca_without_massive if self.few else self.collected.pca
            assert pca is not None
            # in float64, so that sums over processes do not move what lies near the observed difference
            components = pca.components[self.numbers].to(torch.float64)
            mean = pca.mean[self.numbers].to(torch.float64)
            latents = torch.zeros(n, s, components.shape[1], dtype=torch.float64, device=self.device)
            away = torch.zeros(n, s, dtype=torch.float64, device=self.device)
            for rows in torch.arange(n, device=self.device).split(64):
                part = x[rows].to(torch.float64) - mean
                latents[rows], away[rows] = part @ components, part.square().sum(-1)
            away = self._sum(away)
            missed = away - self._sum(latents).square().sum(-1)
            found["missed"] = torch.where(missed > 1e-12 * away, missed, 0.0)  # below is rounding, of all components
            found["about_centre"] = self._sum(self.subsets.squares())
        return found

    def linear(self, members: Members) -> Found:
        """Those of subsets ``(P, ...)`` that are means and products of means."""
        found: Found = {}
        for path in self.paths:
            if path in self.each:
                found[path] = subset_means(self.each[path], members.full)
        if "correlation/mean" in self.paths:
            found["correlation/mean"] = mean_of(self._sum(self.subsets.correlation_sums(members.full)))
        if EXPLAINED in self.paths:
            spread = subset_means(self.each["about_centre"], members.full)
            spread = spread - self._sum(self.subsets.mean_squares(members.full))
            missed = subset_means(self.each["missed"], members.full)
            found[EXPLAINED] = 1 - missed / torch.where(spread > 0, spread, torch.nan)
        of_means = [path for path in OF_MEANS if path in self.paths]
        if of_means:
            limit = self.how.settings.density_threshold
            n_units = int(self.units.sum())
            if limit is None:  # half the RMS of the last sublayer, as of the whole
                last = self._sum(self.subsets.last_squares(members.equal))
                limits = 0.5 * (last / n_units).sqrt()
            else:
                limits = torch.full((len(members.equal),), limit, dtype=torch.float64, device=self.device)
            sums = self._sum(self.subsets.of_means(members.equal, limits, turns=TURNS in of_means))
            above, square, fourth, turns, counted = sums.unbind(1)
            of = {
                "activations/density": above / n_units,
                "activations/participation": square.square() / fourth,
                TURNS: torch.where(counted > 0, turns / counted, torch.nan)[:, :1],
            }
            found |= {path: of[path] for path in of_means}
        return found

    def turns_drawn(self, value: Members, without: Sequence[Members]) -> Tensor:
        """Mean |R| ``(n, K, 1)`` of simulated data about K subsets that scatter as ``without`` says."""
        mean = self.subsets.means(value.equal)
        others = torch.stack([self.subsets.means(part.equal) for part in without], dim=1)

        def sums(drawn: Tensor) -> Tensor:
            r = rotations(drawn).abs()
            return torch.stack([r.nansum(-1), r.isfinite().sum(-1).to(torch.float64)], -1)

        return mean_of(self._sum(simulate(sums, mean, others)))[..., None]

    def costly(self, members: Members, paths: Sequence[str]) -> Found:
        """Those of subsets ``(P, ...)`` that each take a computation of their own."""
        found: Found = {}
        if INFORMATION in paths:
            found[INFORMATION] = mean_of(self._sum(self._information_sums(members.equal, self.some)))
        if any(path in paths for path in SPECTRAL):
            spectra = self._spectra(members.few)
            of = {SPECTRAL[0]: dimension.participation, SPECTRAL[1]: dimension.components_for}
            found |= {path: of[path](spectra) for path in SPECTRAL if path in paths}
        return found

    def information(self, members: Members) -> Tensor:
        """Mean information ``(P, S - 1)`` over all units."""
        return mean_of(self._sum(self._information_sums(members.equal, self.x)))

    def _information_sums(self, members: Tensor, x: Tensor) -> Tensor:
        """Over some units: ``(P, S - 1, 2)``, the sum of what is finite, and of how many."""
        estimator, out = self.how.settings.mi.estimator, []
        for rows in members:
            part = x[rows]
            if len(part) < MIN_SAMPLES[estimator] or not part.shape[-1]:
                out.append(torch.zeros(x.shape[1] - 1, 2, dtype=torch.float64, device=self.device))
                continue
            mi = consecutive_information(part, estimator)
            known = mi.isfinite()
            out.append(torch.stack([torch.where(known, mi, 0.0).sum(-1), known.sum(-1).to(torch.float64)], -1))
        return torch.stack(out)

    def _spectra(self, members: Tensor) -> Tensor:
        """Variances along own components ``(P, S, K)``; each sublayer by one process."""
        if self.gram is None:
            whole = self.share.by_sublayer()[..., self.units]
            self.gram = torch.zeros(whole.shape[1], len(whole), len(whole), device=self.device)
            for s, product in enumerate(self.gram):
                states = dimension.centred(whole[:, s])
                product.copy_(states @ states.T)
        n = int(members.sum(1).max())
        out = self.gram.new_zeros(len(members), len(self.gram), n)
        for k, rows in enumerate(members):
            chosen = rows.nonzero().flatten()
            if len(chosen) > 1 and len(self.gram):
                out[k, :, : len(chosen)] = subset_spectra(self.gram, chosen)
        return torch.cat(from_all(out, self.device), dim=1).to(torch.float64)


def mean_of(sums: Tensor) -> Tensor:
    """From sums and counts ``(..., 2)``; NaN where nothing was counted."""
    return torch.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], torch.nan)
