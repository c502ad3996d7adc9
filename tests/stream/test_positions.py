"""Which tokens are recorded: a function of (seed, sequence) alone, fair, and nested; and what marks BOS and sinks."""

import numpy as np
import pytest
import torch

from rsdyn.stream.text.positions import BOS, SINK, SINK_RATIO, Positions, kinds, numbers, sequence_of

LENGTHS = np.array([5, 2, 17, 1, 40, 3])


def test_the_last_token_is_the_default_trajectory():
    last = Positions("last", LENGTHS)
    assert last.is_last and last.counts.tolist() == [1] * 6 and last.key() == {}
    assert [last.of(i).tolist() for i in range(6)] == [[n - 1] for n in LENGTHS]
    assert all(last.turns(i).tolist() == [0] for i in range(6))


def test_all_is_every_token_with_bos():
    every = Positions("all", LENGTHS)
    assert every.counts.tolist() == LENGTHS.tolist()
    assert [every.of(i).tolist() for i in range(6)] == [list(range(n)) for n in LENGTHS]
    assert all(sorted(every.turns(i)) == list(range(n)) for i, n in enumerate(LENGTHS))


def test_a_sample_is_of_different_tokens_and_all_of_a_short_sequence():
    sample = Positions({"sample": 4}, LENGTHS, seed=3)
    assert sample.counts.tolist() == [4, 2, 4, 1, 4, 3]
    for i, n in enumerate(LENGTHS):
        tokens = sample.of(i).tolist()
        assert tokens == sorted(set(tokens)) and len(tokens) == min(n, 4) and set(tokens) <= set(range(n))


def test_samples_lie_in_each_other_and_in_all_by_their_turns():
    every = Positions("all", LENGTHS, seed=1)
    for k in (1, 2, 3, 4):
        sample = Positions({"sample": k}, LENGTHS, seed=1)
        for i in range(6):
            assert sample.of(i).tolist() == every.of(i)[every.turns(i) < k].tolist()
            assert sample.turns(i).tolist() == every.turns(i)[every.turns(i) < k].tolist()


def test_a_sample_depends_on_seed_and_sequence_alone():
    sample = Positions({"sample": 3}, LENGTHS, seed=7)
    alone = Positions({"sample": 3}, np.array([9, 9, 17, 9]), seed=7)  # sequence 2 among others
    assert sample.of(2).tolist() == alone.of(2).tolist()
    other_seed = Positions({"sample": 3}, LENGTHS, seed=8)
    assert any(sample.of(i).tolist() != other_seed.of(i).tolist() for i in (0, 2, 4))
    same = Positions({"sample": 3}, np.full(50, 30))
    assert len({tuple(same.of(i)) for i in range(50)}) > 40  # not one choice for all sequences


def test_every_token_is_drawn_as_often_bos_too():
    sample = Positions({"sample": 3}, np.full(4000, 10))
    drawn = np.bincount(np.concatenate([sample.of(i) for i in range(4000)]), minlength=10) / 4000
    assert np.abs(drawn - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / 4000)


@pytest.mark.parametrize("rule", ["first", {"sample": 0}, {"samples": 3}, {"sample": True}, {}, None, 3, ["last"]])
def test_no_other_rule(rule):
    with pytest.raises(ValueError, match=r"last, all, or \{'sample': k\}"):
        Positions(rule, LENGTHS)


def test_the_first_by_number_are_of_as_many_sequences_as_can_be():
    every = Positions("all", LENGTHS)
    sequence = torch.arange(6).repeat_interleave(torch.from_numpy(every.counts))
    turn = torch.from_numpy(np.concatenate([every.turns(i) for i in range(6)]))
    number = numbers(sequence, turn)
    assert len(number.unique()) == len(number) and torch.equal(sequence_of(number), sequence)
    first = number.sort().values
    assert sequence_of(first[:6]).tolist() == list(range(6))
    assert sequence_of(first[6:11]).tolist() == [0, 1, 2, 4, 5]  # sequence 3 has one token only
    assert torch.equal(numbers(sequence, torch.zeros_like(sequence)), sequence)


def test_bos_and_sinks_are_marked_by_place_and_by_norm_in_the_middle():
    x = torch.randn(400, 6, 64, generator=torch.Generator().manual_seed(0))
    middle = x[:, 3].norm(dim=-1)
    x[:, 3] /= middle[:, None]  # all as long as their median
    x[7, 3] *= SINK_RATIO * 1.05
    x[8, 3] *= SINK_RATIO * 0.95
    x[9, 2] *= 1000  # beside the middle
    x[100, 3] *= 500
    position = torch.arange(400, dtype=torch.int32) % 100
    kind = kinds(x, position)
    assert kind.dtype == torch.uint8
    assert (kind & SINK).nonzero().flatten().tolist() == [7, 100]
    assert (kind & BOS).nonzero().flatten().tolist() == [0, 100, 200, 300]
    assert kind[100] == BOS | SINK
    assert torch.equal(kinds(x.bfloat16(), position), kind)
