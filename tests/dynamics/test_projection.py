"""PCA against scikit-learn's full SVD and against streams whose planes are known."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as SklearnPCA
from systems import closed_curve, contraction, norm_growth, planted_plane, rotation

from rsdyn.dynamics.moments import covariance, merge_covariance
from rsdyn.dynamics.projection import PCA, Projection


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12)) + 10 * rng.normal(size=12)


@pytest.mark.parametrize("k", [1, 2, 5, 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_sklearn(rows, k, dtype):
    data = torch.from_numpy(rows).to(dtype)
    oracle = SklearnPCA(n_components=k, svd_solver="full").fit(data.double().numpy())
    pca = PCA.fit(data, k)
    close = {"atol": 1e-9} if dtype == torch.float64 else {"atol": 2e-4}
    np.testing.assert_allclose(pca.mean.numpy(), oracle.mean_, rtol=1e-12)
    cosines = np.abs((pca.components.numpy() * oracle.components_.T).sum(0))
    np.testing.assert_allclose(cosines, 1, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-8)
    share = 1e-12 if dtype == torch.float64 else 3e-8  # products are taken in float32
    np.testing.assert_allclose(
        pca.explained_variance_ratio.numpy(), oracle.explained_variance_ratio_, rtol=0, atol=share
    )
    population = oracle.explained_variance_ * 299 / 300
    atol = share * float(pca.total_variance)
    np.testing.assert_allclose(pca.variance.numpy(), population, rtol=0, atol=atol)
    np.testing.assert_allclose(
        pca.reconstruct(data).numpy(), oracle.inverse_transform(oracle.transform(rows)), rtol=0, **close
    )
    np.testing.assert_allclose(pca.encode(data).abs().numpy(), np.abs(oracle.transform(rows)), rtol=0, **close)


def test_planted_plane_is_found_exactly():
    planted = planted_plane(40, 6, 15)
    pca = PCA.fit(planted.x.reshape(-1, 15), 2)
    np.testing.assert_allclose(pca.variance.numpy(), planted.eigenvalues[:2].numpy(), rtol=1e-10)
    share = planted.eigenvalues[:2] / planted.eigenvalues.sum()
    np.testing.assert_allclose(pca.explained_variance_ratio.numpy(), share.numpy(), rtol=1e-10)
    np.testing.assert_allclose((pca.components.T @ planted.plane).abs().numpy(), np.eye(2), atol=1e-9)
    np.testing.assert_allclose(pca.mean.numpy(), planted.mean.numpy(), rtol=1e-10)
    unexplained = (pca.reconstruct(planted.x) - planted.x).square().sum(-1).mean()
    assert float(unexplained) == pytest.approx(float(planted.eigenvalues[2:].sum()), rel=1e-10)


def test_known_systems():
    stream, plane = rotation(20, 9, 7, angle=0.4)
    pca = PCA.fit(stream.reshape(-1, 7), 2)
    assert torch.allclose(pca.reconstruct(stream), stream, atol=1e-10)
    np.testing.assert_allclose(torch.linalg.svdvals(pca.components.T @ plane).numpy(), 1, rtol=1e-10)
    z = pca.encode(stream) - pca.encode(torch.zeros(7, dtype=torch.float64))
    cosines = torch.nn.functional.cosine_similarity(z[:, 1:], z[:, :-1], dim=-1)
    np.testing.assert_allclose(cosines.numpy(), np.cos(0.4), rtol=1e-10)

    stream, point = contraction(30, 5, 7, rate=0.7)
    pca = PCA.fit(stream.reshape(-1, 7), 7)
    distance = (pca.encode(stream) - pca.encode(point)).norm(dim=-1)
    np.testing.assert_allclose((distance[:, 1:] / distance[:, :-1]).numpy(), 0.7, rtol=1e-10)

    ray = norm_growth(1, 8, 7, factor=1.5)[0]
    pca = PCA.fit(ray, 1)
    assert float(pca.explained_variance_ratio) == pytest.approx(1, rel=1e-12)
    speed = (pca.encode(ray)[1:] - pca.encode(ray)[:-1]).norm(dim=-1)
    np.testing.assert_allclose(speed.numpy(), 0.5 * ray[:-1].norm(dim=-1).numpy(), rtol=1e-9)

    share = PCA.fit(closed_curve(100, 9, harmonics=3), 6).explained_variance_ratio
    np.testing.assert_allclose(share.numpy(), 1 / 6, rtol=1e-10)


def test_orthonormal_and_sign_fixed(rows):
    x = torch.from_numpy(rows)
    pca = PCA.fit(x, 12)
    np.testing.assert_allclose((pca.components.T @ pca.components).numpy(), np.eye(12), atol=1e-12)
    largest = pca.components.gather(0, pca.components.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    mean = x.mean(0)
    mirrored = PCA.fit(2 * mean - x, 12)  # the same covariance, met with every sign turned
    shuffled = PCA.fit(x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))], 12)
    for other in (mirrored, shuffled):
        assert torch.allclose(other.components, pca.components, atol=1e-8)
    assert torch.equal(PCA.fit(x, 12).components, pca.components)


@pytest.mark.parametrize("width", [149, 150])  # on either side of where all components are more than are worth finding
def test_a_few_components_of_many_units_are_those_of_sklearn(width):
    x = np.random.default_rng(0).normal(size=(400, width)) * np.geomspace(9, 1, width)
    pca, expected = PCA.fit(torch.from_numpy(x), 3), SklearnPCA(3, svd_solver="full").fit(x)
    np.testing.assert_allclose(pca.variance, expected.explained_variance_ * 399 / 400, rtol=1e-10)
    turned = np.abs((pca.components.T.numpy() * expected.components_).sum(1))
    np.testing.assert_allclose(turned, 1, rtol=1e-10)
    assert PCA.fit(torch.ones(400, width), 2).variance.tolist() == [0, 0]


@pytest.mark.parametrize("size", [1, 7, 299])
def test_streaming_equals_at_once(rows, size):
    x = torch.from_numpy(rows)
    state = covariance(x[:0])
    for part in x.split(size):
        state = merge_covariance(state, covariance(part))
    streamed, whole = PCA.from_covariance(state, 4), PCA.fit(x, 4)
    for name, buffer in whole.named_buffers():
        assert torch.allclose(streamed.get_buffer(name), buffer, rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shapes_and_dtype(rows, lead, dtype):
    pca = PCA.fit(torch.from_numpy(rows), 3)
    x = torch.zeros(*lead, 12, dtype=dtype)
    z = pca.encode(x)
    assert z.shape == (*lead, 3) and z.dtype == dtype
    assert pca.decode(z).shape == pca.reconstruct(x).shape == x.shape and pca.decode(z).dtype == dtype


def test_latents_survive_the_round_trip(rows):
    pca = PCA.fit(torch.from_numpy(rows), 3)
    z = torch.randn(5, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(pca.encode(pca.decode(z)), z, atol=1e-10)


def test_state_dict_round_trip(rows):
    pca, other = (PCA.fit(torch.from_numpy(rows[i:]), 2) for i in (0, 100))
    other.load_state_dict(pca.state_dict())
    assert torch.equal(other.encode(torch.ones(12)), pca.encode(torch.ones(12)))


@pytest.mark.parametrize(("n", "k", "rank"), [(300, 13, 12), (3, 3, 2), (1, 1, 0), (300, 0, 12), (300, -1, 12)])
def test_more_components_than_the_data_have(rows, n, k, rank):
    with pytest.raises(ValueError, match=rf"n_components={k}: {n} vectors of 12 units .* {rank} components; ask for"):
        PCA.fit(torch.from_numpy(rows[:n]), k)


def test_the_interface_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Projection()


def test_few_components_of_a_wide_stream_come_from_lanczos_and_are_the_same():
    """Above a thousand units only the components that are asked for are computed."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(3, 0.1, 1100)
    x = torch.randn(3000, 1100, generator=generator, dtype=torch.float64) * scale
    pca = PCA.fit(x, 3)
    values, vectors = np.linalg.eigh(np.cov(x.numpy(), rowvar=False, bias=True))
    np.testing.assert_allclose(pca.variance, values[::-1][:3], rtol=1e-10)
    np.testing.assert_allclose(np.abs((pca.components.numpy() * vectors[:, ::-1][:, :3]).sum(0)), 1, atol=1e-9)
    assert torch.equal(pca.components, PCA.fit(x, 3).components)
