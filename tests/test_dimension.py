import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as SklearnPCA

from rsdyn.dynamics.dimension import components_for, gram, participation, participation_of_gram, spectra


@pytest.fixture(scope="module")
def trajectories():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, 30, generator=generator, dtype=torch.float64)
    scale = torch.linspace(1, 0.01, 30, dtype=torch.float64) ** torch.tensor([0.1, 1, 2, 4.0])[:, None]
    return x * scale + 100  # later sublayers fill fewer dimensions, far from zero


def test_spectra_equal_sklearns(trajectories):
    found = spectra(gram(trajectories))
    for s in range(4):
        pca = SklearnPCA(svd_solver="full").fit(trajectories[:, s].numpy())
        theirs = pca.explained_variance_ * 59 / 60  # theirs divides by N - 1
        np.testing.assert_allclose(found[s, :30].numpy(), theirs, rtol=1e-4, atol=1e-7)
        counted = int(np.searchsorted(np.cumsum(pca.explained_variance_ratio_), 0.9)) + 1
        assert int(components_for(found)[s]) == counted
    assert (found[:, 30:].abs() < 1e-4 * found[:, :1]).all()


def test_participation_of_known_spectra():
    ball, line = torch.ones(7), torch.tensor([3.0, 0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(participation(torch.stack([ball, line])), torch.tensor([7.0, 1.0]))
    assert components_for(ball, 0.9).item() == 7 and components_for(line, 0.9).item() == 1
    assert components_for(torch.zeros(3)).isnan()
    with pytest.raises(ValueError, match="share=2"):
        components_for(ball, 2.0)


def test_participation_of_some_rows_is_that_of_their_own_spectrum(trajectories):
    grams = gram(trajectories)
    rows = torch.arange(60)[torch.arange(60) % 10 != 3]
    own = participation(spectra(gram(trajectories[rows])))
    torch.testing.assert_close(participation_of_gram(grams, rows), own, rtol=1e-3, atol=0)
    torch.testing.assert_close(
        participation_of_gram(grams, torch.arange(60)), participation(spectra(grams)), rtol=1e-3, atol=0
    )


def test_units_add_up_and_unusable_ones_are_left_out(trajectories):
    whole = gram(trajectories)
    torch.testing.assert_close(gram(trajectories[..., :11]) + gram(trajectories[..., 11:]), whole, rtol=1e-4, atol=1e-2)
    broken = trajectories.clone()
    broken[5, 2, 7] = torch.nan
    keep = [u for u in range(30) if u != 7]
    torch.testing.assert_close(gram(broken)[2], gram(trajectories[..., keep])[2])
    torch.testing.assert_close(gram(broken)[1], whole[1])
