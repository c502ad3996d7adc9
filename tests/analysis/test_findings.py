"""The findings say what the curves do, for curves whose answer is known."""

import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from analysis_results import analysis, condition, scattered
from scipy.stats import spearmanr

from rsdyn.analysis.finding import Finding, Value
from rsdyn.analysis.findings import findings, rows
from rsdyn.analysis.results import Measured, NullTest
from rsdyn.analysis.rotation_rows import share_beyond
from rsdyn.analysis.settings import MEASURES, NULLS, MiConfig
from rsdyn.analysis.statistics import ends_of, fitted_change, spearman
from rsdyn.dynamics import information
from rsdyn.dynamics import rotation_test as surrogates

S = 13
TRANSITIONS = torch.arange(S - 1, dtype=torch.float64)


def cells(table):
    return {row.key: row.values for row in table}


def test_the_schema_names_what_the_library_has():
    assert get_args(get_type_hints(MiConfig)["estimator"]) == information.ESTIMATORS
    assert (*surrogates.NULLS, "token_shuffled", "untrained") == NULLS


def test_each_statistic_of_a_known_curve():
    zigzag = torch.where(TRANSITIONS % 2 == 0, 0.9, 0.7)  # within and across layers, no trend
    rising = 1 + TRANSITIONS
    steeper = torch.cat([torch.arange(8.0), 7 + 4 * torch.arange(1, 5)]).to(torch.float64)
    falling = torch.cat([torch.tensor([3.0, 2.0]), torch.ones(S - 3)]).to(torch.float64)
    here = condition({
        "correlation/mean": scattered(zigzag + 1e-3 * TRANSITIONS), "cosine/mean": scattered(rising),
        "velocity/speed": scattered(steeper), "mutual_information/mean": scattered(falling, n=150),
    })  # fmt: skip
    measures = ["correlation", "cosine", "velocity", "mutual_information"]
    found = cells(findings(analysis({"here": here}, measures)))
    value = found["correlation_within_minus_cross"]["here"]
    assert value.value == pytest.approx(0.199, abs=1e-6) and value.low < 0.199 < value.high
    trend = found["correlation_trend"]["here"]
    assert trend.value == pytest.approx(1.0) and trend.low < 1.0 and trend.high <= 1.0  # its steps are its noise
    assert found["cosine_trend"]["here"].value == pytest.approx(1.0)
    assert found["cosine_trend"]["here"].ends == (1.5, 5.5, 11.5)  # of the layers' means
    change = found["cosine_change"]["here"]
    assert change.value == pytest.approx(10.0) and change.low < 10 < change.high
    layers = steeper.reshape(-1, 2).mean(1).numpy()
    slope = np.polyfit(range(6), layers, 1)[0] * 5
    assert found["speed_change"]["here"].value == pytest.approx(slope / layers.mean())
    assert found["speed_late_steepening"]["here"].value > 0.3
    fall = found["information_early_fall"]["here"]
    assert fall.value == pytest.approx(2.0)
    assert fall.n == 150 and change.n == 240  # information is of the trajectories that were kept


def test_massive_units_and_the_papers_sum_have_rows_of_their_own():
    here = condition({
        "mutual_information/estimator": "paper_literal",
        "mutual_information/mean": scattered(1 / (1 + TRANSITIONS)),
        "mutual_information/true": 2 + 0 * TRANSITIONS,
        "mutual_information/between_tokens": 1 / (1 + TRANSITIONS),
        "velocity/speed": scattered(1 + TRANSITIONS, without_massive=Measured(TRANSITIONS)),
    })  # fmt: skip
    table = findings(analysis({"here": here}, ["mutual_information", "velocity"]))
    by_key = {row.key: row for row in table}
    assert sum(key.endswith("_without_massive") for key in by_key) == 4
    assert by_key["speed_trend_without_massive"].under == "speed_trend"
    assert by_key["speed_change_without_massive"].under == "speed_trend"
    assert "the paper's sum, no information" in by_key["paper_sum_trend"].statistic
    assert by_key["information_trend"].statistic.endswith("(true, kde)")
    assert not any("nats" in row.statistic for row in table if row.key.startswith("paper_sum"))
    assert "paper_sum_early_fall_between_tokens" in by_key  # estimated as asked for, so of the true one there is none
    assert "information_early_fall_between_tokens" not in by_key


def test_massive_units_are_left_out_of_the_share_beyond_a_null():
    p = torch.tensor([0.001, 0.2, 0.01, 0.5, torch.nan])
    test = NullTest(p, p, p, p, p, over_units=1.0)
    assert share_beyond(test) == pytest.approx(50)
    assert share_beyond(test, leave_out=torch.tensor([0])) == pytest.approx(100 / 3)
    assert p.isnan().sum() == 1


def test_one_site_a_layer_has_no_rows_on_kinds():
    table = findings(analysis({"here": condition({"velocity/speed": 1 + TRANSITIONS})}, ["velocity"], sites=1))
    assert [row.key for row in table] == ["speed_trend", "speed_change", "speed_late_steepening"]


def test_an_interval_says_in_its_row_that_it_rests_on_too_few_documents():
    rising = {"cosine/mean": scattered(1 + TRANSITIONS)}
    here = condition(rising | {"counts/intervals_note": "rests on 4 documents: too few"}, groups=4)
    table = findings(analysis({"here": here, "there": condition(rising)}, ["cosine"]))
    assert all(str(row.values["here"]).endswith("] (rests on 4 documents: too few)") for row in table)
    assert not any("few" in str(row.values["there"]) for row in table)
    alone = {"cosine/mean": 1 + TRANSITIONS, "counts/intervals_note": "rests on 1 document: too few"}
    trend, _ = findings(analysis({"here": condition(alone, groups=1)}, ["cosine"]))
    assert str(trend.values["here"]) == "1.000 (no interval: rests on 1 document: too few)"


@pytest.mark.parametrize("curve", [[3.0, 1.0, 2.0, 2.0, 9.0], [1e-9, 1.0, 1.0, 1.0], [5.0, 4.0, 3.0]])
def test_spearman_is_scipys(curve):
    expected = spearmanr(range(len(curve)), curve).statistic
    assert float(spearman(torch.tensor(curve, dtype=torch.float64))) == pytest.approx(expected, abs=1e-12)
    several = torch.tensor([curve, curve[::-1]], dtype=torch.float64)
    assert spearman(several).tolist() == pytest.approx([expected, -expected], abs=1e-12)


def test_spearman_where_nothing_can_be_said():
    assert math.isnan(spearman(torch.ones(5))) and math.isnan(spearman(torch.tensor([1.0, 2.0])))
    assert spearman(torch.tensor([1.0, math.nan, 2.0, 3.0])).item() == pytest.approx(1.0)


def test_the_fitted_change_is_that_of_the_least_squares_line():
    curve = torch.tensor([3.0, 1.0, math.nan, 7.0, 2.0])
    known = [0, 1, 3, 4]
    expected = np.polyfit(known, curve[known].numpy(), 1)[0] * 4
    assert float(fitted_change(curve)) == pytest.approx(expected)
    assert math.isnan(fitted_change(torch.tensor([1.0, math.nan])))
    assert ends_of(torch.tensor([1.0, 2.0, 3.0, 4.0])) == (1.0, 2.0, 4.0)


def test_what_is_not_defined_says_why():
    r_mean = torch.cat([torch.tensor([math.nan]), 0.5 + 0.01 * TRANSITIONS[1:]])
    constant = torch.zeros(S)
    constant[0] = 8
    same = condition({"correlation/mean": scattered(r_mean), "velocity/speed": scattered(torch.ones(S - 1)),
                      "flags/constant": constant})  # fmt: skip
    short = condition({"correlation/mean": scattered(r_mean[:3]), "velocity/speed": scattered(TRANSITIONS[:3])})
    found = cells(findings(analysis({"same": same, "short": short}, ["correlation", "velocity"])))
    first = found["correlation_first"]["same"]
    assert not first.defined and "end in the same token" in first.reason
    assert found["correlation_first"]["short"].reason == "the curve itself is not defined at the first transition"
    assert found["speed_trend"]["same"].reason == "the curve never moves"
    assert found["speed_trend"]["short"].reason.endswith("at least 3 values over depth, and there are 1")
    assert found["correlation_trend"]["same"].defined and found["correlation_trend"]["same"].reason == ""


@pytest.fixture
def turning():
    """Ten units, of which the null explains seven; z says two beyond doubt."""
    p = torch.tensor([0.001, 0.001, 0.02] + [0.5] * 6 + [math.nan], dtype=torch.float64)
    q = torch.tensor([1e-6, 1e-6, 0.2] + [0.9] * 6 + [math.nan], dtype=torch.float64)
    zero = torch.zeros(10)
    test = NullTest(zero, zero, zero, p, q, 2.5, over_units_std=0.05, over_units_z=100.0, over_units_p=0.25)
    return condition({
        "rotation/mean_abs": torch.tensor(7.5), "rotation/random_walk": 5.3, "rotation/nulls": {"layer_shuffle": test},
    })  # fmt: skip


def test_rotations_are_counted_against_each_null(turning):
    found = cells(findings(analysis({"here": turning}, ["rotation"])))
    assert str(found["turns_layer_shuffle"]["here"]) == "2.500 ± 0.050 (stream +100.0 SD, p 0.250)"
    assert found["turns_layer_shuffle_p"]["here"].value == 0.25
    beyond = found["units_beyond_layer_shuffle"]["here"]
    assert beyond.value == pytest.approx(100 * 3 / 9) and "(22 % with q < .05)" in str(beyond)
    assert found["units_beyond_layer_shuffle_fdr"]["here"].value == pytest.approx(100 * 2 / 9)


def test_every_measure_has_a_row_and_every_row_a_key_of_its_own():
    for sites in (1, 2):
        found = rows(analysis({}, MEASURES, sites=sites))
        assert {measure for measure, _ in found} == set(MEASURES)
        made = [row for _, row in found]
        keys = [row.key for row in made]
        assert len(keys) == len(set(keys)) and all(key.isidentifier() and key == key.lower() for key in keys)
        assert {row.under for row in made} <= {"", *keys}


def test_a_value_reads_as_it_is():
    assert str(Value(0.5, 0.4, 0.6)) == "0.500 [0.400, 0.600]"
    assert Value(0.5, ends=(1.0, 2.0, 12345.0)).ends_text == "1.000 → 2.000 → 1.23e+04"
    assert str(Value(math.nan, reason="too short")) == "not defined"
    assert Finding("a", "rotation", "", "", "b").values == {}
