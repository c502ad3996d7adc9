"""Curves by position and angles over tokens: against the direct measures, whatever the pieces and the processes."""

import math

import pytest
import torch

from rsdyn.dynamics import geometry
from rsdyn.metrics.tokens import ByPosition, Triples

LENGTHS = (9, 3, 2, 7, 1, 12)


@pytest.fixture(scope="module")
def stream():
    """States of every token of six sequences, their sequences and positions."""
    x = torch.randn(sum(LENGTHS), 5, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(1)
    sequence = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    return x, sequence, torch.cat([torch.arange(n) for n in LENGTHS])


def angles_of(x, sequence, first=0):
    """One sequence and sublayer after another."""
    found = [x[sequence == i][first:] for i in range(len(LENGTHS))]
    found = [geometry.curvature(one.transpose(0, 1)).T for one in found if len(one) > 2]
    return torch.cat(found)


@pytest.mark.parametrize("piece", [1, 2, 5, 34])
@pytest.mark.parametrize("first", [0, 1])
def test_no_triple_is_lost_between_pieces(stream, piece, first):
    triples = Triples(first=first)
    parts = [triples(*part) for part in zip(*(t.split(piece) for t in stream), strict=True)]
    torch.testing.assert_close(torch.cat([angles for angles, _ in parts]), angles_of(*stream[:2], first))
    counted = torch.cat([of for _, of in parts]).bincount(minlength=6).tolist()
    assert counted == [max(0, n - first - 2) for n in LENGTHS]


def test_tokens_on_a_circle_turn_by_its_angle():
    turn = 0.3 * torch.arange(10, dtype=torch.float64)
    x = torch.stack([turn.cos(), turn.sin(), 0 * turn], -1)[:, None].expand(-1, 4, -1)
    angles, _ = Triples()(x, torch.zeros(10, dtype=torch.int64), torch.arange(10))
    torch.testing.assert_close(angles, torch.full((8, 4), 0.3, dtype=torch.float64))


def test_tokens_that_are_not_neighbours_make_no_triple(stream):
    x, sequence, position = stream
    angles, _ = Triples()(x, sequence, 2 * position)
    assert angles.shape == (0, 5)


def test_curves_by_position_are_means_over_those_tokens(stream):
    x, _, position = stream
    whole, parts = ByPosition(5), [ByPosition(5) for _ in range(2)]
    whole.update(x, position)
    for part, rows in zip(parts, torch.arange(len(x)).split(20), strict=True):
        part.update(x[rows], position[rows])
    found = whole.compute()
    for name, direct in (
        ("cosine", geometry.cosine),
        ("speed", geometry.speed),
        ("relative_speed", geometry.relative_speed),
        ("curvature", geometry.curvature),
    ):
        curves = getattr(found, name)
        for k, rows in enumerate((position == 0, (position > 0) & (position < 4), (position > 3) & (position < 16))):
            torch.testing.assert_close(curves[k], direct(x[rows]).mean(0))
        assert curves[3:].isnan().all()
        summed = (parts[0].total + parts[1].total) / (parts[0].n + parts[1].n)
        torch.testing.assert_close(whole.total / whole.n, summed, equal_nan=True)
    assert found.counts.tolist() == [6, 12, 16, 0, 0]


def test_states_of_zero_do_not_count(stream):
    x, _, position = stream
    x = x.clone()
    x[position == 0] = 0
    metric = ByPosition(5)
    metric.update(x, position)
    found = metric.compute()
    assert found.cosine[0].isnan().all() and found.speed[0].tolist() == [0] * 4
    assert not math.isnan(float(found.cosine[1, 0]))
