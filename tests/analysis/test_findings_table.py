"""The findings in a terminal, in Markdown and in JSON: the same numbers, and nothing wider than the terminal."""

import json
import math

import pytest

from rsdyn.analysis.finding import Finding, Value
from rsdyn.analysis.results import Counts
from rsdyn.analysis.table import as_json, as_markdown, as_text, count_of

CONDITIONS = ["original", "token_shuffled", "shuffled_keep_last", "untrained"]
WHY = "all sequences are one state at the first sublayer, since they end in the same token: nothing varies"


@pytest.fixture
def table():
    def values(*numbers, **more):
        return {c: Value(x, x - 0.1, x + 0.1, n=300, **more) for c, x in zip(CONDITIONS, numbers, strict=False)}

    undefined = {c: Value(math.nan, n=300, reason=WHY) for c in CONDITIONS[:2]}
    return [
        Finding("speed_trend", "velocity", "the stream accelerates", "rises", "mean speed, rank correlation with depth",
                values(-0.5, 0.25, 0.75, 1.0, ends=(1.0, 22.5, 333.25))),
        Finding("speed_change", "velocity", "", "", "fitted change", values(1.5, 2.5, 3.5), under="speed_trend"),
        Finding("turns_p", "rotation", "", "", "p of mean |R|", {"original": Value(0.001)}, detail=True),
        Finding("first", "correlation", "units correlate", "above 0.8", "mean |r|, first transition", undefined),
    ]  # fmt: skip


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_lost(table, width):
    lines = as_text(table, CONDITIONS, width)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    for row in table:
        assert (row.statistic in text) == (not row.detail)
        for value in row.values.values():
            assert row.detail or (str(value) in text and value.ends_text in text)
    assert f"(1) {WHY[0].upper()}{WHY[1:]}." in text and text.count("nothing varies") == 1
    assert "not defined (1)" in text


def test_the_width_is_the_terminals(table, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert as_text(table, CONDITIONS) == as_text(table, CONDITIONS, 60)


def test_markdown_holds_every_row_with_n_and_the_reasons_below(table):
    page = as_markdown(table, CONDITIONS)
    head, rule, *rows = page.splitlines()[: 2 + len(table)]
    assert len({line.replace("\\|", "").count("|") for line in (head, rule, *rows)}) == 1
    assert "| 300 | -0.500 [-0.600, -0.400]<br>1.000 → 22.50 → 333.25 |" in rows[0]
    assert "&emsp;fitted change" in rows[1] and "mean \\|r\\|" in rows[3].replace("\\|R", "\\|r")
    assert f"(1) {WHY[0].upper()}{WHY[1:]}." in page and "first, middle and last value" in page


def test_what_intervals_are_over_is_said_below(table):
    said = Counts(300, 0, 0, 20, "112 documents").intervals
    assert said == "In brackets: 95 % intervals, which leave out 112 documents, in 20 groups."
    assert as_markdown(table, CONDITIONS, said).rstrip().endswith(said)
    assert said not in as_markdown([table[2]], CONDITIONS, said)  # no row of it has an interval


def test_a_reason_is_given_where_there_is_no_number_alone():
    values = {"a": Value(2.0, reason=WHY), "b": Value(math.nan, reason=WHY)}
    (row,) = as_json([Finding("x", "velocity", "", "", "x", values)])
    assert [row["values"][c]["reason"] for c in "ab"] == [None, WHY]


def test_json_holds_every_number(table):
    data = json.loads(json.dumps(as_json(table)))
    assert [row["key"] for row in data] == [row.key for row in table]
    value = data[0]["values"]["token_shuffled"]
    assert (value["value"], value["first"], value["middle"], value["last"], value["n"]) == (
        0.25,
        1.0,
        22.5,
        333.25,
        300,
    )
    assert data[3]["values"]["original"]["reason"] == WHY and data[1]["under"] == "speed_trend"


def test_n_is_one_number_where_conditions_agree():
    assert count_of([Value(1.0, n=5), None, Value(2.0, n=5)]) == "5"
    assert count_of([Value(1.0, n=5), Value(2.0, n=6)]) == "5, 6"
    assert count_of([Value(1.0)]) == ""
