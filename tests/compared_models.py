"""What was measured of made-up models, for tests of comparisons: equal in all facts but for those that are changed."""

import dataclasses

import numpy as np
import torch

from rsdyn.analysis.comparison import Curve, Facts, Model
from rsdyn.analysis.finding import Finding, Value
from rsdyn.analysis.results import Grams
from rsdyn.dynamics.similarity import hollow_grams, packed

FACTS = Facts(
    text="embedded", filter="101 to 499 characters", order="drawn by seed 0", n_sequences=400, n_trajectories=400,
    positions="last", bos="<|bos|>", own_bos=True, tokenizer="BPE, 4096 tokens, BOS 0", n_sublayers=32, n_units=128,
    sites_per_layer=2, computed="computed in float32, kept in bfloat16", version="0.2.0",
    settings={"analysis.mi.estimator": "kde", "analysis.measures": ["correlation", "mutual_information", "rotation"]},
)  # fmt: skip
ROWS = (
    ("correlation_trend", "correlation", "correlations rise with depth", "rise", ""),
    ("correlation_change", "correlation", "", "", "correlation_trend"),
    ("correlation_within_minus_cross", "correlation", "within-layer correlations are higher", "within > cross", ""),
    ("information_early_fall", "mutual_information", "information falls in early layers", "falls", ""),
    ("turns", "rotation", "units rotate", "10.74 turns over 64 sublayers", ""),
    ("turns_innovation_shuffle_z", "rotation", "", "", "turns"),
    ("explained_trend", "pca", "", "", ""),
)


def findings(value=0.5, untrained=0.1, rows=ROWS):
    def number(x):
        return Value(x, x - 0.05, x + 0.05, n=400)

    return tuple(
        Finding(key, measure, claim, paper, f"{key}, measured",
                {"original": number(value)} | ({} if untrained is None else {"untrained": number(untrained)}), under,
                both_sites="within" in key)
        for key, measure, claim, paper, under in rows
    )  # fmt: skip


def model(label, value=0.5, untrained=0.1, series="", step=None, rows=ROWS, **changed):
    conditions = ("original",) if untrained is None else ("original", "untrained")
    facts = dataclasses.replace(FACTS, **changed)
    return Model(label, facts, findings(value, untrained, rows), conditions, series=series, step=step)


def with_curves(of, names, height=0.5):
    """The model with curves of these names in each of its conditions, over transitions, with an interval."""
    n = of.facts.n_sublayers - 1
    at = (np.arange(n) + 0.5) / n
    values = height + 0.3 * at
    curve = Curve(at, values, values - 0.02, values + 0.02)
    return dataclasses.replace(of, curves={c: dict.fromkeys(names, curve) for c in of.conditions})


def with_grams(of, n_sequences=60, seed=0):
    """The model with what its similarity with others is made of, in each of its conditions: noisy copies of a walk."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(n_sequences, of.facts.n_sublayers, 20, generator=generator).cumsum(1)
    own = torch.Generator().manual_seed(1 + seed)
    grams = {}
    for condition in of.conditions:
        x = shared + 0.5 * torch.randn(shared.shape, generator=own).cumsum(1)
        if condition == "untrained":
            x = torch.randn(shared.shape, generator=own)
        number = torch.arange(n_sequences)
        grams[condition] = Grams(packed(hollow_grams(x)), 7919 * number, number // 3)
    settings = dict(of.facts.settings) | {"analysis.measures": ["correlation", "similarity"]}
    return dataclasses.replace(of, facts=dataclasses.replace(of.facts, settings=settings), grams=grams)
