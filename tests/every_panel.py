"""Every panel there is, of small results drawn at random: by key."""

from types import SimpleNamespace

import numpy as np
import torch

from rsdyn.analysis.jacobians import CURVES, DIRECTIONS, PRODUCTS, SERIES, SIZES, JacobianResult, depths_of
from rsdyn.dynamics.controls import random_writes, stays_put
from rsdyn.dynamics.projection import PCA
from rsdyn.figures.jacobians import jacobian_panels
from rsdyn.figures.panel import Panel
from rsdyn.figures.perturbation import effect_panels, perturbation_panels
from rsdyn.perturbation.layers import LayerEffects
from rsdyn.perturbation.points import _add
from rsdyn.perturbation.result import FROZEN, STILL, WRITES, Found

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
    return found


def layer_effects() -> LayerEffects:
    generator = torch.Generator().manual_seed(0)
    n = torch.tensor([7, 30, 40, 50])
    loss = torch.rand(4, LAYERS, generator=generator, dtype=torch.float64) * 40
    return LayerEffects("skip", [*range(LAYERS)], n, torch.full((4,), 20.0, dtype=torch.float64), loss, loss + 1,
                        drawn=(1, 2, 3))  # fmt: skip


def every_panel() -> dict[str, Panel]:
    panels = [
        *jacobian_panels(jacobians()),
        *perturbation_panels(moved_points(), steps=3, ratio=[0.4, 0.1]),
        *effect_panels(layer_effects()),
    ]
    return {panel.key: panel for panel in panels}
