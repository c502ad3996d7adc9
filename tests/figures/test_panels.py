"""One description, two back ends: a panel shows the same series, colours, bands and choices in both."""

import io
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from every_panel import every_panel
from fontTools import subset
from fontTools.ttLib import TTFont
from matplotlib import rc_context
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.image import imread

from rsdyn.figures import interactive, static
from rsdyn.figures.colours import LIGHT, look_of
from rsdyn.figures.panel import (
    Axis,
    Band,
    Bars,
    Caption,
    Control,
    Distribution,
    Flow,
    HeatMap,
    Line,
    Panel,
    Path,
    Paths,
    Rows,
    Rule,
    Said,
    array,
    brief,
    fisher_ticks,
    in_words,
    log_ticks,
)
from rsdyn.figures.style import STYLE, wrapped

PANELS = every_panel()
NOT_NAMED = {"resid_pre", "resid_mid", "start", "end", "end (bold)"}  # parts of a path


def colour_of(trace):
    for part in ("line", "marker"):
        colour = (trace.get(part) or {}).get("color")
        if isinstance(colour, str):
            return colour
    return None


def named(marks, *kinds):
    return {mark.name for mark in marks if isinstance(mark, kinds)}


@pytest.mark.parametrize("key", PANELS)
def test_both_back_ends_show_the_same(key):
    panel = PANELS[key]
    drawn, interactive_one = static.draw(panel), interactive.figure(panel).to_plotly_json()
    marks = [mark for choice in panel.choices() for mark in panel.drawn(choice)]
    lines = named(marks, Line)
    # names and colours: those of the description, in both
    handles = {}
    for axes in drawn.axes:
        for line in axes.lines:
            handles.setdefault(str(line.get_label()).lstrip("_"), to_hex(line.get_color()))
    looks = {mark.name: mark.looks.hex.lower() for mark in marks if isinstance(mark, Line)}
    assert {name: handles.get(name) for name in lines} == looks
    found = {trace["name"]: trace for trace in interactive_one["data"] if not trace.get("fill")}
    assert lines <= {name.replace("&amp;", "&") for name in found}
    for name in lines:
        assert colour_of(found[interactive.flat(name)]).lower() == looks[name]
    # bands: as many in the first choice, and the same values
    first = panel.drawn(panel.first)
    banded = [m for m in first if isinstance(m, Band) or (isinstance(m, Line) and m.low is not None)]
    page = interactive.for_page(panel)
    areas = [t for t in page["traces"] if t.get("fill") and all(panel.first[k] == v for k, v in
                                                              t.get("when", {}).items())]  # fmt: skip
    assert len(areas) == len(banded)
    # controls: every option of a menu is there, and static figures draw what is shown
    assert page["controls"] == [c.name for c in panel.controls]
    menus = interactive_one["layout"].get("updatemenus", [])
    n = int(np.prod([len(c.options) for c in panel.controls if c.kind != "unit"] or [1]))
    shown = int(np.prod([len(c.shown) for c in panel.controls] or [1]))
    assert bool(menus) == (max(n, shown) > 1)
    rows, columns = static._grid(panel)
    assert rows * columns >= len(list(panel.choices()))
    # an axis is called the same
    x, y = panel.axes_at(panel.first)
    assert interactive_one["layout"]["xaxis"]["title"]["text"] == x.label
    if len(list(panel.choices())) == 1:
        assert drawn.axes[0].get_ylabel().replace("\n", " ") == y.label


@pytest.mark.parametrize("key", PANELS)
def test_every_choice_of_the_menu_shows_what_is_drawn_at_it(key):
    panel = PANELS[key]
    figure = interactive.figure(panel).to_plotly_json()
    if "updatemenus" not in figure["layout"]:
        return
    names = [trace["name"] for trace in figure["data"]]
    for choice, button in zip(interactive._choices(panel), figure["layout"]["updatemenus"][0]["buttons"], strict=True):
        visible = {n for n, v in zip(names, button["args"][0]["visible"], strict=True) if v}
        wanted = {interactive.flat(m.name) for m in panel.drawn(choice, waiting=True)
                  if not isinstance(m, (Said, Rule))}  # fmt: skip
        assert visible - NOT_NAMED == wanted


@pytest.mark.parametrize("key", PANELS)
def test_nothing_is_wider_than_the_figure_and_every_panel_says_what_it_is(key):
    panel = PANELS[key]
    figure = static.draw(panel)
    figure.draw_without_rendering()
    assert figure.get_size_inches()[0] in (3.4, 6.8)
    for artist in [*figure.legends, *figure.axes]:
        box = artist.get_tightbbox()
        assert box.x0 >= -1 and box.x1 <= figure.bbox.width + 1, (key, box)
        assert box.y0 >= -1 and box.y1 <= figure.bbox.height + 1, (key, box)
    assert panel.title and panel.alt and all(panel.caption), key
    assert "nan" not in panel.alt.lower() + " ".join(panel.caption).lower()
    assert key == panel.key and "/" not in key and " " not in key


def test_keys_are_unique_and_every_figure_of_the_paper_is_there():
    figures = {panel.figure for panel in PANELS.values()}
    letters = {"1": "BCDEFGH", "2": "ABC", "3": "ABCD", "4": "ABCD"}
    assert {n + letter for n, those in letters.items() for letter in those} <= figures
    assert len({panel.title for panel in PANELS.values()}) == len(PANELS)


# -- the description ---------------------------------------------------------------------------------------------------


def panel(*marks, **more):
    return Panel(key="a", title="A", marks=marks, x=Axis("x"), y=Axis("y"), **more)


def line(name="original", n=4, **more):
    return Line(name=name, x=np.arange(n), y=np.arange(n) + 1.0, **more)


KIND = Control("kind", "kind", (("a", "first"), ("b", "second")), "b")


def test_marks_are_chosen_by_controls_and_rows_by_keys():
    rows = Rows("kind", ("a", "b"))
    both = Line(name="original", rows=rows, x=np.arange(3), y=np.array([[1, 2, 3], [4, 5, 6]]))
    made = panel(both, line("token_shuffled", when={"kind": "a"}), line("untrained", waits=True), controls=(KIND,))
    (alone,) = made.drawn({"kind": "b"})
    np.testing.assert_array_equal(alone.y, [4, 5, 6])
    assert [m.name for m in made.drawn({"kind": "a"}, waiting=True)] == ["original", "token_shuffled", "untrained"]
    ended = replace(both, rows=Rows("kind", ("a",), last=True), y=np.array([[1.0, 2, 3]]))
    assert panel(ended, controls=(KIND,)).drawn({"kind": "b"})[0].y.tolist() == [1, 2, 3]
    other = made.with_key("-1")
    assert other.key == "a-1" and other.first == {"kind-1": "b"} and len(other.drawn({"kind-1": "b"})) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: line(when={"kind": "c"}), "drawn when kind is 'c'"),
        (lambda: line(rows=Rows("other", ("a",))), "other is 'a'"),
        (lambda: Line(name="x", x=np.ones((2, 2)), y=np.ones(2)), r"x of 'x' has shape \(2, 2\)"),
        (lambda: Line(name="x", rows=Rows("kind", ("a", "b")), x=np.ones(3), y=np.ones((1, 3))), "1 rows"),
        (lambda: replace(KIND, value="c"), "has no option 'c'"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        panel(make(), controls=(KIND,))


def test_a_tensor_of_any_kind_is_an_array():
    made = line()
    tensor = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    assert array(tensor).tolist() == [1, 2] and replace(made, x=tensor, y=tensor).y.dtype == np.float64


def test_ticks_and_words():
    ends, ticks = fisher_ticks(np.array([0.81, 0.9995]))
    assert ends[0] < np.arctanh(0.81) < np.arctanh(0.9995) < ends[1] and 0.9 in ticks and 0.98 in ticks
    assert log_ticks(np.array([-1.0, 0.0])) is None
    for low, high in ((1, 1000), (0.93, 1.02), (2e-5, 3e-5), (1, 1)):
        (left, right), ticks = log_ticks(np.array([low, high], dtype=float))
        assert len(ticks) >= 2 and all(left <= np.log10(t) <= right for t in ticks), (low, high, ticks)
    assert [brief(v) for v in (-0.5, 1234.5, 1e-7, float("nan"))] == ["−0.5", "1,234", "1e−7", "not defined"]
    assert in_words("speed", [np.nan, 1, 3, 2], "abcd") == "speed: 1 at b, 2 at d, least 1 at b, largest 3 at c"


# -- the static back end -----------------------------------------------------------------------------------------------


def test_values_are_drawn_as_they_are_and_infinities_leave_gaps():
    values = np.array([1.0, np.inf, 3.0, np.nan])
    figure = static.draw(panel(replace(line(), y=values, low=values - 1, high=values + 1)))
    (drawn,) = figure.axes[0].lines
    np.testing.assert_array_equal(drawn.get_ydata(), [1, np.nan, 3, np.nan])
    (band,) = figure.axes[0].collections
    assert {tuple(v) for v in band.get_paths()[0].vertices} >= {(0.0, 0.0), (0.0, 2.0)}


def test_what_is_shown_of_a_control_stands_beside_each_other():
    made = panel(line(when={"kind": "a"}), line("untrained", when={"kind": "b"}),
                 controls=(replace(KIND, shown=("a", "b")),))  # fmt: skip
    figure = static.draw(made)
    assert [axes.get_title() for axes in figure.axes] == ["first", "second"]
    assert [axes.lines[0].get_label() for axes in figure.axes] == ["original", "untrained"]
    assert len(static.draw(replace(made, controls=(KIND,))).axes) == 1


def test_arrows_point_where_the_points_go_on_paper():
    start = np.stack(np.meshgrid([0.0, 1.0], [0.0, 300.0]), -1).reshape(-1, 2)
    end = start + np.array([0.05, 15.0])
    figure = static.draw(panel(Flow(name="teleport", start=start, end=end, value=np.ones(4), bar="distance")))
    axes = figure.axes[0]
    figure.draw_without_rendering()
    (arrows,) = [a for a in axes.collections if hasattr(a, "U")]
    outline = arrows.get_paths()[0].vertices  # on paper, the tail at the origin
    tip = outline[np.hypot(*outline.T).argmax()]
    way = (axes.transData.transform(end) - axes.transData.transform(start))[0]
    assert np.arctan2(*tip[::-1]) == pytest.approx(np.arctan2(*way[::-1]), abs=0.05)
    np.testing.assert_allclose(np.column_stack([arrows.U, arrows.V]), end - start)


def test_a_distribution_is_its_histogram_with_its_mean_beside_it():
    values = np.concatenate([np.full(30, 1.0), np.full(10, 3.0), [np.nan]])
    figure = static.draw(panel(Distribution(name="original", values=values), Distribution(name="floor", values=values)))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "1.5 ± 0.866" in texts and "mean ± SD" in texts
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["original", "floor"]


def test_files_are_whole_and_the_same_twice(tmp_path):
    made = panel(line())
    first, second = static.save(made, tmp_path / "one"), static.save(made, tmp_path / "two")
    assert [p.name for p in first] == ["a.png", "a.pdf"]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))
    head = first[0].read_bytes()
    at = head.index(b"pHYs") + 4
    assert int.from_bytes(head[at : at + 4], "big") == round(300 / 0.0254)  # pixels per metre
    with pytest.raises(ValueError, match="file name without a folder"):
        static.save(Figure(), tmp_path, "../x")


def test_a_file_is_what_matplotlib_saves(tmp_path):
    made = panel(Line(name="original", x=np.arange(9), y=np.geomspace(1, 1e6, 9)))
    png = static.save(made, tmp_path)[0]
    figure = static.draw(made)
    with rc_context(STYLE):
        figure.savefig(tmp_path / "plain.png", dpi=300)
    np.testing.assert_array_equal(imread(png), imread(tmp_path / "plain.png"))
    saved = static.draw(made)
    static.save(saved, tmp_path, "again")
    assert "draw" not in vars(saved)  # which is shown as any other


def test_a_pdf_holds_the_outlines_of_its_text_and_no_tables_that_shape_it(tmp_path):
    pdf = static.save(panel(line()), tmp_path)[1].read_bytes()
    unpacked = [zlib.decompressobj().decompress(part) for part in pdf.split(b"\nstream\n")[1:] if part[:1] == b"x"]
    fonts = [TTFont(io.BytesIO(part)) for part in unpacked if part.startswith(b"\0\1\0\0")]
    assert fonts
    for font in fonts:
        assert "glyf" in font and not {"GSUB", "GPOS", "GDEF", "MATH", "kern"} & set(font.keys())
    assert "GSUB" not in subset.Options().drop_tables  # which is for others


def test_somebodys_matplotlibrc_changes_nothing(monkeypatch):
    import matplotlib

    before = static.draw(panel(line())).get_size_inches()
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True}):
        figure = static.draw(panel(line()))
    assert (figure.get_size_inches() == before).all() and figure.axes[0].xaxis.label.get_size() == 8
    assert matplotlib.rcParams["font.size"] == 10


def test_figure_1_is_put_together_with_letters():
    figure = static.assembled([replace(panel(line()), key=f"p{c}", figure=f"1{c}", title=f"Panel {c}") for c in "BBCD"])
    letters = [text.get_text() for part in figure.subfigs for text in part.texts]
    assert letters == ["B", "C", "D"] and len(figure.subfigs) == 4
    figure.draw_without_rendering()


# -- the interactive back end ------------------------------------------------------------------------------------------


def test_numbers_are_packed_for_the_page_and_plain_for_wandb():
    made = panel(replace(line(), low=np.zeros(4), high=np.ones(4)))
    area, curve = interactive.for_page(made)["traces"]
    assert curve["line"]["color"] == "@ink" and set(curve["y"]) == {"dtype", "bdata"} and area["fill"] == "toself"
    data = interactive.figure(made).to_plotly_json()["data"]
    assert list(data[1]["y"]) == [1, 2, 3, 4] and data[1]["line"]["color"] == LIGHT["ink"]
    assert data[0]["fillcolor"].startswith("rgba(")


def test_markup_in_names_stays_text():
    trace = interactive.for_page(panel(line("<b>&")))["traces"][0]
    assert trace["name"] == "&lt;b&gt;&amp;"


def test_scales_of_the_page():
    bent = interactive.layout(replace(panel(line()), y=Axis("r", "fisher")))["yaxis"]
    assert bent["range"][1] > bent["range"][0] and len(bent["tickvals"]) == len(bent["ticktext"])
    log = interactive.layout(replace(panel(line()), y=Axis("r", "log")))["yaxis"]
    assert log["type"] == "log" and log["range"][0] < 0 < log["range"][1]


def test_a_long_menu_keeps_its_ends_apart_evenly():
    options = tuple((str(i), str(i)) for i in range(100))
    control = Control("kind", "kind", options, "51", "steps")
    rows = Rows("kind", tuple(v for v, _ in options))
    made = panel(replace(line(), rows=rows, y=np.ones((100, 4))), controls=(control,))
    choices = [c["kind"] for c in interactive._choices(made)]
    assert len(choices) <= interactive.MOST_CHOICES and "51" in choices and choices[0] == "0" and int(choices[-1]) > 95


def test_every_kind_of_mark_has_both_ways_to_be_drawn():
    kinds = {Line, Band, Rule, Path, Paths, HeatMap, Distribution, Bars, Flow, Said}
    assert kinds == set(static.DRAW) == set(interactive.MAKE)
    assert look_of("within layer").colour == "within" and Caption("x").read_for == "" and BarContainer


def test_a_long_name_breaks_behind_its_separators_and_within_a_word_only_where_it_must():
    assert wrapped("SmolLM2-135M-Instruct.Q4_1 (untrained)", 7, 60) == "SmolLM2-135M-\nInstruct.Q4_1\n(untrained)"
    assert wrapped("meta-llama/Llama-3.1-8B", 7, 50) == "meta-llama/\nLlama-3.1-8B"
    assert wrapped("well-read words stay whole", 7, 60).split() == "well-read words stay whole".split()
    assert wrapped("abcdefghijklmnopqrstuvwxyz", 7, 30).replace("\n", "") == "abcdefghijklmnopqrstuvwxyz"


def test_choices_of_several_axes_have_no_label_in_common():
    panel = every_panel()["by_position"]
    labels = [panel.axes_at(choice)[1].label for choice in panel.choices()]
    assert len(set(labels)) == len(labels) > 3
    assert "intrinsic dimension (TwoNN)" in labels and "KL(final || here) (nats)" in labels
    figure = static.draw(panel)
    assert figure.get_supylabel() == "" and figure.get_supxlabel() == "layer"
    heads = [axes.get_title().replace("\n", " ") for axes in figure.axes]
    assert set(labels) <= set(heads)
