"""Findings without the largest units, untrained models with other seeds, and which streams that takes."""

import json
from types import SimpleNamespace

import pytest
import torch
from analysis_results import analysis, condition

from rsdyn.analysis.checks import SMALL_LM, streams_wanted
from rsdyn.analysis.findings import findings
from rsdyn.analysis.left_out import as_json, as_markdown, without_largest, without_largest_of
from rsdyn.analysis.results import Measured
from rsdyn.analysis.seeds import with_seeds
from rsdyn.analysis.words import largest_in_words, samples_in_words
from rsdyn.figures.massive import without_largest as without_largest_panels
from rsdyn.figures.panel import Line
from rsdyn.files import plain

RISING = torch.arange(6, dtype=torch.float64)


def results(more=None):
    flat = 1 + 0 * RISING
    return condition({
        "cosine/mean": Measured(RISING, left_out=torch.stack([RISING, -RISING, flat])),
        "flags/left_out_counts": torch.tensor([0, 1, 2]), "flags/largest_units": torch.tensor([17, 4]),
        "flags/largest_ratios": torch.tensor([104.5, 80.0]), "flags/massive_units": torch.tensor([17]),
    } | (more or {}))  # fmt: skip


def test_each_finding_has_a_value_per_number_of_units():
    found = without_largest(analysis({"original": results(), "untrained": results()}, ["cosine"], sites=1))
    assert [row.key for row in found.rows] == ["cosine_trend", "cosine_change"]
    trend = found.rows[0].values["untrained"]
    assert trend[:2] == pytest.approx([1.0, -1.0]) and trend[2] != trend[2]  # a flat curve has no trend
    page = as_markdown(found, "original")
    assert "17 (104.50), 4 (80.00)" in page and "| 1.000 | -1.000 | not defined |" in page
    data = as_json(found)
    assert data["units"] == [17, 4] and json.dumps(data["rows"][1]["values"])


def test_the_figure_has_each_finding_and_a_look_per_condition():
    found = without_largest(analysis({"original": results(), "untrained": results()}, ["cosine"], sites=1))
    (panel,) = without_largest_panels(found)
    assert [value for value, _ in panel.controls[0].options] == ["cosine_trend"]  # a row under another has none
    original, untrained = (m for m in panel.drawn(panel.first) if isinstance(m, Line))
    assert original.y[:2] == pytest.approx([1.0, -1.0]) and original.looks != untrained.looks
    assert [label for _, label in panel.x.ticks] == ["0", "1", "2"]
    again = without_largest_of(json.loads(json.dumps(plain(as_json(found)))))
    assert again.counts == found.counts and again.rows[0].values["original"][2] != again.rows[0].values["original"][2]
    assert without_largest_panels(None) == [] and without_largest_of(None) is None


def test_further_models_of_a_condition_become_its_seeds():
    other = results({"cosine/mean": -RISING})
    merged = with_seeds(
        {"original": results(), "untrained": results(), "untrained_2": other},
        {"original": "original", "untrained": "untrained", "untrained_2": "untrained"},
    )
    assert list(merged) == ["original", "untrained"] and merged["original"].cosine.mean.seeds is None
    assert torch.equal(merged["untrained"].cosine.mean.seeds, -RISING[None])
    row = next(row for row in findings(analysis(merged, ["cosine"], sites=1)) if row.key == "cosine_trend")
    assert row.values["untrained"].seeds == pytest.approx((-1.0,)) and row.values["original"].seeds == ()
    assert row.values["untrained"].seeds_text == "seeds -1.000 to 1.000"


@pytest.mark.parametrize(
    ("seeds", "size", "n"), [(None, SMALL_LM, 3), (None, SMALL_LM + 1, 1), (2, 10**10, 2), (1, 1000, 1)]
)
def test_small_models_are_untrained_several_times(seeds, size, n):
    settings = SimpleNamespace(conditions=["untrained", "original"], untrained_seeds=seeds)
    wanted = streams_wanted(settings, size)
    assert [w.condition for w in wanted] == ["original", *["untrained"] * n]
    assert [w.untrained_seed for w in wanted[1:]] == list(range(n)) and len({w.name for w in wanted}) == n + 1
    alone = SimpleNamespace(conditions=["token_shuffled"], untrained_seeds=None)
    assert [w.name for w in streams_wanted(alone, size)] == ["token_shuffled"]


def test_the_massive_units_are_named_with_their_ratios_and_the_next_one():
    (line,) = largest_in_words(results().flags, "original")
    assert "1 massive unit," in line and "17 (104 times)" in line and "below is unit 4, 80 times" in line
    none = {"flags/largest_ratios": torch.tensor([90.0, 80.0]), "flags/massive_units": torch.zeros(0)}
    (line,) = largest_in_words(results(none).flags, "original")
    assert line.startswith("No unit is massive") and "unit 17, 90 times" in line


def test_information_of_different_numbers_of_samples_is_not_to_be_compared():
    five, seven = (condition({"mutual_information/mean": Measured(RISING, n=n)}) for n in (5, 7))
    assert samples_in_words(analysis({"a": five, "b": five}, ["mutual_information"])) == []
    (line,) = samples_in_words(analysis({"a": five, "b": seven}, ["mutual_information"]))
    assert "5 (a), 7 (b)" in line and "may not be compared" in line
