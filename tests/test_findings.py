"""The findings say what the curves do, for curves whose answer is known."""

import math

import pytest
import torch

from rsdyn.analysis.findings import (
    as_json,
    as_markdown,
    as_text,
    findings,
    flags_in_words,
    plane_in_words,
    rotation_in_words,
    share_beyond,
    spearman,
)
from rsdyn.analysis.settings import ESTIMATORS, MEASURES, NULLS
from rsdyn.dynamics import information
from rsdyn.dynamics import rotation_test as surrogates

S = 13
TRANSITIONS = torch.arange(S - 1, dtype=torch.float64)


def results(**curves):
    """Results whose groups scatter a little about each curve."""
    out = {}
    generator = torch.Generator().manual_seed(0)
    for name, curve in curves.items():
        noise = 1e-3 * torch.randn(10, *curve.shape, generator=generator, dtype=torch.float64)
        out |= {name: curve, f"{name}_groups": curve + noise}
    return out


def cells(table):
    return {(row.measure, row.statistic): row.values for row in table}


def test_the_schema_names_what_the_library_has():
    assert ESTIMATORS == information.ESTIMATORS
    assert (*surrogates.NULLS, "token_shuffled", "untrained") == NULLS


def test_each_statistic_of_a_known_curve():
    zigzag = torch.where(TRANSITIONS % 2 == 0, 0.9, 0.7)  # within and across layers, no trend
    rising = 1 + TRANSITIONS
    steeper = torch.cat([torch.arange(8.0), 7 + 4 * torch.arange(1, 5)]).to(torch.float64)
    falling = torch.cat([torch.tensor([3.0, 2.0]), torch.ones(S - 3)]).to(torch.float64)
    found = cells(
        findings(
            {"here": results(r_mean=zigzag + 1e-3 * TRANSITIONS, cosine=rising, speed=steeper, mi_mean=falling)},
            ["correlation", "cosine", "velocity", "mutual_information"],
            sites_per_layer=2,
        )
    )
    value = found["correlation", "within minus cross"]["here"]
    assert value.value == pytest.approx(0.199, abs=1e-6) and value.low < 0.199 < value.high
    trend = found["correlation", "mean correlation, rank correlation with depth"]["here"]
    assert trend.value == pytest.approx(1.0) and trend.low < 1.0 and trend.high <= 1.0  # its steps are its noise
    assert found["cosine", "mean cosine, rank correlation with depth"]["here"].value == pytest.approx(1.0)
    assert found["velocity", "slope there less before, of the mean"]["here"].value > 0.3
    fall = found["mutual_information", "first transition minus mean of the last two thirds, nats"]["here"]
    assert fall.value == pytest.approx(2.0)


def test_massive_units_and_the_papers_sum_have_rows_of_their_own():
    curves = results(mi_mean=1 / (1 + TRANSITIONS), speed=1 + TRANSITIONS)
    curves |= {
        "mi_estimator": "paper_literal",
        "mi_true_mean": 2 + 0 * TRANSITIONS,
        "speed_without_massive": TRANSITIONS,
    }
    table = findings({"here": curves}, ["mutual_information", "velocity"], sites_per_layer=2)
    statistics = [row.statistic for row in table]
    assert statistics.count("  without massive units") == 3
    assert any("the paper's sum, no information" in s for s in statistics)
    assert any(s.endswith("(true, kde)") for s in statistics)
    assert not any("nats" in s and "true" not in s for s in statistics)


def test_massive_units_are_left_out_of_the_share_beyond_a_null():
    p = torch.tensor([0.001, 0.2, 0.01, 0.5, torch.nan])
    found = {"null_iaaft_p": p, "massive_units": torch.tensor([0])}
    assert share_beyond(found, "iaaft") == pytest.approx(50)
    assert share_beyond(found, "iaaft", leave_out=found["massive_units"]) == pytest.approx(100 / 3)
    assert found["null_iaaft_p"].isnan().sum() == 1


def test_one_site_a_layer_has_no_rows_on_kinds():
    table = findings({"here": results(speed=1 + TRANSITIONS)}, ["velocity"], sites_per_layer=1)
    assert len(table) == 2 and not any("within" in row.statistic for row in table)


def test_spearman_where_nothing_can_be_said():
    assert math.isnan(spearman(torch.ones(5))) and math.isnan(spearman(torch.tensor([1.0, 2.0])))
    assert spearman(torch.tensor([1.0, math.nan, 2.0, 3.0])).item() == pytest.approx(1.0)


@pytest.fixture
def turning():
    """Ten units, of which the null explains seven; z says two beyond doubt."""
    p = torch.tensor([0.001, 0.001, 0.02] + [0.5] * 6 + [math.nan], dtype=torch.float64)
    q = torch.tensor([1e-6, 1e-6, 0.2] + [0.9] * 6 + [math.nan], dtype=torch.float64)
    return {
        "rotation_abs_mean": torch.tensor(7.5),
        "rotation_random_walk": torch.tensor(5.3),
        "null_layer_shuffle_mean": torch.zeros(10),
        "null_layer_shuffle_p": p,
        "null_layer_shuffle_q_normal": q,
        "null_layer_shuffle_population_p": 0.25,
        "walks_beyond_layer_shuffle": torch.tensor(0.98),
    }


def test_rotations_are_counted_against_each_null(turning):
    table = findings({"here": turning}, ["rotation"], sites_per_layer=2)
    found = cells(table)
    assert str(found["rotation", "turns under layer_shuffle (p of mean |R|)"]["here"]) == "0.000 (p 0.250)"
    beyond = found["rotation", "  units beyond it, p < .05 (chance: 5 %)"]["here"]
    assert beyond.value == pytest.approx(100 * 3 / 9) and "(22 % with q < .05)" in str(beyond)
    first, second = rotation_in_words(turning, 32)
    assert "7.50 times" in first and "5.30 times" in first
    assert second.startswith("33 % of the units") and "98 % do" in second


def test_the_three_forms_hold_the_same(turning):
    table = findings({"a": turning | results(cosine=1 + TRANSITIONS), "b": turning}, ["rotation", "cosine"], 2)
    text, page, data = "\n".join(as_text(table, ["a", "b"])), as_markdown(table, ["a", "b"]), as_json(table)
    for row in table:
        assert row.statistic in text and row.statistic.replace("|R|", "\\|R\\|") in page
        for value in row.values.values():
            assert str(value) in text and str(value) in page.replace("\\|", "|")
    assert len(data) == len(table) and page.count("\n") == len(table) + 2
    assert len({line.count("|") - line.count("\\|") for line in page.splitlines()}) == 1
    assert max(map(len, text.splitlines())) < 200


def test_units_to_look_at_twice_are_named():
    none = torch.zeros(0, dtype=torch.int64)
    flags = {
        "massive_units": torch.tensor([788, 1384]),
        "unusable_units": none,
        "constant_units": none,
        "frozen_units": torch.arange(20),
        "constant": torch.zeros(4),
        "few_levels": torch.tensor([0, 2, 0, 1]),
    }
    (line,) = flags_in_words({"original": flags})
    assert "2 massive" in line and "(788, 1384)" in line and "20 frozen" in line and ", ...)" in line
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


def test_every_measure_has_a_row():
    assert {row[0] for row in __import__("rsdyn.analysis.findings", fromlist=["_rows"])._rows(2)} == set(MEASURES)
