"""What the shape of a stream must not depend on: the basis, the scale, where it lies, the order of sequences."""

import pytest
import torch

from rsdyn.dynamics import dimension, geometry, readout, similarity

N, S, D = 120, 7, 18
NEIGHBOURS = ("twonn", "mle")
OF_STATES = {name: getattr(dimension, name) for name in (*NEIGHBOURS, "effective_rank", "matrix_entropy")}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def x():
    """Trajectories whose units are of unequal size, away from the origin."""
    return drawn(N, S, D).cumsum(1) * torch.logspace(0, 1, D, dtype=torch.float64) + 5


def turn(seed=1):
    q, r = torch.linalg.qr(drawn(D, D, seed=seed))
    return q * r.diagonal().sign()


CHANGES = {
    "turned": lambda x: x @ turn(),
    "mirrored": lambda x: x.flip(-1),
    "small": lambda x: 1e-4 * x,
    "large": lambda x: 1e5 * x,
    "moved": lambda x: x - 40 * torch.linspace(-1, 1, D, dtype=torch.float64),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("measure", [geometry.curvature, geometry.straightness, similarity.cka_map])
def test_trajectories(measure, change, x):
    within = 1e-5 if measure is similarity.cka_map else 1e-7  # the first multiplies in float32
    torch.testing.assert_close(measure(CHANGES[change](x)), measure(x), rtol=within, atol=within)


@pytest.mark.parametrize("change", CHANGES)
def test_similarity_of_two_sets_of_states(change, x):
    y, changed = drawn(N, 5, seed=2), CHANGES[change](x[:, 0])
    torch.testing.assert_close(similarity.cka(changed, y), similarity.cka(x[:, 0], y), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(similarity.cka(y, changed), similarity.cka(y, x[:, 0]), rtol=1e-7, atol=1e-9)
    assert float(similarity.cka(changed, x[:, 0])) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", OF_STATES)
def test_dimensions(name, change, x):
    if name in NEIGHBOURS:
        pytest.importorskip("skdim")
    assert float(OF_STATES[name](CHANGES[change](x[:, 3]))) == pytest.approx(float(OF_STATES[name](x[:, 3])), rel=1e-6)


def test_the_order_of_sequences(x):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    for measure in (geometry.curvature, geometry.straightness):
        torch.testing.assert_close(measure(x[order]), measure(x)[order], rtol=1e-12, atol=0)
    torch.testing.assert_close(similarity.cka_map(x[order]), similarity.cka_map(x), rtol=1e-5, atol=1e-5)  # float32
    y = drawn(N, 5, seed=2)
    torch.testing.assert_close(similarity.cka(x[order, 2], y[order]), similarity.cka(x[:, 2], y), rtol=1e-9, atol=1e-9)
    for name, measure in OF_STATES.items():
        if name not in NEIGHBOURS or pytest.importorskip("skdim"):
            assert float(measure(x[order, 3])) == pytest.approx(float(measure(x[:, 3])), rel=1e-6), name


def test_a_readout_minds_neither_the_order_of_sequences_nor_the_numbers_of_tokens():
    final, here = (drawn(*shape, seed=4).log_softmax(-1) for shape in ((N, 30), (N, S, 30)))
    found = readout.readout(final, here)._asdict()
    order, renamed = (torch.randperm(n, generator=torch.Generator().manual_seed(5)) for n in (N, 30))
    moved = readout.readout(final[order][:, renamed], here[order][..., renamed])._asdict()
    moved["top"] = renamed[moved["top"]]  # the one that is a token's number
    for name, value in found.items():
        torch.testing.assert_close(moved[name], value[order], rtol=1e-9, atol=1e-12, msg=name)
