"""What perturbed points say on their way: against the model's own head, and on tokens whose answer is known."""

import math

import torch

from rsdyn.lm.continuing.continuation import continue_from, run_reference
from rsdyn.lm.source import find_lm
from rsdyn.perturbation.said import MOST_POINTS, Said, said_along, said_in_words


def test_points_are_read_as_the_model_reads():
    lm = find_lm("embedded").load(head=True)
    reference = run_reference(lm, [1, 50, 60, 70])
    noise = torch.randn(20, lm.n_units, generator=torch.Generator().manual_seed(0))
    points = torch.cat([reference.stream[8][None], reference.stream[8] + 30 * noise])
    result = continue_from(lm, reference, 8, points, log_probs=True)
    said = said_along(lm, reference, 8, result)
    assert said.tokens.shape == (MOST_POINTS, lm.n_sublayers - 8 + 1)
    assert said.reference[-1] == reference.log_probs.argmax() and said.reference[0] == said.tokens[0, 0]
    assert torch.equal(said.tokens[0], said.reference)  # the first point is the reference itself
    assert said.tokens[-1, -1] == result.log_probs[-1].argmax()
    assert said.tokens[-1, 3] == lm.log_probs(result.stream[-1, 3]).argmax()


def test_something_else_is_neither_what_the_reference_says_there_nor_at_its_end():
    reference = torch.tensor([5, 6, 7, 9])
    tokens = torch.tensor([
        [1, 6, 9, 9],  # back, by what the reference says
        [1, 2, 9, 9],  # back, after something else
        [1, 6, 7, 9],  # back
        [1, 2, 2, 2],  # not back
    ])  # fmt: skip
    said = Said(tokens, reference)
    assert said.back == 0.75 and said.astray == 1 / 3
    assert said.agreement.tolist() == [0, 0, 0.5, 0.75]
    text = " ".join(said_in_words({4: said}))
    assert "layer 4: 75 % end on the reference's token, 33 % of them after saying something else" in text
    assert math.isnan(Said(tokens[3:], reference).astray) and math.isnan(Said(tokens[:, 2:], reference[2:]).astray)
    assert said_in_words({}) == []
