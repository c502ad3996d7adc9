"""The panels of the analysis: what is drawn is what numpy says of the values given; bad ones are counted."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from sklearn.decomposition import PCA as SklearnPCA
from test_figures import legend, lines, path, tick_labels

from rsdyn import figures
from rsdyn.dynamics.projection import PCA
from rsdyn.figures.colours import look_of

RNG = np.random.default_rng(0)


def note(axes):
    return axes.get_title(loc="left").replace("\n", " ")


def colour(artist):
    return to_hex(artist.get_color()).upper()


def band(polygons):
    """Lower and upper edge of what fill_between drew over n points."""
    (vertices,) = [p.vertices for p in polygons.get_paths()]
    x = np.unique(vertices[:, 0])
    return x, *[np.array([pick(vertices[vertices[:, 0] == at, 1]) for at in x]) for pick in (min, max)]


# ---------------------------------------------------------------------------------------------- Fig. 1B


@pytest.mark.parametrize(("n_sublayers", "n_units", "sites"), [(64, 300, 2), (6, 32, 2), (16, 32, 1), (2, 32, 2)])
def test_mean_activations(n_sublayers, n_units, sites):
    mean = RNG.normal(size=(n_sublayers, n_units)) * np.linspace(0.1, 2, n_sublayers)[:, None]
    mean[-2, 17] = -50.0
    axes, bar = figures.mean_activations(mean, sites_per_layer=sites).axes
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array(), mean[:, np.argsort(mean[-1])].T)
    limit = np.percentile(np.abs(mean), 95)
    np.testing.assert_allclose(image.get_clim(), (-limit, limit))
    assert "percentile 95" in bar.get_ylabel()
    assert note(axes) == f"largest: unit 17, −50 at layer {(n_sublayers - 2) // sites}"
    assert axes.get_xlim() == (-0.5, n_sublayers - 0.5) and axes.get_xlabel() == "layer"


def test_mean_activations_of_strange_values(tmp_path):
    mean = RNG.normal(size=(8, 40))
    mean[2, 5], mean[:, 7], mean[3, 9] = np.nan, np.nan, np.inf
    figure = figures.mean_activations(mean)
    image = figure.axes[0].images[0]
    assert image.get_array().mask.sum() == 10 and np.isfinite(image.get_clim()).all()
    assert "3 units not finite somewhere" in note(figure.axes[0])
    figures.save(figure, tmp_path, "x")
    for nothing in (np.zeros((4, 3)), np.full((4, 3), np.nan)):
        low, high = figures.mean_activations(nothing).axes[0].images[0].get_clim()
        assert -low == high > 0
    one_massive = np.full((4, 32), 0.1)
    one_massive[:, 3] = 1e4  # 3 % of the units must not take all the colour
    assert figures.mean_activations(one_massive).axes[0].images[0].get_clim()[1] == pytest.approx(0.1)


def test_density_with_one_curve_or_several():
    fraction, participation = np.linspace(0.1, 0.9, 12), np.linspace(0.5, 0.3, 12)
    figure = figures.density(fraction, participation, threshold=0.25)
    above, below = figure.axes
    np.testing.assert_array_equal(above.lines[0].get_ydata(), fraction)
    np.testing.assert_array_equal(below.lines[0].get_ydata(), participation)
    assert "|mean| > 0.25" in above.get_ylabel() and not figure.legends and tick_labels(below) == list("012345")
    names = ["all units", "without massive units"]
    figure = figures.density(fraction, dict(zip(names, (participation, fraction), strict=True)), threshold=0.25)
    assert legend(figure) == names and len(figure.axes[1].lines) == 2
    figure = figures.density(dict.fromkeys(names, fraction), dict.fromkeys(names, fraction), threshold=0.25)
    assert [colour(line) for line in figure.axes[0].lines] == [colour(line) for line in figure.axes[1].lines]


# ---------------------------------------------------------------------------------------------- Fig. 1C, G


def check_bands(figure, values, sites):
    kinds = [(figures.WITHIN, "within layer"), (figures.CROSS, "cross layer")]
    if sites == 1:
        kinds = [(figures.CROSS, "layer to layer")]
    assert len(figure.axes) == len(kinds)
    for first, (axes, (expected, label)) in enumerate(zip(figure.axes, kinds, strict=True)):
        assert axes.get_ylabel() == label
        own = np.where(np.isfinite(values), values, np.nan)[first::sites]
        for name, oracle in (("median", np.nanmedian), ("mean", np.nanmean)):
            (line,) = lines(axes, name)
            np.testing.assert_allclose(line.get_ydata(), oracle(own, axis=1))
            np.testing.assert_allclose(line.get_xdata(), np.arange(first, len(values), sites) + 0.5)
        assert colour(lines(axes, "median")[0]) == expected
        for polygons, (low, high) in zip(axes.collections[:2], ((5, 95), (25, 75)), strict=True):
            assert to_hex(polygons.get_facecolor()[0]).upper() == expected
            x, lower, upper = band(polygons)
            np.testing.assert_allclose(x, np.arange(first, len(values), sites) + 0.5)
            np.testing.assert_allclose(lower, np.nanpercentile(own, low, axis=1))
            np.testing.assert_allclose(upper, np.nanpercentile(own, high, axis=1))


@pytest.mark.parametrize(("n_sublayers", "sites"), [(32, 2), (7, 2), (16, 1)])
def test_unit_correlations(n_sublayers, sites):
    r = np.tanh(RNG.normal(1.5, 0.5, (n_sublayers - 1, 40)))
    check_bands(figures.unit_correlations(r, sites_per_layer=sites), r, sites)
    r[2, 3], r[:, 5] = np.nan, np.nan
    figure = figures.unit_correlations(r, sites_per_layer=sites)
    check_bands(figure, r, sites)
    assert note(figure.axes[0]).startswith("2 of 40 units undefined")


def test_unit_information_counts_what_it_leaves_out():
    mi = RNG.gamma(3.0, 0.3, (15, 50))
    floor = RNG.uniform(0.01, 0.02, 15)
    mi[3, 4], mi[3, 5], mi[6, :2] = np.inf, np.inf, np.nan
    figure = figures.unit_information(mi, floor=floor)
    check_bands(figure, mi, 2)
    assert note(figure.axes[0]) == "2 infinite and 2 undefined of 750 values left out"
    for first, axes in enumerate(figure.axes):
        (line,) = lines(axes, "floor (permuted pairs)")
        np.testing.assert_array_equal(line.get_ydata(), floor[first::2])
    assert figures.unit_information(mi, log=True).axes[0].get_yscale() == "log"


def test_one_transition_and_no_defined_unit():
    figure = figures.unit_correlations(np.array([[0.1, 0.5, 0.9]]))
    (axes,) = figure.axes
    assert axes.get_ylabel() == "within layer" and list(lines(axes, "median")[0].get_ydata()) == [0.5]
    low, high = axes.collections[0].get_segments()[0][:, 1]
    np.testing.assert_allclose((low, high), np.percentile([0.1, 0.5, 0.9], [5, 95]))
    figure = figures.unit_correlations(np.full((5, 3), np.nan))
    assert np.isnan(lines(figure.axes[0], "median")[0].get_ydata()).all()
    figure.draw_without_rendering()


@pytest.mark.parametrize("r", [[0.2, 0.9, 0.99, 0.999], [-0.7, 0.1, 0.5, 1.0], [0.97, 0.98], [0.5]])
def test_the_fisher_scale_is_even_in_artanh(r):
    axes = figures.transition_curve(r, fisher=True).axes[0]
    low, high = axes.get_ylim()
    assert low < min(r) and min(max(r), 1 - 1e-6) <= high
    at = axes.transData.transform([[0, v] for v in (low, 0.3, 0.6, 0.9, 0.99)])[:, 1]
    expected = np.arctanh([0.3, 0.6, 0.9, 0.99]) - np.arctanh(low)
    np.testing.assert_allclose((at[1:] - at[0]) / (at[-1] - at[0]), expected / expected[-1], rtol=1e-9)
    ticks = axes.get_yticks()
    assert (np.diff(ticks) > 0).all() and all(low <= tick <= high for tick in ticks)


# ---------------------------------------------------------------------------------------------- Fig. 1D


def test_correlation_density():
    edges = np.linspace(0, 1, 26)
    bins = np.clip(RNG.normal(np.linspace(22, 1, 40)[:, None], 3, (40, 200)).round(), -1, 24)  # -1 is below 0
    r = (bins + 0.5) / 25  # 40 units, 200 pairs, each in the middle of its bin, so that binning loses nothing
    counts = np.stack([np.histogram(row, edges)[0] for row in r])
    figure = figures.correlation_density(counts, edges, below=(r < 0).sum(1))
    top, axes, _ = figure.axes
    share = axes.collections[0].get_array().reshape(40, 25)
    order = np.argsort(np.where(r < 0, 0, r).mean(1), kind="stable")
    np.testing.assert_allclose(share, counts[order] / 200)
    np.testing.assert_allclose(top.patches[0].get_data().values, counts.sum(0) / r.size)
    assert note(top) == f"8,000 pairs, {100 * (r < 0).mean():.2f} % below 0"


def test_correlation_density_without_pairs(tmp_path):
    counts = RNG.integers(0, 5, (30, 10))
    counts[[4, 9]] = 0
    figure = figures.correlation_density(counts, np.linspace(-1, 1, 11))
    share = figure.axes[1].collections[0].get_array().reshape(30, 10)
    assert share.mask[-2:].all() and not share.mask[:-2].any()  # sorted last
    assert note(figure.axes[0]).endswith("0.00 % below −1; 2 units undefined")
    figures.save(figures.correlation_density(np.zeros((3, 4)), np.arange(5)), tmp_path, "x")


# ---------------------------------------------------------------------------------------------- Fig. 1E, F, H


@pytest.mark.parametrize(("n_sublayers", "sites"), [(64, 2), (33, 2), (2, 2), (16, 1), (160, 2)])
def test_transition_curve_in_the_papers_two_colours(n_sublayers, sites):
    values = RNG.uniform(1, 3, n_sublayers - 1)
    interval = np.stack([values - 0.2, values + 0.3])
    others = {name: RNG.uniform(1, 3, n_sublayers - 1) for name in ("shuffled", "untrained", "floor")}
    figure = figures.transition_curve(
        values, interval, others=others, ylabel="speed", interval_label="95 %", sites_per_layer=sites
    )
    (axes,) = figure.axes
    kinds = [("within layer", figures.WITHIN, 0), ("cross layer", figures.CROSS, 1)][: n_sublayers - 1]
    if sites == 1:
        kinds = [("layer to layer", figures.CROSS, 0)]
    for (label, expected, first), polygons in zip(kinds, axes.collections, strict=False):
        (line,) = lines(axes, label)
        assert colour(line) == expected
        np.testing.assert_array_equal(line.get_ydata(), values[first::sites])
        np.testing.assert_array_equal(line.get_xdata(), np.arange(first, n_sublayers - 1, sites) + 0.5)
        if n_sublayers > 2:
            _, low, high = band(polygons)
            np.testing.assert_allclose([low, high], interval[:, first::sites])
    for name, curve in others.items():
        drawn = [*lines(axes, name), *lines(axes, "_" + name)]
        assert len(drawn) == len(kinds) and len({line.get_marker() for line in drawn}) == len(kinds)
        for first, line in enumerate(drawn):
            np.testing.assert_array_equal(line.get_ydata(), curve[first::sites])
            np.testing.assert_array_equal(line.get_xdata(), np.arange(first, n_sublayers - 1, sites) + 0.5)
            assert colour(line) not in (figures.WITHIN, figures.CROSS)
    assert sorted(legend(figure)) == sorted([*(label for label, *_ in kinds), "95 %", *others])
    assert axes.get_ylabel() == "speed" and note(axes) == ""


def test_values_that_cannot_be_drawn_are_counted(tmp_path):
    values = np.linspace(0.5, 2, 20)
    values[[3, 4]] = np.nan, np.inf
    other = np.linspace(1, 2, 20)
    other[0] = -1.0
    figure = figures.transition_curve(values, others={"a": other})
    assert note(figure.axes[0]) == "2 of 40 values cannot be drawn"
    assert np.isnan(lines(figure.axes[0], "within layer")[0].get_ydata()).sum() == 1
    logarithmic = figures.transition_curve(values, others={"a": other}, log=True)
    assert note(logarithmic.axes[0]) == "3 of 40 values cannot be drawn" and logarithmic.axes[0].get_yscale() == "log"
    for i, kind in enumerate(({}, {"log": True}, {"fisher": True})):
        figures.save(figures.transition_curve(np.full(5, np.nan), np.full((2, 5), np.inf), **kind), tmp_path, f"x{i}")


def test_the_axis_begins_at_zero_unless_that_hides_the_changes():
    for values, from_zero in (([1.0, 4.0, 2.0], True), ([0.95, 0.97, 0.99], False), ([-1.0, 3.0, 2.0], False)):
        assert bool(figures.transition_curve(values).axes[0].get_ylim()[0] == 0) is from_zero


# ---------------------------------------------------------------------------------------------- Fig. 2


@pytest.mark.parametrize(("n_units", "n_sublayers", "sites"), [(9, 64, 2), (4, 16, 1), (1, 6, 2), (12, 2, 2)])
def test_portraits(n_units, n_sublayers, sites):
    x, y = RNG.normal(size=(2, n_sublayers, n_units)).cumsum(1)
    x, y = x - x[0], y - y[0]
    rotations = np.linspace(-6.2, 1.0, n_units)
    names = [f"unit {7 * u}" for u in range(n_units)]
    figure = figures.portraits(x, y, names, rotations, sites_per_layer=sites)
    *panels, bar = figure.axes
    assert bar.get_ylabel() == "layer"
    shown = [axes for axes in panels if axes.axison]
    assert len(shown) == n_units
    for u, axes in enumerate(shown):
        name, turns = axes.get_title().split("\n")
        assert name == names[u] and turns == f"{-rotations[u]:.1f} turns ↻".replace("-", "−")
        curve = next(line for line in axes.lines if colour(line) == "#444444")
        np.testing.assert_array_equal(curve.get_xydata(), np.column_stack([x[:, u], y[:, u]]))
        (end,) = lines(axes, "end")
        assert end.get_xydata().tolist() == [[x[-1, u], y[-1, u]]]
        for ticks, values in ((axes.get_xticks(), x[:, u]), (axes.get_yticks(), y[:, u])):
            extreme = values[np.abs(values).argmax()]
            assert ticks[0] == 0 and 0.5 <= ticks[1] / extreme <= 1 + 1e-6


def test_portraits_of_frozen_and_undefined_units(tmp_path):
    x, y = RNG.normal(size=(2, 8, 3))
    x[:, 0], y[:, 0], x[2, 1] = 0, 0, np.nan
    figure = figures.portraits(x, y, "abc", [0.0, np.nan, 0.02])
    titles = [axes.get_title().split("\n")[1] for axes in figure.axes[:3]]
    assert titles == ["0.0 turns ↻", "turns undefined", "0.0 turns ↻"]  # never minus nought
    figures.save(figure, tmp_path, "x")


@pytest.mark.parametrize("n_nulls", [1, 7])
def test_rotation_distribution(n_nulls):
    observed = RNG.normal(-10.7, 2.0, 500)
    observed[:3] = np.nan
    nulls = {f"null model number {i}": RNG.normal(-i, 3.0, (4, 500)) for i in range(n_nulls)}
    nulls["null model number 0"] = torch.tensor(nulls["null model number 0"], dtype=torch.bfloat16)
    figure = figures.rotation_distribution(observed, nulls, observed_name="this model", bins=40)
    (axes,) = figure.axes
    rows = [-observed[3:], *[-np.asarray(torch.as_tensor(v).double()).ravel() for v in nulls.values()]]
    assert len(axes.patches) == len(rows)
    marks = [line for line in axes.lines if line.get_linestyle() == "-"]
    texts = [text.get_text() for text in axes.texts]
    for i, (values, patch, mark) in enumerate(zip(rows, axes.patches, marks, strict=True)):
        heights, edges, base = patch.get_data()
        expected = np.histogram(values, edges)[0]
        assert expected.sum() == len(values)  # nothing lies outside the axis
        np.testing.assert_allclose(np.asarray(heights) - base, 0.85 * expected / expected.max())
        np.testing.assert_allclose(mark.get_xdata(), values.mean())
        written = [float(part.replace("−", "-")) for part in texts[i].split(" ± ")]
        np.testing.assert_allclose(written, [values.mean(), values.std()], atol=0.0501)
    labels = [" ".join(text.get_text().split()) for text in axes.get_yticklabels()]
    assert labels == ["this model", *nulls]
    assert note(axes) == "left out: 3 of this model"
    (carried,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    np.testing.assert_allclose(carried.get_xdata(), rows[0].mean())


def test_rotations_by_unit_states_the_share_of_small_p():
    """The one share of every other place, which is not that outside the band."""
    null_mean, null_std = RNG.normal(0, 1, 4000), RNG.uniform(1, 3, 4000)
    observed, p = RNG.normal(null_mean, null_std), RNG.uniform(size=4000)
    observed[:2], null_std[2], p[:3] = np.nan, np.nan, np.nan
    figure = figures.rotations_by_unit(observed, null_mean, null_std, p=p, null_name="layer shuffle")
    (axes,) = figure.axes
    kept = np.arange(3, 4000)
    (line,) = [line for line in axes.lines if line.get_marker() == "None"]
    np.testing.assert_array_equal(line.get_ydata(), np.sort(-observed[kept]))
    beyond = 100 * (p[kept] < 0.05).mean()
    assert note(axes) == f"{beyond:.1f} % of 3997 units have p < .05 (5 % if the null held); 3 undefined"
    order = kept[np.argsort(-observed[kept])]
    dots = next(line for line in axes.lines if line.get_marker() == "o")
    np.testing.assert_array_equal(dots.get_ydata(), -null_mean[order])
    _, low, high = band(axes.collections[0])
    np.testing.assert_allclose((high + low)[1:-1] / 2, -null_mean[order][1:-1], atol=1e-12)
    np.testing.assert_allclose((high - low)[1:-1] / 2, 1.96 * null_std[order][1:-1])
    assert legend(figure) == ["observed", "layer shuffle: mean", "± 1.96 SD"]
    assert note(figures.rotations_by_unit([np.nan], [0.0], [1.0], p=[np.nan]).axes[0]) == "1 undefined"


# ---------------------------------------------------------------------------------------------- Fig. 4


def test_pca_trajectory_beside_its_control():
    mean, control = path(32, 3), path(32, 2) * 5
    samples = mean + RNG.normal(0, 0.1, (6, 32, 3))
    figure = figures.pca_trajectory(
        mean, samples, ratio=[0.434, 0.1, 0.05], control_mean=control, control_ratio=[0.5, 0.2], control_name="walk"
    )
    panels = [axes for axes in figure.axes if axes.get_ylabel() != "layer"]
    assert len(panels) == 2 and "residual" in note(panels[0]) and note(panels[1]) == "control: walk"
    assert panels[0].get_xlabel() == "PC 1 (43 %)" and panels[1].get_ylabel() == "PC 2 (20 %)"
    for axes, expected in zip(panels, (mean[:, :2], control), strict=True):
        np.testing.assert_array_equal(axes.lines[-1].get_xydata(), expected[[-1]])
        curve = next(line for line in axes.lines if len(line.get_xdata()) == 32)
        np.testing.assert_array_equal(curve.get_xydata(), expected)
    np.testing.assert_array_equal(panels[0].collections[0].get_segments()[2], samples[2, :, :2])
    (alone, _) = figures.pca_trajectory(mean).axes
    assert alone.get_xlabel() == "PC 1" and note(alone) == ""
    figure = figures.pca_trajectory(mean, ratio=[0.996, 0.00321])
    assert [figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()] == ["PC 1 (100 %)", "PC 2 (0.32 %)"]


def test_cumulative_variance_against_sklearn():
    x = RNG.normal(size=(300, 12)) * np.geomspace(3, 0.1, 12)
    ours = PCA.fit(torch.tensor(x), 12).explained_variance_ratio
    figure = figures.cumulative_variance({"stream": ours, "few": ours[:2], "flat": np.full(7, np.nan)})
    (axes,) = figure.axes
    needed = SklearnPCA(0.9).fit(x).n_components_
    assert legend(figure) == [f"stream ({needed} for 90 %)", "few (90 % not reached)", "flat (90 % not reached)"]
    curve = lines(axes, f"stream ({needed} for 90 %)")[0]
    np.testing.assert_allclose(curve.get_ydata(), SklearnPCA().fit(x).explained_variance_ratio_.cumsum())
    np.testing.assert_array_equal(curve.get_xdata(), np.arange(1, 13))
    (dot,) = [line for line in axes.lines if line.get_marker() == "o"]
    assert dot.get_xdata() == [needed] and axes.get_xscale() == "log"
    assert legend(figures.cumulative_variance({"a": np.full(10, 0.1)}, share=1.0)) == ["a (10 for 100 %)"]


def test_components_needed():
    counts = {"original": np.arange(20.0, 4, -1), "shuffled": np.arange(24.0, 8, -1)}
    figure = figures.components_needed(counts)
    (axes,) = figure.axes
    np.testing.assert_array_equal(lines(axes, "shuffled")[0].get_ydata(), counts["shuffled"])
    assert axes.get_ylim()[0] == 0 and tick_labels(axes) == list("01234567") and "90 %" in axes.get_ylabel()
    counts["shuffled"][:2] = np.nan, 4000
    axes = figures.components_needed(counts, share=0.5, sites_per_layer=1).axes[0]
    assert axes.get_yscale() == "log" and "1 of 32 values" in note(axes) and "50 %" in axes.get_ylabel()


def test_loadings_names_the_units():
    components = np.linalg.qr(RNG.normal(size=(50, 4)))[0]
    components[:, 0] = 0
    components[[7, 31, 2], 0] = np.sqrt([0.6, 0.3, 0.1])
    figure = figures.loadings(torch.tensor(components.T, dtype=torch.bfloat16), [31, 7], n_units=2)
    axes = figure.axes[0]
    bars = [patch for patch in axes.patches if patch.get_width() > 0]
    for k in range(4):
        own = [bar for bar in bars if abs(bar.get_y() + bar.get_height() / 2 - k) < 1e-9]
        largest = np.sort(components[:, k] ** 2)[::-1][:2]
        np.testing.assert_allclose([bar.get_width() for bar in own], largest, rtol=0.01)
        massive = [to_hex(bar.get_facecolor()).upper() == look_of("without_massive").hex for bar in own]
        assert massive == [u in (7, 31) for u in np.argsort(-(components[:, k] ** 2))[:2]]
    right = axes.child_axes[0]
    assert right.get_yticklabels()[0].get_text() == "7*, 31*: 90 %"
    diamonds = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "D" and len(line.get_xdata())]
    np.testing.assert_allclose(diamonds, (components[[7, 31]] ** 2).sum(0), rtol=0.02, atol=1e-4)
    assert legend(figure) == ["the 2 largest units", "massive (*)", "sum of 2 massive units"]
    assert legend(figures.loadings(components.T)) == ["the 3 largest units"]
    whole = figures.loadings(np.eye(4)[:1], [0])
    assert whole.axes[0].child_axes[0].get_yticklabels()[0].get_text() == "0*, 1, 2: 100 %"
    assert legend(whole)[-1] == "sum of 1 massive unit"


# ---------------------------------------------------------------------------------------------- all of them

ONES = np.ones((5, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: figures.mean_activations(np.ones(5)), r"mean has shape \(5,\)"),
        (lambda: figures.mean_activations(ONES, percentile=0), "percentile is 0"),
        (lambda: figures.mean_activations(ONES, sites_per_layer=3), "sites_per_layer is 3"),
        (lambda: figures.density(np.ones(5), np.full(5, 900.0), threshold=1), "participation runs from 900"),
        (
            lambda: figures.density(np.ones(5), np.ones(4), threshold=1),
            "participation has 4 values",
        ),
        (lambda: figures.density({}, np.ones(4), threshold=1), "fraction is empty"),
        (lambda: figures.unit_correlations(np.ones(5)), r"r has shape \(5,\)"),
        (lambda: figures.unit_information(ONES, floor=np.ones(4)), r"floor has shape \(4,\).*\(5,\) to go with mi"),
        (lambda: figures.correlation_density(ONES, np.arange(4)), r"edges has shape \(4,\).*\(5,\)"),
        (lambda: figures.correlation_density(ONES, [0, 1, 1, 2, 3]), "edges do not rise"),
        (lambda: figures.correlation_density(-ONES, np.arange(5)), "counts holds values below 0"),
        (lambda: figures.correlation_density(ONES, np.arange(5), below=np.ones(4)), r"below has shape \(4,\)"),
        (lambda: figures.transition_curve(np.ones(5), np.ones((5, 2))), r"interval has shape \(5, 2\).*\(2, 5\)"),
        (lambda: figures.transition_curve(np.ones(5), others={"a": np.ones(4)}), r"others\['a'\] has shape \(4,\)"),
        (lambda: figures.transition_curve(np.ones(5), log=True, fisher=True), "log and fisher"),
        (lambda: figures.portraits(ONES, ONES.T, "abcd", np.ones(4)), r"y has shape \(4, 5\).*\(5, 4\)"),
        (lambda: figures.portraits(ONES, ONES, "abc", np.ones(4)), "names has 3 names, but x has 4"),
        (lambda: figures.portraits(np.ones((5, 13)), np.ones((5, 13)), "a" * 13, np.ones(13)), "at most 12"),
        (lambda: figures.rotation_distribution(np.ones(5), {}), "nulls is empty"),
        (lambda: figures.rotation_distribution(np.ones(5), {"a": [np.nan]}), "'a' holds no finite value"),
        (lambda: figures.rotation_distribution(np.ones(5), {"observed": [1]}), "'observed', which is observed_name"),
        (
            lambda: figures.rotations_by_unit(np.ones(5), np.ones(4), np.ones(5), p=np.ones(5)),
            r"null_mean has shape \(4,\)",
        ),
        (lambda: figures.pca_trajectory(np.ones((5, 1))), "needs 2 components"),
        (lambda: figures.pca_trajectory(ONES, ONES[None, 1:]), r"samples has shape \(1, 4, 4\)"),
        (lambda: figures.pca_trajectory(ONES, control_samples=ONES[None]), "control_mean is None"),
        (lambda: figures.pca_trajectory(ONES, control_mean=np.full((5, 2), np.nan)), "control_mean holds NaN"),
        (lambda: figures.pca_trajectory(ONES, ratio=[0.5]), "ratio has 1 value"),
        (lambda: figures.cumulative_variance({}), "ratios is empty"),
        (lambda: figures.cumulative_variance({"a": [1.0]}, share=90), "share is 90"),
        (lambda: figures.components_needed({"a": [1, 2], "b": [1]}), r"counts\['b'\] has 1"),
        (lambda: figures.loadings(np.eye(3)[:2] * 2), "rows of length 2 to 2"),
        (lambda: figures.loadings(np.linalg.qr(np.arange(12.0).reshape(6, 2))[0]), "components in rows"),
        (lambda: figures.loadings(np.eye(3), [3]), "massive holds unit 3, but units run from 0 to 2"),
    ],
)
def test_a_wrong_value_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


LONG = "a condition with rather a long name that somebody typed, and then went on typing, {}"


def every_figure():
    """Every panel once, from low-precision tensors that carry a gradient, with a title and long names."""

    def t(*shape, low=0.1):
        values = RNG.uniform(low, 0.9, shape)
        return torch.tensor(values, dtype=torch.bfloat16, requires_grad=True)

    many = {LONG.format(i): t(15) for i in range(7)}
    k = {"title": "A title that is a good deal longer than one column of a paper is wide, as titles will be"}
    return {
        "activations": figures.mean_activations(t(16, 40, low=-1), **k),
        "density": figures.density({n: t(16) for n in many}, {n: t(16) for n in many}, threshold=0.1, **k),
        "correlations": figures.unit_correlations(t(15, 40), **k),
        "information": figures.unit_information(t(15, 40), floor=t(15), **k),
        "histograms": figures.correlation_density(t(40, 10), torch.linspace(0, 1, 11), below=t(40), **k),
        "curve": figures.transition_curve(t(15), t(2, 15), others=many, interval_label=LONG, **k),
        "portraits": figures.portraits(t(16, 6), t(16, 6), [f"unit {u}" for u in range(6)], t(6), **k),
        "distribution": figures.rotation_distribution(t(40), many, **k),
        "by unit": figures.rotations_by_unit(t(40), t(40), t(40), p=t(40), null_name=LONG, **k),
        "pca": figures.pca_trajectory(t(16, 2), t(3, 16, 2), ratio=t(2), control_mean=t(16, 2), **k),
        "cumulative": figures.cumulative_variance(many, **k),
        "needed": figures.components_needed(many, **k),
        "loadings": figures.loadings(torch.eye(40)[:5], [2], **k),
    }


def test_nothing_is_wider_than_the_column():
    for name, figure in every_figure().items():
        assert isinstance(figure, Figure) and figure.get_size_inches()[0] == 3.4
        figure.draw_without_rendering()
        box = figure.bbox
        (top,) = figure.legends
        artists = {"legend": top, **{f"axes {i}": axes for i, axes in enumerate(figure.axes)}}
        for part, artist in artists.items():
            found = artist.get_tightbbox()
            assert found.x0 >= -1 and found.x1 <= box.width + 1, f"{name}: {part} spans {found.x0:.0f}-{found.x1:.0f}"
            assert found.y0 >= -1 and found.y1 <= box.height + 1, f"{name}: {part} {found.y0:.0f}-{found.y1:.0f}"


def test_the_same_values_give_the_same_bytes(tmp_path):
    mean, counts = RNG.normal(size=(8, 30)), RNG.integers(0, 9, (30, 10))

    def make(folder):
        panels = {
            "heat": figures.mean_activations(mean),
            "density": figures.correlation_density(counts, np.linspace(0, 1, 11)),
            "units": figures.rotations_by_unit(mean[0], mean[1], np.abs(mean[2]), p=np.abs(mean[2])),
        }
        return [file for name, figure in panels.items() for file in figures.save(figure, tmp_path / folder, name)]

    first, second = make("a"), make("b")
    assert len(first) == 6
    for one, two in zip(first, second, strict=True):
        assert one.stat().st_size > 3000 and one.read_bytes() == two.read_bytes()
