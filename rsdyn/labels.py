"""What conditions, null models and the columns of a perturbation's table are called, wherever people read them."""

from __future__ import annotations

import re
from pathlib import Path

STREAMS = {"shuffled": "token_shuffled"}  # a data.condition -> what analyze.py and the null model call the same stream

# Null models of rotations that are made of the stream itself: a ladder, from the one that keeps most to the paper's.
SURROGATES = {
    "innovation_shuffle": "linear process, new innovations",
    "increment_shuffle_scaled": "steps shuffled in windows, scaled",
    "increment_shuffle_windowed": "steps shuffled in windows",
    "increment_shuffle": "steps shuffled",
    "sign_flip": "steps' signs flipped",
    "iaaft": "steps, same spectrum (IAAFT)",
    "layer_shuffle_regradient": "layer shuffle, new gradient",
    "layer_shuffle": "layer shuffle (paper)",
}

# What each keeps of the stream, for captions and tables.
KEEPS = {
    "innovation_shuffle": "step sizes by place and unit, correlation of near steps, correlation of units",
    "increment_shuffle_scaled": "the unit's steps, about where they were, at the size of their new place",
    "increment_shuffle_windowed": "the unit's steps, about where they were",
    "increment_shuffle": "the unit's steps, anywhere",
    "sign_flip": "the sizes of the unit's steps, in place",
    "iaaft": "the spectrum and the values of the unit's steps",
    "layer_shuffle_regradient": "the unit's values, in no order",
    "layer_shuffle": "the points of the portrait, in no order (no trajectory is like that)",
    "token_shuffled": "the text's tokens, in no order",
    "untrained": "the shape of the model",
}

NAMES = {
    "original": "original text",
    "token_shuffled": "shuffled tokens",
    "shuffled_keep_last": "shuffled, last token kept",
    "untrained": "untrained model",
    "without_massive": "without massive units",
    "floor": "permuted pairs (floor)",
    "per_sequence": "per sequence, mean",
    **SURROGATES,
}

COLUMNS = {
    "plane_mse": "MSE, plane",
    "relative_put": "rel. put",
    "relative": "rel. end",
    "cosine_put": "cos put",
    "cosine": "cos end",
    "kl": "KL, nats",
    "nearer": "nearer",
    "contraction": "contraction",
}


# Names of folders that many trainings have, each with other weights in it.
_ONE_OF_MANY = re.compile(
    r"(.*[-_])?(checkpoint|ckpt|step|epoch|iter|iteration)s?[-_=.]?\d+|\d+"
    r"|(checkpoint|ckpt)s?|(hf|model|models|weights|final|last|latest|best|main|output|outputs|export)([-_]model)?",
    re.IGNORECASE,
)


def folder_label(folder: str | Path, levels: int = 0) -> str:
    """What a model in a folder is called: the folder's name.

    Where many trainings have a folder of that name, such as ``checkpoint-500``, the one above stands before it. At
    least ``levels`` folders above are named, for who has to tell two of one name apart.
    """
    parts = Path(folder).expanduser().resolve().parts[1:]
    while levels + 1 < len(parts) and _ONE_OF_MANY.fullmatch(parts[-levels - 1]):
        levels += 1
    return "/".join(parts[-levels - 1 :]) or str(folder)


def stream_name(condition: str) -> str:
    """The one name of a stream, by which runs of different scripts stand beside each other."""
    return STREAMS.get(condition, condition)
