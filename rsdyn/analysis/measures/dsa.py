"""The measure ``dsa``: how a stream moves from layer to layer, beside the main stream and, kept, other models."""

from __future__ import annotations

import torch
from torch import Tensor

from rsdyn.analysis.collected import Collected
from rsdyn.analysis.finding import Finding, Value, number
from rsdyn.analysis.measure import Measure
from rsdyn.analysis.results import AnalysisResults, ConditionResults, DepthDynamics, DepthStates, Measured
from rsdyn.analysis.settings import UNTRAINED
from rsdyn.dynamics.dynamical_similarity import (
    COMPONENTS,
    at_unit_size,
    dsa,
    explained_of_steps,
    halves,
    linear_step,
    rank_of,
)
from rsdyn.dynamics.moments import Covariance
from rsdyn.dynamics.projection import PCA
from rsdyn.labels import NAMES
from rsdyn.metrics.processes import from_all

KEPT = 400  # sequences that are taken: 0.5 MB of a model of 60 layers
SPLITS = 3  # into halves
LEAST_LAYERS = 6  # whose four steps have 24 orders
LEAST_SEQUENCES = 20  # so that a half of them has more states than components


def depth_dynamics(collected: Collected, main: Collected | None = None, *, seed: int) -> DepthDynamics:
    """Dynamics of the first sequences that were kept, and their distance from those of the stream ``main``.

    All numbers are NaN where the states of a layer are one and the same for all sequences, or fill too few dimensions.
    """
    share = collected.share
    assert share is not None
    sequence = share.sequence[:KEPT].cpu()
    states, held = depth_states(collected)
    group = collected.group_of(sequence)
    kept = None
    if collected.texts is not None and (main is None or collected.name == UNTRAINED):
        kept = DepthStates(states.to(torch.float32), collected.texts[sequence], group)
    unknown = torch.tensor(torch.nan, dtype=torch.float64)
    if rank_of(states) < states.shape[2]:
        return DepthDynamics(Measured(held), Measured(unknown), unknown.expand(SPLITS), states=kept)
    rows = halves(group, SPLITS, seed=seed)
    distances = [dsa(linear_step(states[row]), linear_step(states[~row]), seed=seed) for row in rows]
    return DepthDynamics(
        share=Measured(held),
        predicted=Measured(torch.tensor(explained_of_steps(states, rows[0]), dtype=torch.float64)),
        halves=torch.tensor(distances, dtype=torch.float64),
        with_main=None if main is None else Measured(_distance(states, depth_states(main)[0], seed)),
        states=kept,
    )


def _distance(states: Tensor, others: Tensor, seed: int) -> Tensor:
    known = rank_of(others) == others.shape[2] == states.shape[2]
    found = dsa(linear_step(states), linear_step(others), seed=seed) if known else torch.nan
    return torch.tensor(found, dtype=torch.float64)


def depth_states(collected: Collected) -> tuple[Tensor, Tensor]:
    """States behind each layer but the last, about their mean, in the stream's first components, on every process.

    The embedding is no state of the way: at the last token it is often one vector for most sequences. The components
    are those of all layers together, each at unit size.

    Returns:
        ``(N, L - 1, K)`` float64 on the CPU, and the share of the variance that they hold.
    """
    share = collected.share
    assert share is not None
    sites, n_sublayers = collected.sites_per_layer, collected.n_sublayers
    every = share.by_sublayer()[:KEPT]
    first = 0
    if share.n_processes > 1:
        first = torch.distributed.get_rank() * -(-n_sublayers // share.n_processes)
    own = [s - first for s in range(sites, n_sublayers, sites) if first <= s < first + every.shape[1]]
    x = every[:, own]
    if collected.unusable.any():
        x = x[..., ~collected.unusable]
    n_units = x.shape[2]
    scatter = torch.zeros(n_units, n_units, dtype=torch.float64, device=x.device)
    for place in range(len(own)):
        state = at_unit_size(x[:, place : place + 1])[:, 0]
        scatter.addmm_(state.T, state)
    scatter = torch.stack(from_all(scatter, x.device)).sum(0)
    n_places = len(range(sites, n_sublayers, sites))
    if not scatter.isfinite().all():
        blank = torch.zeros(len(x), n_places, min(COMPONENTS, n_units), dtype=torch.float64)
        return blank, torch.tensor(torch.nan, dtype=torch.float64)
    count = torch.tensor(float(len(x) * n_places), dtype=torch.float64, device=x.device)
    pca = PCA.from_covariance(Covariance(count, scatter.new_zeros(n_units), scatter), min(COMPONENTS, n_units))
    x = x.to(torch.float64)
    mine = pca.encode(x - x.mean(0))
    states = torch.cat(from_all(mine, mine.device), dim=1).cpu()
    return states, pca.explained_variance_ratio.sum().cpu()


def findings(found: AnalysisResults) -> list[Finding]:
    """What a linear step predicts, and how far the streams' steps are apart."""
    some = {c: r.dsa for c, r in found.conditions.items() if r.dsa is not None}
    why = "the states behind a layer are one and the same, or fill too few dimensions"
    main = NAMES.get(found.main_name, found.main_name)

    def value(condition: str, measured: Measured, note: str = "") -> Value:
        x, r = float(measured.value), found.conditions[condition]
        seeds = () if measured.seeds is None else tuple(map(float, measured.seeds))
        return Value(x, n=_n(r), seeds=seeds, note=note if x == x else "", reason="" if x == x else why)

    predicted = {
        c: value(c, d.predicted, f" ({float(d.share.value):.0%} of the variance in {COMPONENTS} components)")
        for c, d in some.items()
    }
    apart = {
        c: value(c, d.with_main, f" (halves of one stream: up to {number(float(d.halves.amax()))})")
        for c, d in some.items()
        if d.with_main is not None
    }
    rows = [
        Finding("dsa_predicted", "dsa", "", "", "steps from layer to layer that a linear map of the state predicts, "
                "held-out sequences", predicted)
    ]  # fmt: skip
    if apart:
        rows.append(
            Finding("dsa_with_main", "dsa", "", "", f"dynamical distance (DSA) from {main}, radians", apart,
                    of_main=True)
        )  # fmt: skip
    return rows


def _n(results: ConditionResults) -> int:
    return min(int(results.counts.trajectories), KEPT)


MEASURE = Measure(
    lambda collected, how: depth_dynamics(collected, how.main, seed=how.seed), more=findings, keeps_samples=True
)
