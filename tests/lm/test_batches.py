"""Which sequences go together: every one once, within the limit, and the same whatever the machine."""

import numpy as np
import pytest

from rsdyn.lm.batches import (
    PACKED,
    SORTED,
    batches_apart,
    length_sorted_batches,
    make_batches,
    tokens_computed,
)

LAYOUTS = (PACKED, SORTED)


def random_lengths(n, seed=0, low=20, high=130):
    return np.random.default_rng(seed).integers(low, high, size=n).tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_tokens", [1, 64, 200, 1024, 100_000])
@pytest.mark.parametrize("n", [0, 1, 7, 256])
def test_every_sequence_once_within_the_limit(layout, batch_tokens, n):
    lengths = random_lengths(n)
    batches = make_batches(lengths, batch_tokens, layout)
    assert sorted(i for batch in batches for i in batch) == list(range(n)) and all(batches)
    for batch in batches:
        assert len(batch) == 1 or tokens_computed(lengths, [batch], layout) <= batch_tokens
        # the canary records one batch again, and must get the same one
        assert make_batches([lengths[i] for i in batch], batch_tokens, layout) == [list(range(len(batch)))]


def test_packed_rows_have_no_padding_and_one_size():
    lengths = random_lengths(256)
    rows = make_batches(lengths, 512, PACKED)
    sizes = [sum(lengths[i] for i in row) for row in rows]
    assert tokens_computed(lengths, rows, PACKED) == sum(lengths) == sum(sizes)
    assert len(rows) % 2 == 0 and len(rows) <= 2 + -(-sum(lengths) // 512)
    assert max(sizes) - min(sizes) < 0.05 * 512  # two threads that take them in turn end together
    padded = make_batches(lengths, 512, SORTED)
    assert tokens_computed(lengths, padded, SORTED) == sum(len(b) * max(lengths[i] for i in b) for b in padded)
    assert 1.005 < tokens_computed(lengths, padded, SORTED) / sum(lengths) < 1.08


def test_rows_that_cannot_be_shared_out_evenly():
    assert make_batches([60] * 5, 100, PACKED) == [[0], [1], [2], [3], [4]]
    assert make_batches([300, 5, 5, 100], 100, PACKED) == [[0], [3], [1, 2]]  # those too long by themselves first
    assert make_batches([40, 40, 40], 100, PACKED) == [[0, 2], [1]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_short_and_long_stay_apart(layout):
    lengths = random_lengths(60)
    batches = make_batches(lengths, 300, layout, apart=70)
    for batch in batches:
        assert len({lengths[i] > 70 for i in batch}) == 1
    short, long = batches_apart(batches, lengths, 70)
    assert max(lengths[i] for b in short for i in b) <= 70 < min(lengths[i] for b in long for i in b)
    assert short + long == batches


def test_length_sorted_batches():
    lengths = [7, 3, 9, 3, 50, 8]
    batches = length_sorted_batches(lengths, 18)
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 18
    assert batches == [[1, 3], [0, 5], [2], [4]]


def test_batches_that_must_not_go_together():
    lengths = [7, 3, 9, 3, 50, 8]
    batches = length_sorted_batches(lengths, 40, apart=8)
    assert batches == [[1, 3, 0, 5], [2], [4]]  # without it, 9 tokens would go with the shorter ones
    assert length_sorted_batches(lengths, 45)[0] == [1, 3, 0, 5, 2]
    assert batches_apart(batches, lengths, 8) == [[[1, 3, 0, 5]], [[2], [4]]]
    assert batches_apart(batches, lengths, 2) == [batches] == batches_apart(batches, lengths, None)
