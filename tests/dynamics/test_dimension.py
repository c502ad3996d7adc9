import math

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.decomposition import PCA as SklearnPCA

from rsdyn.dynamics import dimension
from rsdyn.dynamics.dimension import (
    centred,
    components_for,
    participation,
    spectra_of_rows,
    spectra_without_largest,
    spectrum,
)


@pytest.fixture(scope="module")
def trajectories():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, 30, generator=generator, dtype=torch.float64)
    scale = torch.linspace(1, 0.01, 30, dtype=torch.float64) ** torch.tensor([0.1, 1, 2, 4.0])[:, None]
    return x * scale + 100  # later sublayers fill fewer dimensions, far from zero


@pytest.mark.parametrize("n", [60, 20], ids=["more sequences than units", "more units than sequences"])
def test_spectra_equal_sklearns(trajectories, n):
    for s in range(4):
        x = trajectories[:n, s]
        found = spectrum(centred(x))
        assert found.shape == (min(n, 30),)
        pca = SklearnPCA(svd_solver="full").fit(x.numpy())
        theirs = pca.explained_variance_ * (n - 1) / n  # theirs divides by N - 1
        np.testing.assert_allclose(found.numpy(), theirs, rtol=1e-4, atol=1e-6)
        counted = int(np.searchsorted(np.cumsum(pca.explained_variance_ratio_), 0.9)) + 1
        assert int(components_for(found)) == counted


def test_participation_of_known_spectra():
    ball, line = torch.ones(7), torch.tensor([3.0, 0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(participation(torch.stack([ball, line])), torch.tensor([7.0, 1.0]))
    assert components_for(ball, 0.9).item() == 7 and components_for(line, 0.9).item() == 1
    assert components_for(torch.zeros(3)).isnan()
    with pytest.raises(ValueError, match="share=2"):
        components_for(ball, 2.0)


@pytest.mark.parametrize("n", [60, 20], ids=["more sequences than units", "more units than sequences"])
def test_spectra_of_some_rows_are_those_of_their_own_covariance(trajectories, n):
    """Against numpy's covariance of those rows alone, as far from their own mean as an outlier brings them."""
    x = trajectories[:n, 2].clone()
    x[3] += 50
    group = torch.arange(n) % 10
    chosen = torch.stack([*(group != g for g in range(10)), torch.ones(n, dtype=torch.bool)])
    found = spectra_of_rows(centred(x), chosen)
    assert found.shape == (11, min(n, 30))
    for rows, variances in zip(chosen, found, strict=True):
        expected = np.linalg.eigvalsh(np.cov(x[rows].numpy().T, bias=True))[::-1][: len(variances)]
        np.testing.assert_allclose(variances.numpy(), expected, rtol=1e-3, atol=2e-5 * expected[0])
    assert participation(found)[3] > 1.5 * participation(found)[10]  # without the outlier


@pytest.mark.parametrize("n", [60, 20], ids=["more sequences than units", "more units than sequences"])
def test_spectra_without_the_largest_units_are_those_of_the_others(trajectories, n):
    x = centred(trajectories[:n, 1])
    order = torch.tensor([7, 2, 19, 4])
    x[:, 7] *= 300
    found = spectra_without_largest(x, order, [0, 3, 1, 4])
    for count, variances in zip([0, 3, 1, 4], found, strict=True):
        stays = [u for u in range(30) if u not in order[:count]]
        expected = np.linalg.eigvalsh(np.cov(x[:, stays].double().numpy().T, bias=True))[::-1][: min(n, len(stays))]
        np.testing.assert_allclose(variances[: len(expected)], expected, rtol=1e-3, atol=1e-6 * expected[0])
        assert (variances[len(expected) :] == 0).all()


def test_a_unit_that_is_not_finite_is_left_out(trajectories):
    broken = trajectories[:, 1].clone()
    broken[7, 4] = torch.inf
    clean = trajectories[:, 1].clone()
    clean[:, 4] = 0
    assert torch.equal(centred(broken), centred(clean))


# -- intrinsic dimension and entropy -----------------------------------------------------------------------------------


def planted(n, k, d, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(n, k)) @ rng.normal(size=(k, d)))  # no edge, which would bias both


def swiss_roll(n, seed=0):
    from sklearn.datasets import make_swiss_roll

    return torch.from_numpy(make_swiss_roll(n, random_state=seed)[0])


@pytest.mark.parametrize("k", [1, 2, 5])
def test_intrinsic_dimensions_find_planted_subspaces(k):
    pytest.importorskip("skdim")
    x = [planted(1000, k, 40, seed) for seed in range(4)]
    assert np.mean([dimension.twonn(one) for one in x]) == pytest.approx(k, rel=0.05)
    assert np.mean([dimension.mle(one) for one in x]) == pytest.approx(k, rel=0.05)
    assert np.mean([float(dimension.effective_rank(one)) for one in x]) == pytest.approx(k, rel=0.05)


def test_a_curved_sheet_has_two_dimensions_and_three_components():
    pytest.importorskip("skdim")
    x = [swiss_roll(1000, seed) for seed in range(4)]
    assert np.mean([dimension.twonn(one) for one in x]) == pytest.approx(2, rel=0.05)
    assert np.mean([dimension.mle(one) for one in x]) == pytest.approx(2, rel=0.05)
    assert float(dimension.effective_rank(x[0])) > 2.8


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_flat_torus_of_k_angles_has_k_dimensions_and_twice_the_components(k):
    """A manifold without an edge, in 20 units: circles multiplied with each other."""
    pytest.importorskip("skdim")
    basis = np.linalg.qr(np.random.default_rng(9).normal(size=(20, 2 * k)))[0].T
    angles = [np.random.default_rng(seed).uniform(0, 2 * np.pi, size=(1000, k)) for seed in range(4)]
    x = [torch.from_numpy(np.concatenate([np.sin(a), np.cos(a)], 1) @ basis) for a in angles]
    assert np.mean([dimension.twonn(one) for one in x]) == pytest.approx(k, rel=0.05)
    assert np.mean([dimension.mle(one) for one in x]) == pytest.approx(k, rel=0.05)
    assert float(dimension.effective_rank(x[0])) == pytest.approx(2 * k, rel=0.05)


def test_repeated_states_are_left_out_and_counted():
    skdim = pytest.importorskip("skdim")
    x = planted(300, 3, 10)
    doubled = torch.cat([x, x[:100], x[:1].expand(50, -1)])
    kept, left_out = dimension.distinct(doubled)
    assert (len(kept), left_out) == (300, 150)
    assert dimension.twonn(doubled) == pytest.approx(float(skdim.id.TwoNN().fit(x.numpy()).dimension_), rel=1e-9)
    assert math.isnan(dimension.twonn(torch.ones(50, 4))) and math.isnan(dimension.mle(torch.ones(50, 4)))


def test_entropies_against_scipy():
    from scipy.stats import entropy

    x = planted(60, 7, 20).to(torch.float32)
    values = np.linalg.svd((x - x.double().mean(0)).numpy().astype(float), compute_uv=False)
    assert float(dimension.matrix_entropy(x)) == pytest.approx(entropy(values**2), rel=1e-6)
    assert float(dimension.effective_rank(x)) == pytest.approx(math.exp(entropy(values)), rel=1e-6)
    raw = np.linalg.svd(x.numpy().astype(float), compute_uv=False)
    assert float(dimension.matrix_entropy(x, centre=False)) == pytest.approx(entropy(raw**2), rel=1e-6)


def test_effective_rank_counts_equal_directions_in_any_basis():
    q, _ = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    x = torch.cat([torch.eye(4), -torch.eye(4)]).to(torch.float64) @ q[:4]
    assert float(dimension.effective_rank(x)) == pytest.approx(4, rel=1e-9)
    assert float(dimension.matrix_entropy(x)) == pytest.approx(math.log(4), rel=1e-9)
    several = torch.stack([x, 5 * x @ q])
    assert dimension.effective_rank(several).tolist() == pytest.approx([4, 4])
    assert dimension.effective_rank(torch.ones(5, 3)).isnan()


def test_what_has_no_dimension_is_refused():
    with pytest.raises(ValueError, match=r"give \(N, D\)"):
        dimension.twonn(torch.randn(3, 4, 5))
    with pytest.raises(ValueError, match="NaN or infinities"):
        dimension.twonn(torch.full((30, 4), torch.nan))
    with pytest.raises(ValueError, match="k=1"):
        dimension.mle(torch.randn(30, 4), k=1)


def test_one_table_of_distances_gives_what_the_library_gives():
    """Against scikit-dimension on the states themselves, of all of them and without each group; repeated ones once."""
    skdim = pytest.importorskip("skdim")
    x = planted(200, 4, 30)
    x[:, 7] += 24000  # as a massive unit
    x = torch.cat([x, x[:40]])
    group = torch.arange(240) % 5
    found = dimension.intrinsic_dimension(x, group)
    assert found.repeated == 40
    assert found.twonn == pytest.approx(float(skdim.id.TwoNN().fit(x[:200].numpy()).dimension_), rel=1e-5)
    assert found.mle == pytest.approx(float(skdim.id.MLE().fit(x[:200].numpy()).dimension_), rel=1e-5)
    for g in range(5):
        rest = x[:200][group[:200] != g]
        assert float(found.twonn_groups[g]) == pytest.approx(dimension.twonn(rest), rel=1e-5)
        assert float(found.mle_groups[g]) == pytest.approx(dimension.mle(rest), rel=1e-5)


def test_few_or_equal_states_have_no_intrinsic_dimension():
    pytest.importorskip("skdim")
    found = dimension.intrinsic_dimension(torch.ones(30, 4), torch.arange(30) % 3)
    assert math.isnan(found.twonn) and math.isnan(found.mle) and found.repeated == 29
    assert found.twonn_groups.isnan().all() and len(found.twonn_groups) == 3
    assert math.isnan(dimension.intrinsic_dimension(planted(9, 2, 5)).twonn)  # fewer than neighbours
    assert dimension.intrinsic_dimension(planted(12, 2, 5)).mle > 0


def test_entropies_of_variances_are_those_of_the_states():
    x = planted(50, 6, 20)
    variances = spectrum(x - x.mean(0))
    rank, entropy = dimension.rank_of_variances(variances), dimension.entropy_of_variances(variances)
    assert float(rank) == pytest.approx(float(dimension.effective_rank(x)), rel=1e-5)
    assert float(entropy) == pytest.approx(float(dimension.matrix_entropy(x)), rel=1e-6)


@pytest.mark.parametrize("of", [dimension.effective_rank, dimension.matrix_entropy])
def test_rank_and_entropy_of_what_has_none(of):
    equal = torch.randn(1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).expand(37, -1)
    for nothing in (
        equal,
        equal[:1],
        torch.ones(0, 8),
        torch.ones(5, 0),
    ):  # a mean of 37 is not to the bit what each is
        assert of(nothing).isnan()
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="NaN or infinities"):
            of(torch.full((5, 3), wrong))
    with pytest.raises(ValueError, match=r"give \(N, D\)"):
        of(torch.ones(3))
    whole = planted(40, 3, 6).mul(100).round()
    assert float(of(whole.long())) == pytest.approx(float(of(whole)), rel=1e-9)
    assert float(of(whole.half())) == pytest.approx(float(of(whole.half().double())), rel=1e-9)


def test_mixed_states_have_the_mean_and_covariance_of_the_states():
    x = planted(50, 3, 8) + 5
    x[4] = 100.0
    found = dimension.mixed(x, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(found.mean(0), x.mean(0), rtol=1e-9)
    np.testing.assert_allclose(np.cov(found.T), np.cov(x.T), rtol=1e-9, atol=1e-9)
    assert float((found - x).abs().max()) > 1 and float(found.max()) < 99  # the far one is shared out among all
    again = dimension.mixed(x, torch.Generator().manual_seed(0))
    assert torch.equal(found, again)


def test_gaussian_states_are_no_less_than_their_mixed_ones_and_a_curved_sheet_is():
    pytest.importorskip("skdim")
    generator, below = torch.Generator().manual_seed(1), 0
    for seed in range(40):
        x = torch.randn(40, 20, generator=generator, dtype=torch.float64) * torch.linspace(3, 0.1, 20)
        found = dimension.of_mixed(x, seed=seed)
        assert found.shape == (10, 2)
        assert float(found[0, 0]) == pytest.approx(dimension.twonn(x), rel=1e-6)
        below += sum(dimension.against_mixed(of).p < 0.05 for of in found.unbind(1))
    assert below <= 11  # of 80, 4 of them by chance; 12 and more once in a thousand times
    sheet = [dimension.against_mixed(of) for of in dimension.of_mixed(swiss_roll(300)).unbind(1)]
    assert all(test.p < 0.01 and test.value < 2.3 < 2.6 < test.mean for test in sheet)
    assert dimension.of_mixed(torch.ones(30, 4)).isnan().all()
    assert math.isnan(dimension.against_mixed(dimension.of_mixed(torch.ones(30, 4))[:, 0]).p)


@pytest.mark.parametrize("n", [400, 40], ids=["more states than units", "more units than states"])
def test_rounding_does_not_count_as_dimensions(n):
    """Five states that repeat, and one unit that outweighs the rest, against numpy's singular values in float64."""
    few = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    massive = torch.randn(n, 64, generator=torch.Generator().manual_seed(1))
    massive[:, 3] *= 1e5
    group = torch.arange(n) % 4
    for x in (few[torch.arange(n) % 5], massive):
        shares = np.linalg.svd((x - x.mean(0)).double().numpy(), compute_uv=False)
        expected = np.exp(scipy.stats.entropy(shares))
        assert float(dimension.rank_of_variances(spectrum(centred(x)))) == pytest.approx(expected, rel=1e-4)
        rest = spectra_of_rows(centred(x), (group != 0)[None])[0]
        shares = np.linalg.svd((x[group != 0] - x[group != 0].mean(0)).double().numpy(), compute_uv=False)
        assert float(dimension.rank_of_variances(rest)) == pytest.approx(np.exp(scipy.stats.entropy(shares)), rel=1e-4)


def test_neighbours_without_a_group_are_those_of_the_others_alone():
    """Also where a group's states lie so close together that all the nearest known ones are of it; with duplicates."""
    pytest.importorskip("skdim")
    x = torch.cat([planted(120, 3, 6), planted(90, 2, 6) * 1e-3, torch.ones(4, 6)])
    group = torch.cat([torch.arange(120) % 3, torch.full((94,), 3)])
    found = dimension.intrinsic_dimension(x, group)
    for g, by_two, likely in zip(range(4), found.twonn_groups, found.mle_groups, strict=True):
        assert float(by_two) == pytest.approx(dimension.twonn(x[group != g]), rel=1e-9)
        assert float(likely) == pytest.approx(dimension.mle(x[group != g]), rel=1e-9)
