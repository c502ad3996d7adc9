"""Labels are exchanged between what is exchangeable, and p-values of labels that say nothing are uniform."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, kstest, permutation_test

from rsdyn.dynamics.label_permutation import exchange_of, holm, permutation_p, permuted_labels, sequential_p

DOCUMENT = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 4])


def test_whole_documents_exchange_labels_where_each_has_one():
    label = torch.tensor([0, 0, 0, 1, 1, 1, 0, 0, 0])
    found = exchange_of(label, DOCUMENT)
    assert (found.kind, found.divided, found.movable) == ("documents", 0, 9)
    assert math.exp(found.log_count) == pytest.approx(math.comb(5, 2))
    drawn = permuted_labels(label, DOCUMENT, 400, seed=1)
    assert all(len(row[d == DOCUMENT].unique()) == 1 for row in drawn for d in range(5))
    of_documents = {tuple(row[[0, 3, 4, 6, 7]].tolist()) for row in drawn}
    assert of_documents == set(itertools.permutations([0, 1, 1, 0, 0])), "every exchange, and no other"
    assert torch.equal(permuted_labels(label, DOCUMENT, 400, seed=1), drawn)


def test_sequences_exchange_labels_within_documents_where_they_vary_and_single_ones_among_themselves():
    label = torch.tensor([0, 1, 1, 0, 0, 1, 1, 1, 0])
    found = exchange_of(label, DOCUMENT)
    assert (found.kind, found.divided, found.movable) == ("within", 3, 9)
    assert math.exp(found.log_count) == pytest.approx(3 * 2 * 2 * 2)
    drawn = permuted_labels(label, DOCUMENT, 600, seed=0)
    for d in (0, 2, 4):
        assert (drawn[:, d == DOCUMENT].sum(1) == label[d == DOCUMENT].sum()).all()
    assert (drawn[:, [3, 6]].sum(1) == 1).all() and len(drawn.unique(dim=0)) == 24


def test_what_a_few_documents_have_of_each_label_counts_as_a_document():
    document = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    label = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0])  # document 0 alone has both
    found = exchange_of(label, document)
    assert (found.kind, found.divided, found.movable) == ("documents", 1, 11)
    for row in permuted_labels(label, document, 50, seed=0):
        assert all(row[i] == row[i + 1] for i in (0, 3, 5, 7, 9))
        assert sum(int(row[i]) for i in (0, 2, 3, 5, 7, 9)) == 3


def test_three_labels_keep_their_numbers():
    label, document = torch.arange(30) % 3, torch.arange(30)
    drawn = permuted_labels(label, document, 20, seed=0)
    assert all((drawn == k).sum(1).tolist() == [10] * 20 for k in range(3)) and len(drawn.unique(dim=0)) == 20


def test_p_is_that_of_all_exchanges_as_scipy_counts_them():
    torch.manual_seed(0)
    x, label, document = torch.randn(8).double(), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.arange(8)

    def difference(labels):
        return (x * (labels == 0)).sum(-1) / 4 - (x * (labels == 1)).sum(-1) / 4

    def statistic(a, b, axis=-1):
        return np.abs(a.mean(axis) - b.mean(axis))

    exact = permutation_test((x[:4].numpy(), x[4:].numpy()), statistic, vectorized=True, n_resamples=np.inf,
                             alternative="greater").pvalue  # fmt: skip
    drawn = permuted_labels(label, document, 9999, seed=0)
    p = float(permutation_p(difference(label), difference(drawn)))
    assert abs(p - exact) < 4 * (exact * (1 - exact) / 9999) ** 0.5


def test_labels_that_say_nothing_are_rejected_at_the_rate_that_is_asked_for():
    """Documents that differ, and labels by document: five per cent, where single sequences' reject 40."""
    torch.manual_seed(1)
    n_sets, document = 300, torch.arange(24).repeat_interleave(10)
    ps, naive = [], []
    for i in range(n_sets):
        x = torch.randn(24)[document] + torch.randn(240)
        label = (torch.randperm(24) < 8).long()[document]

        def difference(labels, x=x):
            return (x * labels).sum(-1) / labels.sum(-1) - (x * (1 - labels)).sum(-1) / (1 - labels).sum(-1)

        ps.append(float(permutation_p(difference(label), difference(permuted_labels(label, document, 199, seed=i)))))
        alone = permuted_labels(label, torch.arange(240), 199, seed=i)
        naive.append(float(permutation_p(difference(label), difference(alone))))
    rejected = sum(p <= 0.05 for p in ps)
    assert binom.ppf(0.001, n_sets, 0.05) <= rejected <= binom.ppf(0.999, n_sets, 0.05)
    assert kstest(ps, "uniform").pvalue > 0.001
    assert sum(p <= 0.05 for p in naive) > 0.25 * n_sets


def test_a_p_that_stops_early_is_calibrated_too():
    torch.manual_seed(0)
    ps = torch.stack([sequential_p(torch.randn(()), torch.randn(199), 10)[0] for _ in range(800)])
    assert 0.03 < float((ps <= 0.05).double().mean()) < 0.07
    p, stopped = sequential_p(torch.tensor([0.0, 9.0]), torch.randn(30, 2), 10)
    assert p.tolist() == [1.0, pytest.approx(1 / 31)] and not stopped


def test_holm():
    p = torch.tensor([[0.01, 0.04], [0.03, float("nan")]], dtype=torch.float64)
    assert holm(p).flatten().tolist()[:3] == pytest.approx([0.03, 0.06, 0.06])
    assert holm(p)[1, 1].isnan()
    assert holm(torch.tensor([0.6, 0.5])).tolist() == [1.0, 1.0] and holm(torch.zeros(0)).shape == (0,)
    assert permutation_p(torch.tensor(float("nan")), torch.randn(9)).isnan()
