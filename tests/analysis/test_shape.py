"""Curvature, dimension, similarity, readout and phases of streams whose shape is known, and their rows."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rsdyn.analysis.collected import Collected
from rsdyn.analysis.left_out import without_largest
from rsdyn.analysis.measure import How
from rsdyn.analysis.over_sequences import mean_of
from rsdyn.analysis.phases import phases_of
from rsdyn.analysis.readout import by_position, examples_of, readout_results, with_one_of_each_range
from rsdyn.analysis.results import AnalysisResults, ConditionResults, Counts, Curvature, Flags, Measured
from rsdyn.analysis.settings import AnalysisConfig
from rsdyn.analysis.shape import check_shape
from rsdyn.analysis.shape_rows import shape_in_words, shape_rows
from rsdyn.analysis.streams import measure_stream
from rsdyn.dynamics import dimension, geometry
from rsdyn.dynamics.readout import Readout
from rsdyn.dynamics.resampling import jackknife
from rsdyn.dynamics.similarity import cka
from rsdyn.errors import UserError
from rsdyn.lm.readout import LogitLens
from rsdyn.stream.trajectory_datamodule import TrajectoryBatch

pytest.importorskip("skdim")
N, S, D = 60, 8, 40
MEASURES = ("cosine", "curvature", "dimension", "similarity")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def probed(x, measures=MEASURES, *, position=None, sequence=None, largest=None, tokens="last"):
    collected = Collected(n_sublayers=x.shape[1], n_units=x.shape[2], measures=measures, largest=largest, tokens=tokens)
    sequence = torch.arange(len(x)) if sequence is None else sequence
    batch = TrajectoryBatch(x, sequence, position=position)
    collected.first_pass(batch)
    collected.between_passes()
    if collected.n_passes == 2:
        collected.second_pass(batch)
    collected.finish()
    return collected


def shape_of(collected, measures=MEASURES, main=None):
    """What was measured, by measure; ``main`` is another stream that is the main one."""
    found = measure_stream(collected, How(AnalysisConfig(measures=[*measures]), main=main), torch.float32)
    return {measure: getattr(found, measure) for measure in measures}


@pytest.fixture(scope="module")
def x():
    x = drawn(N, S, D).cumsum(1)
    x[..., 7] += 1000  # a massive unit
    x[:, 0] = x[0, 0]  # as WikiText's first sublayer
    return x


@pytest.fixture(scope="module")
def shapes(x):
    return shape_of(probed(x))


def test_curvature_is_that_of_the_trajectories_with_and_without_massive_units(x, shapes):
    found, few = shapes["curvature"], torch.arange(D) != 7
    angles = geometry.curvature(x.double())
    torch.testing.assert_close(found.angle.value, angles.mean(0))
    torch.testing.assert_close(found.angle.without_massive.value, geometry.curvature(x.double(), few).mean(0))
    torch.testing.assert_close(found.straightness.value, geometry.straightness(x.double()).mean())
    group = torch.arange(N) % 20
    without = torch.stack([angles[group != g].mean() for g in range(20)])
    expected = jackknife(angles.mean(), without)
    torch.testing.assert_close(found.mean_angle.interval, torch.stack(expected[1:]))
    assert found.mean_angle.left_out.shape == (5,)  # of 40 units a quarter may be left out: 0, 1, 2, 4, 8
    torch.testing.assert_close(found.mean_angle.left_out[1], geometry.curvature(x.double(), few).mean())
    assert set(found.nulls) == {"shuffled_steps", "rotated_steps", "random_walk"} == set(found.nulls_without_massive)
    assert found.nulls["rotated_steps"].mean == pytest.approx(math.pi / 2)


def test_dimensions_are_those_of_each_sublayer_and_repeated_states_are_counted(x, shapes):
    found = shapes["dimension"]
    assert found.repeated.tolist() == [N - 1] + [0] * (S - 1)
    assert math.isnan(float(found.twonn.value[0]))
    for s in (1, S - 1):
        assert float(found.twonn.value[s]) == pytest.approx(dimension.twonn(x[:, s]), rel=1e-4)
        assert float(found.mle.value[s]) == pytest.approx(dimension.mle(x[:, s]), rel=1e-4)
        few = x[:, s][:, torch.arange(D) != 7]
        assert float(found.twonn.without_massive.value[s]) == pytest.approx(dimension.twonn(few), rel=1e-4)
        assert float(found.effective_rank.value[s]) == pytest.approx(float(dimension.effective_rank(x[:, s])), rel=1e-3)
    assert found.participation.interval.shape == (2, S)
    each = torch.stack([dimension.of_mixed(x[:, s]) for s in range(S)]).nanmean(0)
    assert found.n_nulls == N and found.nulls["twonn"].value == pytest.approx(
        float(found.twonn.value.nanmean()), rel=1e-4
    )
    assert found.nulls["mle"].mean == pytest.approx(float(each[1:, 1].mean()), rel=1e-6)


def test_similarity_is_cka_with_its_floor_and_an_interval(x, shapes):
    found = shapes["similarity"]
    for s in (1, 4):
        assert float(found.adjacent.value[s]) == pytest.approx(float(cka(x[:, s], x[:, s + 1])), abs=1e-5)
        assert float(found.map[s, 6]) == pytest.approx(float(cka(x[:, s], x[:, 6])), abs=1e-5)
    assert found.adjacent.value[0].isnan() and found.map[0].isnan().all()  # a constant sublayer
    low, high = found.adjacent.interval[:, 3]
    assert low < found.adjacent.value[3] < high
    assert found.floor.shape == (5, S - 1) and abs(float(found.floor.nanmean())) < 0.05
    assert found.with_main is None


def test_another_stream_is_compared_sequence_by_sequence(x):
    main, other = probed(x), probed(x @ torch.linalg.qr(drawn(D, D, seed=3))[0])
    found = shape_of(other, ("similarity",), main)["similarity"]
    torch.testing.assert_close(found.with_main.value[1:], torch.ones(S - 1, dtype=torch.float64), atol=1e-4, rtol=0)
    assert found.floor is None and found.with_main.n == N


def test_streams_of_different_sequences_are_compared_on_those_in_common(x):
    main, other = probed(x), probed(x[20:], sequence=torch.arange(20, 90)[:40])
    found = shape_of(other, ("similarity",), main)["similarity"]
    assert found.with_main.n == 40
    torch.testing.assert_close(found.with_main.value[1:], torch.ones(S - 1, dtype=torch.float64), atol=1e-4, rtol=0)
    apart = probed(x, sequence=torch.arange(1000, 1000 + N))
    assert shape_of(apart, ("similarity",), main)["similarity"].with_main is None


def test_order_of_sequences_and_basis_make_no_difference(x):
    order, q = torch.randperm(N, generator=torch.Generator().manual_seed(1)), torch.linalg.qr(drawn(D, D, seed=4))[0]
    plain = drawn(N, S, D, seed=5).cumsum(1)
    one, two = probed(plain), probed(100 * plain[order] @ q, sequence=order)
    a, b = (shape_of(collected) for collected in (one, two))
    torch.testing.assert_close(a["curvature"].angle.value, b["curvature"].angle.value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a["similarity"].map, b["similarity"].map, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(a["dimension"].mle.value, b["dimension"].mle.value, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        a["dimension"].effective_rank.value, b["dimension"].effective_rank.value, rtol=1e-3, atol=0
    )


def test_curves_by_position_and_over_tokens():
    lengths = torch.tensor([9, 6, 7, 5, 8, 6])
    sequence = torch.arange(6).repeat_interleave(lengths)
    position = torch.cat([torch.arange(n) for n in lengths.tolist()])
    x = drawn(len(sequence), S, D).cumsum(1)
    found = shape_of(probed(x, sequence=sequence, position=position, tokens="all"), ("curvature",))["curvature"]
    over = found.over_tokens
    rows = [geometry.curvature(x[sequence == i].transpose(0, 1).double()).T for i in range(6)]
    torch.testing.assert_close(over.value, torch.cat(rows).mean(0), rtol=1e-5, atol=1e-5)
    assert over.n == int((lengths - 2).sum()) and over.without_massive.n == int((lengths - 3).sum())
    later = geometry.curvature(x[(position > 0) & (position < 4)].double()).mean(0)
    torch.testing.assert_close(found.by_position[1], later, rtol=1e-5, atol=1e-5)
    assert found.by_position[3:].isnan().all()


def test_dimension_and_similarity_by_position_are_those_of_as_many_tokens_of_each_range():
    """Against the functions themselves on the tokens whose numbers come first; a range of few tokens has none."""
    lengths = torch.randint(18, 30, (40,), generator=torch.Generator().manual_seed(2))
    sequence = torch.arange(40).repeat_interleave(lengths)
    position = torch.cat([torch.arange(n) for n in lengths.tolist()])
    x = drawn(len(sequence), S, D, seed=3).cumsum(1)
    collected = Collected(n_sublayers=S, n_units=D, measures=("dimension", "similarity"), tokens="all")
    number = torch.randperm(len(sequence), generator=torch.Generator().manual_seed(4)) * 1000
    for rows in torch.arange(len(sequence)).split(97):
        collected.first_pass(TrajectoryBatch(x[rows], sequence[rows], position=position[rows], number=number[rows]))
    collected.between_passes()
    collected.finish()
    settings = AnalysisConfig(measures=["dimension", "similarity"])
    found = measure_stream(collected, How(settings), torch.float32)
    ranges = [(0, 0), (1, 3), (4, 15), (16, 63)]
    n = int((position == 0).sum())  # the range with the fewest tokens
    assert found.dimension.n_by_position == n == 40
    for k, (first, last) in enumerate(ranges):
        here = ((position >= first) & (position <= last)).nonzero().flatten()
        states = x[here[number[here].argsort()]][:n]
        for s in (0, 5):
            at = {name: float(curve[k, s]) for name, curve in found.dimension.by_position.items()}
            assert at["twonn"] == pytest.approx(dimension.twonn(states[:, s]), rel=1e-4)
            assert at["mle"] == pytest.approx(dimension.mle(states[:, s]), rel=1e-4)
            assert at["effective_rank"] == pytest.approx(float(dimension.effective_rank(states[:, s])), rel=1e-3)
            assert at["matrix_entropy"] == pytest.approx(float(dimension.matrix_entropy(states[:, s])), rel=1e-3)
            variances = torch.linalg.svdvals((states[:, s] - states[:, s].mean(0)).double()).square()
            assert at["participation"] == pytest.approx(float(dimension.participation(variances)), rel=1e-3)
            assert at["components_90"] == float(dimension.components_for(variances))
            near = float(cka(states[:, s], states[:, s + 1]))
            assert float(found.similarity.by_position[k, s]) == pytest.approx(near, abs=1e-5)
    for curve in (*found.dimension.by_position.values(), found.similarity.by_position):
        assert curve.shape[0] == 5 and curve[4].isnan().all()  # no sequence is so long
    last = probed(x, ("dimension", "similarity"), sequence=torch.arange(len(x)))
    assert not last.shares_at and shape_of(last, ("dimension",))["dimension"].by_position == {}


def test_rows_say_on_how_many_trajectories_they_are(x):
    """What is kept, not all that was read."""
    collected = Collected(n_sublayers=S, n_units=D, measures=("curvature", "dimension"), keep=25)
    batch = TrajectoryBatch(x, torch.arange(N))
    collected.first_pass(batch)
    collected.between_passes()
    collected.finish()
    settings = AnalysisConfig(measures=["curvature", "dimension"])
    found = replace(ConditionResults(counts(), flags()), **{
        name: getattr(measure_stream(collected, How(settings), torch.float32), name) for name in settings.measures
    })  # fmt: skip
    rows = {row.key: row.values["original"] for row in shape_rows(results(found, tuple(settings.measures)))}
    for key in ("curvature", "curvature_without_massive", "straightness", "path_length", "dimension_twonn",
                "dimension_twonn_without_massive", "dimension_participation"):  # fmt: skip
        assert rows[key].n == 25, key
    assert "(here 25)" in " ".join(shape_in_words(results(found)))


# -- readout, phases, rows ---------------------------------------------------------------------------------------------


def counts():
    return Counts(trajectories=N, bos=0, sinks=0, groups=20)


def flags():
    none = torch.zeros(0, dtype=torch.int64)
    return Flags(none, none, none, none, none, none, none, none, none, none, none)


def results(found, measures=MEASURES):
    return AnalysisResults({"original": found}, measures, 2, S, D)


def test_a_readout_leaves_out_where_the_lens_does_not_read():
    kl = torch.tensor([[math.nan, 3.0, math.nan, 1.0], [math.nan, 5.0, math.nan, 0.0]])
    unread = kl.isnan()
    read = Readout(
        kl=kl,
        entropy=kl,
        rank=torch.where(unread, -1, torch.tensor([[0, 9, 0, 0], [0, 99, 0, 0]])),
        probability=kl / 10,
        agrees=torch.tensor([[False, False, False, True]] * 2),
        commit=torch.tensor([3, 4]),
        top=torch.tensor([7, 2]),
    )
    found = readout_results(read, torch.tensor([0, 1]), LogitLens())
    assert found.kl.value.nan_to_num(-1).tolist() == [-1, 4, -1, 0.5]
    assert found.agreement.value.nan_to_num(-1).tolist() == [-1, 0, -1, 1]
    assert float(found.rank.value[1]) == pytest.approx((math.log(10) + math.log(100)) / 2)
    assert float(found.commit.value) == 3.5 and found.committed.tolist() == [0, 0, 0, 0.5, 1]


def test_agreement_stands_beside_a_readout_that_always_says_the_commonest_token():
    """Of 40 sequences 30 end on token 5: its share, with an interval as that of any other share."""
    top = torch.where(torch.arange(40) % 4 > 0, 5, torch.arange(40))
    curves = torch.rand(40, 6, generator=torch.Generator().manual_seed(0))
    read = Readout(curves, curves, curves.long(), curves, curves > 0.5, torch.zeros(40, dtype=torch.int64), top)
    found = readout_results(read, torch.arange(40) % 10, LogitLens(), decode=lambda tokens: f"<{tokens[0]}>")
    assert float(found.commonest.value) == 0.75 and found.commonest_token == "<5>"
    low, high = found.commonest.interval
    assert 0.5 < low < 0.75 < high < 1
    rows = {
        row.key: row for row in shape_rows(results(ConditionResults(counts(), flags(), readout=found), ("readout",)))
    }
    assert rows["readout_commonest"].under == "readout_agreement"
    assert rows["readout_commonest"].values["original"].value == 0.75


def test_no_examples_ask_nothing_of_the_model():
    assert examples_of(None, [], LogitLens(), str) == []


def test_a_readout_by_position_is_a_mean_over_the_tokens_of_each_range():
    rows = torch.arange(12.0).view(6, 2)
    read = Readout(rows, rows + 1, rows.long(), rows / 12, rows > 3, *torch.zeros(2, 6, dtype=torch.int64))
    read.rank[5] = -1  # not read
    found = by_position(read, torch.tensor([0, 2, 3, 0, 70, 16]))
    assert set(found) == {"kl", "entropy", "rank", "probability", "agreement"}
    assert found["kl"].nan_to_num(-1).tolist() == [[3, 4], [3, 4], [-1, -1], [-1, -1], [8, 9]]
    assert found["agreement"][0].tolist() == [0.5, 0.5]
    torch.testing.assert_close(found["rank"][4], torch.tensor([8.0, 9.0], dtype=torch.float64).log1p())


def test_of_each_range_one_token_is_read_the_same_each_time():
    text = np.arange(40)
    found = with_one_of_each_range(text, 7, seed=3)
    assert found[0] == 39 and found[1] == 0
    assert [int(p) for p in np.digitize(found[1:], [1, 4, 16, 64])] == [0, 1, 2, 3]
    assert found.tolist() == with_one_of_each_range(text, 7, seed=3).tolist()
    others = {tuple(with_one_of_each_range(text, i, seed=3)) for i in range(30)}
    assert len(others) > 20
    assert with_one_of_each_range(text[:1], 0, seed=0).tolist() == [0, 0]


def three_phases(seed=0):
    """A condition whose curves change their level at layers 5 and 11 of 16."""
    level = torch.tensor([0.2, 0.9, 0.5]).repeat_interleave(torch.tensor([10, 12, 10]))
    values = level + 0.05 * drawn(N, 32, seed=seed)
    curve = mean_of(values[:, :-2], torch.arange(N) % 10)
    whole = Curvature(curve, *[mean_of(values.mean(1), torch.arange(N) % 10)] * 4)
    return ConditionResults(counts(), flags(), curvature=whole)


def test_phases_of_a_stream_that_has_three():
    pytest.importorskip("ruptures")
    found = phases_of(three_phases(), sites_per_layer=2, seed=0)
    assert found.curves == ("curvature/angle",) and found.n == 2
    assert found.places[1, :2].tolist() == [5, 11] == found.low[1, :2].tolist() == found.high[1, :2].tolist()
    rows = {row.key: row for row in shape_rows(results(replace(three_phases(), phases=found), ("phases",)))}
    assert str(rows["phases"].values["original"]).startswith("2 (at layer 5 [5, 5], 11 [11, 11]; p ")


def test_phases_need_curves_and_layers():
    pytest.importorskip("ruptures")
    with pytest.raises(UserError, match="phases look at the curves of other measures"):
        phases_of(ConditionResults(counts(), flags()), sites_per_layer=2, seed=0)
    short = replace(three_phases(), curvature=replace(three_phases().curvature, angle=Measured(drawn(10))))
    assert phases_of(short, sites_per_layer=2, seed=0) is None


def test_rows_and_words(x, shapes):
    found = results(replace(ConditionResults(counts(), flags()), **shapes))
    rows = {row.key: row for row in shape_rows(found)}
    assert len(rows) == len(shape_rows(found))
    for key in ("curvature", "curvature_without_massive", "curvature_rotated_steps", "straightness", "dimension_twonn",
                "similarity_adjacent", "similarity_floor", "dimension_twonn_few",
                "dimension_mle_few_gaussian"):  # fmt: skip
        assert key in rows, key
    assert " (z " in str(rows["dimension_twonn_few_gaussian"].values["original"])
    value = rows["curvature"].values["original"]
    assert value.low < value.value < value.high and value.n == N
    assert str(rows["dimension_middle"].paper).startswith("arXiv 2405.15471")
    twonn = shapes["dimension"].twonn.value
    thirds = twonn[2:6].nanmean() / torch.cat([twonn[:2], twonn[6:]]).nanmean()
    assert rows["dimension_middle"].values["original"].value == pytest.approx(float(thirds))
    of = shapes["similarity"].map.numpy()
    upper = [(i, j) for i in range(S) for j in range(i)]
    within = np.nanmean([of[i, j] for i, j in upper if (i < S // 2) == (j < S // 2)])
    between = np.nanmean([of[i, j] for i, j in upper if (i < S // 2) != (j < S // 2)])
    assert rows["similarity_clusters"].values["original"].value == pytest.approx(within - between)
    assert rows["similarity_clusters_without_massive"].under == "similarity_clusters"
    largest = {row.key: row for row in without_largest(found).rows}
    assert set(largest) - {"cosine_trend", "cosine_change"} == {
        "curvature", "straightness", "dimension_participation", "dimension_components_90",
        "dimension_effective_rank", "dimension_matrix_entropy",
    }  # fmt: skip
    few = torch.arange(D) != 7
    assert largest["curvature"].values["original"][1] == pytest.approx(
        float(geometry.curvature(x.double(), few).mean()), rel=1e-6
    )
    assert largest["dimension_effective_rank"].statistic == rows["dimension_effective_rank"].statistic
    claims = [row.measure for row in shape_rows(found) if row.claim]
    assert claims == ["curvature", "dimension", "similarity"]  # each measure's rows stand under a claim of its own
    text = " ".join(shape_in_words(found))
    assert "at a right angle, 1.571" in text and "1 sublayers up to 59 states repeat others" in text


@pytest.mark.parametrize(
    ("measures", "n", "said"),
    [
        (["curvature"], 2, "curvature needs at least 3 sublayers, and this model has 2"),
        (["phases"], 8, "phases look at the curves of other measures"),
    ],
)
def test_what_a_stream_cannot_give_is_said_first(measures, n, said):
    with pytest.raises(UserError, match=said):
        check_shape(measures, n_trajectories=20, n_sublayers=n)


@pytest.mark.parametrize(("measure", "least"), [("similarity", 4), ("dimension", 10)])
def test_too_few_sequences_are_refused(measure, least):
    check_shape([measure], n_trajectories=least, n_sublayers=8)
    with pytest.raises(UserError, match=f"{measure} needs at least {least} sequences and gets {least - 1}"):
        check_shape([measure], n_trajectories=least - 1, n_sublayers=8)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("rsdyn.analysis.shape.find_spec", lambda name: None)
    with pytest.raises(UserError, match="dimension needs the package scikit-dimension: pip install scikit-dimension"):
        check_shape(["dimension"], n_trajectories=20, n_sublayers=8)
