"""Debiased CKA: copies 1, independent states 0, against its published formula; the map against its pairs."""

import numpy as np
import pytest
import torch

from rsdyn.dynamics.similarity import (
    cka,
    cka_map,
    hollow_grams,
    map_of,
    packed,
    permuted_floor,
    permuted_map,
    unpacked,
    without_each_group,
)


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unbiased_hsic(k, m):
    """Equation 5 of Song et al. 2012, written out for Gram matrices."""
    k, m = k.copy(), m.copy()
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    n, one = len(k), np.ones(len(k))
    whole = one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + whole - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def test_against_the_published_formula():
    x, y = drawn(40, 7), drawn(40, 5, seed=1) + drawn(40, 7)[:, :5]
    k, m = (x @ x.T).numpy(), (y @ y.T).numpy()
    wanted = unbiased_hsic(k, m) / np.sqrt(unbiased_hsic(k, k) * unbiased_hsic(m, m))
    assert float(cka(x, y)) == pytest.approx(wanted, rel=1e-9)


def test_against_a_published_implementation():
    """The numbers of google-research/representation_similarity (Kornblith et al. 2019), ``debiased=True``."""
    i, j = torch.arange(24, dtype=torch.float64)[:, None], torch.arange(7, dtype=torch.float64)
    x = (i * (1 + j**2) + j).sin() * (1 + j)
    y = (i * (3 + 2 * j[:5])).cos() + 0.3 * x[:, :5]
    z = (i * torch.tensor([5.0, 11, 17]) + 1).cos()
    assert float(cka(x, y)) == pytest.approx(0.14897399165348772, rel=1e-9)
    assert float(cka(x, z)) == pytest.approx(-0.06768429748306685, rel=1e-9)


def test_rotated_shifted_and_scaled_copies_are_the_same():
    x = drawn(60, 12)
    q, _ = torch.linalg.qr(drawn(12, 12, seed=2))
    assert float(cka(x, 3 * x @ q + 5)) == pytest.approx(1, abs=1e-9)
    assert float(cka(x, torch.cat([x, x], 1))) == pytest.approx(1, abs=1e-9)


def test_independent_states_are_at_zero_where_the_biased_one_is_not():
    found, biased = [], []
    for seed in range(40):
        x, y = drawn(100, 200, seed=2 * seed), drawn(100, 200, seed=2 * seed + 1)
        found.append(float(cka(x, y)))
        a, b = x - x.mean(0), y - y.mean(0)
        biased.append(float((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())))
    assert abs(np.mean(found)) < 0.01
    assert np.mean(biased) > 0.5


def test_the_map_is_all_pairs():
    x, y = drawn(50, 6, 9).cumsum(1), drawn(50, 4, 5, seed=3)
    found = cka_map(x)
    assert found.shape == (6, 6) and found.dtype == torch.float64
    for s in range(6):
        for m in range(6):
            assert float(found[s, m]) == pytest.approx(float(cka(x[:, s], x[:, m])), abs=1e-6)
    torch.testing.assert_close(found.diagonal(), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-6)
    both = cka_map(x, y)
    assert both.shape == (6, 4)
    assert float(both[2, 3]) == pytest.approx(float(cka(x[:, 2], y[:, 3])), abs=1e-6)


def test_the_order_of_samples_does_not_matter_and_permuted_pairing_is_the_floor():
    x = drawn(200, 3, 20).cumsum(1)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cka_map(x[order]), cka_map(x), rtol=0, atol=1e-6)
    assert cka_map(x, x[order]).abs().max() < 0.1 < cka_map(x)[0, 2]


def test_constant_states_have_none():
    x = drawn(20, 3, 4)
    x[:, 1] = 2.0
    found = cka_map(x)
    assert found[1].isnan().all() and found[:, 1].isnan().all() and found[0, 2].isfinite()
    assert cka(x[:, 0], x[:, 1]).isnan()


def test_mistakes():
    with pytest.raises(ValueError, match="x has 3 samples: the debiased estimator needs at least 4"):
        cka(drawn(3, 2), drawn(3, 2))
    with pytest.raises(ValueError, match="the same samples"):
        cka(drawn(5, 2), drawn(6, 2))
    with pytest.raises(ValueError, match="the same samples"):
        cka_map(drawn(5, 2, 2), drawn(6, 2, 2))
    with pytest.raises(ValueError, match=r"give \(N, D\)"):
        cka(drawn(5, 2, 2), drawn(5, 2))
    with pytest.raises(ValueError, match=r"give \(N, S, D\)"):
        cka_map(drawn(5, 2))


# -- from Gram matrices ------------------------------------------------------------------------------------------------


def test_without_each_group_is_the_estimator_of_the_others():
    x, y = drawn(60, 4, 9).cumsum(1), drawn(60, 4, 7, seed=3)
    y[:, 2, :4] += x[:, 2, :4]
    group = torch.arange(60) % 7 * 10
    found, without = without_each_group(hollow_grams(x), hollow_grams(y), group)
    assert without.shape == (7, 4)
    for s in range(4):
        assert float(found[s]) == pytest.approx(float(cka(x[:, s], y[:, s])), abs=2e-6)
        for g in range(7):
            rest = group != 10 * g
            assert float(without[g, s]) == pytest.approx(float(cka(x[rest, s], y[rest, s])), abs=3e-6)
    assert without_each_group(hollow_grams(x), hollow_grams(y), torch.zeros(60))[1].shape == (0, 4)


def test_the_map_of_grams_is_the_map():
    x = drawn(40, 5, 8).cumsum(1)
    x[:, 3] = 1.0
    torch.testing.assert_close(map_of(hollow_grams(x)), cka_map(x), rtol=0, atol=1e-6, equal_nan=True)
    found, without = without_each_group(hollow_grams(x)[:-1], hollow_grams(x)[1:], torch.arange(40) % 3)
    assert found.isnan().tolist() == [False, False, True, True] and without[:, 2:].isnan().all()


def test_the_floor_is_at_zero_and_its_spread_is_that_of_permuted_pairs():
    x = drawn(80, 6, 30).cumsum(1)
    grams = hollow_grams(x)
    floor = permuted_floor(grams[:-1], grams[1:], n=20)
    assert floor.shape == (20, 5) and abs(float(floor.mean())) < 0.01
    orders = [torch.randperm(80, generator=torch.Generator().manual_seed(i)) for i in range(60)]
    direct = torch.stack([cka(x[:, 2], x[order, 3]) for order in orders])
    assert float(floor[:, 2].std()) == pytest.approx(float(direct.std()), rel=0.5)
    assert float(cka(x[:, 2], x[:, 3])) > 10 * float(floor.abs().max())


def test_between_two_models_a_turned_copy_is_the_same_and_permuted_sequences_are_nothing():
    """The map of one stream with another's, of other width: the map of pairs; packed in half precision, too."""
    x = drawn(120, 5, 40).cumsum(1)
    q, _ = torch.linalg.qr(drawn(64, 64, seed=2))
    turned = 3 * torch.nn.functional.pad(x, (0, 24)) @ q + 7  # 64 units
    a, b = hollow_grams(x), hollow_grams(turned)
    exact = cka_map(x, turned)
    torch.testing.assert_close(map_of(a, b), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(exact.diagonal(), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-6)
    kept = [unpacked(packed(gram), 120) for gram in (a, b)]
    torch.testing.assert_close(map_of(*kept), exact, rtol=0, atol=1e-4)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))  # as permuted_map draws its first
    floor = permuted_map(a, b, n=4)
    torch.testing.assert_close(floor[0], cka_map(x, turned[order]), rtol=0, atol=1e-5)
    assert floor.shape == (4, 5, 5) and float(floor.abs().max()) < 0.1


def test_packed_pairs_are_those_of_as_many_samples():
    gram = hollow_grams(drawn(10, 2, 3))
    constant = hollow_grams(torch.ones(10, 2, 3))
    assert not unpacked(packed(constant), 10).any() and map_of(constant, gram).isnan().all()
    with pytest.raises(ValueError, match="45 columns: 11 samples have 55"):
        unpacked(packed(gram), 11)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(wrong):
    x = drawn(20, 3, 4)
    broken = x.clone()
    broken[5, 1, 2] = wrong
    with pytest.raises(ValueError, match="y: it holds NaN or infinities"):
        cka(x[:, 0], broken[:, 1])
    with pytest.raises(ValueError, match="x: it holds NaN or infinities"):
        cka_map(broken)


def test_any_number_format_and_equal_states_that_are_not_exact():
    x, y = (1000 * drawn(30, 6)).round(), drawn(30, 5, seed=1)
    assert float(cka(x.long(), y)) == pytest.approx(float(cka(x, y)), abs=1e-12)
    assert float(cka(x.half(), y)) == pytest.approx(float(cka(x.half().double(), y)), abs=1e-12)
    equal = drawn(1, 6, seed=2).expand(31, -1)  # whose mean is not to the bit what each is
    assert cka(equal, drawn(31, 5)).isnan() and cka(equal, equal).isnan()
