"""A stream that somebody else recorded beside the model that it is said to be from: some sequences, recorded again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsdyn.errors import UserError
from rsdyn.lm.given import GivenModel
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.source import LMSource, find_lm
from rsdyn.stream.exchange.raw import Raw

EXACT, ROUNDED = 1e-2, 1e-1  # of a state's norm: float32 against any layout, and what two half precisions give


def compare_with_model(raw: Raw, model: Any, n: int) -> None:
    """Record ``n`` sequences again and compare; ``UserError`` with what the stream seems to be where it is another's.

    Args:
        raw: with the tokens of its sequences.
        model: a name, what :func:`rsdyn.find_lm` gives, or a transformers model.
        n: the shortest so many.
    """
    lm = _opened(model)
    sublayers = _places(raw, lm)
    if raw.tokens is None:
        raise UserError(
            f"{raw.name}: tokens: without the ids of its sequences nothing can be compared with {lm.label}."
        )
    chosen = sorted(range(len(raw.tokens)), key=lambda i: (len(raw.tokens[i]), i))[:n]  # type: ignore[index]
    language_model = lm.load()
    theirs = [raw.states[i].float() for i in chosen]
    ids = [raw.tokens[i].numpy().astype(np.int64) for i in chosen]
    at = [raw.position[i] for i in chosen]
    if max(int(row.max()) for row in ids) >= lm.vocab_size:
        raise UserError(f"{raw.name}: its tokens are not {lm.label}'s, whose vocabulary ends at {lm.vocab_size - 1}.")
    ours = _record(language_model, ids, at)
    here = [x[:, sublayers] for x in ours]
    allowed = EXACT if all(x.dtype == torch.float32 for x in raw.states) else ROUNDED
    apart = torch.cat([_distance(a, b) for a, b in zip(theirs, here, strict=True)])
    if float(apart.max()) <= allowed:
        return
    sublayer = int(apart.argmax()) % apart.shape[1]
    seems = _diagnosis(language_model, theirs, ids, at, ours, sublayers, allowed)
    raise UserError(
        f"{raw.name}: it differs from {lm.label}, recorded again, by {float(apart.max()):.2g} of a state's norm at "
        "sublayer "
        f"{sublayer} ({allowed:g} is rounding). {seems}"
    )


def _opened(model: Any) -> LMSource | GivenModel:
    if isinstance(model, (LMSource, GivenModel)):
        return model
    return GivenModel(model) if isinstance(model, nn.Module) else find_lm(str(model))


def _places(raw: Raw, lm: LMSource | GivenModel) -> list[int]:
    """Which of the model's sublayers are there; the one behind its last layer is ``n_sublayers``."""
    n_units = raw.states[0].shape[-1]
    if n_units != lm.n_units:
        raise UserError(f"{raw.name}: it has {n_units} units and {lm.label} has {lm.n_units}: another model's.")
    n_layers = lm.n_layers
    wrong = [s for s in dict.fromkeys(raw.sites) if s not in lm.site_names]
    if wrong:
        raise UserError(f"{raw.name}: {lm.label} has no {wrong[0]}: its layers add attention and MLP at once.")
    beyond = [n for n in raw.layers if n > n_layers or (n == n_layers and "resid_mid" in raw.sites)]
    if beyond:
        raise UserError(f"{raw.name}: it has a layer {beyond[0]}, and those of {lm.label} are 0 to {n_layers - 1}.")
    if raw.layers[0] == 0 and raw.layers == tuple(range(len(raw.layers))) and len(raw.layers) == n_layers + 1:
        raise UserError(
            f"{raw.name}: it has {n_layers + 1} layers and {lm.label} has {n_layers}. The last of transformers' "
            "hidden_states stands behind the final norm and is no part of the stream: leave it out."
        )
    return [
        lm.sublayer(n, s) if n < n_layers else len(lm.site_names) * n_layers
        for n, s in zip(raw.layers, raw.sites, strict=True)
    ]


def _record(lm: LanguageModel, ids: list[np.ndarray], at: list[Tensor]) -> list[Tensor]:
    """All sublayers of these tokens and the state behind the last layer, ``(t, S + 1, D)`` of each sequence."""
    x = lm.record(ids, positions=[a.numpy() for a in at], batch_tokens=1, dtype=torch.float32, final=True)
    return list(x.split([len(a) for a in at]))


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() - b.double()).norm(dim=-1) / b.double().norm(dim=-1).clamp_min(1e-30)


def _diagnosis(
    lm: LanguageModel,
    theirs: list[Tensor],
    ids: list[np.ndarray],
    at: list[Tensor],
    ours: list[Tensor],
    sublayers: list[int],
    allowed: float,
) -> str:
    """What the states are instead, where it is one of the ways in which such files go wrong."""

    def fits(other: list[Tensor], places: list[int] = sublayers, rows: slice = slice(None)) -> bool:
        pairs = zip(theirs, other, strict=True)
        return all(float(_distance(a[:, rows], b[:, places][:, rows]).max()) <= allowed for a, b in pairs)

    sites = len(lm.sites.names)
    if fits(ours, rows=slice(None, -1)):
        return (
            "All but the last state agree: the last stands behind the final norm, or is of another layer. Leave it out."
        )
    shifted = [place + sites for place in sublayers]
    if max(shifted) <= ours[0].shape[1] - 1 and fits(ours, shifted):
        return "It is off by one layer: these are the outputs of the layers that they are declared to be the inputs of."
    inner = [place + sites for place in sublayers[:-1]]
    if inner and all(
        float(_distance(a[:, :-1], b[:, inner]).max()) <= allowed for a, b in zip(theirs, ours, strict=True)
    ):
        return (
            "It is off by one layer: these are the outputs of the layers that they are declared to be the inputs of, "
            "the "
            "last behind the final norm."
        )
    doubled = _record(lm, [np.concatenate([row[:1], row]) for row in ids], [a + 1 for a in at])
    if fits(doubled):
        return "It has seen the first token twice: two BOS. Record it again with one."
    whole = torch.cat([b[:, sublayers] for b in ours])
    for a in torch.cat(theirs):
        if float(_distance(whole, a[None]).mean(dim=-1).min()) > allowed:
            break
    else:
        return "Each state is another sequence's: the rows were shuffled. Give states and tokens in one order."
    return (
        "Another model, another revision, a precision that overflowed, or padding on the left, which moves the "
        "positions "
        "of all tokens, make such numbers."
    )
