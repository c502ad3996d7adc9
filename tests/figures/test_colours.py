"""A series has one look, by its name, in the static figures, on the page and in W&B's charts."""

import pytest
import torch

from rsdyn import figures
from rsdyn.analysis.jacobians import SERIES
from rsdyn.analysis.settings import CONDITIONS
from rsdyn.figures.colours import DARK, DASHES, LIGHT, LOOKS, look_of
from rsdyn.labels import NAMES
from rsdyn.tracking.charts import curve_chart
from rsdyn.tracking.keys import PANELS

S = 9


def test_every_condition_has_a_look_and_no_two_the_same():
    looks = [LOOKS[condition] for condition in CONDITIONS]
    assert len({look.colour for look in looks}) == len({look.dash for look in looks}) == len(CONDITIONS)
    assert {look.colour for look in LOOKS.values()} <= LIGHT.keys() == DARK.keys()
    assert {look.dash for look in LOOKS.values()} <= DASHES.keys()


def test_a_name_its_label_and_its_label_with_more_behind_are_one_series():
    for condition in CONDITIONS:
        assert look_of(condition) == look_of(NAMES[condition]) == look_of(f"{NAMES[condition]}, 100 components")
    assert look_of("PCA, 2 components") == LOOKS["pca"]
    assert all(kind.label in LOOKS for kind in SERIES.values())  # of Jacobians, by what they are called
    assert look_of("my own") == look_of("my own") and look_of("my own").colour in LIGHT


@pytest.mark.parametrize("others", [CONDITIONS[1:], CONDITIONS[:0:-1], CONDITIONS[2:], ("floor", *CONDITIONS[1:])])
def test_static_figures_go_by_the_name_whatever_stands_beside_it(others):
    curve = torch.linspace(0, 1, S - 1)
    figure = figures.transition_curve(curve, others={NAMES[c]: curve + i for i, c in enumerate(others, 1)})
    drawn = {line.get_label().lstrip("_"): line for line in figure.axes[0].lines}
    for condition in others:
        assert drawn[NAMES[condition]].get_color() == look_of(condition).hex
    named = {NAMES[c]: torch.rand(S) for c in ("original", *others) if c != "floor"}
    for figure in (figures.components_needed(named), figures.explained_variance(named)):
        found = {line.get_label(): line.get_color() for line in figure.axes[0].lines if line.get_label() in named}
        assert found == {name: look_of(name).hex for name in named}


@pytest.mark.parametrize("some", [CONDITIONS, CONDITIONS[::-1], CONDITIONS[1:]])
def test_wandbs_charts_have_the_figures_colours(some):
    panel = next(p for p in PANELS if p.measure == "speed")
    chart = curve_chart({c: [1.0, 2.0] for c in some}, panel, ["a", "b"])
    assert {trace.name: trace.line.color for trace in chart.data} == {NAMES[c]: look_of(c).hex for c in some}


def test_the_page_has_the_figures_colours(monkeypatch):
    from types import SimpleNamespace

    from rsdyn.report.page import colours
    from rsdyn.report.streams import streams_of

    arrays = SimpleNamespace(under=lambda _: {})
    run = SimpleNamespace(script="analyze", model="m", name="n", arrays=arrays, summary={"conditions": CONDITIONS[1:]})
    for stream in streams_of([run]):
        assert (stream.colour, stream.dash) == (look_of(stream.condition).token, look_of(stream.condition).dash)
    css = colours()
    assert all(f"--{name}:{value};" in css for theme in (LIGHT, DARK) for name, value in theme.items())
