"""What an analysis says in sentences, with the numbers it was given."""

import math

import torch

from rsdyn.analysis.words import flags_in_words, plane_in_words, rotation_in_words


def test_turns_are_set_beside_those_of_walks():
    p = torch.tensor([0.001, 0.001, 0.02] + [0.5] * 6 + [math.nan], dtype=torch.float64)
    turning = {
        "rotation_abs_mean": torch.tensor(7.5),
        "rotation_random_walk": torch.tensor(5.3),
        "null_layer_shuffle_mean": torch.zeros(10),
        "null_layer_shuffle_p": p,
        "null_layer_shuffle_q_normal": p,
        "walks_beyond_layer_shuffle": torch.tensor(0.98),
    }
    first, second = rotation_in_words(turning, 32)
    assert "7.50 times" in first and "5.30 times" in first
    assert second.startswith("33 % of the units") and "98 % do" in second


def test_units_to_look_at_twice_are_named():
    none = torch.zeros(0, dtype=torch.int64)
    flags = {
        "unusable_units": none,
        "constant_units": none,
        "frozen_units": torch.arange(20),
        "constant": torch.zeros(4),
        "few_levels": torch.tensor([0, 2, 0, 1]),
    }
    (line,) = flags_in_words({"original": flags})
    assert "20 frozen" in line and "7, ...)" in line
    assert "3 unit-sublayers with few levels" in line and "constant" not in line
    clean = {k: v[:0] if k.endswith("units") else v * 0 for k, v in flags.items()}
    assert flags_in_words({"original": clean}) == []


def test_the_plane_is_put_into_words():
    results = {
        "pca_ratio": torch.tensor([0.3, 0.2, 0.1]),
        "control_ratio": torch.tensor([0.6, 0.15]),
        "half_angles": torch.tensor([1.25, 3.5]),
        "pca_massive_loadings": torch.tensor([[0.5, 0.25], [0.0, 0.0]]),
    }
    (line,) = plane_in_words(results)
    assert "50 % of the variance" in line and "same steps: 75 %" in line and "1.2 and 3.5 degrees" in line
    assert "Massive units are 75 % of the first component." in line
    (line,) = plane_in_words(results | {"pca_massive_loadings": torch.zeros(3, 0)})
    assert "Massive" not in line
