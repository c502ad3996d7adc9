"""The probe against the pure functions and numpy on the same activations, all at once."""

from dataclasses import replace

import lightning as L
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as SklearnPCA

from rsdyn.analysis.collected import Collected
from rsdyn.analysis.measures.activations import activations
from rsdyn.analysis.measures.correlation import correlation
from rsdyn.analysis.measures.cosine import cosine
from rsdyn.analysis.measures.mutual_information import mutual_information
from rsdyn.analysis.measures.norm import norm
from rsdyn.analysis.measures.pca import pca
from rsdyn.analysis.measures.rotation import against_stream, rotation
from rsdyn.analysis.measures.velocity import velocity
from rsdyn.analysis.probe import ResidualStreamProbe
from rsdyn.analysis.results import curves
from rsdyn.analysis.settings import MEASURES
from rsdyn.analysis.streams import counts, flags
from rsdyn.dynamics.information import consecutive_information
from rsdyn.errors import UserError
from rsdyn.lm.source import find_lm
from rsdyn.stream.text.groups import sequence_groups
from rsdyn.stream.trajectories import TrajectoryStream
from rsdyn.stream.trajectory_datamodule import TrajectoryBatch, TrajectoryDataModule

N, S, D = 53, 6, 32


@pytest.fixture(scope="module")
def stream(tiny_llama, tmp_path_factory):
    from rsdyn.stream.text.tokens import Sequences

    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 20, size=60)
    ids = rng.integers(1, 300, size=int(lengths.sum())).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    sequences = Sequences(ids=ids, offsets=offsets, n_rows=60, n_truncated=0, bos_id=0, bos_note=None)
    cache = tmp_path_factory.mktemp("cache")
    stream = TrajectoryStream(find_lm(str(tiny_llama)), sequences, cache_dir=cache, dtype="float32", shard_sequences=8)
    stream.open()
    return stream


def run(stream, measures=MEASURES, samples=N, **options):
    collected = Collected(n_sublayers=S, n_units=D, measures=measures, **options)
    data = TrajectoryDataModule(stream, samples=samples, passes=collected.n_passes)
    trainer = L.Trainer(
        logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", barebones=False
    )
    trainer.test(ResidualStreamProbe(collected), datamodule=data, verbose=False)
    return collected


@pytest.fixture(scope="module")
def probe(stream):
    return run(stream)


@pytest.fixture(scope="module")
def x(stream):
    shards = [stream.shard(k).activations for k in range(stream.n_shards)]
    return torch.cat(shards)[:N].to(torch.float64)


def test_every_sequence_is_counted_once_and_no_shard_is_recorded_for_nothing(probe, stream):
    assert (probe.n_trajectories, probe.n_bos, probe.n_sinks) == (N, 0, 0)
    assert stream.n_recorded == 56  # seven shards of eight hold the first 53


def test_activations(probe, x):
    found = activations(probe, 0.3)
    torch.testing.assert_close(found.mean, x.mean(0))
    torch.testing.assert_close(found.std, x.std(0, correction=0))
    torch.testing.assert_close(found.density.value, (x.mean(0).abs() > 0.3).to(torch.float64).mean(1))
    default = activations(probe).density_threshold
    assert default == pytest.approx(0.5 * float(x.mean(0)[-1].square().mean().sqrt()))


def test_correlation(probe, x):
    found = correlation(probe, bins=20)
    whole = np.array([np.corrcoef(x[:, :, u].T.numpy()) for u in range(D)])
    consecutive = np.array([[whole[u, s, s + 1] for u in range(D)] for s in range(S - 1)])
    np.testing.assert_allclose(found.units.numpy(), consecutive, atol=1e-9)
    rows, columns = np.triu_indices(S, 1)
    for u in range(D):
        pairs = whole[u, rows, columns]
        counts, _ = np.histogram(np.clip(pairs[pairs >= 0], 0, 1 - 1e-12), bins=20, range=(0, 1))
        np.testing.assert_array_equal(found.pair_counts[u].numpy(), counts)
        assert found.pairs_below[u] == (pairs < 0).sum()
    low, high = found.mean.interval
    assert (low < found.mean.value).all() and (found.mean.value < high).all()


def test_cosine_and_speed(probe, x):
    torch.testing.assert_close(
        cosine(probe).mean.value,
        torch.nn.functional.cosine_similarity(x[:, 1:], x[:, :-1], dim=-1).mean(0),
        rtol=1e-6,
        atol=1e-6,
    )
    speed = np.linalg.norm(np.diff(x.numpy(), axis=1), axis=-1)
    found = velocity(probe)
    np.testing.assert_allclose(found.speed.value, speed.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.speed.std, speed.std(0), rtol=1e-5)


def test_the_interval_of_a_mean_leaves_out_whole_documents(stream, x):
    """Delete-a-group jackknife of a mean, by hand: five documents, some of their rows far apart."""
    from scipy.stats import t as student

    document = np.random.default_rng(3).integers(0, 5, len(stream.sequences))
    groups = sequence_groups(replace(stream.sequences, documents=document), N)
    found = run(stream, measures=["velocity", "activations"], groups=groups)
    speed = np.linalg.norm(np.diff(x.numpy(), axis=1), axis=-1)
    without = np.array([speed[document[:N] != d].mean(0) for d in range(5)])
    error = np.sqrt(4 / 5 * ((without - without.mean(0)) ** 2).sum(0)) * student.ppf(0.975, 4)
    got = velocity(found)
    np.testing.assert_allclose(got.speed.low, speed.mean(0) - error, rtol=1e-4)
    order = [int(groups.group[document[:N] == d][0]) for d in range(5)]
    np.testing.assert_allclose(got.speed.groups[order], without, rtol=1e-6)
    assert counts(found).intervals_note == "rests on 5 documents: too few"
    shares = activations(found)
    assert shares.density.draws.shape == (400, S) and shares.density.groups is None
    assert (shares.density.low <= shares.density.value).all()


def test_one_document_alone_has_no_interval(stream):
    groups = sequence_groups(replace(stream.sequences, documents=np.zeros(60, np.int64)), N)
    found = run(stream, groups=groups)
    for measured in (velocity(found), activations(found), correlation(found), mutual_information(found, "copula", 0),
                     pca(found, 0)):  # fmt: skip
        assert all(part is None for _, m in curves(measured) for part in (m.interval, m.groups, m.draws))


def test_information(probe, x):
    found = mutual_information(probe, "copula", seed=0)
    expected = consecutive_information(x, "copula")
    torch.testing.assert_close(found.units, expected)
    assert (found.floor < found.mean.value).all()
    literal = mutual_information(probe, "paper_literal", seed=0)
    torch.testing.assert_close(literal.true_units, consecutive_information(x, "kde"))


def test_rotations(probe, x):
    options = {"n": 50, "shared": False, "window": 8, "sites_per_layer": 2, "seed": 0}
    found = rotation(probe, ["layer_shuffle"], **options)
    a = x.mean(0).numpy()
    slope = np.gradient(a, axis=0)
    angles = np.arctan2(np.diff(slope, axis=0), np.diff(a, axis=0))
    turned = np.unwrap(angles, axis=0)
    np.testing.assert_allclose(found.turns.numpy(), (turned[-1] - turned[0]) / (2 * np.pi), atol=1e-6)
    assert found.nulls["layer_shuffle"].p.shape == (D,)


def test_components(probe, stream, x):
    found = pca(probe, seed=0)
    flat = x.reshape(-1, D).numpy()
    sk = SklearnPCA(svd_solver="full").fit(flat)
    np.testing.assert_allclose(found.ratio.value.numpy(), sk.explained_variance_ratio_, rtol=1e-5, atol=1e-7)
    few = run_components(stream, 3)
    missed = flat - flat.mean(0) - (flat - flat.mean(0)) @ sk.components_[:3].T @ sk.components_[:3]
    missed = (missed.reshape(N, S, D) ** 2).sum((0, 2))
    about = ((x - x.mean(0)) ** 2).sum((0, 2)).numpy()
    np.testing.assert_allclose(few.over_depth.explained.value.numpy(), 1 - missed / about, atol=1e-4)


def run_components(stream, n):
    again = run(stream, ["pca"], components=n)
    return pca(again, seed=0)


def batches(x):
    numbers = torch.arange(len(x))
    return [TrajectoryBatch(a, n) for a, n in zip(x.split(20), numbers.split(20), strict=True)]


def by_hand(x, measures, **options):
    """What is collected without a Trainer."""
    collected = Collected(n_sublayers=x.shape[1], n_units=x.shape[2], measures=measures, **options)
    probe = ResidualStreamProbe(collected)
    for batch in batches(x):
        probe.test_step(batch, 0, 0)
    for batch in batches(x):
        probe.test_step(batch, 0, 1)
    probe.on_test_epoch_end()
    return collected


def test_principal_components_hold_no_covariance(probe):
    """Of 4096 units the covariance of each half has 134 MB, which a view of its mean would keep and send."""
    for fitted in (probe.pca, *probe.half_pca):
        for found in fitted.buffers():
            assert found.untyped_storage().nbytes() <= 8 * D * D


def test_massive_units_are_named_and_taken_out(x):
    planted = x.clone()
    planted[..., 7] += 1e4
    probe = by_hand(planted, MEASURES)
    assert flags(probe, torch.float32).massive_units.tolist() == [7]
    rest = x[..., [u for u in range(D) if u != 7]]
    torch.testing.assert_close(
        cosine(probe).mean.without_massive.value,
        torch.nn.functional.cosine_similarity(rest[:, 1:], rest[:, :-1], dim=-1).mean(0),
        rtol=1e-5,
        atol=1e-6,
    )
    assert (cosine(probe).mean.value > 0.999).all()  # one unit hides all others


def test_the_largest_units_of_the_main_stream_are_those_of_all(x):
    planted = x.clone()
    planted[..., 7] += 1e4
    main = by_hand(planted, MEASURES)
    assert main.largest.order[0] == 7 and main.largest.counts == (0, 1, 2, 4, 8)
    other = by_hand(x, MEASURES, largest=main.largest)  # where unit 7 is as small as any
    assert flags(other, torch.float32).massive_units.tolist() == [7]
    assert torch.equal(other.largest.order, main.largest.order)
    assert not by_hand(x, MEASURES).massive.any()


def test_every_curve_without_the_largest_units_is_that_of_the_others(x):
    """Each number left out, against the pure functions on the units that stay."""
    planted = x.clone()
    for unit, by in ((7, 1e4), (20, 3e3), (3, 500)):
        planted[..., unit] += by * (1 + 0.1 * torch.randn(N, S, generator=torch.Generator().manual_seed(unit)))
    probe = by_hand(planted, MEASURES)
    order = probe.largest.order.tolist()
    assert order[:3] == [7, 20, 3]
    options = {"n": 5, "shared": False, "window": 8, "sites_per_layer": 2, "seed": 0}

    def everything(of):
        found = [activations(of), correlation(of), cosine(of), velocity(of), mutual_information(of, "copula", 0),
                 rotation(of, [], **options), pca(of, 0)]  # fmt: skip
        return {(type(part).__name__, path): m for part in found for path, m in curves(part)}

    found = everything(probe)
    for i, count in enumerate(probe.largest.counts):
        expected = everything(by_hand(planted[..., [u for u in range(D) if u not in order[:count]]], MEASURES))
        compared = [key for key in found if found[key].left_out is not None]
        assert len(compared) == 11
        for key in compared:
            if "components_90" in key[1]:
                assert (found[key].left_out[i] - expected[key].value).abs().max() <= 1  # near a tie
                continue
            np.testing.assert_allclose(
                found[key].left_out[i], expected[key].value, rtol=2e-3, atol=1e-4, err_msg=f"{key}, {count} units"
            )


def test_norms_are_numpys_with_and_without_the_largest_units(x):
    """The recipe of docs/architecture.md: a curve of each sequence, its interval and its variants."""
    planted = x.clone()
    planted[..., 7] += 1e4
    collected = by_hand(planted, ["norm"])
    found = norm(collected).mean
    h = planted.numpy()
    each = np.linalg.norm(h, axis=-1)
    np.testing.assert_allclose(found.value, each.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.std, each.std(0), rtol=1e-3)
    without = np.array([each[np.arange(N) % 20 != g].mean(0) for g in range(20)])
    np.testing.assert_allclose(found.groups, without, rtol=1e-6)
    assert (found.low < found.value).all() and (found.value < found.high).all()
    order = collected.largest.order.tolist()
    for i, count in enumerate(collected.largest.counts):
        rest = np.delete(h, order[:count], axis=-1)
        np.testing.assert_allclose(found.left_out[i], np.linalg.norm(rest, axis=-1).mean(0), rtol=1e-5)
    rest = np.linalg.norm(np.delete(h, 7, axis=-1), axis=-1).mean(0)
    np.testing.assert_allclose(found.without_massive.value, rest, rtol=1e-5)


def test_relative_speed_is_the_step_over_the_norm(probe, x):
    found = velocity(probe)
    h = x.numpy()
    expected = (np.linalg.norm(np.diff(h, axis=1), axis=-1) / np.linalg.norm(h[:, :-1], axis=-1)).mean(0)
    np.testing.assert_allclose(found.relative.value, expected, rtol=1e-5)


def test_correlation_by_last_token(x):
    """Between tokens, each counted once; within them, where the first state is the token's own, from layer 1 on."""
    token = torch.arange(N) % 5
    planted = x.clone()
    planted[:, 0] = torch.randn(5, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[token]
    found = correlation(by_hand(planted, ["correlation"], last_token=token))
    means = np.stack([planted[token == t].mean(0).numpy() for t in range(5)])
    between = [np.corrcoef(means[:, 0, u], means[:, 1, u])[0, 1] for u in range(D)]
    np.testing.assert_allclose(found.by_last_token.between_units, between, atol=1e-9)
    left = planted.numpy() - means[token]
    within = [np.corrcoef(left[:, 2, u], left[:, 3, u])[0, 1] for u in range(D)]
    np.testing.assert_allclose(found.by_last_token.within_units, within, atol=1e-8)
    assert found.by_last_token.between.n == 5
    alone = correlation(by_hand(planted, ["correlation"], last_token=torch.zeros(N, dtype=torch.int64)))
    assert alone.by_last_token.between_units.isnan().all()  # one token is no correlation
    assert correlation(by_hand(planted, ["correlation"])).by_last_token is None


def test_the_density_without_massive_units_has_a_threshold_of_its_own(x):
    planted = x.clone()
    planted[..., 7] += 1e4
    found = activations(by_hand(planted, ["activations"]))
    mean = np.delete(planted.numpy().mean(0), 7, axis=1)
    at = 0.5 * np.sqrt((mean[-1] ** 2).mean())
    assert found.density_threshold_without_massive == pytest.approx(at)
    np.testing.assert_allclose(found.density.without_massive.value, (np.abs(mean) > at).mean(1))
    assert found.density_threshold > 100 * at
    given = activations(by_hand(planted, ["activations"]), 0.3)
    assert given.density_threshold == given.density_threshold_without_massive == 0.3


def test_principal_components_without_massive_units(x):
    """Against sklearn on the units that are left; with the massive one, it is the first component."""
    planted = x.clone()
    generator = torch.Generator().manual_seed(1)
    planted[..., 7] += 1e4 * (1 + 0.1 * torch.randn(N, S, generator=generator))
    probe = by_hand(planted, ["pca"])
    found = pca(probe, seed=0)
    assert found.massive_loadings[0].sum() > 0.99 and found.ratio.value[0] > 0.99
    every = planted.reshape(-1, D).numpy()
    theirs = SklearnPCA(1).fit_transform(every).reshape(N, S).mean(0)
    np.testing.assert_allclose(found.latents.mean[:, 0].abs().numpy(), np.abs(theirs), atol=1)  # of 10,000
    rest = x[..., [u for u in range(D) if u != 7]]
    flat = rest.reshape(-1, D - 1).numpy()
    k = len(found.ratio.without_massive.value)
    sk = SklearnPCA(k, svd_solver="full").fit(flat)
    np.testing.assert_allclose(
        found.ratio.without_massive.value.numpy(), sk.explained_variance_ratio_, rtol=1e-4, atol=1e-6
    )
    assert (found.components_without_massive[:, 7].abs() < 1e-9).all()
    few = by_hand(planted, ["pca"], components=3)
    found = pca(few, seed=0)
    sk = SklearnPCA(3, svd_solver="full").fit(flat)
    missed = ((flat - sk.inverse_transform(sk.transform(flat))).reshape(N, S, D - 1) ** 2).sum((0, 2))
    about = ((rest - rest.mean(0)) ** 2).sum((0, 2)).numpy()
    np.testing.assert_allclose(found.over_depth.explained.without_massive.value.numpy(), 1 - missed / about, atol=1e-3)


def test_units_with_nan_are_named_and_spoil_nothing_else(x):
    broken = x.clone()
    broken[4, 2, 9] = torch.nan
    probe = by_hand(broken, MEASURES)
    assert flags(probe, torch.float32).unusable_units.tolist() == [9]
    keep = [u for u in range(D) if u != 9]
    clean = by_hand(x[..., keep], MEASURES)
    for measure in (cosine, velocity):
        a, b = dict(curves(measure(probe))), dict(curves(measure(clean)))
        assert a.keys() == b.keys() != set()
        for name in a:
            for part in ("value", "std", "groups", "interval"):
                here, there = getattr(a[name], part), getattr(b[name], part)
                torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-7)
    a, b = correlation(probe), correlation(clean)
    torch.testing.assert_close(a.units[:, keep], b.units, rtol=1e-9, atol=1e-9)
    assert a.units[1:3, 9].isnan().all()
    a, b = (pca(p, seed=0) for p in (probe, clean))
    n = len(b.ratio.value)
    torch.testing.assert_close(a.ratio.value[:n], b.ratio.value, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(a.over_depth.dimensions.value, b.over_depth.dimensions.value, rtol=1e-3, atol=1e-3)
    a, b = (mutual_information(p, "copula", 0) for p in (probe, clean))
    torch.testing.assert_close(a.units[:, keep], b.units)


def test_constant_and_frozen_units_are_counted(x):
    planted = x.clone()
    planted[..., 3] = 2.5
    found = flags(by_hand(planted, ["correlation"]), torch.float32)
    assert found.constant_units.tolist() == [3] and (found.constant == 1).all()
    assert found.frozen_units.tolist() == [3]
    torch.testing.assert_close(found.frozen_steps, torch.full((S - 1,), 1 / D, dtype=torch.float64))


def test_identical_units_are_alike(x):
    planted = x.clone()
    planted[..., 5] = planted[..., 6]
    probe = by_hand(planted, MEASURES)
    r, mi = correlation(probe).units, mutual_information(probe, "kde", 0).units
    assert torch.equal(r[:, 5], r[:, 6]) and torch.equal(mi[:, 5], mi[:, 6])


def test_more_components_than_there_are_is_a_users_mistake(x):
    probe = Collected(n_sublayers=S, n_units=D, measures=["pca"], components=D + 1)
    for batch in batches(x):
        probe.first_pass(batch)
    with pytest.raises(UserError, match=r"components=33"):
        probe.between_passes()


def test_without_a_cache_the_second_pass_does_not_record_again(stream):
    bare = TrajectoryStream(stream.lm, stream.sequences, cache_dir=None, dtype="float32", shard_sequences=8)
    found = run(bare, ["cosine"], samples=16)
    assert bare.n_recorded == 16 and found.n_trajectories == 16


# -- every token of each sequence ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens(stream):
    return TrajectoryStream(
        stream.lm, stream.sequences, positions="all", cache_dir=stream.cache.root, dtype="float32", shard_sequences=8
    )


def test_measures_over_all_tokens_are_numpys(tokens):
    tokens.open()
    found = run(tokens, keep=40)
    shards = [tokens.shard(k) for k in range(tokens.n_shards)]
    index = torch.cat([s.index for s in shards])
    rows = index < N
    x = torch.cat([s.activations for s in shards])[rows].to(torch.float64)
    position = torch.cat([s.position for s in shards])[rows]
    assert (found.n_trajectories, found.n_bos, found.n_sinks) == (len(x), N, 0) and len(x) > 5 * N
    torch.testing.assert_close(activations(found).mean, x.mean(0))
    steps = x.diff(dim=1).norm(dim=-1)
    speed = velocity(found)
    torch.testing.assert_close(speed.speed.value, steps.mean(0))
    # the jackknife leaves whole sequences out, all their tokens together
    left_out = [steps[index[rows] % 20 != g].mean(0) for g in range(20)]
    torch.testing.assert_close(speed.speed.groups, torch.stack(left_out))
    r = np.corrcoef(x[:, 2, 5].numpy(), x[:, 3, 5].numpy())[0, 1]
    assert float(correlation(found).units[2, 5]) == pytest.approx(r, rel=1e-6)
    sk = SklearnPCA(2).fit(x.flatten(0, 1).numpy())
    np.testing.assert_allclose(pca(found, 0).ratio.value[:2], sk.explained_variance_ratio_[:2], rtol=1e-6)
    # kept: the token whose turn comes first, of the first 40 sequences
    first = [tokens.positions.turns(i).tolist().index(0) for i in range(40)]
    assert found.share.sequence.tolist() == list(range(40))
    kept = torch.stack([x[(index[rows] == i) & (position == t)][0] for i, t in enumerate(first)])
    assert torch.equal(found.share.x.to(torch.float64), kept)
    assert mutual_information(found, "kde", 0).mean.n == 40


def test_tokens_are_paired_with_themselves_in_the_other_stream(tokens, stream):
    shuffled = TrajectoryStream(
        stream.lm, stream.sequences.shuffled(0), positions="all", cache_dir=None, dtype="float32", shard_sequences=8
    )
    tokens.open()
    ours, theirs = (run(s, ["rotation"], keep=100) for s in (tokens, shuffled))
    assert torch.equal(ours.share.number, theirs.share.number) and len(ours.share.number) == 100
    assert against_stream(ours, theirs, "token_shuffled", n=50, seed=0).p.shape == (D,)
    others = run(shuffled, ["rotation"], keep=99)
    with pytest.raises(ValueError, match="different tokens"):
        against_stream(ours, others, "token_shuffled", n=50, seed=0)
