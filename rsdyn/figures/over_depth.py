"""How depth is drawn and told: as an axis, as the two kinds of transition along it, and in words.

Axes of sublayers are labelled with layers, counted from 0 as in the model's own module names. Entry s of anything
taken between sublayers belongs to the step from s to s + 1 and is drawn between the two; with both sites of a layer
recorded, even entries are within a layer and odd ones across layers.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from rsdyn.figures.panel import Axis


def layer_ticks(n_sublayers: int, sites: int) -> list[int]:
    """Choose at most nine layers to label; a depth of 16, 32 or 80 layers then divides evenly."""
    n_layers = -(-n_sublayers // sites)
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 25, 50, 100, n_layers) if n_layers <= 9 * step)
    return list(range(0, n_layers, step))


def depth_axis(n_sublayers: int, sites: int | None) -> Axis:
    """The axis of depth: layers; sublayers, where nobody knows how many make a layer."""
    pad = 0.02 * n_sublayers + 0.2
    limits = (-pad, n_sublayers - 1 + pad)
    if sites is None:
        return Axis("sublayer", limits=limits)
    ticks = tuple((float(layer * sites), str(layer)) for layer in layer_ticks(n_sublayers, sites))
    return Axis("layer", limits=limits, ticks=ticks)


SHARED_DEPTH = Axis("depth, from the first sublayer to the last", limits=(-0.02, 1.02))
"""The axis of models of different depth."""


class Kind(NamedTuple):
    """A kind of transition: its name, which its colour goes by, its marker, and the entries that are of it."""

    name: str
    marker: Literal["circle", "square"]
    part: slice


def transition_kinds(sites: int | None) -> list[Kind]:
    """The kinds of transition: within and across layers, where both sites of a layer were recorded."""
    if sites == 2:
        return [Kind("within layer", "circle", slice(0, None, 2)), Kind("cross layer", "square", slice(1, None, 2))]
    return [Kind("layer to layer", "circle", slice(None))]


def sublayer_names(n_sublayers: int, sites: int | None) -> tuple[str, ...]:
    """What each sublayer is called under the pointer."""
    if sites is None:
        return tuple(f"sublayer {s}" for s in range(n_sublayers))
    site = ("resid_pre", "resid_mid") if sites == 2 else ("resid_pre",)
    return tuple(f"layer {s // sites}, {site[s % sites]}" for s in range(n_sublayers))


def transition_names(n_sublayers: int, sites: int | None) -> tuple[str, ...]:
    """What the step from each sublayer to the next is called under the pointer."""
    if sites == 2:
        return tuple(
            f"within layer {s // 2}" if s % 2 == 0 else f"layer {s // 2} to {s // 2 + 1}"
            for s in range(n_sublayers - 1)
        )
    unit = "layer" if sites == 1 else "sublayer"
    return tuple(f"{unit} {s} to {s + 1}" for s in range(n_sublayers - 1))
