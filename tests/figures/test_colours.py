"""A series has one look, by its name, in the static figures, on the page and in W&B's charts."""

from dataclasses import replace

import pytest
from every_panel import analysis, condition

from rsdyn.analysis.jacobians import SERIES
from rsdyn.analysis.settings import CONDITIONS
from rsdyn.figures.analysis import analysis_panels
from rsdyn.figures.colours import DARK, DASHES, LIGHT, LOOKS, look_of
from rsdyn.figures.groups import looks_of_groups
from rsdyn.figures.panel import Line
from rsdyn.figures.streams import Analysis, streams_of
from rsdyn.labels import NAMES
from rsdyn.report.page import colours


def test_every_condition_has_a_look_and_no_two_the_same():
    looks = [LOOKS[condition] for condition in CONDITIONS]
    assert len({look.colour for look in looks}) == len({look.dash for look in looks}) == len(CONDITIONS)
    assert {look.colour for look in LOOKS.values()} <= LIGHT.keys() == DARK.keys()
    assert {look.dash for look in LOOKS.values()} <= DASHES.keys()


def test_a_name_and_its_label_are_one_series():
    for name in CONDITIONS:
        assert look_of(name) == look_of(NAMES[name]) == LOOKS[name]
    assert all(kind.label in LOOKS for kind in SERIES.values())  # of Jacobians, by what they are called
    assert look_of("my own") == look_of("my own") and look_of("my own").colour in LIGHT


def test_without_massive_units_a_control_keeps_its_colour():
    found = analysis()
    found = replace(found, conditions=found.conditions | {"untrained": condition(1)})  # with massive units of its own
    panels = analysis_panels(streams_of([Analysis(found)]))
    (panel,) = (p for p in panels if p.key == "fig4b_cumulative_variance")
    looks = {mark.name: mark.looks for mark in panel.marks}
    assert looks["without massive units"] == LOOKS["without_massive"]
    control = looks[f"{NAMES['untrained']}, without massive units"]
    assert control.colour == LOOKS["untrained"].colour and control.dash == LOOKS["without_massive"].dash


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0)])
def test_a_condition_keeps_its_look_whatever_stands_beside_it(order):
    found = analysis()
    some = [list(found.conditions)[i] for i in order]
    streams = streams_of([Analysis(replace(found, conditions={c: found.conditions[c] for c in some}))])
    for panel in analysis_panels(streams):
        for mark in panel.marks:
            if isinstance(mark, Line) and mark.name in (NAMES[c] for c in some):
                assert mark.looks == look_of(mark.name), (panel.key, mark.name)


def test_of_several_runs_a_colour_is_a_run_and_a_dash_a_condition():
    streams = streams_of([Analysis(analysis(), "one", "a"), Analysis(analysis(), "two", "b")])
    assert len({s.looks.colour for s in streams if s.label.startswith("one: ")}) == 1
    assert len({s.looks.colour for s in streams}) == 2 and not any(s.main for s in streams)
    for stream in streams:
        assert stream.looks.dash == look_of(stream.condition).dash
    alike = streams_of([Analysis(analysis(), "one", "a"), Analysis(analysis(), "one", "b")])
    assert [s.label for s in alike][::3] == ["a: original text", "b: original text"]


def test_the_page_has_the_figures_colours():
    css = colours()
    assert all(f"--{name}:{value};" in css for theme in (LIGHT, DARK) for name, value in theme.items())


def test_a_group_keeps_its_look_whatever_groups_stand_beside_it():
    few, more = ("correct", "wrong"), ("correct", "unsure", "wrong")
    assert looks_of_groups(few) == [look for name, look in zip(more, looks_of_groups(more), strict=True) if name in few]
    many = [f"group {i}" for i in range(30)]
    assert len(set(looks_of_groups(many))) == 30 and len({look.colour for look in looks_of_groups(many[:8])}) == 8
