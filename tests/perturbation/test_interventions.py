"""Editing the stream in an ordinary forward, and states for grids: against the layers called by hand, and geometry."""

import numpy as np
import pytest
import torch
from family_zoo import ZOO
from scipy.stats import kstest, norm
from tiny_models import tiny_lm

from rsdyn.autoencoder.model import CompressingAutoencoder
from rsdyn.dynamics.moments import Moments
from rsdyn.dynamics.projection import PCA
from rsdyn.errors import NonFiniteError, UserError
from rsdyn.lm.continuing.continuation import continue_from, run_reference
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.source import find_lm
from rsdyn.perturbation.states import (
    add_noise,
    edit_stream,
    grid_points,
    grid_ranges,
    grid_states,
    moved_states,
    noise_states,
    random_directions,
    replace_stream,
    swap,
    swapped_states,
    teleport,
    through_projection,
)

IDS = np.array([1, 17, 203, 5, 99, 42])


@pytest.fixture(scope="module")
def lm(tiny_llama):
    return find_lm(str(tiny_llama)).load()


@pytest.fixture(scope="module")
def reference(lm):
    return run_reference(lm, IDS)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def hooks(lm):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in lm.base.modules())


def output(lm, ids=IDS):
    with torch.no_grad():
        return lm.base(input_ids=torch.as_tensor(np.atleast_2d(ids)), use_cache=False).last_hidden_state


# -- in an ordinary forward --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("site", ["resid_pre", "resid_mid"])
def test_the_stream_itself_moves(tmp_path, model_type, site):
    """The layer called by hand with the state, or its MLP half added to the state, gives the next layer's input."""
    lm = find_lm(str(tiny_lm(tmp_path, model_type=model_type))).load()
    s = lm.sublayer(1, site)
    state = 3 * torch.randn(lm.n_units, generator=gen())
    with replace_stream(lm, s, state):
        moved = lm.record([IDS])[0]
    assert torch.equal(moved[:s], lm.record([IDS])[0][:s])  # what lies before is as it was
    assert torch.equal(moved[s], state)
    layer = lm.base.layers[1]
    with torch.no_grad():
        middle = moved[2 * 1 + 1]
        by_hand = middle + layer.mlp(layer.post_attention_layernorm(middle[None]))[0]
    torch.testing.assert_close(moved[4], by_hand, rtol=1e-5, atol=1e-5)  # resid_pre[2]: the skip path moved too


@pytest.mark.parametrize("position", ["last", "all"])
def test_same_as_continuing(lm, reference, position):
    for s in range(lm.n_sublayers):
        state = reference.stream[s] + torch.randn(lm.n_units, generator=gen(s))
        with replace_stream(lm, s, state, position=position):
            hooked = lm.record([IDS])[0, s:]
        ours = continue_from(lm, reference, s, state[None], position=position).stream[0]
        torch.testing.assert_close(hooked, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(ZOO))
def test_every_family_and_site(name):
    """A layer's two sites, its stream 3-D or 2-D, in an ordinary forward and continued from there."""
    lm = LanguageModel(ZOO[name]().base_model, name=name)
    reference = run_reference(lm, IDS)
    before = hooks(lm)
    for s in range(lm.n_sublayers // lm.n_layers, lm.n_sublayers - 1):
        state = reference.stream[s] + reference.stream[s].std() * torch.randn(lm.n_units, generator=gen(s))
        with replace_stream(lm, s, state):
            hooked = lm.record([IDS])[0]
        assert torch.equal(hooked[s], state)
        ours = continue_from(lm, reference, s, state[None]).stream[0]
        torch.testing.assert_close(hooked[s:], ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))
    assert hooks(lm) == before


def test_a_layer_that_is_given_its_stream_by_name(lm):
    layer = lm.sites.layers[1]
    state = torch.randn(lm.n_units, generator=gen())
    by_name = lambda m, args, kwargs: ((), {"hidden_states": args[0], **kwargs})  # noqa: E731
    for s in (2, 3):
        with replace_stream(lm, s, state):
            expected = output(lm)
        handle = layer.register_forward_pre_hook(by_name, with_kwargs=True)
        try:
            with replace_stream(lm, s, state):
                assert torch.equal(output(lm), expected)
        finally:
            handle.remove()


@pytest.mark.parametrize("name", ["llama", "opt"])  # opt has sequences and tokens in one dimension at resid_mid
def test_a_state_for_each_row_of_a_batch(name):
    lm = LanguageModel(ZOO[name]().base_model, name=name)
    other = np.array([9, 8, 7, 6, 5, 4])
    states = torch.randn(2, lm.n_units, generator=gen())
    for position in ("all", "last"):
        with replace_stream(lm, 3, states, position=position):
            both = output(lm, np.stack([IDS, other]))
        for row, ids, state in zip(both, (IDS, other), states, strict=True):
            with replace_stream(lm, 3, state, position=position):
                torch.testing.assert_close(row, output(lm, ids)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both[:, :-1], output(lm, np.stack([IDS, other]))[:, :-1], rtol=1e-5, atol=1e-5)


def test_nothing_is_left_behind(lm, reference):
    before, plain = hooks(lm), output(lm)
    pca = PCA.fit(reference.stream, 2)
    managers = [
        lambda: replace_stream(lm, 2, reference.stream[0]),
        lambda: teleport(lm, 3, pca, torch.tensor([5.0, -5.0])),
        lambda: add_noise(lm, 1, 0.5, generator=gen()),
        lambda: swap(lm, 4, reference.stream.flip(0)),
        lambda: edit_stream(lm, 0, lambda x: -x, position="all"),
    ]
    for manager in managers:
        with manager():
            assert hooks(lm) > before
            assert not torch.allclose(output(lm)[0, -1], plain[0, -1])
        assert hooks(lm) == before
        assert torch.equal(output(lm), plain)
        with pytest.raises(IndexError), manager():
            output(lm, [10_000_000])
        assert hooks(lm) == before and lm.n_edits == 0
        assert torch.equal(output(lm), plain)


def test_an_exception_in_the_forward_leaves_nothing(lm):
    before, plain = hooks(lm), output(lm)
    with pytest.raises(ZeroDivisionError), edit_stream(lm, 1, lambda x: x / (1 // 0)):
        output(lm)
    with pytest.raises(NonFiniteError), edit_stream(lm, 1, lambda x: x * torch.nan):
        output(lm)
    with pytest.raises(ValueError, match=r"shape \(1, 3\)"), edit_stream(lm, 1, lambda x: x[:, :3]):
        output(lm)
    assert hooks(lm) == before and lm.n_edits == 0
    assert torch.equal(output(lm), plain)


def test_nested(lm, reference):
    a, b = torch.randn(2, lm.n_units, generator=gen())
    with replace_stream(lm, 1, a):
        alone = lm.record([IDS])[0]
        with replace_stream(lm, 3, b):
            both = lm.record([IDS])[0]
            assert lm.n_edits == 2
        with replace_stream(lm, 1, b):  # the inner one comes last
            assert torch.equal(lm.record([IDS])[0, 1], b)
        assert torch.equal(lm.record([IDS])[0], alone)
    assert torch.equal(both[1], a) and torch.equal(both[3], b) and not torch.equal(alone[3], b)
    torch.testing.assert_close(both[4:], continue_from(lm, reference, 3, b[None]).stream[0, 1:], rtol=1e-5, atol=1e-5)


def test_embeddings_given_by_the_caller_are_not_written_into(lm):
    given = torch.randn(1, 4, lm.n_units, generator=gen())
    kept = given.clone()
    with replace_stream(lm, 0, torch.ones(lm.n_units)), torch.no_grad():
        lm.base(inputs_embeds=given, use_cache=False)
    assert torch.equal(given, kept)


def test_teleport_and_noise_are_what_the_grid_functions_make(lm, reference):
    pca = PCA.fit(reference.stream, 2)
    point = torch.tensor([2.0, -1.0])
    for off_plane in ("drop", "keep"):
        with teleport(lm, 2, pca, point, off_plane=off_plane):
            moved = lm.record([IDS])[0, 2]
        torch.testing.assert_close(pca.encode(moved), point, rtol=1e-4, atol=1e-4)
        inside = pca.components.float() @ (pca.components.float().T @ (moved - reference.stream[2]))
        outside = moved - reference.stream[2] - inside
        assert (outside.norm() < 1e-4) == (off_plane == "keep")
    with add_noise(lm, 2, 0.5, generator=gen(7)):
        noisy = lm.record([IDS])[0, 2]
    torch.testing.assert_close(noisy, noise_states(reference.stream[2], 0.5, 1, generator=gen(7))[0])


def test_what_would_be_wrong_while_an_intervention_is_open_is_refused(lm, reference):
    with replace_stream(lm, 2, reference.stream[2]):
        with pytest.raises(ValueError, match="1 interventions are open"):
            continue_from(lm, reference, 0, reference.stream[:1])
        with pytest.raises(ValueError, match="1 interventions are open"):
            run_reference(lm, IDS)
        with pytest.raises(ValueError, match="one length"):
            lm.record([IDS, IDS[:3]])
        with pytest.raises(ValueError, match="one batch"):
            lm.record([IDS, IDS], batch_tokens=6)
        lm.record([IDS, IDS])


def test_bad_interventions(lm, reference):
    state = reference.stream[0]
    pca = PCA.fit(reference.stream)
    cases = [
        (lambda: replace_stream(lm, 6, state), r"sublayer=6.*from 0 to 5"),
        (lambda: replace_stream(lm, 0, state, position="first"), r"position='first'.*last, all"),
        (lambda: replace_stream(lm, 0, state[:5]), r"states: shape \(5,\).*\(32,\)"),
        (lambda: replace_stream(lm, 0, state * torch.nan), "NaN or Inf"),
        (lambda: add_noise(lm, 0, 0.0), r"sigma=0\.0.*above 0"),
        (lambda: add_noise(lm, 0, float("nan")), "sigma=nan"),
        (lambda: swap(lm, 0, reference.stream[1:]), r"trajectory: shape \(5, 32\).*\(6, 32\)"),
        (
            lambda: teleport(lm, 0, pca, state[:2], off_plane="lose"),
            "off_plane='lose'.*drop, keep",
        ),
    ]
    for manager, words in cases:
        with pytest.raises(ValueError, match=words), manager():
            pass
    with replace_stream(lm, 0, torch.zeros(3, 32)), pytest.raises(ValueError, match=r"\(3, 32\).*needs \(1, 32\)"):
        output(lm)
    assert hooks(lm) == 0 and lm.n_edits == 0


# -- states for a grid -------------------------------------------------------------------------------------------------


def test_grid_points_against_numpy():
    ranges = torch.tensor([[-1.0, 3.0], [10.0, 20.0]], dtype=torch.float64)
    first, second = np.meshgrid(np.linspace(-1, 3, 5), np.linspace(10, 20, 5), indexing="ij")
    points = grid_points(ranges, 5)
    np.testing.assert_allclose(points.numpy(), np.stack([first.ravel(), second.ravel()], 1), rtol=1e-12)
    np.testing.assert_allclose(grid_points(torch.tensor([[0, 1], [2, 4]]), 3)[-1].numpy(), [1.0, 4.0])  # whole numbers
    for n in (1, 0, 2.0, True):
        with pytest.raises(UserError, match=r"n=.*at least 2"):
            grid_points(ranges, n)
    for bad in ([[1.0, 1.0], [0.0, 1.0]], [[2.0, 1.0], [0.0, 1.0]], [[0.0, np.nan], [0.0, 1.0]]):
        with pytest.raises(UserError, match="min has to be below its max"):
            grid_points(torch.tensor(bad), 3)
    with pytest.raises(ValueError, match=r"ranges: shape \(2,\)"):
        grid_points(torch.tensor([0.0, 1.0]), 3)


def test_grid_ranges():
    latents = torch.tensor([[[0.0, -10.0], [4.0, 10.0]], [[1.0, 0.0], [2.0, 5.0]]])
    np.testing.assert_allclose(grid_ranges(latents, 0.25).numpy(), [[-1, 5], [-15, 15]])
    for bad in (latents[:0], latents[..., :1], latents[0, :1], latents * torch.nan):
        with pytest.raises(ValueError, match="latents"):
            grid_ranges(bad)


@pytest.fixture
def plane():
    x = torch.randn(200, 6, generator=gen(), dtype=torch.float64) * torch.tensor([5.0, 4, 1, 1, 1, 1])
    return PCA.fit(x @ torch.linalg.qr(torch.randn(6, 6, generator=gen(1), dtype=torch.float64)).Q + 3, 2), x[0]


def test_drop_is_in_the_plane_and_keep_holds_the_rest(plane):
    """Against the algebra of projections in numpy: z V' + mu, and x + V (z - V'(x - mu))."""
    pca, x = plane
    ranges = torch.tensor([[-6.0, 6.0], [-5.0, 5.0]])
    v, mu = pca.components.numpy(), pca.mean.numpy()
    drop = grid_states(pca, x, ranges, 4)
    z = drop.points.numpy()
    assert drop.states.shape == (16, 6)
    np.testing.assert_allclose(drop.states.numpy(), z @ v.T + mu, atol=1e-12)
    keep = grid_states(pca, x, ranges, 4, "keep")
    np.testing.assert_allclose(keep.states.numpy(), x.numpy() + (z - (x.numpy() - mu) @ v) @ v.T, atol=1e-12)
    home = pca.encode(x)[None]
    torch.testing.assert_close(moved_states(pca, x, home, "keep")[0], x)  # to where it is: nothing moves
    assert (moved_states(pca, x, home, "drop")[0] - x).norm() > 0.5


def test_autoencoder_with_statistics_of_each_sublayer():
    """The sublayer reaches encode and decode: shifting its statistics shifts the decoded states with them."""
    torch.manual_seed(0)
    cae = CompressingAutoencoder(8, 2, 3, standardise="unit_sublayer", n_sublayers=4).eval()
    mean = torch.arange(4.0)[:, None] * 100 * torch.ones(4, 8)
    cae.set_statistics(Moments(torch.tensor(2.0), mean.double(), 2 * torch.ones(4, 8, dtype=torch.float64)))
    ranges = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]])
    x = torch.randn(8, generator=gen())
    for off_plane in ("drop", "keep"):
        low, high = (grid_states(cae, x + 100 * s, ranges, 3, off_plane, s) for s in (1, 3))
        assert low.states.shape == (9, 8) and not low.states.requires_grad
        torch.testing.assert_close(high.states - low.states, torch.full((9, 8), 200.0), rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="sublayer"):
        grid_states(cae, x, ranges, 3)


def test_grids_of_another_projection(plane):
    pca, x = plane
    ranges = torch.tensor([[-6.0, 6.0], [-5.0, 5.0]])
    with pytest.raises(UserError, match="state of 5 units"):
        grid_states(pca, x[:5], ranges, 3)
    three = PCA.fit(torch.randn(50, 6, generator=gen(), dtype=torch.float64), 3)
    with pytest.raises(UserError, match="3 latent dimensions"):
        grid_states(three, x, ranges, 3)
    with pytest.raises(ValueError, match="off_plane='lost'"):
        grid_states(pca, x, ranges, 3, "lost")


def test_noise_has_the_stated_size_and_is_gaussian():
    x = torch.linspace(-3, 7, 400)
    states = noise_states(x, 0.3, 500, generator=gen())
    noise = (states - x).double().numpy()
    scale = 0.3 * float(x.double().norm()) / 20
    assert kstest(noise.ravel()[::7], norm(scale=scale).cdf).pvalue > 0.001
    assert np.sqrt((noise**2).sum(1).mean()) == pytest.approx(0.3 * float(x.norm()), rel=0.01)
    assert torch.equal(noise_states(x, 0.3, 500, generator=gen()), states)
    assert not torch.equal(noise_states(x, 0.3, 500, generator=gen(1)), states)


def test_random_directions_are_as_far_and_uniform():
    reference = torch.full((3,), 100.0, dtype=torch.float64)
    states = reference + torch.arange(1.0, 4001.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0, 0])
    control = random_directions(reference, states, generator=gen())
    moved = (control - reference).numpy()
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), np.arange(1, 4001), rtol=1e-9)
    cosines = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    for axis in range(3):  # Archimedes: on a sphere in 3-D each coordinate is uniform over [-1, 1]
        assert kstest((cosines[:, axis] + 1) / 2, "uniform").pvalue > 0.001


def test_swapped_states_are_real_and_of_others():
    trajectories = torch.arange(5 * 4 * 2.0).reshape(5, 4, 2)
    assert torch.equal(swapped_states(trajectories, 2, exclude=3), trajectories[[0, 1, 2, 4], 2])
    assert torch.equal(swapped_states(trajectories, 1), trajectories[:, 1])
    rows = [swapped_states(trajectories, 2, exclude=3, n=3, generator=gen(s)) for s in range(30)]
    allowed = {tuple(r) for r in trajectories[[0, 1, 2, 4], 2].tolist()}
    drawn = [{tuple(r) for r in some.tolist()} for some in rows]
    assert all(len(d) == 3 and d <= allowed for d in drawn) and set.union(*drawn) == allowed
    with pytest.raises(UserError, match="0 other sequences"):
        swapped_states(trajectories[:1], 0, exclude=0)
    for n in (0, 5):
        with pytest.raises(UserError, match=f"4 other sequences.*n={n}"):
            swapped_states(trajectories, 0, exclude=3, n=n)
    with pytest.raises(ValueError, match="sublayer=4"):
        swapped_states(trajectories, 4)


def test_through_a_projection_the_plane_alone_is_perturbed():
    """PCA is linear: a state's part in the plane is the perturbed one's, the rest the mean's or the reference's."""
    torch.manual_seed(3)
    pca = PCA.fit(torch.randn(200, 12) * torch.arange(1.0, 13), 2)
    reference, states = torch.randn(12), torch.randn(5, 12) * 4
    basis = pca.components.to(torch.float32)  # (D, K), orthonormal
    inside = basis @ basis.T
    for off_plane, rest in (("drop", pca.mean.to(torch.float32)), ("keep", reference)):
        got = through_projection(pca, reference, states, off_plane)
        torch.testing.assert_close(got @ inside, states @ inside, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got - got @ inside, (rest - inside @ rest).expand(5, -1), rtol=1e-4, atol=1e-4)
