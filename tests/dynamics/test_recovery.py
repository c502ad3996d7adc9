"""Recovery about systems with exact answers, and against numpy and scipy: each measure says what is true."""

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.spatial.distance import cosine as scipy_cosine
from scipy.special import rel_entr
from systems import contraction, norm_growth, rotation

from rsdyn.autoencoder.model import CompressingAutoencoder
from rsdyn.dynamics.projection import PCA, Projection
from rsdyn.dynamics.recovery import (
    Recovery,
    against_control,
    kl,
    mean_over_prompts,
    median_over_prompts,
    nearer,
    rates,
    recovery,
    step_rates,
    summary,
)

P, S, D = 6, 12, 16
RNG = np.random.default_rng(0)


def close(found, expected, **kwargs):
    np.testing.assert_allclose(np.asarray(found), expected, **{"rtol": 1e-9, "atol": 1e-12, **kwargs})


def of_stream(x: torch.Tensor, projection: Projection | None = None) -> Recovery:
    """The first sequence is the reference, the others are the points."""
    return recovery(x[0], x[1:], projection)


def plane_of(columns: torch.Tensor) -> PCA:
    """A PCA about the origin with the given orthonormal columns ``(D, K)``."""
    return PCA(torch.zeros(len(columns)), columns, torch.ones(columns.shape[1]), torch.tensor(9.0))


def shared_writes() -> torch.Tensor:
    """``h_{t+1} = h_t + u_t`` with the same ``u_t`` for every sequence: the norm grows, and nothing contracts."""
    rng = np.random.default_rng(1)
    writes = torch.from_numpy(rng.normal(size=(1, S, D))).cumsum(1) * 3
    return torch.from_numpy(rng.normal(size=(P + 1, 1, D))) + writes


def numbers(x: torch.Tensor, projection: Projection | None = None) -> dict[str, float]:
    return {name: float(value) for name, value in summary(of_stream(x, projection))._asdict().items()}


# ---------------------------------------------------------------------------------------------- systems


@pytest.mark.parametrize("rate", [0.8, 0.95])
def test_a_contraction_is_called_one(rate):
    x, point = contraction(P, S, D, rate)
    falling = rate ** np.arange(S)
    resting = recovery(point.expand(S, D), x)  # the reference rests where all of them go
    close(resting.distance / resting.distance[:, :1], np.tile(falling, (P, 1)))
    close(resting.relative / resting.relative[:, :1], np.tile(falling, (P, 1)))
    close(resting.alignment, 1)
    assert (resting.cosine.diff(dim=1) > 0).all()
    found = rates(resting.distance, resting.norm)
    close(found.growth, 0)
    for slope in (found.absolute, found.relative, found.contraction):
        close(slope, np.log(rate))
    close(step_rates(resting.distance), np.log(rate))
    table = summary(resting)
    assert table.nearer == table.nearer_absolute == table.nearer_relative == 1 and table.undefined == 0
    moving = of_stream(x).distance  # about a reference that moves to the same point
    close(moving / moving[:, :1], np.tile(falling, (P - 1, 1)))


def test_a_pure_growth_and_a_pure_decay_are_no_contraction():
    for factor in (1.2, 0.8):
        x = norm_growth(P + 1, S, D, factor)
        found = of_stream(x)
        for same in (found.relative, found.cosine, found.alignment):
            close(same, np.tile(np.asarray(same[:, :1]), S))
        close(found.distance[:, -1] / found.distance[:, 0], factor ** (S - 1))
        slopes = rates(found.distance, found.norm)
        close(slopes.growth, np.log(factor))
        close(slopes.absolute, np.log(factor))
        close(slopes.relative, 0)
        close(slopes.contraction, max(np.log(factor), 0))
        table = summary(found)
        assert table.nearer_absolute == (factor < 1)  # the distance alone takes a decay for recovery
        assert table.nearer_relative == table.nearer == 0


def test_shared_writes_feign_recovery_in_cosine_and_relative_distance_alone():
    table = numbers(shared_writes())
    assert table["cosine_put"] < 0.95 < table["cosine"] and table["relative"] < 0.5 * table["relative_put"]
    assert table["nearer_relative"] == 1 and table["nearer_absolute"] == table["nearer"] == 0
    assert table["growth_rate"] > 0.05 and table["relative_rate"] == pytest.approx(-table["growth_rate"])
    assert table["absolute_rate"] == pytest.approx(0, abs=1e-12) and table["contraction"] == pytest.approx(0, abs=1e-12)
    assert table["alignment"] == pytest.approx(1)


def test_a_turn_changes_the_displacement_and_no_distance():
    angle = 0.3
    x, plane = rotation(P + 1, S, D, angle)
    found = of_stream(x, plane_of(plane))
    for same in (found.distance, found.relative, found.cosine, found.plane.distance):
        close(same, np.tile(np.asarray(same[:, :1]), S))
    close(found.alignment, np.tile(np.cos(angle * np.arange(S)), (P, 1)))
    close(rates(found.distance, found.norm).contraction, 0)
    assert summary(found).nearer == 0


def test_a_turn_out_of_the_plane_feigns_recovery_in_the_plane():
    x, plane = rotation(P + 1, 6, D, 0.3)
    found = of_stream(x, plane_of(plane[:, :1]))  # sees one of the two directions of the turn
    start = (x[1:, 0] - x[0, 0]) @ plane
    size, phase = start.norm(dim=-1)[:, None], torch.atan2(start[:, 1], start[:, 0])[:, None]
    close(found.plane.distance, size * (phase + 0.3 * torch.arange(6, dtype=torch.float64)).cos().abs())
    seen = nearer(found.plane.distance).numpy()
    assert seen.mean() > 0 and (rates(found.plane.distance, found.norm).contraction[seen == 1] < 0).all()
    assert summary(found).nearer == 0 and rates(found.distance, found.norm).contraction.min() > -1e-12


def test_growth_over_a_contraction_is_told_apart():
    """Distances shrink by 0.9 while the norm grows by 1.1: 0.9 is the contraction, whatever the relative one says."""
    x, point = contraction(P, S, D, 0.9)
    reference = point * 1.1 ** torch.arange(S, dtype=torch.float64)[:, None]
    found = recovery(reference, reference + (x - point))
    slopes = rates(found.distance, found.norm)
    close(slopes.contraction, np.log(0.9))
    close(slopes.relative, np.log(0.9 / 1.1))
    shrinking = point * 0.95 ** torch.arange(S, dtype=torch.float64)[:, None]
    found = recovery(shrinking, shrinking + (x - point))
    close(rates(found.distance, found.norm).contraction, np.log(0.9 / 0.95))


def test_against_a_control():
    x, point = contraction(P, S, D, 0.8)
    still = recovery(point.expand(S, D), x)
    other, same_point = contraction(4, S, D, 0.9)
    control = recovery(same_point.expand(S, D), other)
    expected = np.tile((0.8 / 0.9) ** np.arange(S), (P, 1))
    close(against_control(still.distance, control.distance), expected)
    close(against_control(still.relative, control.relative), expected)
    for stream in (norm_growth(P, S, D), shared_writes(), rotation(P, S, D)[0], x):  # all alike: nothing is special
        found = of_stream(stream)
        close(against_control(found.distance[1:], found.distance[:2]), 1)
    mixed = torch.tensor([[1.0, 0.5], [1.0, 2.0]])  # half and twice: 1 in the geometric mean
    close(against_control(mixed, mixed), [[1, 0.5], [1, 2]])


# ---------------------------------------------------------------------------------------------- against numpy


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_measure_is_numpy_s(dtype, monkeypatch):
    x = torch.from_numpy(RNG.normal(size=(P + 1, S, D)) * 5 + 20).to(dtype)
    pca = PCA.fit(x.flatten(0, 1).double(), 3)
    exact = x.double().numpy()
    reference, points = exact[0], exact[1:]
    difference, norm = points - reference, np.linalg.norm(reference, axis=-1)
    latents = difference @ pca.components.numpy()
    for chunk in (1 << 20, 1, 2 * S * D):
        monkeypatch.setattr("rsdyn.dynamics.recovery._CHUNK_ELEMENTS", chunk)
        found = of_stream(x, pca)
        close(found.distance, np.linalg.norm(difference, axis=-1))
        close(found.relative, np.linalg.norm(difference, axis=-1) / norm)
        close(found.norm, norm)
        for p in range(P):
            for s in range(S):
                close(found.cosine[p, s], 1 - scipy_cosine(points[p, s], reference[s]))
                close(found.alignment[p, s], 1 - scipy_cosine(difference[p, s], difference[p, 0]))
        close(found.plane.distance, np.linalg.norm(latents, axis=-1))
        close(found.plane.relative, np.linalg.norm(latents, axis=-1) / norm)
        close(found.plane.mse, (latents**2).mean(-1))
        assert (found.plane.relative <= found.relative + 1e-12).all()
        everything = [*found[:5], *found.plane]
        assert {m.dtype for m in everything} == {torch.float64}


def test_rates_are_the_fitted_slopes():
    distance, norm = RNG.uniform(0.5, 2, (P, S)), RNG.uniform(1, 3, S)
    for steps, kept in ((None, S), (4, 5), (1, 2), (99, S)):
        found = rates(torch.from_numpy(distance), torch.from_numpy(norm), steps)
        slopes = [scipy.stats.linregress(np.arange(kept), np.log(row[:kept])).slope for row in [*distance, norm]]
        close(found.absolute, slopes[:-1])
        close(found.growth, slopes[-1])
        close(found.relative, np.subtract(slopes[:-1], slopes[-1]))
        close(found.contraction, np.maximum(slopes[:-1], np.subtract(slopes[:-1], slopes[-1])))
    close(step_rates(torch.from_numpy(distance)), np.diff(np.log(distance), axis=1))


def test_the_table_is_the_mean_over_defined_points():
    x = torch.from_numpy(RNG.normal(size=(P + 3, S, D)) + 3)
    x[2] = x[0]  # was put on the reference, and stayed there
    x[4, 5, 1] = torch.nan
    pca = PCA.fit(torch.from_numpy(RNG.normal(size=(40, D))), 2)
    found, kept = of_stream(x, pca), [0, 2, 4, 5, 6, 7]
    table = summary(found, steps=3)
    assert table.undefined == 2 and all(value.isfinite() for value in table)
    assert {value.dtype for value in table} == {torch.float64}
    clean = of_stream(x[[0, *(k + 1 for k in kept)]], pca)
    slopes = rates(clean.distance, clean.norm, 3)
    close(table.plane_mse, clean.plane.mse[:, 1:].numpy().mean())
    close(table.plane_relative, clean.plane.relative[:, -1].numpy().mean())
    for name in ("relative", "cosine"):
        values = getattr(clean, name).numpy()
        close(getattr(table, name + "_put"), values[:, 0].mean())
        close(getattr(table, name), values[:, -1].mean())
    close(table.alignment, clean.alignment[:, -1].numpy().mean())
    for name in ("absolute", "relative"):
        close(getattr(table, name + "_rate"), getattr(slopes, name).numpy().mean())
        values = (clean.distance if name == "absolute" else clean.relative).numpy()
        close(getattr(table, "nearer_" + name), (values[:, -1] < values[:, 0]).mean())
    close(table.contraction, slopes.contraction.numpy().mean())
    both = [(d[:, -1] < d[:, 0]).numpy() for d in (clean.distance, clean.relative)]
    close(table.nearer, (both[0] & both[1]).mean())
    assert summary(of_stream(x)).plane_mse.isnan()


def test_nothing_follows_an_injection_at_the_last_sublayer():
    found = of_stream(shared_writes()[:, :1])
    table = summary(found)
    for value in (table.contraction, table.growth_rate, table.nearer, table.nearer_absolute):
        assert value.isnan()
    assert table.relative == table.relative_put and table.undefined == 0 and step_rates(found.distance).shape == (P, 0)


def test_points_that_reach_or_never_left_the_reference():
    distance = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.1, 0.2], [1.0, 2.0, torch.inf], [1.0, 2.0, 4.0]])
    found = rates(distance, torch.ones(3))
    assert found.absolute[0] == -torch.inf and found.contraction[0] == -torch.inf
    assert found.absolute[1:].isnan().tolist() == [True, True, False]
    close(found.absolute[3], np.log(2))
    assert rates(distance, torch.tensor([1.0, 0.0, 1.0])).contraction.isnan().all()
    close(nearer(distance), [1, np.nan, np.nan, 0])
    barely = torch.tensor([[1.0, 1 - 1e-6], [1.0, 1 - 1e-4]])
    assert nearer(barely).tolist() == [0, 1] and nearer(barely, margin=0).tolist() == [1, 1]
    assert nearer(barely, margin=1e-3).tolist() == [0, 0]
    assert against_control(distance[3:], distance[:2]).isnan().all()


def test_an_autoencoder_gets_its_own_dtype_and_each_state_s_sublayer():
    torch.manual_seed(0)
    model = CompressingAutoencoder(D, 2, 3, standardise="unit_sublayer", n_sublayers=S + 4).eval()
    model.mean.copy_(torch.randn(S + 4, D))
    x = torch.from_numpy(RNG.normal(size=(P + 1, S, D)))
    found = recovery(x[0], x[1:], model, first_sublayer=4).plane
    with torch.no_grad():
        z = torch.stack([model.encoder(x[:, s].float() - model.mean[4 + s]) for s in range(S)], 1).double()
    close(found.mse, (z[1:] - z[0]).square().mean(-1), rtol=1e-4, atol=1e-10)
    assert not found.mse.requires_grad


# ---------------------------------------------------------------------------------------------- next token


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kl_is_scipy_s(dtype, monkeypatch):
    logits = torch.from_numpy(RNG.normal(size=(P + 1, 50)) * 4).to(dtype)
    monkeypatch.setattr("rsdyn.dynamics.recovery._CHUNK_ELEMENTS", 120)
    for x in (logits.log_softmax(-1), logits):  # log-probabilities and logits alike
        p, q = np.exp(x[1:].double().log_softmax(-1).numpy()), np.exp(x[0].double().log_softmax(-1).numpy())
        found = kl(x[1:], x[0])
        assert found.dtype == torch.float64
        close(found, rel_entr(p, q).sum(-1))
        close(kl(x[0], x[1:]), rel_entr(q, p).sum(-1))  # the other way round, and it is another number
        close(kl(x[1:], x[:P]), [scipy.stats.entropy(a, b) for a, b in zip(p, [q, *p[:-1]], strict=True)])
    assert not np.allclose(kl(logits[1:], logits[0]), kl(logits[0], logits[1:]))


def test_kl_of_the_same_distribution_is_zero_and_of_a_near_one_small_and_right():
    logits = torch.from_numpy(RNG.normal(size=(P, 3000)) * 5).float()
    assert (kl(logits, logits) == 0).all() and (kl(logits.log_softmax(-1), logits) < 1e-10).all()
    shift = torch.from_numpy(RNG.normal(size=(P, 3000))) * 1e-5
    near = kl(logits.double() + shift, logits.double())
    p = logits.double().softmax(-1)
    variance = (p * shift.square()).sum(-1) - (p * shift).sum(-1).square()
    close(near, variance / 2, rtol=1e-3, atol=0)  # to the second order: half the variance of the change


def test_kl_of_impossible_tokens():
    inf = torch.inf
    q = torch.tensor([0.5, 0.5, 0.0]).log()
    p = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.5, 0.5, 0.0]]).log()
    close(kl(p, q), [np.log(2), inf, 0])
    far = torch.tensor([[0.0, -2000.0], [torch.nan, 0.0]])
    found = kl(far, -far[0])  # log 1 - log exp(-2000)
    assert found[0] == 2000 and found[1].isnan()


# ---------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(("m", "level"), [(2, 0.95), (20, 0.95), (7, 0.8)])
def test_the_mean_over_prompts_has_scipy_s_t_interval(m, level):
    values = RNG.lognormal(size=(m, 4, 2))
    found = mean_over_prompts(torch.from_numpy(values), level)
    low, high = scipy.stats.t.interval(level, m - 1, values.mean(0), scipy.stats.sem(values, axis=0))
    close(found.value, values.mean(0))
    close(found.low, low)
    close(found.high, high)


@pytest.mark.parametrize("m", [6, 7, 20, 51])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_the_median_over_prompts_has_scipy_s_quantile_interval(m, level):
    """Of ``scipy.stats.quantile_test``, which is one-sided twice: each end leaves out at most half of what is left."""
    values = RNG.lognormal(size=m)
    found = median_over_prompts(torch.from_numpy(values), level)
    expected = scipy.stats.quantile_test(values, q=0, p=0.5).confidence_interval(level)
    close(found.value, np.median(values))
    close([found.low, found.high], [expected.low, expected.high])


@pytest.mark.parametrize("sample", ["normal", "lognormal", "exponential", "standard_cauchy"])
def test_the_median_covers_what_it_says_whatever_the_distribution(sample):
    """4000 experiments of 20 prompts: 95.9 % by the binomial; no mean of a Cauchy has an interval at all."""
    rng = np.random.default_rng(1)
    draw, truth = getattr(rng, sample), {"lognormal": 1.0, "exponential": np.log(2)}.get(sample, 0.0)
    found = median_over_prompts(torch.from_numpy(draw(size=(20, 4000))))
    covered = float(((found.low <= truth) & (found.high >= truth)).double().mean())
    assert covered == pytest.approx(0.9586, abs=0.012)


def test_the_mean_of_differences_covers_what_it_says():
    values = torch.from_numpy(np.random.default_rng(1).normal(2.0, 1.0, (20, 4000)))
    found = mean_over_prompts(values)
    assert float(((found.low <= 2) & (found.high >= 2)).double().mean()) == pytest.approx(0.95, abs=0.012)


def test_few_and_undefined_prompts():
    one = mean_over_prompts(torch.tensor([[1.0, 5.0]]))
    assert one.value.tolist() == [1, 5] and one.low.isnan().all() and one.high.isnan().all()
    five = median_over_prompts(torch.tensor([5.0, 1.0, 2.0, 4.0, 3.0]))
    assert five.value == 3 and five.low.isnan() and five.high.isnan()  # no two of five values cover 95 %
    six = median_over_prompts(torch.tensor([[6.0, 1.0], [1, 1], [2, 1], [4, 1], [3, 1], [5, torch.nan]]))
    assert (six.low[0], six.high[0]) == (1, 6) and six.value[1].isnan() and six.low[1].isnan()
    alike = mean_over_prompts(torch.zeros(20))
    assert alike.low == alike.value == alike.high == 0


# ---------------------------------------------------------------------------------------------- bad input

X = torch.ones(S, D)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recovery(X[0], X[None]), r"reference of shape \(16,\)"),
        (lambda: recovery(X[:0], X[None, :0]), "not empty"),
        (lambda: recovery(X, X), r"perturbed of shape \(12, 16\): give \(P, 12, 16\)"),
        (lambda: recovery(X, X[None, 1:]), r"perturbed of shape \(1, 11, 16\)"),
        (lambda: recovery(X, X[None][:0]), "at least one point"),
        (lambda: recovery(X, X[None].int()), r"perturbed is torch.int32"),
        (lambda: rates(X, X[0, :3]), r"norm of shape \(3,\)"),
        (lambda: rates(X, X[0], steps=0), "steps=0"),
        (lambda: against_control(X, X[:, 1:]), r"control of shape \(12, 15\)"),
        (lambda: against_control(X, X[:0]), "at least one control"),
        (lambda: nearer(X, margin=1.0), "margin=1.0"),
        (lambda: nearer(X, margin=float("nan")), "margin=nan"),
        (lambda: kl(X, X[0, 1:]), r"log_q of shape \(15,\)"),
        (lambda: kl(X, X[1:]), r"log_q of shape \(11, 16\)"),
        (lambda: kl(X[None], X[0]), r"log_p of shape \(1, 12, 16\)"),
        (lambda: kl(torch.tensor(1.0), X[0]), r"log_p of shape \(\)"),
        (lambda: mean_over_prompts(X[:0]), "at least one prompt"),
        (lambda: median_over_prompts(X[0, 0]), "at least one prompt"),
        (lambda: mean_over_prompts(X, level=95), "level=95"),
        (lambda: median_over_prompts(X, level=0), "level=0"),
    ],
)
def test_a_wrong_value_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
