"""The table of panels: no name twice, every figure in a section."""

import pytest

from rsdyn.tracking.keys import CHARTS, PANELS, SECTIONS, SUFFIXES, panel, section


def test_names_are_unique_and_cannot_be_taken_for_a_part_of_a_curve():
    names = [p.measure for p in PANELS] + list(CHARTS)
    assert len(names) == len(set(names))
    assert not any(name.endswith(SUFFIXES) or "/" in name for name in names)
    assert {p.script for p in PANELS} | {script for *_, script in CHARTS.values()} == {"train", "analyze", "perturb"}


def test_every_figure_has_a_section():
    for figure in [p.figure for p in PANELS] + [figure for figure, *_ in CHARTS.values()]:
        assert section(figure) in SECTIONS.values()
    assert section("4D") == SECTIONS["4D"] != section("4C") == SECTIONS["4"]


def test_a_panel_by_its_measure():
    assert panel("speed").ylabel == "speed (activation units)"
    with pytest.raises(KeyError, match="must be one of active_share"):
        panel("velocity")
