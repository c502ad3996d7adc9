"""The page of a comparison: what stands on it, that names cannot break it, and how it looks on a phone and a screen."""

import re

import numpy as np
import pytest
from browser import Browser, find_chromium
from compared_models import model, with_curves, with_grams
from every_panel import condition

from rsdyn.analysis.comparison import Model, compare
from rsdyn.analysis.results import curves
from rsdyn.figures.comparison import CURVES, comparison_panels, places, shortened
from rsdyn.figures.panel import Line
from rsdyn.report.compared import OLD_NAMES
from rsdyn.report.comparison import comparison_page, write_comparison

NAMES = [drawn.name for drawn in CURVES]


@pytest.fixture(scope="module")
def comparison():
    """Three models of other shapes, a training of six checkpoints, and one that failed."""
    steps = (0, 32, 64, 128, 256, 512)
    checkpoints = [
        with_grams(
            with_curves(model(f"half-width/step-{s}", 0.1 * i, 0.15, "half-width", s, n_units=64), NAMES, 0.05 * i),
            seed=i,
        )
        for i, s in enumerate(steps)
    ]
    models = [
        with_grams(with_curves(model("embedded", 0.5), NAMES), seed=10),
        *checkpoints,
        with_curves(model("a-model-with-a-very-long-name-of-its-own", -0.4, 0.2, n_sublayers=60, n_units=576,
                          n_sequences=200, n_trajectories=200), NAMES[:3]),
        Model("org/gated", failure="lm.name=org/gated: it is gated"),
    ]  # fmt: skip
    return compare(models)


@pytest.fixture(scope="module")
def page(comparison, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return write_comparison(folder, comparison)


def test_what_stands_on_the_page(comparison, page):
    html = page.read_text()
    places_of = [
        html.index(f'id="{name}"')
        for name in ("answer", "apart", "findings", "dots", "training-0", "depth", "similarity")
    ]
    assert places_of == sorted(places_of) and html.index('id="what"') > places_of[-1]
    for label in (*comparison.labels, "org/gated"):
        assert label in html
    assert "lm.name=org/gated: it is gated" in html
    assert "a-very-long-name-of-its-own-untrained: similarity is not among the measures" in html
    assert html.count("<sup title=") > 10 and "N: 200 sequences, not 400 sequences" in html
    assert "http://" not in re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)


def test_every_panel_is_a_picture_too(comparison, page):
    keys = {panel.key for panels in comparison_panels(comparison).values() for panel in panels}
    assert keys == {path.stem for path in (page.parent / "figures").glob("*.png")}
    assert {"compare_turns", "depth_correlation_mean", "training_0_turns", "similarity_between_models"} <= keys


def test_dots_are_the_values_and_bars_the_intervals(comparison):
    panel = next(p for p in comparison_panels(comparison)["findings"] if p.key == "compare_turns")
    dots = {mark.name: mark for mark in panel.marks if isinstance(mark, Line) and not mark.line}
    bars = {mark.name: mark for mark in panel.marks if isinstance(mark, Line) and mark.line}
    row = next(row for row in comparison.rows if row.key == "turns")
    for i, label in enumerate(comparison.labels):
        value = row.cells[label].value
        assert (dots[label].x[0], dots[label].y[0]) == (value.value, i)
        assert bars[label].x.tolist() == [value.low, value.high]
    marked = {label for label, mark in dots.items() if mark.marker == "square"}
    assert marked == {label for label in comparison.labels if row.cells[label].not_comparable}
    low, high = panel.x.limits
    assert all(low < x < high for bar in bars.values() for x in bar.x)


def test_the_similarity_of_two_models_is_chosen_by_name_and_the_firsts_are_lines(comparison):
    panels = {p.key: p for p in comparison_panels(comparison)["similarity"]}
    one = panels["similarity_between_models"]
    options = dict(one.controls[0].options)
    assert options["0"] == "embedded and half-width/step-0" and len(options) == len(comparison.similar)
    (drawn,) = one.drawn({"models": "0"})
    np.testing.assert_array_equal(drawn.z, comparison.similar[0].map.numpy())
    lines = {m.name: m for m in panels["similarity_at_the_same_depth"].marks if isinstance(m, Line)}
    pairs = {pair.labels[1]: pair for pair in comparison.similar if pair.labels[0] == "embedded"}
    assert set(lines) == set(pairs) and "embedded-untrained" in lines
    assert np.all(lines["embedded-untrained"].y < 0.3) and np.all(lines["half-width/step-32"].y[1:] > 0.3)


def test_every_curve_that_is_drawn_is_one_that_an_analysis_has():
    known = dict(curves(condition(0)))
    assert [name for name in NAMES if name not in known] == []
    assert set(OLD_NAMES) <= set(NAMES)


def test_a_model_that_lacks_a_curve_has_no_line_there(comparison):
    panels = {p.key: p for p in comparison_panels(comparison)["depth"]}
    lines = [{mark.name for mark in panels[f"depth_{name.replace('/', '_')}"].marks} for name in (NAMES[0], NAMES[-1])]
    assert len(lines[0] - lines[1]) == 2  # the model and its twin


def test_steps_stand_at_their_logarithms_where_they_span_much():
    assert places([0, 32, 64, 128, 1024]).tolist() == [0, 1, 2, 3, 6]
    assert places([500, 1000, 1500]).tolist() == [500, 1000, 1500]
    assert np.all(np.diff(places([0, 1, 3, 100000])) > 0)


def test_a_long_name_keeps_its_end():
    assert shortened("x" * 50 + "step-512").endswith("step-512") and len(shortened("x" * 50)) <= 26
    assert shortened("embedded") == "embedded"


def test_names_cannot_break_the_page(tmp_path):
    name = "<img src=x onerror=alert(1)>&\"'"
    found = compare([with_curves(model(name), NAMES[:1]), Model("</script>", failure="<b>bold</b>")])
    html = comparison_page(found, comparison_panels(found))
    assert "<img src=x" not in html and "<b>bold" not in html and html.count("</script>") == html.count("<script")


def test_nothing_measured_is_a_page_too():
    html = comparison_page(compare([Model("x", failure="gone")]), {})
    assert "Nothing was measured" in html and "x failed" in html


@pytest.mark.skipif(find_chromium() is None, reason="needs Chromium")
@pytest.mark.parametrize(("width", "dark"), [(400, False), (1600, True)])
def test_it_is_drawn_and_nothing_runs_over_the_edge(width, dark, page, tmp_path):
    browser = Browser(tmp_path / "profile", find_chromium())
    try:
        browser.look(width, dark=dark)
        browser.open(page)
        assert browser.run("document.documentElement.dataset.figures") == "drawn" and not browser.messages
        assert browser.run("document.documentElement.scrollWidth") <= width
        drawn = browser.run(
            "[...document.querySelectorAll('.plot')].map((p) => p.querySelectorAll('.main-svg').length)"
        )
        assert drawn and all(drawn)
        assert not [url for url in browser.requests if not url.startswith(("file:", "data:", "blob:"))]
        # labels of an axis are not cut off at the left
        labels = "[...document.querySelectorAll('.plot .ytick text')]"
        outside = browser.run(f"{labels}.filter((t) => t.getBoundingClientRect().left < 0).length")
        assert outside == 0
    finally:
        browser.close()
