"""Keys of findings, curves and tables of an analysis, from results made by hand."""

import pytest
import torch

from rsdyn.analysis.findings import findings
from rsdyn.tracking.analysis import curves, findings_table, massive_table, rotation_table, summary_numbers, tables

S, D = 7, 8
MEASURES = ["activations", "correlation", "cosine", "velocity", "mutual_information", "rotation", "pca"]


def results(*, massive=False, literal=False):
    torch.manual_seed(0)
    curve = {"density": S, "participation": S, "r_mean": S - 1, "cosine": S - 1, "speed": S - 1, "mi_mean": S - 1,
             "dimensions": S, "ev": S}  # fmt: skip
    r = {name: torch.rand(n) for name, n in curve.items()}
    r |= {"mi_floor": torch.rand(S - 1), "mi_estimator": "paper_literal" if literal else "kde"}
    r |= {"mean": torch.rand(S, D), "unusable_units": torch.tensor([7]), "massive_units": torch.tensor([2] * massive)}
    r |= {"rotation": torch.randn(D), "rotation_abs_mean": torch.tensor(1.0), "rotation_random_walk": torch.tensor(5.0)}
    for name in ("mean", "std", "z", "p", "q", "q_normal"):
        r[f"null_layer_shuffle_{name}"] = torch.rand(D)
    r["null_layer_shuffle_population_p"] = torch.tensor(0.25)
    r |= {f"null_layer_shuffle_{name}": torch.tensor(2.0) for name in ("turns", "turns_std", "turns_z")}
    if massive:
        r |= {f"{name}_without_massive": torch.rand(n) for name, n in curve.items()}
    if literal:
        r["mi_true_mean"] = torch.rand(S - 1)
    return r


@pytest.mark.parametrize("sites", [1, 2])
@pytest.mark.parametrize("massive", [False, True])
@pytest.mark.parametrize("literal", [False, True])
def test_every_row_of_the_findings_is_known_by_its_own_key(sites, massive, literal):
    table = findings({"original": results(massive=massive, literal=literal)}, MEASURES, sites)
    keys = [row.key for row in table]
    assert len(keys) == len(set(keys))
    numbers = summary_numbers(table)
    assert set(numbers) == {f"{key}/original" for key in keys}
    assert numbers["turns_layer_shuffle_p/original"] == 0.25
    assert ("paper_sum_trend/original" in numbers) == literal
    assert "information_trend/original" in numbers  # the true one, where the other is asked for too
    assert ("speed_trend_without_massive/original" in numbers) == massive
    columns, rows = findings_table(table)
    assert [row[columns.index("key")] for row in rows] == [f"findings/{key}/original" for key in keys]


def test_curves_have_their_null_interval_and_the_rest_without_massive_units():
    r = results(massive=True) | {"speed_interval": torch.rand(2, S - 1)}
    found = curves({"original": r})
    assert set(found["speed"]) == {"original", "original_low", "original_high", "original_without_massive"}
    assert set(found["mutual_information"]) == {"original", "original_null", "original_without_massive"}
    # shares of the usable units, and of those that are not massive
    assert found["participation"]["original"] == pytest.approx((r["participation"] / 7).tolist())
    without = (r["participation_without_massive"] / 6).tolist()
    assert found["participation"]["original_without_massive"] == pytest.approx(without)


def test_the_papers_sum_has_a_panel_of_its_own_beside_the_information():
    r = results(literal=True)
    found = curves({"original": r})
    assert found["mutual_information"] == {"original": pytest.approx(r["mi_true_mean"].tolist())}
    assert found["paper_literal"]["original"] == pytest.approx(r["mi_mean"].tolist())
    assert found["paper_literal"]["original_null"] == pytest.approx(r["mi_floor"].tolist())


def test_what_is_not_finite_is_nothing():
    r = results()
    r["cosine"][2], r["cosine"][3] = torch.nan, torch.inf
    found = curves({"original": r})["cosine"]["original"]
    assert found[2] is None and found[3] is None and found[1] == pytest.approx(float(r["cosine"][1]))


def test_massive_units_are_there_where_they_are_largest():
    mean = torch.ones(3, 5)
    mean[1, 4], mean[2, 4], mean[2, 1] = -300.0, 200.0, 500.0
    columns, rows = massive_table({"original": (mean, torch.tensor([1, 4]))})
    assert columns == ["condition", "unit", "mean there", "sublayer", "times the median", "mean at the end"]
    assert rows == [["original", 1, 500.0, 2, 500.0, 500.0], ["original", 4, -300.0, 1, 300.0, 200.0]]
    assert massive_table({"original": (mean, torch.tensor([], dtype=torch.long))}).rows == []


def test_units_without_an_effect_come_last_and_every_null_comes_early():
    r = results()
    r["null_layer_shuffle_z"] = torch.tensor([0.0, torch.nan, -9.0, 1.0, 2.0, 3.0, 4.0, torch.inf])
    names = ("mean", "std", "z", "p", "q", "q_normal")
    r |= {f"null_sign_flip_{k}": r[f"null_layer_shuffle_{k}"].flip(0) for k in names}
    rows = rotation_table({"original": r}).rows
    assert [row[1:3] for row in rows[:4]] == [
        ["layer_shuffle", 7], ["sign_flip", 0], ["layer_shuffle", 2], ["sign_flip", 5]
    ]  # fmt: skip
    assert [row[2] for row in rows[::2]][-2:] == [0, 1]


def test_what_was_not_measured_has_no_table():
    r = {k: v for k, v in results().items() if k in ("cosine", "massive_units", "unusable_units")}
    assert set(tables(findings({"original": r}, ["cosine"], 2), {"original": r})) == {"findings"}
    assert rotation_table({}).rows == []
