"""A small version of benchmarks/interval_coverage.py: intervals hold the value of the population as often as they say.

The full one is in benchmarks/RESULTS.md. Here the population is made up: documents whose rows share half their
variance.
"""

import numpy as np
import pytest
import torch
from benchmark_module import benchmark

MEASURES = ["activations", "correlation", "cosine", "velocity", "rotation", "curvature", "similarity"]
N_SAMPLES = 40


@pytest.fixture(scope="module")
def coverage():
    return benchmark("interval_coverage")


@pytest.fixture(scope="module")
def world():
    """3000 trajectories of 150 documents, eight sublayers of 24 units, growing over depth; and their documents."""
    rng = np.random.default_rng(0)
    document = np.repeat(np.arange(150), rng.geometric(1 / 20, 150))[:3000]
    n, s, d = len(document), 8, 24
    steps = rng.normal(size=(s, d)) + rng.normal(size=(150, s, d))[document] + rng.normal(size=(n, s, d))
    steps *= np.linspace(1, 3, s)[:, None]
    return torch.from_numpy(steps.cumsum(1)).to(torch.float32), document


def covered(coverage, world, draw, over_documents):
    x, document = world
    truth = coverage.rows_of(x, coverage.groups_of(document, True), MEASURES)
    found = []
    for k in range(N_SAMPLES):
        index = draw(np.random.default_rng(k), document)
        groups = coverage.groups_of(document[index], over_documents)
        found.append(coverage.rows_of(x[torch.from_numpy(index)], groups, MEASURES))
    return {key: row["coverage"] for key, row in coverage.summary(found, truth).items()}


def test_every_row_covers_for_sequences_drawn_at_random(coverage, world):
    found = covered(coverage, world, coverage.at_random(150), False)
    assert len(found) > 12
    assert min(found.values()) >= 84, found  # of 40 samples that cover 95 % fewer than 84 % come once in 300
    assert 92 <= np.mean(list(found.values())) <= 99.5


def test_in_runs_of_a_document_documents_cover_and_sequences_do_not(coverage, world):
    draw = coverage.in_runs(400)
    documents = covered(coverage, world, draw, True)
    assert min(documents.values()) >= 80 and np.mean(list(documents.values())) >= 90, documents
    sequences = covered(coverage, world, draw, False)
    assert np.mean(list(sequences.values())) < 80, sequences


def test_runs_give_each_sequence_the_same_chance(coverage, world):
    _, document = world
    draw, counts = coverage.in_runs(400), np.zeros(len(document))
    for k in range(300):
        index = draw(np.random.default_rng(k), document)
        assert len(set(index.tolist())) == 400
        counts[index] += 1
    chance, places = 400 / len(document), [document == d for d in np.unique(document)]
    means = np.array([counts[place].mean() for place in places])
    assert abs(means - 300 * chance).max() < 5 * np.sqrt(300 * chance * (1 - chance))
    assert max(place.sum() for place in places) > 30
