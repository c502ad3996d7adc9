"""Findings of several models beside each other: what makes them not comparable, gaps, twins, and what is said first."""

import dataclasses
import json
import math

import pytest
from compared_models import FACTS, ROWS, model

from rsdyn.analysis.comparison import Model, compare, differences, gaps, listed
from rsdyn.analysis.comparison_table import answer, as_json, as_markdown, as_text, is_leading, warnings
from rsdyn.analysis.finding import Finding, Value
from rsdyn.analysis.table import as_json as findings_as_json
from rsdyn.analysis.table import from_json
from rsdyn.files import plain


def cells(comparison, label):
    return {row.key: row.cells[label] for row in comparison.rows}


def test_models_of_equal_facts_are_comparable_and_share_their_untrained_twin():
    found = compare([model("a"), model("b", 0.7)])
    assert found.labels == ["a", "b", "a-untrained"] and not found.differences and not found.failed
    assert found.columns[2].of == ("a", "b") and found.columns[2].is_twin
    assert all(not cell.not_comparable for row in found.rows for cell in row.cells.values())
    assert cells(found, "b")["turns"].value.value == 0.7 and cells(found, "a-untrained")["turns"].value.value == 0.1


def test_what_a_twin_owes_to_its_trained_model_does_not_tell_twins_apart():
    """The likeness with the trained stream, and what is left out of it as that one's massive units, are not its own."""
    more = (("similarity_with_main", "similarity", "", "", ""), ("cosine_trend_without_massive", "cosine", "", "", ""))

    def trained(label, likeness):
        own = model(label)
        added = tuple(
            Finding(key, measure, "", "", key, {"original": Value(0.5), "untrained": Value(likeness)}, of_main=True)
            for key, measure, *_ in more
        )
        return dataclasses.replace(own, findings=(*own.findings, *added))

    assert compare([trained("a", 0.2), trained("b", 0.3)]).labels == ["a", "b", "a-untrained"]


def test_models_of_another_shape_have_a_twin_of_their_own():
    found = compare([model("a"), model("b", n_units=64, untrained=0.2), model("c", untrained=None)])
    assert found.labels == ["a", "a-untrained", "b", "b-untrained", "c"]


@pytest.mark.parametrize(
    ("changed", "name", "touched", "untouched"),
    [
        ({"text": "wikitext"}, "Text", [row[0] for row in ROWS], []),
        ({"n_sequences": 200, "n_trajectories": 200}, "N", [row[0] for row in ROWS], []),
        ({"filter": "51 to 499 characters"}, "Filter", [row[0] for row in ROWS], []),
        ({"positions": "all"}, "Positions", [row[0] for row in ROWS], []),
        ({"bos": "nothing (lm.bos=none)", "own_bos": False}, "What opens a sequence (BOS)", [r[0] for r in ROWS], []),
        ({"n_sublayers": 60}, "Depth", ["turns", "turns_innovation_shuffle_z"], ["correlation_trend"]),
        ({"n_units": 64}, "Width", ["explained_trend"], ["correlation_trend", "turns"]),
        ({"sites_per_layer": 1}, "Sites per layer", ["correlation_trend", "turns"], ["explained_trend"]),
        ({"settings": {"analysis.mi.estimator": "ksg"}}, "Estimator of information", ["information_early_fall"],
         ["turns"]),
        ({"tokenizer": "BPE, 49152 tokens, BOS 1"}, "Tokenizer", [], ["correlation_trend", "turns"]),
        ({"version": "0.1.0"}, "Version of rsdyn", [], ["turns"]),
        ({"order": "drawn by seed 1"}, "Order of sequences", [], ["turns"]),
    ],
)  # fmt: skip
def test_what_differs_is_said_once_for_all_and_beside_each_value_that_it_touches(changed, name, touched, untouched):
    found = compare([model("a"), model("b", **changed)])
    assert [d.name for d in found.differences] == [name]
    told = str(found.differences[0])
    assert told in warnings(found) and "(a)" in told and "(b)" in told
    beside = cells(found, "b")
    for key in touched:
        assert any(reason.startswith(name) for reason in beside[key].not_comparable), key
    for key in untouched:
        assert not beside[key].not_comparable, key
    assert all(not cell.not_comparable for cell in cells(found, "a").values())


def test_each_models_own_bos_is_no_difference_but_one_put_there_is():
    own = dataclasses.replace(FACTS, bos="<s>", tokenizer="another")
    given = dataclasses.replace(FACTS, bos="<s>", own_bos=False)
    assert [d.name for d in differences({"a": FACTS, "b": own})] == ["Tokenizer"]
    assert [d.name for d in differences({"a": FACTS, "b": given})] == ["What opens a sequence (BOS)"]
    assert differences({"a": FACTS, "b": dataclasses.replace(FACTS, bos=None)}) == []  # an older run does not say


def test_a_row_that_a_model_has_not_says_why():
    fewer = tuple(row for row in ROWS if "within" not in row[0])
    found = compare([model("a"), model("b", rows=fewer, sites_per_layer=1)])
    cell = cells(found, "b")["correlation_within_minus_cross"]
    assert cell.value is None and "one site per layer" in cell.not_comparable[0]
    older = compare([model("a"), model("b", rows=ROWS[:3], version="0.1.0")])
    assert "rsdyn 0.1.0" in cells(older, "b")["turns"].not_comparable[0]
    without = {"analysis.measures": ["correlation"]}
    some = compare([model("a"), model("b", rows=ROWS[:3], settings=without)])
    assert cells(some, "b")["turns"].not_comparable == ("rotation was not measured",)


def test_rows_that_only_the_second_model_has_stand_where_it_has_them():
    found = compare([model("a", rows=(ROWS[0], ROWS[4])), model("b", rows=ROWS)])
    assert [row.key for row in found.rows] == [row[0] for row in ROWS]


def test_one_statistic_that_is_another_in_words_is_said():
    other = model("b")
    changed = tuple(dataclasses.replace(f, statistic="of 64 components") if f.key == "explained_trend" else f
                    for f in other.findings)  # fmt: skip
    found = compare([model("a"), dataclasses.replace(other, findings=changed)])
    assert "of 64 components" in cells(found, "b")["explained_trend"].not_comparable[0]


def test_a_failed_model_is_named_and_the_rest_are_compared():
    found = compare([Model("x", failure="it has no config.json"), model("a"), model("b")])
    assert found.failed == {"x": "it has no config.json"} and "x" not in found.labels
    assert "x failed and is left out: it has no config.json" in warnings(found)
    assert "1 failed" in answer(found)[0]
    told = as_json(found)["models"][-1]
    assert told == {"label": "x", "status": "failed", "error": "it has no config.json"}


def test_nothing_measured_is_said():
    found = compare([Model("x", failure="gone")])
    assert found.rows == () and answer(found) == ["Nothing was measured: no model finished."]
    assert "x failed" in as_markdown(found) and as_json(found)["rows"] == []


def test_two_models_of_one_label_are_refused():
    with pytest.raises(ValueError, match="label='a'"):
        compare([model("a"), model("a")])


# -- over training


def test_checkpoints_stand_in_the_order_of_their_steps():
    steps = {512: 0.9, 0: 0.1, 64: 0.4}
    found = compare([model(f"run/step-{s}", v, series="run", step=s) for s, v in steps.items()])
    (series,) = found.series
    assert series.steps == (0, 64, 512) and series.labels == ("run/step-0", "run/step-64", "run/step-512")
    assert found.labels[-1] == "run-untrained"
    assert "From step 0 to 512 of run, what moves most" in answer(found)[-1]
    assert "| measured | step 0 | step 64 | step 512 |" in as_markdown(found)


def test_one_checkpoint_is_no_training():
    assert compare([model("run/step-0", series="run", step=0), model("b")]).series == ()


@pytest.mark.parametrize(
    ("steps", "missing"),
    [
        ([500, 1000, 1500, 2000], []),
        ([500, 1000, 2000, 2500], [(1000, 2000)]),
        ([0, 500, 1000, 2500, 3000], [(1000, 2500)]),
        ([0, 64, 128, 256, 512], []),
        ([0, 1, 2, 4, 16, 32, 64], [(4, 16)]),
        ([0, 16, 32, 64, 128, 512], [(128, 512)]),
        ([1, 10, 17, 90], []),
        ([0, 512], []),
        ([5], []),
        ([], []),
        ([0, 0, 0], []),
    ],
)
def test_a_gap_in_a_row_of_checkpoints_is_found(steps, missing):
    assert list(gaps(steps)) == missing


def test_a_gap_is_said():
    found = compare([model(str(s), series="run", step=s) for s in (500, 1000, 2000, 2500)])
    assert any("no checkpoint between steps 1000 and 2000" in line for line in warnings(found))


# -- what is written


def test_at_most_six_sentences_stand_first_and_count_what_the_intervals_say():
    found = compare([model("a", 0.5), model("b", -0.5), model("c", 0.01), model("d", math.nan)])
    told = answer(found)
    assert len(told) <= 6 and told[0] == "4 models on 400 sequences of embedded."
    assert told[1].startswith("Correlations rise with depth in 1 of 3 models where it is defined (of 4)")
    assert "in 1 it is the other way round, in 1 the interval holds 0, of 1 untrained model in 1" in told[1]


def test_the_forms_agree_and_json_has_everything():
    found = compare([model("a"), model("b", 0.7, n_sequences=200, n_trajectories=200)])
    written = json.loads(json.dumps(plain(as_json(found)), allow_nan=False))
    assert [row["key"] for row in written["rows"]] == [row.key for row in found.rows]
    row = written["rows"][0]
    assert {"key", "claim", "paper"} <= row.keys() and row["claim"] == "correlations rise with depth"
    assert row["values"]["b"]["value"] == 0.7 and row["values"]["b"]["low"] == pytest.approx(0.65)
    assert row["values"]["b"]["not_comparable"] == ["N: 200 sequences, not 400 sequences"]
    assert row["values"]["a"]["not_comparable"] == []
    text, markdown = "\n".join(as_text(found, 120)), as_markdown(found)
    for output in (text, markdown):
        assert "0.700 [0.650, 0.750] (a)" in output and "(a) N: 200 sequences, not 400 sequences." in output
    lines = markdown.splitlines()
    assert lines.index(answer(found)[0]) < next(i for i, line in enumerate(lines) if line.startswith("| claim"))
    for row in found.rows:
        assert f"{row.key}, measured" in markdown


def test_variants_and_most_null_models_do_not_lead():
    leads = [row.key for row in compare([model("a")]).rows if is_leading(row.finding)]
    assert "correlation_change" not in leads and {"turns", "turns_innovation_shuffle_z"} <= set(leads)


def test_findings_are_read_back_as_they_were_written():
    value = Value(0.25, 0.2, math.nan, (0.1, math.nan, 0.3), 40, (0.2, math.nan), "", " %", " (few)")
    undefined = Value(math.nan, reason="nothing varies")
    table = [Finding("k", "pca", "c", "p", "s", {"original": value, "untrained": undefined}, "of", True)]
    (back,) = from_json(json.loads(json.dumps(plain(findings_as_json(table)))))
    assert str(back.values["original"].unit) == " %" and back.detail and back.under == "of"
    assert str(back.values["untrained"]) == "not defined" and back.values["untrained"].reason == "nothing varies"
    assert back.values["original"].ends[0] == 0.1 and math.isnan(back.values["original"].ends[1])
    assert back.values["original"].seeds[0] == 0.2 and back.values["original"].n == 40


def test_names_are_listed_as_people_do():
    assert listed(["a"]) == "a" and listed(["a", "b"]) == "a and b" and listed([]) == ""
    assert listed(list("abcdefgh")) == "a, b, c, d, e and 3 more"


def test_a_training_of_which_all_checkpoints_agree_is_named_once():
    steps = [model(f"run/step-{s}", series="run", step=s, n_units=64) for s in (0, 64, 512)]
    (width, *_) = compare([model("a"), *steps]).differences
    assert "128 units (a); 64 units (run)." in str(width)
    assert set(width.values) == {"a", "run/step-0", "run/step-64", "run/step-512"}
