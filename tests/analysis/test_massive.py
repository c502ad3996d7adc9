"""Massive activations: planted units, by class of token, are found where they were written."""

import numpy as np
import pytest
import torch
from benchmark_module import benchmark

from rsdyn.dynamics import massive
from rsdyn.metrics.running import LargestByKind
from rsdyn.stream.text.positions import BOS, SINK

S, D = 12, 20


def planted(n: int = 90):
    """Tokens of size about 1; unit 7 at the first token is written at sublayer 5, unit 3 at sinks at 8."""
    x = torch.randn(n, S, D, generator=torch.Generator().manual_seed(0))
    position = torch.arange(n) % 30
    kind = torch.where(position == 0, BOS, torch.where(position == 4, SINK, 0)).to(torch.uint8)
    x[position == 0, 5:10, 7] = -1000.0
    x[position == 0, 10:, 7] = 400.0
    x[position == 4, 8:, 3] = 50.0
    return x, kind, position


def test_where_a_curve_is_written_and_unwritten():
    curves = torch.tensor([[1.0, 2, 3, 100, 90, 80, 40, 4], [1.0, 1, 1, 1, 1, 1, 1, 9]])
    found = massive.written(curves)
    assert (found.onset.tolist(), found.unwritten.tolist()) == ([3, 7], [6, -1])
    assert (found.before.tolist(), found.after.tolist()) == ([3, 1], [100, 9])
    with pytest.raises(ValueError, match="a step needs two"):
        massive.written(torch.ones(1))


def test_planted_units_are_found_by_class():
    x, kind, position = planted()
    metric = LargestByKind(S, D)
    for rows in torch.arange(len(x)).split(17):
        metric.update(x[rows].bfloat16(), kind[rows], position[rows])
    found = metric.compute()
    assert found.counts.tolist() == [3, 3, 84]
    torch.testing.assert_close(found.largest[0, 5:10, 7], torch.full((5,), 1000.0, dtype=torch.float64))
    assert massive.largest_units(found.largest, found.typical, 2).tolist() == [7, 3]
    written = massive.written(found.largest[0, :, 7])
    assert (int(written.onset), int(written.unwritten)) == (5, 10)
    assert int(massive.written(found.largest[1, :, 3]).onset) == 8
    # by hand, of what was given
    others = x[kind == 0].bfloat16().double().abs()
    torch.testing.assert_close(found.largest[2], others.amax(0))
    torch.testing.assert_close(found.typical[2], others.mean(0).median(-1).values)
    assert massive.range_names() == ("0", "1 to 3", "4 to 15", "16 to 63", "64 on")
    norm = x.bfloat16().float().norm(dim=-1).double()
    torch.testing.assert_close(found.norms[1], norm[(position >= 1) & (position <= 3)].mean(0))
    torch.testing.assert_close(found.norms[3], norm[position >= 16].mean(0))
    assert found.norms[4].isnan().all()


def test_nothing_known_of_tokens_is_one_class():
    x, _, _ = planted()
    metric = LargestByKind(S, D)
    metric.update(x, None, None)
    found = metric.compute()
    assert found.counts.tolist() == [0, 0, 90] and found.norms.isnan().all() and found.largest[:2].isnan().all()
    assert massive.largest_units(found.largest, found.typical, 1).tolist() == [7]


@pytest.mark.parametrize("n_units", [3, 20, 31])
def test_how_far_the_largest_unit_stands_out_is_over_torchs_median(n_units):
    sizes = torch.randn(4, 5, n_units, generator=torch.Generator().manual_seed(0)).abs()
    expected = sizes.amax(-1).double().log() - sizes.median(-1).values.double().log()
    assert torch.equal(massive.stands_out(sizes).log_ratio, expected)


def test_how_far_the_largest_unit_stands_out_is_scale_free_and_ignores_what_is_not_finite():
    x = torch.randn(50, 6, 21, generator=torch.Generator().manual_seed(3))
    found = massive.stands_out(x.abs())
    size = np.sort(x.abs().double().numpy(), -1)
    np.testing.assert_allclose(found.log_ratio, np.log(size[..., -1] / size[..., 10]), rtol=1e-6)
    for same in (1e4 * x, x.flip(-1), -x):
        torch.testing.assert_close(massive.stands_out(same.abs()).log_ratio, found.log_ratio, rtol=1e-5, atol=1e-6)
    broken = x.clone()
    broken[3, 2, 5], broken[4, 1, 7] = torch.nan, torch.inf
    without = x.clone()
    without[3, 2, 5] = without[4, 1, 7] = 0
    assert torch.equal(massive.stands_out(broken.abs()).log_ratio, massive.stands_out(without.abs()).log_ratio)
    assert massive.stands_out(torch.zeros(2, 5)).log_ratio.isnan().all()
    # massive: over 100 and from 1,000 times the median of its own state on
    states = torch.tensor([[999.0, 1, 1], [1000, 1, 1], [99, 0.01, 0.01], [101, 0.01, 0.01], [5, 0, 0]])
    assert massive.stands_out(states).is_massive.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("n_units", [3, 20, 21, 128, 576])
def test_the_null_model_is_that_of_simulated_normal_units(n_units):
    x = torch.randn(40_000, n_units, generator=torch.Generator().manual_seed(n_units))
    drawn, null = massive.stands_out(x.abs()).log_ratio, massive.normal_states(n_units)
    error = float(drawn.std()) / 200
    assert abs(null.mean_log - float(drawn.mean())) < 4 * error
    share = float((drawn.exp() < null.quantile).double().mean())
    assert share == pytest.approx(0.95, abs=0.005)


def test_the_null_model_of_most_units_is_close_to_what_theory_says_and_two_units_have_none():
    """The largest of D normals is near sqrt(2 log D), less its known correction; their median is .6745."""
    n = 100_000
    root = np.sqrt(2 * np.log(2 * n))
    largest = root - (np.log(np.log(2 * n)) + np.log(4 * np.pi)) / (2 * root) + np.euler_gamma / root
    assert np.exp(massive.normal_states(n).mean_log) == pytest.approx(largest / 0.67449, rel=0.01)
    with pytest.raises(ValueError, match="give at least 3"):
        massive.normal_states(2)


def ratios_of(x, group, n_groups):
    """Of states (n, S, D) that are all of one class: the typed result, as a run would have it."""
    from rsdyn.analysis.measures.massive import _ratio

    metric = LargestByKind(x.shape[1], x.shape[2], n_groups)
    metric.update(x, None, None, group)
    return _ratio(metric.compute(), 2, x.shape[2])


def test_the_interval_is_the_jackknife_over_groups_and_does_not_mind_order_or_batches():
    x = torch.randn(60, 4, 15, generator=torch.Generator().manual_seed(1))
    group = torch.arange(60) % 6
    found = ratios_of(x, group, 8)  # two groups have no such token
    log = massive.stands_out(x.abs()).log_ratio
    without = torch.stack([log[group != g].mean(0) for g in range(6)])
    error = ((without - without.mean(0)).square().sum(0) * 5 / 6).sqrt()
    torch.testing.assert_close(found.ratio.value, log.mean(0).exp())
    torch.testing.assert_close(found.ratio.high.log() - found.ratio.value.log(), 2.570582 * error, rtol=1e-5, atol=1e-9)
    metric, order = LargestByKind(4, 15, 8), torch.randperm(60, generator=torch.Generator().manual_seed(2))
    for rows in order.split(7):
        metric.update(x[rows], None, None, group[rows])
    torch.testing.assert_close(metric.compute().log_ratios[2].sum(0), log.sum(0))
    again = ratios_of(x[order], group[order], 8)
    torch.testing.assert_close(again.ratio.interval, found.ratio.interval, rtol=1e-9, atol=0)
    torch.testing.assert_close(again.p, found.p, rtol=1e-6, atol=1e-9)
    one_state = ratios_of(x[:1].expand(60, -1, -1), group, 8)  # as BOS is, whose state is the same in every text
    assert one_state.p.isnan().all() and float((one_state.ratio.high / one_state.ratio.low).max()) < 1 + 1e-6
    lone = ratios_of(x, torch.zeros_like(group), 8)
    assert lone.ratio.interval is None and lone.p.isnan().all()


@pytest.fixture(scope="module")
def calibration():
    return benchmark("calibrate_massive")


def test_p_of_normal_states_is_calibrated(calibration):
    """A small version of benchmarks/calibrate_massive.py, whose figures are in benchmarks/RESULTS.md."""
    assert calibration.rejected(calibration.normal, 120) <= 0.12  # 5 % of 120 sets: more than 14 come once in 2,000


def test_intervals_hold_the_population_value_where_documents_differ(calibration):
    found = calibration.coverage(100)
    assert 0.88 <= found <= 1.0, found


@pytest.mark.slow
def test_p_is_calibrated_to_a_point_and_intervals_cover(calibration):
    assert 0.04 <= calibration.rejected(calibration.normal, 2000) <= 0.06
    assert 0.93 <= calibration.coverage(1000) <= 0.97


def test_norms_by_position_have_a_panel_only_where_positions_are_known():
    from dataclasses import replace

    from every_panel import analysis

    from rsdyn.figures.massive import massive as panels
    from rsdyn.figures.streams import Analysis, streams_of

    found = analysis()
    largest, *ratios, norms = panels(streams_of([Analysis(found)]))
    assert [m.name for m in largest.marks][::2] == ["first token", "others"]  # there are no sinks
    assert [p.key for p in ratios] == ["massive_ratio_first_token", "massive_ratio_others"]
    assert {"massive (1,000 times)", "independent normal units", "original text"} <= {m.name for m in ratios[0].marks}
    np.testing.assert_allclose(norms.marks[1].y, found.main.massive.norm_by_position[1])
    main = replace(found.main, massive=replace(found.main.massive, norm_by_position=None))
    assert len(panels(streams_of([Analysis(replace(found, conditions={"original": main}))]))) == 3


def test_words_name_the_unit_and_the_block_that_writes_it():
    from rsdyn.analysis.collected import Collected
    from rsdyn.analysis.measures.massive import massive as measured
    from rsdyn.analysis.words import massive_in_words

    x, kind, position = planted()
    probe = Collected(n_sublayers=S, n_units=D, measures=["massive"])
    assert probe.n_passes == 1
    probe.extremes.update(x, kind, position)
    first, sinks, others = massive_in_words(measured(probe), 2)
    assert first.startswith("Largest activation, first token (3): 1,000, unit 7 at sublayer 5 (resid_mid of layer 2), ")
    assert "written by the attention of layer 2, from " in first and "below half of its peak from sublayer 10" in first
    assert "unit 3" in sinks and "written by the MLP of layer 3" in sinks and "(84)" in others
    probe.extremes.reset()
    probe.extremes.update(x, None, None)
    assert massive_in_words(measured(probe), 1)[-1].endswith(" positions=all shows them.")


def test_findings_name_the_largest_activation_of_each_class_beside_the_published_claim():
    from rsdyn.analysis.collected import Collected
    from rsdyn.analysis.measures.massive import massive as measured
    from rsdyn.analysis.measures.massive import rows
    from rsdyn.analysis.results import AnalysisResults, ConditionResults, Counts, Flags

    x, kind, position = planted()
    probe = Collected(n_sublayers=S, n_units=D, measures=["massive"])
    probe.extremes.update(x, kind, position)
    found = measured(probe)
    none = torch.zeros(0, dtype=torch.int64)
    of = ConditionResults(Counts(90, 3, 3, 1), Flags(*[none] * 11), massive=found)
    first, null, sinks, _, others, _ = rows(AnalysisResults({"original": of}, ("massive",), 2, S, D))
    assert first.paper.startswith("arXiv 2402.17762") and first.claim and not sinks.claim and not others.claim
    value = first.values["original"]
    here = x[kind == BOS].double().abs()
    ratios = (here.amax(-1) / here.median(-1).values).log().mean(0).exp()
    s = int(ratios.argmax())
    assert value.value == pytest.approx(float(ratios[s]), rel=1e-6) and value.n == 3 and 5 <= s < 10
    share = 100 * (here[:, s].amax(-1) >= 1000 * here[:, s].median(-1).values).float().mean()
    assert f"(at sublayer {s}; beyond both thresholds in {share:.0f} % of tokens; up to 1000, unit 7)" in str(value)
    assert (null.key, null.under) == ("massive_first_token_normal", "massive_first_token")
    assert null.values["original"].value == pytest.approx(np.exp(massive.normal_states(D).mean_log))
    assert "50.00, unit 3" in str(sinks.values["original"]) and others.values["original"].value < 20
