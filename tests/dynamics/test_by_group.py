"""Correlation between and within groups, against scipy on the groups' means and on what they leave."""

import pytest
import torch
from scipy.stats import pearsonr

from rsdyn.dynamics.by_group import between_groups, within_groups

N, G, D = 200, 7, 5


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(0, G - 1, (N,), generator=generator)  # the last group is empty
    common = torch.randn(G, 2, D, generator=generator, dtype=torch.float64) * 3
    x = common[group] + torch.randn(N, 2, D, generator=generator, dtype=torch.float64).cumsum(1) + 100
    n = torch.bincount(group, minlength=G).double()
    mean = torch.zeros(G, 2, D, dtype=torch.float64).index_add_(0, group, x) / n.clamp(min=1)[:, None, None]
    away = x - x.mean(0)
    return group, x, n, mean, away.square().sum(0), (away[:, 0] * away[:, 1]).sum(0)


def test_between_groups_each_group_counts_once(data):
    _, _, n, mean, *_ = data
    found = between_groups(n, mean)
    for u in range(D):
        expected = pearsonr(mean[: G - 1, 0, u], mean[: G - 1, 1, u]).statistic
        assert float(found[u]) == pytest.approx(expected, abs=1e-12)


def test_within_groups_is_the_correlation_of_what_the_means_leave(data):
    group, x, n, mean, m2, cross = data
    found, left = within_groups(n, mean, m2, cross), (x - mean[group]).numpy()
    for u in range(D):
        assert float(found[u]) == pytest.approx(pearsonr(left[:, 0, u], left[:, 1, u]).statistic, abs=1e-10)


def test_what_groups_explain_wholly_is_undefined_within_them(data):
    """The first state of a model without position embeddings is its last token's embedding."""
    group, x, n, _, _, _ = data
    x = x.clone()
    x[:, 0] = torch.randn(G, D, dtype=torch.float64)[group]
    mean = torch.zeros(G, 2, D, dtype=torch.float64).index_add_(0, group, x) / n.clamp(min=1)[:, None, None]
    away = x - x.mean(0)
    assert within_groups(n, mean, away.square().sum(0), (away[:, 0] * away[:, 1]).sum(0)).isnan().all()
    assert between_groups(n, mean).isfinite().all()


def test_two_groups_make_no_correlation(data):
    _, _, n, mean, *_ = data
    assert between_groups(n[:2], mean[:2]).isnan().all()
    same = mean.clone()
    same[:, 0] = 4.0
    assert between_groups(n, same).isnan().all()
