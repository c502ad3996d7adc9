"""Which prompts are perturbed, and at which layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rsdyn.errors import UserError
from rsdyn.lm.source import LMSource
from rsdyn.perturbation.settings import PerturbConfig
from rsdyn.stream.text.local_files import DamagedError, lines_of
from rsdyn.stream.text.tokens import Sequences, tokenise_one

PAPER_LAYERS, PAPER_DEPTH = (0, 7, 15, 23, 31), 32
FROM_TEXT = 20  # sequences of the text beside the prompt, where the text has as many


class Prompt(NamedTuple):
    """A prompt's tokens with BOS, and which sequence of the text it is, if it was drawn from there."""

    tokens: np.ndarray
    sequence: int | None = None


def layers_of(layers: Sequence[float] | None, n_layers: int) -> list[int]:
    """The layers of injection at a model's depth; ``UserError`` for one that is out of range."""
    if layers is None:
        return sorted({round(layer / (PAPER_DEPTH - 1) * (n_layers - 1)) for layer in PAPER_LAYERS})
    if any(value != int(value) for value in layers):
        if max(layers) > 1:
            raise UserError(
                f"layers={[*layers]}: with a decimal part they are fractions of the depth, from 0 to 1. Give "
                f"fractions, or whole layer numbers from 0 to {n_layers - 1}."
            )
        return sorted({round(value * (n_layers - 1)) for value in layers})
    chosen = sorted({int(value) for value in layers})
    if chosen[-1] >= n_layers:
        raise UserError(f"layers: this model has no layer {chosen[-1]}; its {n_layers} layers are 0 to {n_layers - 1}.")
    return chosen


def prompts_of(settings: PerturbConfig, sequences: Sequences, lm: LMSource, *, seed: int) -> list[Prompt]:
    """The prompts that the settings ask for: the one or those that were written, then sequences drawn from the text.

    Those that were written are user turns of a chat template where the text's sequences are.

    Raises ``UserError`` for an empty one, one longer than the model's context, and more than the text has.
    """
    return [*_written(settings, sequences, lm), *_drawn(settings, sequences, seed)]


def groups_in_words(settings: PerturbConfig) -> list[str]:
    """Which groups prompts and swapped-in states are of, in a sentence; [] where they are of all of the text."""
    parts = []
    if settings.prompt_group is not None:
        parts.append(f"prompts of the text are of group {settings.prompt_group}")
    if settings.swap_group is not None:
        parts.append(f"states swapped in are of group {settings.swap_group}")
    said = "; ".join(parts)
    return [f"{said[0].upper()}{said[1:]}."] if parts else []


def of_group(sequences: Sequences, group: str, argument: str) -> np.ndarray:
    """Which sequences are of a group, boolean ``(N,)``; ``UserError``, naming ``argument``, where there is none."""
    if sequences.labels is None:
        raise UserError(f"{argument}={group}: the sequences have no groups. Name the column that has (`group_column`).")
    return sequences.labels.members(group, argument)


def _written(settings: PerturbConfig, sequences: Sequences, lm: LMSource) -> list[Prompt]:
    key, texts = "prompt", [settings.prompt]
    if settings.prompts is not None:
        key = "prompts"
        try:
            lines = list(lines_of(Path(settings.prompts).expanduser()))
        except (OSError, DamagedError) as error:
            raise UserError(f"prompts={settings.prompts}: cannot be read as text ({error}).") from error
        texts = [line for line in lines if line.strip()]
        if not texts:
            raise UserError(f"prompts={settings.prompts}: the file holds no prompt. Write one a line.")
    tokenizer = lm.tokenizer()
    prompts = []
    for text in texts:
        tokens = tokenise_one(tokenizer, text, sequences.bos_id, chat_template=sequences.chat_template)
        if not text.strip() or len(tokens) == int(sequences.bos_id is not None):
            raise UserError(f"{key}: the prompt is empty. Write some words.")
        if len(tokens) > lm.max_tokens:
            raise UserError(
                f"{key}: {text[:40]!r} has {len(tokens)} tokens with BOS, more than the model's context of "
                f"{lm.max_tokens}. Shorten it."
            )
        prompts.append(Prompt(tokens))
    return prompts


def _drawn(settings: PerturbConfig, sequences: Sequences, seed: int) -> list[Prompt]:
    wanted, group = settings.from_text, settings.prompt_group
    rows = np.random.default_rng(seed).permutation(len(sequences))
    if group is not None:
        rows = rows[of_group(sequences, group, "prompt_group")[rows]]
    if wanted is None:
        wanted = min(FROM_TEXT, len(rows)) if settings.prompts is None else 0
    if wanted > len(rows):
        of = "the text" if group is None else f"the group {group}"
        raise UserError(f"from_text={wanted}: {of} has {len(rows)} sequences. Ask for fewer.")
    if sequences.documents is not None:  # sequences of one document are no independent prompts: one of each comes first
        _, first = np.unique(sequences.documents[rows], return_index=True)
        again = np.ones(len(rows), dtype=bool)
        again[first] = False
        rows = np.concatenate([rows[~again], rows[again]])
    return [Prompt(sequences[int(i)], int(i)) for i in sorted(rows[:wanted])]
