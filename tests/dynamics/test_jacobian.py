"""Spectra, exponents and nulls of Jacobians: against numpy, scipy, exact systems and random matrix theory."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch

from rsdyn.dynamics import jacobian
from rsdyn.dynamics.jacobian import (
    antisymmetric_share,
    complex_share_of_chance,
    henrici,
    leading_exponents,
    lyapunov,
    matched_null,
    participation_ratio,
    products_to_the_end,
    spectrum,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation(n, seed=0):
    return torch.linalg.qr(normal(n, n, seed=seed)).Q


def planted(exponents, steps, seed=0):
    """A linear system whose product has these exponents exactly: each step turns one orthonormal basis into another."""
    bases = [rotation(len(exponents), seed + s) for s in range(steps + 1)]
    return torch.stack([b @ torch.diag(exponents.exp()) @ a.T for a, b in pairwise(bases)])


# -- spectrum ----------------------------------------------------------------------------------------------------------


def test_spectrum_is_numpys_and_scipys():
    j = torch.eye(30, dtype=torch.float64) + 0.3 * normal(30, 30)
    found = spectrum(j)
    expected = np.linalg.eigvals(j.numpy())
    np.testing.assert_allclose(np.sort_complex(found.eigenvalues.numpy()), np.sort_complex(expected), rtol=1e-10)
    np.testing.assert_allclose(found.singular_values, scipy.linalg.svdvals(j.numpy()), rtol=1e-12)
    assert found.gain == found.singular_values[0] and found.rank == 30
    assert float(found.log_abs_det) == pytest.approx(np.linalg.slogdet(j.numpy())[1], abs=1e-10)
    assert float(found.expanding) == (scipy.linalg.svdvals(j.numpy()) > 1).mean()
    assert float(found.complex_share) == (expected.imag != 0).mean()
    g = j - torch.eye(30)
    assert float(found.rms) == pytest.approx(float(g.square().mean().sqrt()))
    assert float(found.antisymmetric) == pytest.approx(float(antisymmetric_share(g)))
    assert float(found.henrici) == pytest.approx(float(henrici(j)), rel=1e-9)
    assert float(found.henrici_update) == pytest.approx(float(henrici(g)), rel=1e-9)


@pytest.mark.parametrize("n", [5, 12])
def test_henrici_is_the_strict_triangle_of_schurs_form(n):
    a = normal(n, n, seed=n)
    triangle = np.triu(scipy.linalg.schur(a.numpy().astype(complex))[0], 1)
    assert float(henrici(a)) == pytest.approx(np.linalg.norm(triangle) / np.linalg.norm(a.numpy()), rel=1e-10)


def test_normal_and_nilpotent_matrices():
    rest = normal(8, 8)
    for a in (rest + rest.T, rest - rest.T, rotation(8)):
        assert float(henrici(a)) < 1e-7
    assert float(henrici(torch.diag(torch.ones(5, dtype=torch.float64), 1))) == pytest.approx(1)


def test_a_departure_is_not_lost_beside_an_identity():
    """J = I + G with a tiny G: the squares of J alone would leave rounding."""
    g = torch.zeros(6, 6, dtype=torch.float64)
    g[0, 1] = 1e-7
    found = spectrum(torch.eye(6, dtype=torch.float64) + g)
    assert float(found.henrici_update) == pytest.approx(1, rel=1e-6)
    assert float(found.henrici) == pytest.approx(1e-7 / 6**0.5, rel=1e-6)


def test_pure_rotation():
    angle = torch.linspace(0.1, 3, 6, dtype=torch.float64)
    blocks = [torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) for a in angle]
    j = torch.block_diag(*blocks).double()
    q = rotation(12)
    j = q @ j @ q.T
    found = spectrum(j)
    torch.testing.assert_close(found.eigenvalues.abs(), torch.ones(12, dtype=torch.float64), rtol=1e-6, atol=0)
    assert found.complex_share == 1 and float(found.henrici) < 1e-6
    generator = rotation(12) @ torch.block_diag(*[torch.tensor([[0.0, -1], [1, 0]])] * 6).double() @ rotation(12).T
    assert float(antisymmetric_share(generator)) == pytest.approx(1)
    torch.testing.assert_close(lyapunov(j[None].expand(7, 12, 12)), torch.zeros(12).double(), rtol=0, atol=1e-6)


def test_antisymmetric_share():
    symmetric, antisymmetric = torch.ones(2, 2), torch.tensor([[0.0, 1], [-1, 0]])
    shares = antisymmetric_share(torch.stack([symmetric, antisymmetric, symmetric + antisymmetric]))
    torch.testing.assert_close(shares, torch.tensor([0.0, 1, 1 / 3]))
    n = 300
    assert float(antisymmetric_share(normal(n, n))) == pytest.approx((1 - 1 / n) / 2, abs=0.01)
    assert antisymmetric_share(torch.zeros(3, 3)).isnan()


def test_a_singular_matrix_is_said_to_be():
    j = normal(5, 5)
    j[:, 1] = j[:, 3]
    found = spectrum(j)
    assert found.log_abs_det == -torch.inf and found.rank == 4
    assert spectrum(normal(6, 2) @ normal(2, 6, seed=1)).rank == 2


def test_leading_dimensions_and_half_precision():
    js = normal(2, 3, 4, 4, dtype=torch.float32)
    found = spectrum(js)
    assert found.eigenvalues.shape == (2, 3, 4) and found.henrici.shape == (2, 3)
    torch.testing.assert_close(found.henrici[1, 2], spectrum(js[1, 2]).henrici)
    assert spectrum(js.bfloat16()).rms.dtype == torch.float32


def test_what_an_orthogonal_change_of_basis_leaves():
    j, q = torch.eye(9, dtype=torch.float64) + 0.5 * normal(9, 9), rotation(9, seed=3)
    before, after = spectrum(j), spectrum(q @ j @ q.T)
    for name in ("singular_values", "log_abs_det", "rms", "expanding", "complex_share", "antisymmetric", "henrici"):
        torch.testing.assert_close(getattr(before, name), getattr(after, name), rtol=1e-8, atol=1e-10)
    js = normal(4, 9, 9, seed=5)
    torch.testing.assert_close(lyapunov(q @ js @ q.T), lyapunov(js), rtol=1e-9, atol=1e-10)


def test_what_another_change_of_basis_does_not():
    j, c = (
        torch.eye(9, dtype=torch.float64) + 0.5 * normal(9, 9),
        torch.diag(torch.linspace(1, 9, 9, dtype=torch.float64)),
    )
    before, after = spectrum(j), spectrum(c @ j @ torch.linalg.inv(c))
    assert float(after.log_abs_det) == pytest.approx(float(before.log_abs_det), abs=1e-9)
    assert after.complex_share == before.complex_share
    for name in ("gain", "antisymmetric", "henrici"):
        assert abs(float(getattr(after, name) - getattr(before, name))) > 1e-3


# -- what chance gives -------------------------------------------------------------------------------------------------


def test_complex_share_of_chance():
    """Exact small cases of Edelman, Kostlan & Shub (their table of the expected number of real eigenvalues)."""
    real = {1: 1, 2: math.sqrt(2), 3: 1 + math.sqrt(2) / 2, 4: 11 * math.sqrt(2) / 8, 5: 1 + 13 * math.sqrt(2) / 16}
    for n, expected in real.items():
        assert complex_share_of_chance(n) == pytest.approx(1 - expected / n, abs=1e-12)
    for n in (576, 4096):
        assert complex_share_of_chance(n) == pytest.approx(1 - math.sqrt(2 / (math.pi * n)), abs=1e-3)
    with pytest.raises(ValueError, match="n=0"):
        complex_share_of_chance(0)


def test_ginibre():
    """200 iid matrices: their share of real eigenvalues, and the circle that the others fill."""
    n = 40
    found = spectrum(normal(200, n, n) / n**0.5)
    error = float(found.complex_share.std()) / 200**0.5
    assert float(found.complex_share.mean()) == pytest.approx(complex_share_of_chance(n), abs=4 * error)
    inside = (found.eigenvalues.abs() < 0.5).double().mean()
    assert float(inside) == pytest.approx(0.25, abs=0.02)


def test_matched_nulls():
    g = normal(3, 20, 20) @ torch.diag(torch.linspace(0.1, 3, 20, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    gaussian = matched_null(g, "gaussian", generator)
    torch.testing.assert_close(gaussian.square().mean((1, 2)), g.square().mean((1, 2)), rtol=0.2, atol=0)
    rotated = matched_null(g, "rotated", generator)
    torch.testing.assert_close(torch.linalg.svdvals(rotated), torch.linalg.svdvals(g))
    assert float((rotated - g).norm() / g.norm()) > 0.5
    again = [matched_null(g, "rotated", generator.manual_seed(1)) for _ in range(2)]
    assert torch.equal(*again)
    with pytest.raises(ValueError, match=r"kind='shuffled': the matched nulls are gaussian and rotated"):
        matched_null(g, "shuffled", generator)


def test_haar_rotations_favour_no_direction():
    """Without the signs of R put back, QR's Q has a mean trace that is not 0."""
    drawn = jacobian._rotation(torch.empty(4000, 3, 3), torch.Generator().manual_seed(0))
    trace = drawn.diagonal(dim1=1, dim2=2).sum(-1)
    assert abs(float(trace.mean())) < 0.07  # its standard deviation is 1


# -- exponents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 40])
def test_a_linear_system_with_known_exponents(steps):
    exponents = torch.linspace(1, -3, 20, dtype=torch.float64)
    js = planted(exponents, steps)
    torch.testing.assert_close(lyapunov(js), exponents, rtol=0, atol=1e-12)
    torch.testing.assert_close(lyapunov(js, 3), exponents[:3], rtol=0, atol=1e-9)
    # multiplied out, most of them are rounding
    product = torch.linalg.multi_dot([*js.flip(0)]) if steps > 1 else js[0]
    missed = torch.linalg.svdvals(product).log() / steps - exponents
    assert steps == 1 or float(missed.abs().max()) > 0.1


@pytest.mark.parametrize(("n", "steps", "size"), [(12, 60, 0.3), (6, 400, 0.8), (30, 300, 0.2)])
def test_sum_of_the_exponents_is_that_of_the_determinants(n, steps, size):
    js = torch.eye(n, dtype=torch.float64) + size * normal(steps, n, n)
    found = lyapunov(js)
    assert (found.diff() <= 0).all()
    assert float(found.sum() * steps) == pytest.approx(float(torch.linalg.slogdet(js).logabsdet.sum()), abs=1e-8)


def test_singular_values_of_a_long_product_against_many_digits():
    """P^T P in 240 digits."""
    mpmath = pytest.importorskip("mpmath")
    js = torch.eye(5, dtype=torch.float64) + 0.8 * normal(120, 5, 5)
    with mpmath.workdps(240):
        product = mpmath.eye(5)
        for j in js:
            product = mpmath.matrix(j.tolist()) * product
        values = mpmath.eigsy(product.T * product, eigvals_only=True)
        expected = sorted((float(mpmath.log(v)) / 2 for v in values), reverse=True)
    assert expected[0] - expected[-1] > 100
    np.testing.assert_allclose(lyapunov(js) * 120, expected, atol=1e-10)


def test_windows_of_a_range_that_float64_does_not_have(monkeypatch):
    js = torch.eye(24, dtype=torch.float64) + 0.3 * normal(500, 24, 24)
    whole = lyapunov(js)
    monkeypatch.setattr(jacobian, "_WINDOW", 150.0)
    torch.testing.assert_close(lyapunov(js), whole, rtol=0, atol=1e-10)
    longer = torch.cat([js] * 3)
    found = lyapunov(longer)
    assert float(found[0] - found[-1]) * len(longer) > 1500  # nats: exp of it is beyond float64
    assert float(found.sum()) * 1500 == pytest.approx(3 * float(torch.linalg.slogdet(js).logabsdet.sum()), abs=1e-7)


def test_exponents_of_a_contraction_and_of_a_growing_norm():
    js = 0.5 * torch.stack([rotation(6, s) for s in range(9)])
    torch.testing.assert_close(lyapunov(js), torch.full((6,), math.log(0.5), dtype=torch.float64), rtol=0, atol=1e-12)
    # a state that only grows longer: every direction grows as its norm does, so none contracts relative to it
    grown = lyapunov(1.3 * torch.stack([rotation(6, s) for s in range(9)])) - math.log(1.3)
    torch.testing.assert_close(grown, torch.zeros(6).double(), rtol=0, atol=1e-12)


def test_a_lost_direction_is_counted():
    js = normal(3, 6, 6)
    js[1] = js[1, :, :4] @ normal(4, 6, seed=2)
    found = lyapunov(js)
    assert (found == -torch.inf).sum() == 2
    expected = torch.linalg.svdvals(js[2] @ js[1] @ js[0])[:4].log() / 3
    torch.testing.assert_close(found[:4], expected, rtol=1e-9, atol=1e-9)
    assert lyapunov(js, 5)[4] == -torch.inf
    assert (lyapunov(torch.zeros(2, 3, 3)) == -torch.inf).all()
    # a small direction is not a lost one
    assert float(lyapunov(torch.tensor([[1.0, 0], [0, 1e-20]], dtype=torch.float64)[None])[1]) == pytest.approx(
        -20 * math.log(10)
    )


def test_leading_exponents_of_maps_alone():
    js = torch.eye(60, dtype=torch.float64) + 0.1 * normal(10, 60, 60)
    whole = lyapunov(js)
    assert torch.equal(lyapunov(js, 60), whole)
    torch.testing.assert_close(lyapunov(js, 2), whole[:2], rtol=0, atol=1e-9)
    forward, backward = [lambda v, j=j: j @ v for j in js], [lambda u, j=j: j.T @ u for j in js]
    found = leading_exponents(forward, backward, 60, 5, rounds=100)
    torch.testing.assert_close(found.value, whole[:5], rtol=0, atol=1e-9)
    assert leading_exponents(forward, backward, 60, 5, rounds=2) == (None, 2)  # said, not guessed


def test_leading_exponents_by_blocks_and_by_subspaces():
    """Blocks of 10 columns, of 120; a range that one matrix of float64 does not hold; a low rank."""
    js = planted(torch.linspace(0.2, -1, 120, dtype=torch.float64), 12)
    maps = [lambda v, j=j: j @ v for j in js], [lambda u, j=j: j.T @ u for j in js]
    columns = []
    counted = [lambda v, f=f: (columns.append(v.shape[1]), f(v))[1] for f in maps[0]], maps[1]
    found = leading_exponents(*counted, 120, 12, rounds=30)
    torch.testing.assert_close(found.value, torch.linspace(0.2, -1, 120, dtype=torch.float64)[:12], rtol=0, atol=1e-9)
    assert set(columns) == {10} and len(columns) < 12 * 12  # sweeps of twelve steps
    wide = planted(torch.linspace(0.2, -40, 120, dtype=torch.float64), 12)
    assert jacobian._lanczos(*maps, jacobian._start(120, 10, "cpu"), 12, 120, 1, 1e-9) == (None, 1)
    maps = [lambda v, j=j: j @ v for j in wide], [lambda u, j=j: j.T @ u for j in wide]
    assert jacobian._lanczos(*maps, jacobian._start(120, 10, "cpu"), 12, 120, 30, 1e-9) is None
    found = leading_exponents(*maps, 120, 12, rounds=30)
    torch.testing.assert_close(found.value, torch.linspace(0.2, -40, 120, dtype=torch.float64)[:12], rtol=0, atol=1e-9)
    low = normal(120, 30) @ normal(30, 120, seed=1)
    found = leading_exponents([lambda v: low @ v], [lambda u: low.T @ u], 120, 10, rank=30)
    torch.testing.assert_close(found.value, torch.linalg.svdvals(low)[:10].log(), rtol=0, atol=1e-9)


def test_products_to_the_end_are_those_multiplied_out():
    js = torch.eye(12, dtype=torch.float64) + 0.4 * normal(5, 12, 12)
    found = products_to_the_end(js)
    for s in range(5):
        product = torch.linalg.multi_dot([*js[s:].flip(0), torch.eye(12).double()])
        values = torch.linalg.svdvals(product)
        assert float(found.gain[s]) == pytest.approx(float(values[0]), rel=1e-6)
        assert float(found.participation[s]) == pytest.approx(float(participation_ratio(values)), rel=1e-9)


@pytest.mark.parametrize("spread", [0.01, 0.3])
def test_largest_gain_of_a_wide_product(spread):
    """Beyond 128 units by Krylov blocks, also where the next singular values are near."""
    js = torch.eye(200, dtype=torch.float64) + spread * normal(3, 200, 200) / 200**0.5
    expected = torch.linalg.svdvals(torch.linalg.multi_dot([*js.flip(0)]))[0]
    assert float(products_to_the_end(js).gain[0]) == pytest.approx(float(expected), rel=3e-4)
    rank_one = normal(200, 1) @ normal(1, 200, seed=1)
    assert float(products_to_the_end(rank_one[None]).gain[0]) == pytest.approx(float(torch.linalg.norm(rank_one)))


def test_participation_ratio():
    assert float(participation_ratio(torch.tensor([1e200, 0, 0], dtype=torch.float64))) == 1
    assert float(participation_ratio(torch.ones(7))) == pytest.approx(7)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [spectrum, henrici, antisymmetric_share, lyapunov])
@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (torch.full((2, 3, 3), torch.nan), "2 of 2 matrices hold NaN"),
        (torch.full((1, 3, 3), torch.inf), "NaN or infinities"),
        (torch.zeros(2, 3, 4), "square"),
        (torch.zeros(3), "square"),
        (torch.zeros(1, 0, 0), "square"),
        (torch.zeros(1, 3, 3, dtype=torch.int64), "real floating point"),
        (torch.zeros(1, 3, 3, dtype=torch.complex64), "real floating point"),
        ([[1.0]], "list"),
    ],
)
def test_matrices_that_are_refused(function, matrix, words):
    with pytest.raises(ValueError, match=words):
        function(matrix)


def test_exponents_that_are_refused():
    js = normal(4, 3, 3)
    for k in (0, 4, -1, True, 1.0):
        with pytest.raises(ValueError, match=rf"k={k}: .*exponents 1 to 3"):
            lyapunov(js, k)
    with pytest.raises(ValueError, match=r"give \(S, D, D\)"):
        lyapunov(js[0])
    with pytest.raises(ValueError, match="at least one"):
        lyapunov(js[:0])
