"""Keys of findings, curves and tables of an analysis, from results made by hand."""

from dataclasses import replace

import pytest
import torch
from every_panel import D, S, analysis

from rsdyn.analysis.finding import Finding, Value
from rsdyn.analysis.results import Activations, ConditionResults
from rsdyn.tracking.analysis import curves, findings_table, massive_table, rotation_table, summary_numbers, tables


def curves_of(**more):
    found = analysis(**more)
    return curves(found.conditions, found.n_units), found.main


def test_numbers_of_the_runs_table_have_the_rows_own_key_and_its_interval():
    rows = [
        Finding("turns", "rotation", "units rotate", "10.74", "mean |R|", {"original": Value(3.0, 2.5, 3.5)}),
        Finding("turns_p", "rotation", "", "", "p", {"original": Value(0.25), "untrained": Value(0.5)}),
        Finding("detail", "rotation", "", "", "more", {"original": Value(1.0)}, detail=True),
    ]
    assert summary_numbers(rows) == {
        "turns/original": 3.0, "turns/original_low": 2.5, "turns/original_high": 3.5, "turns_p/original": 0.25,
        "turns_p/untrained": 0.5,
    }  # fmt: skip
    columns, of = findings_table(rows)
    assert [row[columns.index("key")] for row in of] == [
        "findings/turns/original", "findings/turns_p/original", "findings/turns_p/untrained",
        "findings/detail/original",
    ]  # fmt: skip
    assert {row[0] for row in of} == {"units rotate"}


def test_curves_have_their_null_interval_and_the_rest_without_massive_units():
    found, main = curves_of()
    of = {name for name in found["speed"] if name.startswith("original")}
    assert of == {"original", "original_low", "original_high", "original_without_massive"}
    assert found["mutual_information"]["original_null"] == pytest.approx(main.mutual_information.floor.tolist())
    # shares of the usable units, and of those that are not massive
    participation = main.activations.participation
    assert found["participation"]["original"] == pytest.approx((participation.value / D).tolist())
    without = (participation.without_massive.value / (D - 2)).tolist()
    assert found["participation"]["original_without_massive"] == pytest.approx(without)
    assert found["speed"]["original_low"] == pytest.approx(main.velocity.speed.low.tolist())


def test_the_papers_sum_has_a_panel_of_its_own_beside_the_information():
    found, main = curves_of(literal=True)
    of = main.mutual_information
    assert found["mutual_information"]["original"] == pytest.approx(of.true.value.tolist())
    assert found["paper_literal"]["original"] == pytest.approx(of.mean.value.tolist())
    assert found["paper_literal"]["original_null"] == pytest.approx(of.floor.tolist())


def test_what_is_not_finite_is_nothing():
    found = analysis()
    found.main.cosine.mean.value[2], found.main.cosine.mean.value[3] = torch.nan, torch.inf
    series = curves(found.conditions, D)["cosine"]["original"]
    assert series[2] is None and series[3] is None and len(series) == S - 1


def test_massive_units_are_there_where_they_are_largest():
    mean = torch.ones(3, 5)
    mean[1, 4], mean[2, 4], mean[2, 1] = -300.0, 200.0, 500.0
    r = analysis().main
    flags = replace(r.flags, massive_units=torch.tensor([1, 4]))
    of = replace(r.activations, mean=mean)
    columns, rows = massive_table({"original": ConditionResults(r.counts, flags, activations=of)})
    assert columns == ["condition", "unit", "mean there", "sublayer", "times the median", "mean at the end"]
    assert rows == [["original", 1, 500.0, 2, 500.0, 500.0], ["original", 4, -300.0, 1, 300.0, 200.0]]
    none = replace(flags, massive_units=torch.tensor([], dtype=torch.long))
    assert massive_table({"original": ConditionResults(r.counts, none, activations=of)}).rows == []
    assert isinstance(of, Activations)


def test_units_without_an_effect_come_last_and_every_null_comes_early():
    r = analysis().main
    z = torch.tensor([0.0, torch.nan, -9.0, 1.0, 2.0, 3.0, 4.0, torch.inf, 0.5, 0.4, 0.3, 0.2])
    test = replace(next(iter(r.rotation.nulls.values())), z=z)
    nulls = {"layer_shuffle": test, "sign_flip": replace(test, z=z.flip(0))}
    rows = rotation_table({"original": replace(r, rotation=replace(r.rotation, nulls=nulls))}).rows
    assert [row[1:3] for row in rows[:4]] == [
        ["layer_shuffle", 7], ["sign_flip", 4], ["layer_shuffle", 2], ["sign_flip", 9]
    ]  # fmt: skip
    assert [row[2] for row in rows[::2]][-2:] == [0, 1]
    assert rows[0][3] == pytest.approx(-float(r.rotation.turns[7])) and rows[0][6] == -torch.inf


def test_what_was_not_measured_has_no_table():
    found = analysis()
    bare = replace(found, conditions={"original": ConditionResults(found.main.counts, found.main.flags)}, by_group=None)
    assert set(tables([], bare)) == {"findings"}
    assert set(tables([], found)) == {"findings", "massive_units", "units_by_rotation", "by_group"}
    assert rotation_table({}).rows == []


def test_groups_are_a_table_and_numbers_by_name():
    from every_panel import by_group

    from rsdyn.tracking.analysis import group_numbers, groups_table, in_key

    found = by_group(("right/wrong", "ä b"))
    numbers = group_numbers(found)
    row = found.rows["cosine_level"]
    assert numbers["cosine_level/right_wrong"] == float(row.value[0])
    assert numbers["cosine_level/right_wrong-ä_b"] == float(row.difference[0])
    assert numbers["cosine_level/right_wrong-ä_b_p_holm"] == float(row.p_holm[0])
    assert not any(key.startswith("speed_level") for key in numbers)  # a detail
    assert in_key("///") == "_" and len(in_key("x" * 99)) == 40
    table = groups_table(found)
    assert len(table.rows) == 3 * len(found.rows) and all(len(row) == len(table.columns) for row in table.rows)
    assert {row[2] for row in table.rows} == {"right/wrong", "ä b", "right/wrong - ä b"}
