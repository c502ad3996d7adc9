"""Every panel there is, of small results drawn at random: by key."""

from types import SimpleNamespace

import numpy as np
import torch

from rsdyn.analysis.jacobians import CURVES, DIRECTIONS, PRODUCTS, SERIES, SIZES, JacobianResult, depths_of
from rsdyn.analysis.left_out import LargestUnits, LeftOut
from rsdyn.analysis.results import (
    Activations,
    AnalysisResults,
    ByGroup,
    ByToken,
    ConditionResults,
    Correlation,
    Cosine,
    Counts,
    Curvature,
    Dimension,
    Flags,
    GroupCurve,
    GroupRow,
    MassiveActivations,
    Measured,
    MutualInformation,
    NullTest,
    OverDepth,
    PhaseResults,
    Plane,
    PrincipalComponents,
    ReadoutResults,
    Rotation,
    Similarity,
    StepNull,
    Velocity,
)
from rsdyn.analysis.subset_curves import CURVES as BY_GROUP
from rsdyn.analysis.subset_curves import SINGLE
from rsdyn.analysis.unit_surrogates import TurnHistograms
from rsdyn.autoencoder.result import Trained
from rsdyn.dynamics.controls import random_writes, stays_put
from rsdyn.dynamics.projection import PCA
from rsdyn.figures.analysis import analysis_panels
from rsdyn.figures.autoencoder import training_panels
from rsdyn.figures.jacobians import jacobian_panels
from rsdyn.figures.panel import Panel
from rsdyn.figures.perturbation import effect_panels, perturbation_panels
from rsdyn.figures.streams import Analysis, Stream, streams_of
from rsdyn.perturbation.layers import LayerEffects
from rsdyn.perturbation.points import _add
from rsdyn.perturbation.result import FROZEN, STILL, WRITES, Found
from rsdyn.perturbation.said import Said

LAYERS, SITES, D = 5, 2, 12
S = LAYERS * SITES


def jacobians(texts: int = 3) -> JacobianResult:
    rng = np.random.default_rng(0)
    result = JacobianResult(LAYERS, D, SITES)
    for series in SERIES:
        curves = {name: rng.uniform(0.1, 0.9, (texts, S)) for name in (*CURVES, *PRODUCTS)}
        curves |= {"singular": np.zeros((texts, S)), "exponents": -np.sort(rng.normal(size=(texts, D)), axis=1)}
        curves["growth"] = rng.uniform(0, 0.1, texts)
        if series == "full":
            curves["linear"] = rng.uniform(0.4, 2, (texts, len(depths_of(S)), len(DIRECTIONS), len(SIZES)))
        result.curves[series] = curves
        result.eigenvalues[series] = 1 + rng.normal(size=(S, D)) + 1j * rng.normal(size=(S, D))
    return result


def moved_points(prompts: int = 4, points: int = 16) -> Found:
    plane = PCA(torch.zeros(D), torch.eye(D)[:, :2], torch.ones(2), torch.tensor(9.0))
    found = Found("teleport", prompts, points, {0: 0, 2: 4}, tuple(range(1, prompts)))
    for number in range(prompts):
        generator = torch.Generator().manual_seed(number)
        stream = torch.randn(S, D, generator=generator, dtype=torch.float64).cumsum(0)
        for layer, s in found.sublayers.items():
            reference = SimpleNamespace(stream=stream, log_probs=torch.zeros(5))
            states = stream[s] + torch.randn(points, D, generator=generator, dtype=torch.float64)
            for condition, moved in (
                ("teleport", stays_put(states, S - s) + stream[s:]),
                (STILL, stays_put(states, S - s)),
                (WRITES, random_writes(states, stream[s:], generator=generator)),
                (FROZEN, stays_put(states, S - s) * 0.9),
            ):
                if condition == FROZEN and number == 0 and layer == 2:
                    continue  # a prompt may lack a control
                _add(found, (layer, condition), reference, moved, torch.zeros(points, 5), plane, s, number)
    found.reference = torch.randn(S, 2).cumsum(0)
    for layer, s in found.sublayers.items():
        own = torch.arange(S - s + 1)
        found.said[layer] = Said(torch.stack([own, own.clamp(max=1), own.flip(0), own + (own == 1)]), own)
    return found


def layer_effects() -> LayerEffects:
    generator = torch.Generator().manual_seed(0)
    n = torch.tensor([7, 30, 40, 50])
    loss = torch.rand(4, LAYERS, generator=generator, dtype=torch.float64) * 40
    return LayerEffects("skip", [*range(LAYERS)], n, torch.full((4,), 20.0, dtype=torch.float64), loss, loss + 1,
                        drawn=(1, 2, 3))  # fmt: skip


def measured(shape, generator, low=0.1, high=0.9, *, massive=True, **more) -> Measured:
    value = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
    without = Measured(value / 2, interval=torch.stack([value / 2 - 0.01, value / 2 + 0.01])) if massive else None
    return Measured(value, interval=torch.stack([value - 0.02, value + 0.03]), without_massive=without, **more)


def null_test(generator, *, example=True) -> NullTest:
    mean, std = torch.randn(2, D, generator=generator, dtype=torch.float64)
    p, q = torch.rand(2, D, generator=generator, dtype=torch.float64)
    drawn = torch.randn(D, generator=generator, dtype=torch.float64) if example else None
    return NullTest(mean, std.abs(), mean, p, q, 1.0, example=drawn, walks_beyond=0.05, surrogates=p[:4])


def condition(seed: int, *, massive: bool = True, literal: bool = False, sites: int = SITES) -> ConditionResults:
    g = torch.Generator().manual_seed(seed)
    n = LAYERS * sites
    units = torch.tensor([3, 7]) if massive else torch.tensor([], dtype=torch.int64)
    flags = Flags(
        torch.tensor([3, 7]), torch.tensor([200.0, 120.0]), torch.tensor([0, 1, 2]), units, torch.ones(len(units)),
        torch.tensor([], dtype=torch.int64), torch.zeros(n, dtype=torch.int64), torch.tensor([], dtype=torch.int64),
        torch.zeros(n, dtype=torch.int64), torch.zeros(n - 1), torch.tensor([], dtype=torch.int64),
    )  # fmt: skip

    def curve(size, low=0.1, high=0.9, **more):
        return measured((size,), g, low, high, massive=massive, **more)

    trajectory = torch.randn(n, D, generator=g, dtype=torch.float64).cumsum(0)
    path = torch.randn(6, n, 3, generator=g, dtype=torch.float64).cumsum(1)
    ratio = torch.tensor([0.5, 0.3, 0.15], dtype=torch.float64)
    of_units = torch.rand(n - 1, D, generator=g, dtype=torch.float64)
    of_units[2, 4], of_units[3, 1] = torch.nan, torch.inf
    components = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64)).Q[:10]
    more = {"true": curve(n - 1), "true_units": of_units} if literal else {}
    nulls = {name: null_test(g) for name in ("innovation_shuffle", "increment_shuffle_scaled", "layer_shuffle")}
    return ConditionResults(
        Counts(40, 0, 0, 10), flags,
        activations=Activations(trajectory, trajectory.abs(), curve(n), 0.4, curve(n, 1, 6), 0.3),
        correlation=Correlation(
            of_units.clamp(max=1), curve(n - 1), of_units.isnan().sum(1),
            torch.randint(0, 9, (D, 50), generator=g).double(), torch.linspace(0, 1, 51, dtype=torch.float64),
            torch.ones(D), 0.02, torch.rand(n, generator=g), torch.rand(D, generator=g),
        ),
        cosine=Cosine(curve(n - 1), torch.rand(5, n - 1, generator=g)),
        velocity=Velocity(curve(n - 1, 1, 200), curve(n - 1, 0.01, 3), relative_by_position=torch.rand(5, n - 1)),
        mutual_information=MutualInformation(
            "paper_literal" if literal else "kde", of_units, curve(n - 1, n=40), 0.1 * torch.rand(n - 1, generator=g),
            of_units.isnan().sum(1), of_units.isinf().sum(1), **more,
        ),
        rotation=Rotation(
            torch.randn(D, generator=g, dtype=torch.float64), measured((), g), trajectory,
            torch.randn(D, generator=g, dtype=torch.float64), torch.zeros(D), 5.0,
            nulls | {"untrained": null_test(g, example=False)},
        ),
        pca=PrincipalComponents(
            Measured(ratio, without_massive=Measured(ratio / 2) if massive else None), components, components[:3, :2],
            Plane(path[0, :, :2], path[:, :, :2], ratio[:2]), half_angles=torch.tensor([3.0, 8.0]),
            latents=Plane(path.mean(0), path, ratio), over_depth=OverDepth(curve(n), curve(n, 1, 5), curve(n, 1, 9)),
        ),
        massive=MassiveActivations(
            largest=10 * torch.rand(3, n, generator=g) + 1, unit=torch.randint(0, D, (3, n), generator=g),
            typical=torch.rand(3, n, generator=g) + 0.1, counts=torch.tensor([4, 0, 30]), top=torch.tensor([3]),
            curves=torch.rand(3, 1, n), onset=torch.ones(3, 1), before=torch.ones(3, 1), after=torch.ones(3, 1),
            unwritten=torch.ones(3, 1), norm_by_position=torch.rand(5, n, generator=g) + 1,
            ratio=ByToken(curve(n, 900, 3000, n=4), None, curve(n, 4, 60, n=30)), massive=torch.rand(3, n),
            normal_ratio=4.4, normal_quantile=5.4, normal_p=torch.rand(3, n),
        ),
        **shape(n, curve, main=seed == 0),
    )  # fmt: skip


def shape(n: int, curve, *, main: bool) -> dict[str, object]:
    number = curve(n)
    nulls = {"shuffled_steps": StepNull(1.4, 1.5, 0.01, -10.0, 0.001)}
    places = torch.tensor([[2, -1], [1, 3]])
    return {
        "curvature": Curvature(curve(n - 2, 1, 2), *[number] * 4, nulls, over_tokens=curve(n, 1, 2),
                               by_position=torch.rand(5, n - 2)),
        "dimension": Dimension(*[curve(n, 1, 20) for _ in range(6)], torch.zeros(n, dtype=torch.int64),
                               {"twonn": torch.rand(5, n)}, 30),
        "similarity": Similarity(torch.rand(n, n), curve(n - 1), torch.rand(5, n - 1) / 50 if main else None, None,
                                 None if main else curve(n), by_position=torch.rand(5, n - 1)),
        "readout": ReadoutResults("logit lens", *[curve(n, n=20) for _ in range(5)], number,
                                  torch.linspace(0, 1, n + 1), by_position={"kl": torch.rand(5, n)} if main else {}),
        "phases": PhaseResults(("cosine/mean", "curvature/angle"), 2, places, places, places, torch.rand(2),
                               torch.tensor([0.3, 0.01]), torch.rand(2, 9)),
    }  # fmt: skip


def analysis(**more) -> AnalysisResults:
    names = ("original", "token_shuffled", "untrained")
    others = {"massive": False, "sites": more.get("sites", SITES)}
    found = {name: condition(seed, **(more if seed == 0 else others)) for seed, name in enumerate(names)}
    measures = ("activations", "correlation", "cosine", "velocity", "mutual_information", "rotation", "pca", "massive")
    sites = more.get("sites", SITES)
    return AnalysisResults(found, measures, sites, LAYERS * sites, D, by_group(n=LAYERS * sites))


def by_group(names=("a", "b", "c"), *, n: int = S) -> ByGroup:
    """Groups, each against the rest, or two of them against each other."""
    g = torch.Generator().manual_seed(3)
    first, second = (names[:1], names[1:]) if len(names) == 2 else (names, ("the rest",) * len(names))
    n_groups, n_contrasts = len(names), len(first)
    counts = torch.arange(40, 40 + n_groups)

    def drawn(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64) + 0.1

    curves, rows = {}, {}
    for path, (measure, key, words) in BY_GROUP.items():
        size = 1 if path in SINGLE else n - 1 if path.startswith(("corr", "cos", "vel", "mut")) else n
        size -= 2 * (path == "curvature/angle")
        for more in ("", "_without_massive") if key == "cosine" else ("",):
            value, difference = drawn(n_groups, size), drawn(n_contrasts, size) - 0.5
            ends, apart = torch.stack([value - 0.1, value + 0.1]), torch.stack([difference - 0.2, difference + 0.2])
            p = drawn(n_contrasts) / 2
            said = words + more.replace("_", " ")
            curves[key + more] = GroupCurve(
                path, said, value, ends, difference, apart, p, counts, key == "dimensions", bool(more)
            )
            rows[f"{key}_level{more}"] = GroupRow(
                measure, said, value[:, 0], ends[..., 0], difference[:, 0], apart[..., 0], p / 99, p / 9,
                counts, key == "dimensions", "", key == "speed",
            )  # fmt: skip
    return ByGroup(names, counts, counts // 4, 2, first, second, "documents", "documents", 100, 999, curves, rows,
                   ("2 sequences have no label: they are in the whole alone.",))  # fmt: skip


def streams(**more) -> list[Stream]:
    return streams_of([Analysis(analysis(**more), "a model", "a run", 40)])


def largest_units() -> LargestUnits:
    values = {"original": [0.5, 0.1, float("nan")], "untrained": [0.2, 0.3, 0.4]}
    rows = [LeftOut(f"row_{i}", "cosine", f"the statistic of row {i}, rank correlation", "", values) for i in range(5)]
    return LargestUnits([0, 1, 2], [3, 7], [200.0, 120.0], rows)


def trained(k: int = 2) -> Trained:
    g = torch.Generator().manual_seed(0)
    path = torch.randn(7, S, k, generator=g, dtype=torch.float64).cumsum(1)
    ev = {view: tuple(torch.rand(2, S, generator=g, dtype=torch.float64) - 0.3) for view in ("own", "global", "raw")}
    losses = tuple((float(e), 1.0 / (e + 1)) for e in range(5))
    return Trained((D, 8, 6, k), "unit", S, SITES, 7, path.mean(0), path, tuple(range(7)), torch.rand(S - 1),
                   torch.rand(S - 1) / 9, ev, losses, losses, 3, 1.6)  # fmt: skip


def histograms(units=range(D)) -> dict[str, TurnHistograms]:
    counts = np.random.default_rng(0).integers(0, 9, (len(units), 40))
    ends = np.full(len(units), 1.0)
    return {"layer_shuffle": TurnHistograms(tuple(units), counts, -ends, ends)}


def every_panel() -> dict[str, Panel]:
    """All panels; those of the paper's sum stand for themselves."""
    literal = [
        p
        for p in analysis_panels(streams(literal=True))
        if p.key.startswith(("fig1g_information_kde", "fig1h_information_kde"))
    ]
    panels = [
        *analysis_panels(streams(), largest=largest_units(), histograms=histograms()),
        *literal,
        *training_panels(trained(), {"PCA, 100 components (analysis)": measured((S,), torch.Generator())}),
        *jacobian_panels(jacobians()),
        *perturbation_panels(moved_points(), steps=3, ratio=[0.4, 0.1]),
        *effect_panels(layer_effects()),
    ]
    return {panel.key: panel for panel in panels}
