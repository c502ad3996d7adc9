"""Each panel: the right lines, points and labels; wrong shapes named; files that are the same twice."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from rsdyn import figures


def path(n_sublayers, n_dimensions):
    t = np.linspace(0, 1, n_sublayers)[:, None]
    return np.concatenate([np.cos(3 * t) * (1 + t), np.sin(3 * t) * (1 + t), t**2], axis=1)[:, :n_dimensions]


def lines(axes, label):
    return [line for line in axes.lines if line.get_label() == label]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def tick_labels(axes):
    return [text.get_text() for text in axes.get_xticklabels()]


@pytest.mark.parametrize(
    ("n_dimensions", "n_sublayers", "sites"),
    [(1, 32, 2), (2, 64, 2), (3, 33, 2), (5, 16, 1), (2, 16, 1), (2, 2, 2), (1, 1, 2), (2, 1, 1)],
)
def test_latent_trajectory(tmp_path, n_dimensions, n_sublayers, sites):
    mean = np.pad(path(n_sublayers, n_dimensions), ((0, 0), (0, max(0, n_dimensions - 3))))
    samples = mean + np.random.default_rng(0).normal(0, 0.1, (7, *mean.shape))
    figure = figures.latent_trajectory(mean, samples, sites_per_layer=sites)
    assert isinstance(figure, Figure)
    panels, bar = figure.axes[:-1], figure.axes[-1]
    assert len(panels) == (1 if n_dimensions < 3 else 2) and bar.get_ylabel() == "layer"
    for k, axes in enumerate(panels):
        behind, *dots = axes.collections
        assert len(behind.get_segments()) == 7
        assert sum(len(d.get_offsets()) for d in dots) == n_sublayers
        assert len(dots) == (2 if sites == 2 and n_sublayers > 1 else 1)
        if n_dimensions > 1:
            assert axes.get_ylabel() == f"latent {k + 2}"
        (start,), (end,) = lines(axes, "start"), lines(axes, "end")
        column = 0 if n_dimensions == 1 else k + 1
        assert start.get_ydata()[0] == mean[0, column] and end.get_ydata()[0] == mean[-1, column]
    assert panels[-1].get_xlabel() == ("layer" if n_dimensions == 1 else "latent 1")
    assert ("resid_mid" in legend(figure)) == (sites == 2 and n_sublayers > 1)
    figures.save(figure, tmp_path, "x")


def test_latent_trajectory_without_samples_and_from_tensors():
    figure = figures.latent_trajectory(torch.tensor(path(8, 2), dtype=torch.bfloat16, requires_grad=True), name="PC")
    assert figure.axes[0].get_xlabel() == "PC 1" and "sequences" not in legend(figure)


@pytest.mark.parametrize(("n_sublayers", "within", "cross"), [(32, 16, 15), (33, 16, 16), (3, 1, 1), (2, 1, 0)])
def test_latent_distance_in_the_papers_two_colours(tmp_path, n_sublayers, within, cross):
    distance = np.arange(1.0, n_sublayers)
    figure = figures.latent_distance(distance, np.stack([distance - 0.5, distance + 0.5]), spread_label="95 %")
    axes = figure.axes[0]
    for label, colour, count, first in (
        ("within layer", figures.WITHIN, within, 0),
        ("cross layer", figures.CROSS, cross, 1),
    ):
        found = lines(axes, label)
        assert len(found) == (count > 0)
        if found:
            assert to_hex(found[0].get_color()).upper() == colour
            np.testing.assert_allclose(found[0].get_ydata(), distance[first::2])
            np.testing.assert_allclose(found[0].get_xdata(), np.arange(first, n_sublayers - 1, 2) + 0.5)
    assert "95 %" in legend(figure)
    figures.save(figure, tmp_path, "x")


def test_latent_distance_of_whole_layers_has_one_kind():
    figure = figures.latent_distance(np.ones(15), sites_per_layer=1)
    assert legend(figure) == ["layer to layer"] and len(figure.axes[0].lines[0].get_xdata()) == 15


@pytest.mark.parametrize(
    ("n_sublayers", "sites", "labels", "ticks"),
    [
        (32, 2, ["0", "2", "4", "6", "8", "10", "12", "14"], range(0, 32, 4)),
        (64, 2, ["0", "4", "8", "12", "16", "20", "24", "28"], range(0, 64, 8)),
        (16, 1, ["0", "2", "4", "6", "8", "10", "12", "14"], range(0, 16, 2)),
        (5, 2, ["0", "1", "2"], (0, 2, 4)),
    ],
)
def test_the_sublayer_axis_is_labelled_with_layers(n_sublayers, sites, labels, ticks):
    figure = figures.explained_variance({"autoencoder": np.linspace(0, 1, n_sublayers)}, sites_per_layer=sites)
    axes = figure.axes[0]
    assert tick_labels(axes) == labels and list(axes.get_xticks()) == list(ticks) and axes.get_xlabel() == "layer"


def test_explained_variance_says_about_which_mean():
    curves = {"autoencoder": torch.linspace(0.2, 0.9, 32), "PCA, 2 components": np.linspace(0.1, 0.8, 32)}
    figure = figures.explained_variance(curves, about="the mean of all sublayers")
    axes = figure.axes[0]
    assert legend(figure) == list(curves) and "about the mean of all sublayers" in axes.get_ylabel()
    assert -0.1 < axes.get_ylim()[0] < 0 and 1 < axes.get_ylim()[1] < 1.1
    np.testing.assert_allclose(lines(axes, "autoencoder")[0].get_ydata(), np.linspace(0.2, 0.9, 32), atol=1e-6)


def test_explained_variance_far_below_zero_is_clipped_and_said(tmp_path):
    values = np.linspace(0.1, 0.9, 32)
    values[:3] = -1e6, -np.inf, -0.4
    figure = figures.explained_variance({"autoencoder": values, "empty": np.full(32, np.nan)})
    axes = figure.axes[0]
    assert axes.get_ylim()[0] == -0.5 and legend(figure)[-1] == "below −0.5"
    marks = [line for line in axes.lines if line.get_marker() == "v" and len(line.get_xdata())]
    assert list(marks[0].get_xdata()) == [0, 1]
    figures.save(figure, tmp_path, "x")


def test_loss_curves_mark_the_best_epoch_and_choose_the_scale(tmp_path):
    epochs = range(20)
    figure = figures.loss_curves([(e, 1 / (e + 1)) for e in epochs], [(e, 2 / (e + 1)) for e in epochs], best_epoch=19)
    axes = figure.axes[0]
    assert axes.get_yscale() == "log" and legend(figure) == ["training", "validation", "best epoch (19)"]
    assert list(lines(axes, "best epoch (19)")[0].get_xdata()) == [19, 19]
    assert len(lines(axes, "training")[0].get_xdata()) == 20
    assert figures.loss_curves([(0, 1.0), (1, 0.5)], []).axes[0].get_yscale() == "linear"
    assert figures.loss_curves([(0, 1.0), (1, 0.0)], [(0, 50.0)]).axes[0].get_yscale() == "linear"  # no log of 0
    for strange in ([(0, float("nan"))], []):
        figures.save(figures.loss_curves(strange, []), tmp_path, "x")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: figures.latent_trajectory(np.ones(5)), r"mean has shape \(5,\)"),
        (lambda: figures.latent_trajectory(np.ones((5, 0))), r"mean has shape \(5, 0\)"),
        (lambda: figures.latent_trajectory(np.full((5, 2), np.nan)), "mean holds NaN"),
        (lambda: figures.latent_trajectory(np.ones((5, 2)), np.ones((3, 4, 2))), r"samples has shape \(3, 4, 2\)"),
        (lambda: figures.latent_trajectory(np.ones((5, 2)), sites_per_layer=3), "sites_per_layer is 3"),
        (lambda: figures.latent_distance(np.ones((5, 2))), "distance has shape"),
        (lambda: figures.latent_distance(np.ones(5), np.ones((5, 2))), r"spread has shape \(5, 2\).*\(2, 5\)"),
        (lambda: figures.explained_variance({}), "curves is empty"),
        (lambda: figures.explained_variance({"a": np.ones(4), "b": np.ones(5)}), r"curves\['b'\] has 5"),
        (lambda: figures.loss_curves([(0, 1, 2), (1, 2, 3)], []), "train has shape"),
        (lambda: figures.loss_curves([], [1.0, 2.0]), "val has shape"),
        (lambda: figures.save(Figure(), "x", "../y"), "name is '../y'"),
    ],
)
def test_a_wrong_shape_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_files_are_not_empty_and_the_same_twice(tmp_path):
    def make(folder):
        return figures.save(figures.latent_trajectory(path(32, 2), path(32, 2)[None]), tmp_path / folder, "fig3b")

    first, second = make("a"), make("b")
    assert [p.name for p in first] == ["fig3b.png", "fig3b.pdf"]
    for one, two in zip(first, second, strict=True):
        assert one.stat().st_size > 5000 and one.read_bytes() == two.read_bytes()
    assert b"CreationDate" not in first[1].read_bytes()


def test_no_pyplot_state_and_no_style_leaks():
    import sys

    import matplotlib

    size = matplotlib.rcParams["font.size"]
    figures.latent_distance(np.ones(5))
    assert matplotlib.rcParams["font.size"] == size
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_somebodys_matplotlibrc_changes_no_figure(tmp_path):
    """LaTeX may not be there, and another layout would throw ours out."""
    code = (
        "from rsdyn import figures; import sys, hashlib; "
        "f = figures.loss_curves([(1, 2.0), (2, 1.0)], [(1, 2.0), (2, 1.5)], 2); "
        "print(*(hashlib.sha256(p.read_bytes()).hexdigest() for p in figures.save(f, sys.argv[1], 'loss')))"
    )
    (tmp_path / "matplotlibrc").write_text(
        "text.usetex: True\nfigure.autolayout: True\nsavefig.bbox: tight\naxes.grid: True\nfont.size: 30\n"
    )
    root = str(Path(__file__).parents[2])
    made = [
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / f"of-{i}")],
            env={**os.environ, "PYTHONPATH": root, **more},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for i, more in enumerate(({}, {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}))
    ]
    assert made[0] == made[1]
