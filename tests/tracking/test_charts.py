"""Figures for W&B: complete, in plain numbers, with a menu where the page has a control."""

import numpy as np
import pytest

from rsdyn.report.plots import Control, Plot, band, line, packed
from rsdyn.tracking.charts import COLOURS, curve_chart, figure_of, shortened, unpacked
from rsdyn.tracking.keys import panel

NAMES = ["layer 0, resid_pre", "layer 0, resid_mid", "layer 1, resid_pre"]


def test_a_chart_has_every_condition_with_its_interval_and_null():
    series = {
        "original": [1.0, 2.0, None], "original_low": [0.5, 1.5, None], "original_high": [1.5, 2.5, None],
        "original_null": [0.1, 0.1, 0.1], "original_without_massive": [0.9, 1.9, 2.9], "untrained": [3.0, 3.0],
    }  # fmt: skip
    data = curve_chart(series, panel("speed"), NAMES).to_plotly_json()["data"]
    assert [t["name"] for t in data] == [
        "original interval", "original text", "original text: null", "original text: without massive units",
        "untrained model",
    ]  # fmt: skip
    interval = data[0]
    # round the area: up along what is known, and back
    assert interval["x"] == [0, 1, 1, 0] and interval["y"] == [1.5, 2.5, 1.5, 0.5] and interval["fill"] == "toself"
    assert [t["line"]["dash"] for t in data[1:]] == ["solid", "dash", "dot", "solid"]
    assert data[1]["y"] == [1.0, 2.0, None] and data[4]["text"] == NAMES[:2]
    assert data[1]["line"]["color"] == data[3]["line"]["color"] != data[4]["line"]["color"]


def test_the_title_names_the_figure_and_what_the_bands_are():
    series = {"a": [1.0], "a_low": [0.5], "a_high": [2.0]}
    layout = curve_chart(series, panel("recovery_distance"), NAMES).to_plotly_json()["layout"]
    assert (
        layout["title"]["text"] == "Fig. 4D  Distance to the reference<br><sup>bands: 95 % interval over prompts</sup>"
    )
    assert layout["yaxis"]["type"] == "log" and layout["yaxis"]["title"]["text"] == "distance / norm of the reference"


def test_typed_arrays_of_the_page_come_back_as_lists():
    values = np.array([[1.0, np.nan], [2.5, -np.inf]])
    assert unpacked(packed(values)) == [[1.0, None], [2.5, None]]
    assert unpacked(packed([3, 4], "i4")) == [3, 4]
    assert shortened([0.123456789, None]) == [0.123457, None]


def plot(traces, controls=(), layout=None):
    return Plot("p", "Fig. 9  A title", "", ("", "", ""), traces, layout or {}, list(controls))


def test_a_plot_of_the_page_has_its_colours_and_no_key_of_the_pages_script():
    traces = [line([0, 1], [1, 2], "@not a colour", "@within") | {"paths": 3}, band([0, 1], [0, 1], [1, 2], "@c1", "g")]
    found = figure_of(plot(traces)).to_plotly_json()
    first, second = found["data"]
    assert first["line"]["color"] == COLOURS["@within"] and first["name"] == "@not a colour" and first["y"] == [1, 2]
    assert second["fillcolor"] == "rgba(213,94,0,0.18)"
    assert "updatemenus" not in found["layout"] and found["layout"]["title"]["text"] == "Fig. 9  A title"


def test_a_control_becomes_a_menu_that_shows_what_the_page_would():
    stream = Control("stream", "stream", [("a", "first"), ("b", "second")], "b")
    massive = Control("massive", "massive units", [("with", "with"), ("without", "without")], "with", "switch")
    idle = Control("steps", "steps", [("1", "1"), ("2", "2")], "1", "slider")
    traces = [
        line([0], [1], "always", "@ink"),
        line([0], [1], "a", "@ink") | {"when": {"stream": "a"}},
        line([0], [1], "b", "@ink") | {"when": {"stream": "b", "massive": "with"}},
        line([0], [1], "b-", "@ink") | {"when": {"stream": "b", "massive": "without"}},
    ]
    layout = {"xaxis": {"title": {"text": "x"}},
              "versions": {"stream": {"a": {"yaxis": {"title": {"text": "of a"}}},
                                      "b": {"yaxis": {"title": {"text": "of b"}}}}}}  # fmt: skip
    found = figure_of(plot(traces, [stream, massive, idle], layout)).to_plotly_json()
    assert [t["visible"] for t in found["data"]] == [True, False, True, False]
    assert found["layout"]["yaxis"]["title"]["text"] == "of b"
    (menu,) = found["layout"]["updatemenus"]
    assert menu["active"] == 2 and [b["label"] for b in menu["buttons"]] == [
        f"stream: {a}, massive units: {b}" for a in ("first", "second") for b in ("with", "without")
    ]
    shown = [b["args"][0]["visible"] for b in menu["buttons"]]
    assert shown[1] == [True, True, False, False] and shown[3] == [True, False, False, True]
    assert menu["buttons"][0]["args"][1] == {"yaxis": {"title": {"text": "of a"}}}


def test_a_plot_that_only_the_pages_script_draws_is_refused():
    with pytest.raises(ValueError, match="'p' has no traces"):
        figure_of(plot([]))


def test_layers_have_a_colour_and_what_was_put_in_a_dash():
    names = ["layer00_teleport", "layer03_teleport", "layer00_attention_frozen"]
    data = curve_chart({name: [1.0] for name in names}, panel("recovery_cosine"), NAMES).to_plotly_json()["data"]
    colours, dashes = ([t["line"][look] for t in data] for look in ("color", "dash"))
    assert colours[0] == colours[2] != colours[1] and dashes[0] == dashes[1] == "solid" != dashes[2]
