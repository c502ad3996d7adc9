"""What is refused of a stream that somebody else recorded, as far as the states and their tokens give it away.

Each check knows one way in which such files go wrong, and what it looks like in the numbers. What they cannot see, a
model can: ``against_model.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rsdyn.errors import UserError
from rsdyn.stream.exchange.raw import Raw

LEAST = 8  # trajectories from which the spread of their norms says something
COLLAPSE = 0.25  # of the spread of log norms, from one sublayer to the next
SHRINK = 1 / 3  # of the median norm
SAME = 1e-3  # relative distance below which two states in front of layer 0 are one token's
_BLOCK = 256


def check(raw: Raw) -> None:
    """Raise ``UserError`` with the reason where these states are not what they are declared to be."""
    _finite(raw)
    _beginnings(raw)
    _embeddings(raw)
    _final_norm(raw)


def _finite(raw: Raw) -> None:
    for number, states in enumerate(raw.states):
        if torch.isfinite(states).all():
            continue
        row, sublayer, unit = (~torch.isfinite(states)).nonzero()[0].tolist()
        value = float(states[row, sublayer, unit])
        half = states.dtype == torch.float16
        why = (
            "float16 ends at 65,504, and the stream of many models does not. Record it in bfloat16 or float32"
            if half
            else "Where it was recorded in float16, which ends at 65,504, record it in bfloat16 or float32"
        )
        raise UserError(
            f"{raw.name}: the state of sequence {number}, token {int(raw.position[number][row])}, at sublayer "
            f"{sublayer} is {value} in unit {unit}. {why}."
        )


def _beginnings(raw: Raw) -> None:
    """Two BOS, and padding on the left, by how the sequences begin."""
    words = raw.words_from_the_start()
    if words is None or any(len(ids) < 3 for ids in words):
        return
    runs = [_run(ids) for ids in words]
    first = [int(ids[0]) for ids in words]
    common = len(set(first)) == 1
    if common and len(words) > 1 and set(runs) == {2}:
        what = f"token {first[0]}" if raw.tokens is not None else "the same token"
        raise UserError(
            f"{raw.name}: every sequence begins with {what} twice: two BOS, of which a model has seen one. Tokenise "
            "with add_special_tokens=False where a template has put BOS already, and record it again."
        )
    equal = len({len(ids) for ids in words}) == 1
    usual = max(set(first), key=first.count)
    shifted = [i for i, ids in enumerate(words) if first[i] != usual and int(ids[1]) == usual]
    if len(words) > 1 and equal and (raw.is_batch or len(words) > 2):
        if max(runs) > 1 and len(set(runs)) > 1:
            number = max(range(len(runs)), key=lambda i: runs[i])
            raise _padded(raw, number, runs[number])
        if shifted and raw.is_batch and not common:
            raise _padded(raw, shifted[0], 1)


def _padded(raw: Raw, number: int, n: int) -> UserError:
    return UserError(
        f"{raw.name}: sequence {number} begins with {n} equal token{'s' * (n > 1)} that others do not have: padding on "
        "the left, which moves the positions of all tokens behind it. Pad on the right, or record sequences one by one."
    )


def _run(ids: Tensor) -> int:
    """How many tokens at the beginning are the first one."""
    differ = (ids != ids[0]).nonzero()
    return int(differ[0]) if len(differ) else len(ids)


def _embeddings(raw: Raw) -> None:
    """In front of layer 0 a token's state is its embedding, whatever stands before it: off by one, or shuffled."""
    tokens = raw.recorded_tokens()
    if tokens is None or not raw.begins_at_embedding:
        return
    first = torch.cat([x[:, 0] for x in raw.states]).float()
    position = torch.cat(raw.position)
    if _is_function(first, tokens) is not False:
        return
    both = torch.stack([tokens, position], dim=1)
    with_position = torch.unique(both, dim=0, return_inverse=True)[1]
    if _is_function(first, with_position) is True:
        return  # positions are learnt, and added to the embedding
    n_states = _distinct(first)
    if n_states <= len(tokens.unique()):
        raise UserError(
            f"{raw.name}: in front of layer 0 equal tokens have unequal states, and there are no more of them "
            f"({n_states}) than tokens: rows and tokens were shuffled against each other. Give both in one order."
        )
    raise UserError(
        f"{raw.name}: what is declared as the input of layer 0 depends on what stands before a token ({n_states} "
        "states "
        f"of {len(tokens.unique())} tokens), so it is no embedding: off by one layer. transformers' hidden_states[0] "
        "and hook_resid_pre of block 0 are the input of layer 0; hidden_states[1] and hook_resid_post are its output."
    )


def _is_function(states: Tensor, of: Tensor) -> bool | None:
    """Whether equal numbers ``of`` have equal states; None where no number comes twice."""
    order = torch.argsort(of, stable=True)
    of, states = of[order], states[order]
    same = of[1:] == of[:-1]
    if not same.any():
        return None
    apart = (states[1:] - states[:-1]).norm(dim=-1) / states[1:].norm(dim=-1).clamp_min(1e-30)
    return bool((apart[same] < SAME).all())


def _distinct(states: Tensor) -> int:
    """How many states there are, equal ones counted once; those of one scale and rounding are."""
    scale = states.norm(dim=-1).median().clamp_min(1e-30)
    return len(torch.unique((states / scale / SAME).round(), dim=0))


def _final_norm(raw: Raw) -> None:
    """A norm makes all states about equally long, and mostly short: no step of a running sum does.

    Measured from the input of the last layer to the state behind the final norm: spread of the logarithm of the norm
    .112 to .007 in the embedded model, .032 to .039 in SmolLM2; median norm times .26 and .07. From the input of one
    layer to the next the norm does not fall below .87 of what it was, its spread not below .69.
    """
    if sum(map(len, raw.states)) < LEAST or len(raw.layers) < 2:
        return
    norms = torch.cat([x[:, -2:].double().norm(dim=-1) for x in raw.states]).clamp_min(1e-30)
    position = torch.cat(raw.position)
    norms = norms[position > 0] if int((position > 0).sum()) >= LEAST else norms  # the first token may be a sink
    before, last = norms.log().std(0).tolist()
    ratio = float((norms[:, 1] / norms[:, 0]).median())
    if (before > 1e-3 and last < COLLAPSE * before) or ratio < SHRINK:
        raise UserError(
            f"{raw.name}: the last state looks as if it stood behind the final norm: it is {ratio:.2g} times as long "
            "as "
            f"the one before, and the spread of its norms (of their logarithm) {last:.1g} where that has {before:.1g}. "
            "transformers' hidden_states[-1] is such a state, and no part of the stream: leave it out."
        )
