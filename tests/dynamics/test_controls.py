"""Points that no layer moved: what they are, and what they must not pass for."""

import numpy as np
import pytest
import torch
from systems import contraction

from rsdyn.dynamics.controls import random_writes, stays_put
from rsdyn.dynamics.recovery import nearer, rates, recovery, summary

P, S, D = 40, 12, 48


def moving_away_and_towards(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A reference ``(S, D)`` that travels along a line, and points that lie ahead of it."""
    way = torch.randn(D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    reference = torch.linspace(1, 10, S, dtype=torch.float64)[:, None] * way
    noise = torch.randn(P, D, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return reference, 9 * way + noise


def test_points_that_stay_put_are_what_was_put_at_every_sublayer():
    states = torch.randn(P, D)
    found = stays_put(states, S)
    assert found.shape == (P, S, D) and all(torch.equal(found[:, s], states) for s in range(S))


def test_standing_still_passes_for_recovery_where_the_reference_comes_along():
    """The trap itself: every point ends nearer, in distance and in ratio, and its rate is that of a contraction."""
    reference, states = moving_away_and_towards()
    table = summary(recovery(reference, stays_put(states, S)))
    assert table.nearer == 1 and table.contraction < 0


def test_random_writes_have_the_lengths_of_the_reference_and_no_direction():
    reference = torch.randn(S, D, generator=torch.Generator().manual_seed(1)).cumsum(0)
    states = torch.randn(4000, D, generator=torch.Generator().manual_seed(2))
    found = random_writes(states, reference, generator=torch.Generator().manual_seed(3))
    steps = found.diff(dim=1)
    assert torch.equal(found[:, 0], states)
    expected = reference.diff(dim=0).norm(dim=-1)
    torch.testing.assert_close(steps.norm(dim=-1), expected.expand(4000, -1), rtol=1e-4, atol=1e-4)
    directions = (steps / expected[:, None]).double()
    # uniform on the sphere: mean 0, covariance 1 / D, and successive ones independent
    assert directions.mean(0).norm(dim=-1).max() < 2 / 4000**0.5
    second = torch.einsum("psd,pse->de", directions, directions) / directions[..., 0].numel()
    assert (second - torch.eye(D) / D).abs().max() < 6 / D / (directions[..., 0].numel()) ** 0.5 * 2
    along = (directions[:, 1:] * directions[:, :-1]).sum(-1)
    assert abs(float(along.mean())) < 4 / (D * along.numel()) ** 0.5
    again = random_writes(states, reference, generator=torch.Generator().manual_seed(3))
    assert torch.equal(found, again)
    assert not torch.equal(found, random_writes(states, reference, generator=torch.Generator().manual_seed(4)))


def test_a_contraction_keeps_its_right_answer_beside_the_controls():
    """Towards where the reference rests: all come nearer, at the true rate; points that stay put do not at all."""
    x, point = contraction(P, S, D, 0.9)
    reference = point.expand(S, D)
    found, still = recovery(reference, x), recovery(reference, stays_put(x[:, 0], S))
    assert nearer(found.distance).mean() == 1 and nearer(still.distance).mean() == 0
    np.testing.assert_allclose(rates(found.distance, found.norm).contraction, np.log(0.9), rtol=1e-9)
    np.testing.assert_allclose(rates(still.distance, still.norm).contraction, 0, atol=1e-12)
    drifting = recovery(x[0], random_writes(x[1:, 0], x[0], generator=torch.Generator().manual_seed(0)))
    assert summary(drifting).nearer < 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stays_put(torch.ones(3), 2), r"states: shape \(3,\)"),
        (lambda: stays_put(torch.ones(3, 2), 0), "n_sublayers=0"),
        (lambda: random_writes(torch.ones(3), torch.ones(2, 3)), r"states of shape \(3,\)"),
        (lambda: random_writes(torch.ones(3, 2), torch.ones(2, 3)), r"reference of shape \(2, 3\)"),
        (lambda: random_writes(torch.ones(3, 2), torch.ones(0, 2)), "at least one sublayer"),
    ],
)
def test_a_wrong_value_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
