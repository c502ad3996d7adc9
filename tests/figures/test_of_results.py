"""What each panel shows are the numbers of its results, and no others."""

import numpy as np
import pytest
import torch
from every_panel import (
    LAYERS,
    D,
    S,
    analysis,
    condition,
    histograms,
    jacobians,
    layer_effects,
    measured,
    moved_points,
    streams,
    trained,
)  # fmt: skip

from rsdyn.analysis.jacobians import SERIES, depths_of
from rsdyn.analysis.results import AnalysisResults, Cosine
from rsdyn.figures import interactive, static
from rsdyn.figures.analysis import analysis_panels, figure_1
from rsdyn.figures.autoencoder import training_panels
from rsdyn.figures.colours import LOOKS
from rsdyn.figures.jacobians import jacobian_panels
from rsdyn.figures.panel import Band, Bars, Distribution, Flow, HeatMap, Line, Path, array
from rsdyn.figures.perturbation import effect_panels, perturbation_panels
from rsdyn.figures.rotations import chosen_units, portrait_units
from rsdyn.figures.streams import Analysis, streams_of
from rsdyn.perturbation.result import STILL, Found


@pytest.fixture(scope="module")
def found():
    return {panel.key: panel for panel in analysis_panels(streams(), histograms=histograms(), seed=1)}


def line(panel, name, /, **choice):
    (mark, *_) = [m for m in panel.drawn(panel.first | choice) if isinstance(m, Line) and m.name == name]
    return mark


def marks(panel, of, /, **choice):
    return [m for m in panel.drawn(panel.first | choice) if isinstance(m, of)]


@pytest.mark.parametrize(
    ("key", "of"),
    [
        ("fig1c_correlation_mean", lambda r: r.correlation.mean),
        ("fig1e_cosine", lambda r: r.cosine.mean),
        ("fig1f_speed", lambda r: r.velocity.speed),
        ("fig1f_relative_speed", lambda r: r.velocity.relative),
        ("fig1h_information_mean", lambda r: r.mutual_information.mean),
    ],
)
def test_a_curve_of_transitions_lies_between_sublayers_and_tells_the_kinds_apart(found, key, of):
    main, shuffled = (of(r) for r in list(analysis().conditions.values())[:2])
    for name, part in (("within layer", slice(0, None, 2)), ("cross layer", slice(1, None, 2))):
        mark = line(found[key], name)
        np.testing.assert_allclose(mark.x, np.arange(S - 1)[part] + 0.5)
        np.testing.assert_allclose(mark.y, main.value[part])
        np.testing.assert_allclose([mark.low, mark.high], main.interval[:, part])
    some = [m for m in found[key].drawn({}) if m.name == "shuffled tokens"]
    np.testing.assert_allclose(np.concatenate([m.y for m in some]), [*shuffled.value[0::2], *shuffled.value[1::2]])
    without = [m for m in found[key].drawn({}) if m.name == "without massive units"]
    np.testing.assert_allclose(without[0].y, main.without_massive.value[0::2])


def test_shares_are_of_the_units_that_are_counted(found):
    main = analysis().main
    mark = line(found["fig1b_participation"], "original text")
    np.testing.assert_allclose(mark.y, main.activations.participation.value / D)
    without = line(found["fig1b_participation"], "without massive units")
    np.testing.assert_allclose(without.y, main.activations.participation.without_massive.value / (D - 2))


def test_maps_are_sorted_as_the_paper_sorts_them(found):
    main = analysis().main
    (heat,) = marks(found["fig1b_mean_activations"], HeatMap)
    order = np.argsort(main.activations.mean[-1].numpy())
    np.testing.assert_allclose(heat.z, main.activations.mean.numpy()[:, order].T)
    assert heat.labels == tuple(f"unit {u}" for u in order)
    (pairs,) = marks(found["fig1d_correlation_density"], HeatMap)
    total = main.correlation.pair_counts.sum(1) + main.correlation.pairs_below
    rows = [int(name.split()[1]) for name in pairs.labels]
    np.testing.assert_allclose(pairs.z, (main.correlation.pair_counts / total[:, None])[rows])
    assert rows == np.argsort(main.correlation.unit_means.numpy(), kind="stable").tolist()
    (other,) = marks(found["fig1b_mean_activations"], HeatMap, stream="0-1")
    assert not np.array_equal(other.z, heat.z)


def test_bands_of_units_are_their_quantiles_and_what_is_not_finite_is_counted(found):
    panel = found["fig1g_information"]
    values = array(analysis().main.mutual_information.units)
    finite = np.where(np.isfinite(values), values, np.nan)
    wide, half = marks(panel, Band, kind="cross layer")
    np.testing.assert_allclose(wide.low, np.nanquantile(finite[1::2], 0.05, axis=1))
    np.testing.assert_allclose(half.high, np.nanquantile(finite[1::2], 0.75, axis=1))
    np.testing.assert_allclose(line(panel, "mean").y, np.nanmean(finite[0::2], axis=1))
    assert panel.note == f"2 of {values.size} values are infinite or undefined"


def test_the_papers_sum_stands_beside_the_true_information_and_is_not_called_one():
    panels = {p.key: p for p in analysis_panels(streams(literal=True))}
    of = analysis(literal=True).main.mutual_information
    np.testing.assert_allclose(line(panels["fig1h_information_kde_mean"], "within layer").y, of.true.value[0::2])
    np.testing.assert_allclose(line(panels["fig1h_information_mean"], "within layer").y, of.mean.value[0::2])
    assert "not an information" in panels["fig1h_information_mean"].y.label
    assert panels["fig1h_information_mean"].y.scale == "log" and "nats" in panels["fig1h_information_kde_mean"].y.label


def test_turns_are_clockwise_and_stand_beside_their_nulls(found):
    rotation = analysis().main.rotation
    (path,) = marks(found["fig2a_portraits"], Path, unit="7")
    a = rotation.trajectory[:, 7].numpy()
    np.testing.assert_allclose(path.x, a - a[0], atol=1e-6)
    np.testing.assert_allclose(path.y, np.gradient(a) - np.gradient(a)[0], atol=1e-6)
    rows = {m.name: m.values for m in marks(found["fig2b_rotations"], Distribution)}
    np.testing.assert_allclose(rows["original text"], -rotation.turns)
    np.testing.assert_allclose(rows["layer shuffle (paper)"], -rotation.nulls["layer_shuffle"].example)
    panel = found["fig2c_rotations_by_unit"]
    null = line(panel, "the null", null="layer_shuffle")
    order = np.argsort(-rotation.turns.numpy(), kind="stable")
    test = rotation.nulls["layer_shuffle"]
    np.testing.assert_allclose(null.y, -test.mean[order])
    np.testing.assert_allclose(null.high - null.y, 1.96 * test.std[order])
    units = line(panel, "units", null="layer_shuffle")
    assert (np.diff(units.y) >= 0).all() and units.picked == tuple(str(u) for u in order) and units.picks == "unit"
    (bars,) = marks(found["fig2a_place_in_null"], Bars, null="layer_shuffle", unit="7")
    np.testing.assert_allclose(bars.height, histograms()["layer_shuffle"].counts[7])
    assert not marks(found["fig2a_place_in_null"], Bars, null="untrained", unit="7")


def test_units_are_chosen_by_their_turns():
    turns = np.array([np.nan, 5.0, 1.0, 4.0, 3.0, 2.0, 0.0, -1.0])
    assert portrait_units(turns, None, 0)[:3] == [1, 3, 4] and len(set(portrait_units(turns, None, 0))) == 6
    assert portrait_units(turns, [7, 2], 0) == [7, 2]
    many = np.random.default_rng(0).normal(size=100)
    kept = chosen_units(many, 16)
    assert len(kept) == 16 and {many.argmin(), many.argmax()} <= set(kept.tolist())


def test_components_and_their_units(found):
    pca = analysis().main.pca
    cumulative = line(found["fig4b_cumulative_variance"], "original text")
    np.testing.assert_allclose(cumulative.y, np.cumsum(pca.ratio.value.numpy()))
    (path,) = marks(found["fig4a_trajectory"], Path)
    np.testing.assert_allclose(path.x, pca.latents.mean[:, 0])
    assert "50.0 %" in found["fig4a_trajectory"].axes_at({"stream": "0-0"})[0].label
    bars = marks(found["fig4_loadings"], Bars)
    first = sum(float(b.height[b.x == 0].sum()) for b in bars)
    assert first == pytest.approx(float((pca.components[0] ** 2).sort().values[-3:].sum()))
    massive = next(b for b in bars if b.name == "massive units")
    assert {int(text.split(":")[0].split()[1]) for text in massive.text} <= {3, 7}


def test_figure_1_has_its_panels_in_order(found):
    assert "".join(panel.figure[-1] for panel in figure_1(list(found.values()))) == "BCCDEFGH"


def test_what_was_not_measured_has_no_panel_and_what_is_undefined_none_of_its_values():
    r = condition(0)
    cosine = Cosine(r.cosine.mean)  # of last tokens, so not by position
    bare = AnalysisResults({"original": type(r)(r.counts, r.flags, cosine=cosine)}, ("cosine",), 2, S, D)
    (panel,) = analysis_panels(streams_of([Analysis(bare)]))
    assert panel.key == "fig1e_cosine"
    r.cosine.mean.value[:] = torch.nan
    (panel,) = analysis_panels(streams_of([Analysis(bare)]))
    assert f"{S - 1} of" in panel.note and "not defined anywhere" in panel.alt
    static.draw(panel).draw_without_rendering()
    interactive.figure(panel)


@pytest.mark.parametrize("sites", [1, 2])
def test_a_model_with_one_site_has_one_kind_of_transition(sites):
    r = {"original": condition(0, sites=sites)}
    found = AnalysisResults(r, ("cosine",), sites, LAYERS * sites, D)
    panel = next(p for p in analysis_panels(streams_of([Analysis(found)])) if p.key == "fig1e_cosine")
    names = {m.name for m in panel.marks if not m.name.startswith("without")}
    assert names == ({"layer to layer"} if sites == 1 else {"within layer", "cross layer"})


def test_models_of_different_depth_overlay_from_0_to_1():
    one, two = analysis(), analysis(sites=1)
    panels = {p.key: p for p in analysis_panels(streams_of([Analysis(one, "a", "x"), Analysis(two, "b", "y")]))}
    curves = [m for m in panels["fig1b_active_share"].marks if isinstance(m, Line)]
    assert all(m.x[0] == 0 and m.x[-1] == 1 for m in curves) and {len(m.x) for m in curves} == {S, LAYERS}
    assert {m.waits for m in curves if m.name in ("a: original text", "b: original text")} == {False}
    assert {m.waits for m in curves if "untrained" in m.name} == {True}


# -- training ----------------------------------------------------------------------------------------------------------


def test_training_panels_show_the_test():
    found = trained()
    beside = {"PCA, 100 components (analysis)": measured((S,), torch.Generator())}
    panels = {p.key: p for p in training_panels(found, beside)}
    explained = panels["fig3d_explained_variance"]
    np.testing.assert_allclose(line(explained, "autoencoder").y, found.explained["own"][0])
    np.testing.assert_allclose(line(explained, "PCA, 2 components", variance="raw").y, found.explained["raw"][1])
    assert "PCA, 100 components (analysis)" not in {m.name for m in explained.drawn({"variance": "own"})}
    assert line(explained, "PCA, 2 components", variance="raw").looks == LOOKS["pca"]
    other = line(explained, "PCA, 100 components (analysis)", variance="raw").looks
    assert other.colour == LOOKS["pca"].colour and other.dash == "dot"  # as the caption says
    within = line(panels["fig3c_latent_distance"], "within layer")
    np.testing.assert_allclose(within.y, found.distance[0::2])
    np.testing.assert_allclose(within.high - within.y, found.distance_std[0::2], rtol=1e-6)
    assert list(line(panels["fig3a_shape"], "width").y) == [12, 8, 6, 2, 6, 8, 12]
    assert panels["loss"].y.scale == "linear" and "1.600 of 2" in panels["fig3b_latent_trajectory"].note


@pytest.mark.parametrize("k", [1, 2, 3])
def test_latents_of_any_number_have_a_path(k):
    panel = next(p for p in training_panels(trained(k)) if p.key == "fig3b_latent_trajectory")
    paths = [m for choice in panel.choices() for m in panel.drawn(choice) if isinstance(m, Path)]
    assert len(paths) == (2 if k == 3 else 1)
    np.testing.assert_allclose(paths[-1].y, trained(k).latents[:, -1])
    static.draw(panel).draw_without_rendering()


# -- perturbation ------------------------------------------------------------------------------------------------------


def test_points_go_where_they_went():
    found = moved_points()
    panels = {p.key: p for p in perturbation_panels(found, steps=3, ratio=[0.4, 0.1])}
    plane = panels["fig4d_teleport"]
    for layer in found.sublayers:
        latents = array(found.of_points[layer, "teleport"]["latents"])
        for k in (1, 3, 9):
            (flow,) = marks(plane, Flow, layer=str(layer), steps=str(k))
            at = min(k, latents.shape[1] - 1)  # a stream that has ended by then stays at its end
            np.testing.assert_allclose(flow.start, latents[:, 0])
            np.testing.assert_allclose(flow.end, latents[:, at])
            np.testing.assert_allclose(flow.value, array(found.of_points[layer, "teleport"]["relative"])[:, at])
    assert plane.x.label == "component 1 (40.0 %)"
    curve = line(panels["recovery_cosine"], STILL, layer="2")
    np.testing.assert_allclose(curve.y, found.measured(2, STILL, "cosine_curve").value)
    ours = line(panels["recovery_relative"], "teleport", layer="0")
    np.testing.assert_allclose(ours.low, found.measured(0, "teleport", "relative_curve").low)
    assert line(panels["recovery_relative"], "as put", layer="0").y[0] == ours.y[0] and curve.low is None
    rows = {row.layer: row for row in found.rows if row.condition == "teleport"}
    np.testing.assert_allclose(line(panels["recovery_mse"], "teleport").y, [rows[n]["plane_mse"] for n in (0, 2)])


def test_what_points_say_is_the_share_on_the_token_that_the_reference_ends_on():
    found = moved_points()
    panel = next(p for p in perturbation_panels(found, steps=3) if p.key == "recovery_readout")
    n = len(found.said[2].reference)
    shares = [0.25] + [0.0] * (n - 2) + [0.5]  # four points: as the reference, stuck, backwards, astray and back
    np.testing.assert_allclose(line(panel, "teleport", layer="2").y, shares)
    assert line(panel, "unperturbed", layer="2").y.tolist() == [0.0] * (n - 1) + [1.0]
    assert len(line(panel, "teleport", layer="0").y) == len(found.said[0].reference)
    back = Found.from_arrays(found.arrays(), {"kind": "teleport", "n_prompts": 4, "n_points": 16,
                                              "rows": found.to_dict()["rows"]})  # fmt: skip
    assert {layer: said.tokens.tolist() for layer, said in back.said.items()} == {
        layer: said.tokens.tolist() for layer, said in found.said.items()
    }
    found.said.clear()
    assert "recovery_readout" not in [p.key for p in perturbation_panels(found, steps=3)]


def test_points_that_are_not_finite_and_layers_that_nothing_follows():
    found = moved_points()
    found.of_points[2, "teleport"]["latents"][3, 2] = torch.nan
    for name in ("latents", "relative", "cosine"):  # as at the last sublayer
        found.of_points[0, "teleport"][name] = found.of_points[0, "teleport"][name][:, -1:]
    panel = perturbation_panels(found, steps=3)[0]
    told = [m.told() for c in panel.choices() for m in panel.drawn(c) if m.name == "said"]
    assert any("1 of 16 points not finite" in words for words in told)
    assert any("0 sublayers follow" in words for words in told)
    static.draw(panel).draw_without_rendering()
    interactive.figure(panel)


def test_effects_of_layers():
    found = layer_effects()
    kl, perplexity = effect_panels(found)
    np.testing.assert_allclose(line(kl, "texts").y, [float(e.kl.value) for e in found.effects])
    np.testing.assert_allclose(line(perplexity, "the prompt").y, found.of_text(0)[1])
    assert kl.key == "skip_kl" and perplexity.y.scale == "symlog"


# -- Jacobians ---------------------------------------------------------------------------------------------------------


def test_jacobians_stand_beside_their_nulls():
    found = jacobians()
    panels = {p.key: p for p in jacobian_panels(found)}
    eigenvalues = panels["jacobian_eigenvalues"]
    mark = line(eigenvalues, SERIES["full"].label, sublayer="4")
    np.testing.assert_allclose(mark.x + 1j * mark.y, found.eigenvalues["full"][4])
    for series, kind in list(SERIES.items())[1:]:
        beside = line(eigenvalues, kind.label, sublayer="4", beside=series)
        np.testing.assert_allclose(beside.x, found.eigenvalues[series][4].real)
    assert len(list(eigenvalues.choices())) == 3 * 5
    gain = line(panels["jacobian_gain"], SERIES["full"].label)
    np.testing.assert_allclose(gain.y, found.mean("full", "gain")[0::2])
    np.testing.assert_allclose(gain.low, found.interval("full", "gain")[0, 0::2])
    relative = line(panels["jacobian_exponents_relative"], SERIES["untrained"].label)
    np.testing.assert_allclose(relative.y, found.mean("untrained", "exponents") - found.mean("untrained", "growth"))
    linear = line(panels["jacobian_linear_range"], f"sublayer {depths_of(S)[1]}", direction="random")
    np.testing.assert_allclose(linear.y, np.exp(np.median(np.log(found.curves["full"]["linear"]), 0))[1, 1])
    with pytest.raises(ValueError, match="99 is not one of 0 to 9"):
        jacobian_panels(found, [99])
