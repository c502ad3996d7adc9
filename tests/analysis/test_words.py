"""What an analysis says in sentences, with the numbers it was given."""

import math

import torch
from analysis_results import analysis, condition

from rsdyn.analysis.results import NullTest
from rsdyn.analysis.words import flags_in_words, plane_in_words, rotation_in_words


def test_turns_are_set_beside_those_of_walks():
    p = torch.tensor([0.001, 0.001, 0.02] + [0.5] * 6 + [math.nan], dtype=torch.float64)
    test = NullTest(p, p, p, p, p, over_units=2.5, walks_beyond=0.98)
    turning = condition({
        "rotation/mean_abs": torch.tensor(7.5), "rotation/random_walk": 5.3, "rotation/nulls": {"layer_shuffle": test},
    })  # fmt: skip
    first, second = rotation_in_words(turning.rotation, 32)
    assert "7.50 times" in first and "5.30 times" in first
    assert second.startswith("33 % of the units") and "98 % do" in second


def test_units_to_look_at_twice_are_named():
    none = torch.zeros(0, dtype=torch.int64)
    flags = {
        "flags/unusable_units": none,
        "flags/constant_units": none,
        "flags/frozen_units": torch.arange(20),
        "flags/constant": torch.zeros(4),
        "flags/few_levels": torch.tensor([0, 2, 0, 1]),
        "flags/left_out_counts": torch.tensor([1, 2]),
    }
    _, line = flags_in_words(analysis({"original": condition(flags)}, []))
    assert "20 frozen" in line and "7, ...)" in line
    assert "3 unit-sublayers with few levels" in line and "constant" not in line
    clean = {k: v[:0] if k.endswith("units") else v if k.endswith("counts") else v * 0 for k, v in flags.items()}
    (line,) = flags_in_words(analysis({"original": condition(clean)}, []))
    assert flags_in_words(analysis({"original": condition()}, [])) == []  # no unit was looked at
    assert line == "No unit is massive: none has a mean of 100 times the median in original."


def test_the_plane_is_put_into_words():
    results = {
        "pca/ratio": torch.tensor([0.3, 0.2, 0.1]),
        "pca/control/ratio": torch.tensor([0.6, 0.15]),
        "pca/half_angles": torch.tensor([1.25, 3.5]),
        "pca/massive_loadings": torch.tensor([[0.5, 0.25], [0.0, 0.0]]),
    }
    (line,) = plane_in_words(condition(results).pca)
    assert "50 % of the variance" in line and "same steps: 75 %" in line and "1.2 and 3.5 degrees" in line
    assert "Massive units are 75 % of the first component." in line
    (line,) = plane_in_words(condition(results | {"pca/massive_loadings": torch.zeros(3, 0)}).pca)
    assert "Massive" not in line
