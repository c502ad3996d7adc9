"""How each series is drawn, by its name: one table for the static figures, the page and W&B's charts.

A condition, a control or a variant has one colour and one dash, whatever else stands beside it. Colours are names
(``ink``, ``c1``, ...) that each theme turns into a colour of its own: :data:`LIGHT` on paper, :data:`DARK` on the
page's dark theme.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

from rsdyn.labels import NAMES

# Wong's colour-blind safe palette (Nature Methods 8, 441, 2011), a brown and a purple beside it.
LIGHT = {
    "ink": "#000000", "c1": "#D55E00", "c2": "#CC79A7", "c3": "#E69F00", "c4": "#56B4E9", "c5": "#7A5230",
    "c6": "#5E4FA2", "within": "#009E73", "cross": "#0072B2", "muted": "#767676", "paper": "#ffffff",
    "rule": "#d9d9d9", "faint": "#f4f4f2",
}  # fmt: skip
# ink is light, and colours that are dark become brighter, so that they keep their contrast
DARK = LIGHT | {
    "ink": "#e6e6e3", "c1": "#f07f2e", "c5": "#c09468", "c6": "#9d8fe0", "within": "#1fbf92", "cross": "#3d9be0",
    "muted": "#999999", "paper": "#15171a", "rule": "#33373d", "faint": "#1d2024",
}  # fmt: skip
DASHES: dict[str, Any] = {
    "solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", "longdash": (0, (7, 3)), "longdashdot": (0, (7, 2, 1, 2)),
}  # fmt: skip


class Look(NamedTuple):
    """How a series is drawn.

    Attributes:
        colour: a key of :data:`LIGHT` and :data:`DARK`.
        dash: a key of :data:`DASHES`, as Plotly calls it.
    """

    colour: str
    dash: str

    @property
    def hex(self) -> str:
        """The colour on paper."""
        return LIGHT[self.colour]

    @property
    def token(self) -> str:
        """The colour as the page names it, for either theme."""
        return f"@{self.colour}"

    @property
    def line(self) -> Any:
        """The dash as matplotlib takes it."""
        return DASHES[self.dash]


LOOKS = {
    "original": Look("ink", "solid"),
    "token_shuffled": Look("c1", "dash"),
    "shuffled_keep_last": Look("c3", "dashdot"),
    "untrained": Look("c2", "dot"),
    "without_massive": Look("c4", "longdash"),
    "floor": Look("muted", "dot"),
    "autoencoder": Look("c1", "solid"),
    "pca": Look("ink", "dash"),
    "PCA": Look("ink", "dash"),
    "all units": Look("ink", "solid"),
    "per_sequence": Look("c5", "dot"),
    "training": Look("ink", "solid"),
    "validation": Look("c1", "dash"),
    "trained, full context": Look("ink", "solid"),
    "trained, one token alone": Look("c1", "dash"),
    "untrained, full context": Look("c2", "dot"),
    "weights permuted": Look("c3", "dashdot"),
    "G's singular values, rotated": Look("c4", "longdash"),
    "iid Gaussian G": Look("c5", "longdashdot"),
    "teleport": Look("c1", "solid"),
    "noise": Look("c1", "solid"),
    "swap": Look("c1", "solid"),
    "attention frozen": Look("c2", "dash"),
    "random directions": Look("c3", "dot"),
    "swapped-in state": Look("c4", "dashdot"),
    "texts": Look("ink", "solid"),
    "the prompt": Look("c1", "dash"),
    "stays put": Look("c5", "longdash"),
    "random writes": Look("c6", "longdashdot"),
    "first token": Look("c1", "solid"),
    "sinks": Look("c4", "dash"),
    "others": Look("ink", "solid"),
    "within layer": Look("within", "solid"),
    "cross layer": Look("cross", "solid"),
    "layer to layer": Look("cross", "solid"),
    "sequences": Look("muted", "solid"),
    "unperturbed": Look("muted", "solid"),
    "at the injection": Look("ink", "solid"),
    "then": Look("ink", "solid"),
    "as put": Look("muted", "dot"),
    "unit circle": Look("muted", "solid"),
    "zero": Look("rule", "solid"),
    "within a factor of two": Look("muted", "solid"),
    "median": Look("ink", "solid"),
    "mean": Look("ink", "dash"),
    "units": Look("ink", "solid"),
    "the null": Look("muted", "solid"),
    "surrogates": Look("muted", "solid"),
    "the unit": Look("c1", "solid"),
    "the chosen unit": Look("c1", "solid"),
    "width": Look("ink", "solid"),
    "massive units": Look("c4", "solid"),
    "largest units": Look("muted", "solid"),
}
WITHOUT = "without massive units"
_LABELS = {NAMES[key]: key for key in LOOKS if key in NAMES}
_OTHERS = tuple(f"c{i}" for i in range(1, 7))


def is_series(name: str) -> bool:
    """Whether a name is one of the table, so that its colour means something."""
    return _LABELS.get(name, name) in LOOKS


def look_of(name: str) -> Look:
    """The look of a series, by its name or the words it is shown under.

    A name that is not in the table (a series of somebody's own) gets a look that is a function of the name alone.
    """
    key = _LABELS.get(name, name)
    if key in LOOKS:
        return LOOKS[key]
    number = zlib.crc32(name.encode())
    return Look(_OTHERS[number % len(_OTHERS)], list(DASHES)[1:][number // 7 % (len(DASHES) - 1)])
