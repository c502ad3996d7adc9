"""The panels of perturbed streams: what is drawn is what numpy says of the values given; bad ones are counted."""

import numpy as np
import pytest
import torch
from matplotlib.colors import LogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.quiver import Quiver
from test_figures import legend, lines, path

from rsdyn import figures

RNG = np.random.default_rng(0)
S = 32


def colour(artist):
    return to_hex(artist.get_color()).upper()


def quiver(axes):
    (found,) = [artist for artist in axes.collections if isinstance(artist, Quiver)]
    return found


def teleported(*layers, p=25, k=2):
    """A walk from every point of a cloud, from each layer's resid_pre to the last sublayer."""
    return {layer: RNG.normal(size=(p, S - 2 * layer, k)).cumsum(1) for layer in layers}


# ---------------------------------------------------------------------------------------------- Fig. 4D


def test_teleports_show_the_mean_step_of_every_point():
    reference, points = path(S, 3), teleported(0, 7, 12, 15, k=3)
    figure = figures.teleports(reference, points, ratio=[0.434, 0.1, 0.05])
    *panels, bar = figure.axes
    headings = ["layer 0", "layer 7", "layer 12: next 7 sublayers", "layer 15: next 1 sublayer"]
    assert [axes.get_title() for axes in panels] == headings
    expected = {
        layer: np.diff(x[:, :13, :2], axis=1).mean(1)  # the mean of as many of the next 12 steps as there are
        for layer, x in points.items()
    }
    longest = max(np.hypot(*step.T).max() for step in expected.values())
    for axes, (layer, step) in zip(panels, expected.items(), strict=True):
        control, ring = axes.lines
        np.testing.assert_array_equal(control.get_xydata(), reference[:, :2])
        assert colour(control) == "#999999"
        np.testing.assert_array_equal(ring.get_xydata(), reference[[2 * layer], :2])
        arrows = quiver(axes)
        np.testing.assert_allclose(arrows.XY, points[layer][:, 0, :2])
        np.testing.assert_allclose(np.column_stack([arrows.U, arrows.V]), step, atol=1e-12)
        np.testing.assert_allclose(arrows.get_array(), np.hypot(*step.T))
        assert arrows.get_clim() == (0, longest)  # one scale of colour
        span = np.array([np.diff(axes.get_xlim()), np.diff(axes.get_ylim())]).ravel()
        np.testing.assert_allclose(np.hypot(*(step / span).T).max() / arrows.scale, 1.1 / 5)  # of 5 x 5 points
    everything = np.concatenate([reference[:, :2], *(x[:, 0, :2] for x in points.values())])
    for axis in range(2):
        assert len({tuple((axes.get_xlim, axes.get_ylim)[axis]()) for axes in panels}) == 1
        low, high = (panels[0].get_xlim, panels[0].get_ylim)[axis]()
        assert low < everything[:, axis].min() and high > everything[:, axis].max()
    assert panels[2].get_xlabel() == panels[3].get_xlabel() == "PC 1 (43 %)" and panels[0].get_xlabel() == ""
    assert figure.get_supylabel() == "PC 2 (10 %)" and "over the next 12" in bar.get_xlabel()
    assert legend(figure) == ["unperturbed", "at the injection"]


def test_arrows_point_where_the_points_go_on_paper():
    """A quiver with matplotlib's default angles would be wrong as soon as the two axes have different scales."""
    put = np.stack(np.meshgrid([0.0, 1.0], [0.0, 300.0]), -1).reshape(-1, 2)
    end = put + np.array([0.05, 15.0])
    figure = figures.teleports(np.column_stack([[0, 1], [0, 300]]), {0: np.stack([put, end], 1)}, n_steps=1)
    axes = figure.axes[0]
    figure.draw_without_rendering()
    arrows = quiver(axes)
    assert arrows.angles == arrows.scale_units == "xy"
    outline = arrows.get_paths()[0].vertices  # on paper, the tail at the origin
    tip = outline[np.hypot(*outline.T).argmax()]
    on_paper = (axes.transData.transform(end) - axes.transData.transform(put))[0]
    assert np.arctan2(*tip[::-1]) == pytest.approx(np.arctan2(*on_paper[::-1]), abs=0.05)
    assert 0.3 < np.arctan2(*on_paper[::-1]) < 1.2 < np.arctan2(15.0, 0.05)


@pytest.mark.parametrize(("n_steps", "heading"), [(3, "layer 15: next 2 sublayers"), (2, "layer 15"), (1, "layer 15")])
def test_the_number_of_steps(n_steps, heading):
    points = {15: RNG.normal(size=(4, 3, 2))}
    figure = figures.teleports(path(S, 2), points, n_steps=n_steps, name="latent")
    axes, bar = figure.axes
    last = min(n_steps, 2)
    np.testing.assert_allclose(quiver(axes).U, (points[15][:, last, 0] - points[15][:, 0, 0]) / last)
    assert axes.get_title() == heading and f"over the next {n_steps}" in bar.get_xlabel()
    assert axes.get_xlabel() == "latent 1" and figure.get_supylabel() == "latent 2"
    np.testing.assert_array_equal(axes.lines[1].get_xydata(), path(S, 2)[[S - 3]])


def test_points_that_are_not_finite_and_layers_that_nothing_follows(tmp_path):
    points = teleported(0, 3)
    points[3][4, 5, 1], points[3][7, 0] = np.nan, np.inf
    points[3][9, 20] = np.nan  # after the twelve
    points["the last resid_mid"] = points[0][:, -1:]
    figure = figures.teleports(path(S, 2), points)
    everything, some, none, _ = figure.axes
    assert len(quiver(everything).U) == 25 and some.get_title() == "layer 3: 2 left out"
    np.testing.assert_allclose(quiver(some).XY, np.delete(points[3][:, 0], [4, 7], axis=0))
    assert none.get_title() == "the last resid_mid: nothing follows" and not none.collections
    np.testing.assert_array_equal(none.lines[-1].get_xydata(), points[0][:, -1])
    figures.save(figure, tmp_path, "x")
    figures.save(figures.teleports(path(S, 2), {0: np.full((4, S, 2), np.nan)}), tmp_path, "y")
    figures.save(figures.teleports(np.ones((1, 2)), {0: np.ones((4, 1, 2))}), tmp_path, "z")
    still = figures.teleports(np.ones((2, 2)), {0: np.ones((4, 2, 2))})
    assert (quiver(still.axes[0]).U == 0).all()
    figures.save(still, tmp_path, "still")


def test_one_wild_layer_makes_the_colours_logarithmic():
    points = teleported(0, 7, 14)
    assert not isinstance(quiver(figures.teleports(path(S, 2), points).axes[0]).norm, LogNorm)
    points[15] = RNG.normal(size=(5, 2, 2)) * 100
    panels = figures.teleports(path(S, 2), points).axes[:-1]
    assert all(isinstance(quiver(axes).norm, LogNorm) for axes in panels)
    assert len({quiver(axes).get_clim() for axes in panels}) == 1
    assert quiver(panels[0]).get_clim()[1] == quiver(panels[3]).get_array().max()


# ---------------------------------------------------------------------------------------------- curves


def curves():
    names = ["teleport", "random directions", "swapped in", "frozen attention"]
    return {layer: {name: RNG.uniform(0.5, 2, S - 2 * layer) for name in names} for layer in (0, 7, 15)}


def test_recovery_curves():
    given = curves()
    del given[7]["random directions"]  # the others keep their looks
    values = given[7]["teleport"]
    intervals = {7: {"teleport": np.stack([values - 0.1, values + 0.3])}}
    figure = figures.recovery_curves(given, intervals, interval_label="95 %")
    assert [axes.get_title() for axes in figure.axes] == ["layer 0", "layer 7", "layer 15"]
    for axes, found in zip(figure.axes, given.values(), strict=True):
        for name, expected in found.items():
            (line,) = lines(axes, name)
            np.testing.assert_array_equal(line.get_xydata(), np.column_stack([np.arange(len(expected)), expected]))
            (first,) = lines(figure.axes[0], name)
            assert (colour(line), line.get_linestyle()) == (colour(first), first.get_linestyle())
        (put,) = [line for line in axes.lines if line.get_linestyle() == ":" and colour(line) == "#999999"]
        assert set(put.get_ydata()) == {found["teleport"][0]}
        assert axes.get_ylim() == figure.axes[0].get_ylim()
    looks = {(colour(line), line.get_linestyle()) for name in given[0] for line in lines(figure.axes[0], name)}
    assert len(looks) == 4 and len(figure.axes[0].collections) == 0
    (band,) = figure.axes[1].collections
    vertices = band.get_paths()[0].vertices
    for s, value in enumerate(values):
        own = vertices[vertices[:, 0] == s, 1]
        np.testing.assert_allclose([own.min(), own.max()], [value - 0.1, value + 0.3])
    assert legend(figure) == [*given[0], "as put", "95 %"]
    assert "interval" not in legend(figures.recovery_curves(given))
    assert figure.get_supxlabel() == "sublayers since the injection"
    assert all(tick == int(tick) for axes in figure.axes for tick in axes.get_xticks())


def test_scales_and_values_that_cannot_be_drawn(tmp_path):
    given = curves()
    given[7]["swapped in"][2:4] = np.nan, np.inf
    given[15]["teleport"][1] = 0.0
    figure = figures.recovery_curves(given)
    assert [axes.get_title() for axes in figure.axes] == ["layer 0", "layer 7, 2 not drawn", "layer 15"]
    assert figure.axes[0].get_yscale() == "linear" and figure.axes[0].get_ylim()[0] == 0
    figure = figures.recovery_curves(given, log=True)
    assert figure.axes[2].get_title() == "layer 15, 1 not drawn" and figure.axes[2].get_yscale() == "log"
    figures.save(figure, tmp_path, "x")
    cosines = {"the last": {"teleport": [0.9, 0.999], "noise": [0.2, 0.3]}, "after it": {"teleport": [1.0]}}
    figure = figures.recovery_curves(cosines, fisher=True)
    assert figure.axes[0].get_title() == "the last" and figure.axes[0].get_yscale() == "function"
    (single,) = lines(figure.axes[1], "teleport")
    assert single.get_marker() == "o"  # a point alone has no line
    figures.save(figure, tmp_path, "y")
    figures.save(figures.recovery_curves({0: {"a": [np.nan] * 4}}, log=True), tmp_path, "z")


# ---------------------------------------------------------------------------------------------- all of them

P = np.ones((4, 3, 2))
ONE = {3: {"a": np.ones(4)}}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: figures.teleports(np.ones((5, 1)), {0: P}), "needs 2 dimensions"),
        (lambda: figures.teleports(np.full((5, 2), np.nan), {0: P}), "reference holds NaN"),
        (lambda: figures.teleports(np.ones((5, 2)), {}), "teleported is empty"),
        (lambda: figures.teleports(np.ones((5, 2)), {7: P[0]}), r"teleported\[7\] has shape \(3, 2\)"),
        (lambda: figures.teleports(np.ones((2, 2)), {7: P}), r"teleported\[7\] has shape \(4, 3, 2\).*at most 2"),
        (lambda: figures.teleports(np.ones((5, 3)), {7: P}), r"must be \(P, S', 3\)"),
        (lambda: figures.teleports(np.ones((5, 2)), {0: P}, ratio=[0.5]), "ratio has 1 value"),
        (lambda: figures.teleports(np.ones((5, 2)), {0: P}, n_steps=0), "n_steps is 0"),
        (lambda: figures.recovery_curves({}), "curves is empty"),
        (lambda: figures.recovery_curves({3: {}}), r"curves\[3\] is empty"),
        (lambda: figures.recovery_curves({3: {"a": np.ones(4), "b": np.ones(3)}}), r"curves\[3\]\['b'\] has 3 values"),
        (lambda: figures.recovery_curves(ONE, {3: {"a": np.ones((4, 2))}}), r"intervals\[3\]\['a'\].*\(2, 4\)"),
        (lambda: figures.recovery_curves(ONE, {3: {"b": np.ones((2, 4))}}), r"\['b'\] belongs to no curve"),
        (lambda: figures.recovery_curves(ONE, {4: {"a": np.ones((2, 4))}}), r"intervals\[4\].*belongs to no curve"),
        (lambda: figures.recovery_curves(ONE, log=True, fisher=True), "log and fisher"),
    ],
)
def test_a_wrong_value_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def every_figure():
    """From low-precision tensors that carry a gradient, with a title and long names."""

    def t(*shape):
        return torch.tensor(RNG.uniform(0.1, 0.9, shape), dtype=torch.bfloat16, requires_grad=True)

    long = "a condition with rather a long name that somebody typed, and then went on typing, {}"
    many = {layer: {long.format(i): t(16 - 2 * layer) for i in range(6)} for layer in range(3)}
    bands = {layer: {name: t(2, 16 - 2 * layer) for name in found} for layer, found in many.items()}
    k = {"title": "A title that is a good deal longer than one column of a paper is wide, as titles will be"}
    return {
        "teleports": figures.teleports(t(16, 2), {n: t(9, 16 - 2 * n, 2) for n in (0, 3, 7)}, ratio=t(2), **k),
        "one": figures.teleports(t(16, 2) * 1e5, {3: t(9, 10, 2)}),
        "curves": figures.recovery_curves(many, bands, **k),
        "cosines": figures.recovery_curves({n: many[n] for n in (1, 2)}, fisher=True, ylabel="cosine", **k),
    }


def test_nothing_is_wider_than_the_column():
    for name, figure in every_figure().items():
        assert isinstance(figure, Figure) and figure.get_size_inches()[0] == 3.4
        figure.draw_without_rendering()
        for part, artist in {"legend": figure.legends[0], **dict(enumerate(figure.axes))}.items():
            found = artist.get_tightbbox()
            assert found.x0 >= -1 and found.x1 <= figure.bbox.width + 1, f"{name}: {part} {found.x0:.0f}-{found.x1:.0f}"
            assert found.y0 >= -1 and found.y1 <= figure.bbox.height + 1, f"{name}: {part} {found.y0:.0f}"


def test_the_same_values_give_the_same_bytes(tmp_path):
    reference, points, given = path(S, 2), teleported(0, 15), curves()

    def make(folder):
        panels = {"teleports": figures.teleports(reference, points), "curves": figures.recovery_curves(given)}
        return [file for name, figure in panels.items() for file in figures.save(figure, tmp_path / folder, name)]

    for one, two in zip(make("a"), make("b"), strict=True):
        assert one.stat().st_size > 3000 and one.read_bytes() == two.read_bytes()
