"""Massive activations: planted units, by class of token, are found where they were written."""

import numpy as np
import pytest
import torch

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


def test_norms_by_position_have_a_panel_only_where_positions_are_known():
    from dataclasses import replace

    from every_panel import analysis

    from rsdyn.figures.massive import massive as panels
    from rsdyn.figures.streams import Analysis, streams_of

    found = analysis()
    largest, norms = panels(streams_of([Analysis(found)]))
    assert [m.name for m in largest.marks][::2] == ["first token", "others"]  # there are no sinks
    np.testing.assert_allclose(norms.marks[1].y, found.main.massive.norm_by_position[1])
    main = replace(found.main, massive=replace(found.main.massive, norm_by_position=None))
    assert len(panels(streams_of([Analysis(replace(found, conditions={"original": main}))]))) == 1


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
    first, sinks, others = rows(AnalysisResults({"original": of}, ("massive",), 2, S, D))
    assert first.paper.startswith("arXiv 2402.17762") and first.claim and not sinks.claim and not others.claim
    value = first.values["original"]
    here = x[kind == BOS][:, 5:10].double().abs()
    ratios = 1000 / here.mean(0).median(-1).values
    assert value.value == pytest.approx(float(ratios.max()), rel=1e-6) and value.n == 3
    assert f"(unit 7, 1000 at sublayer {5 + int(ratios.argmax())})" in str(value)
    assert "unit 3, 50.00" in str(sinks.values["original"]) and others.values["original"].value < 20
