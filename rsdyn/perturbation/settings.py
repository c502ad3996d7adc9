"""The settings of the perturbation: `perturb.` keys."""

from dataclasses import dataclass, field
from typing import Literal

from rsdyn.options import (
    is_range,
    setting,
)

LAYER_KINDS = ("skip", "swap_layers")  # what is done to layers, and not to states: no stream is recorded for these


@dataclass
class GridConfig:
    """The grid of points that the stream is teleported to."""

    n: int = setting(10, "Points along each side of the grid.", low=2)
    range: list[float] | None = setting(
        None,
        "Its ends, [min1,max1,min2,max2], in latents; null is the range of the text's trajectories and a tenth more.",
        allowed="four numbers [min1,max1,min2,max2], each min below its max",
        test=is_range,
    )


@dataclass
class NoiseConfig:
    """Gaussian noise on the stream."""

    sigma: float = setting(0.5, "Size of the noise, as a share of the state's own norm.", above=0)


@dataclass
class PerturbConfig:
    """What perturb.py does to the stream of a prompt."""

    kind: Literal["teleport", "noise", "swap", "skip", "swap_layers"] = setting(
        "teleport",
        "Put the state on a grid in a plane, add noise to it, or put another sequence's state in its place; or leave "
        "each layer out in turn (skip), or exchange it with the next (swap_layers).",
    )
    layers: list[float] | None = setting(
        None,
        "Layers of injection: numbers such as [0,7,15], or fractions of the depth such as [0.25,1.0] if any is not "
        "whole; null is the paper's 0, 7, 15, 23 and 31 of 32, at this model's depth, and every layer for skip and "
        "swap_layers.",
        low=0,
    )
    site: Literal["resid_pre", "resid_mid"] = setting("resid_pre", "Where in the layer.")
    position: Literal["last", "all"] = setting("last", "The last token's state alone, or the same state at all.")
    space: Literal["pca", "cae"] = setting(
        "pca", "Plane of the teleports: PCA of the text's stream, or an autoencoder."
    )
    through: Literal["full", "projection"] = setting(
        "full",
        "Noise and swaps act on the whole state, or only on what the projection of perturb.space holds of it.",
    )
    checkpoint: str | None = setting(None, "Autoencoder of perturb.space=cae: a best.ckpt of train.py.")
    off_plane: Literal["drop", "keep"] = setting(
        "drop",
        "Teleports, and what goes through the projection, lose what lies outside the plane (the paper), or keep it.",
    )
    prompt: str = setting("I'm sorry, Dave. I'm afraid I can't do that.", "The prompt (the paper's).")
    prompts: str | None = setting(
        None, "A text file of prompts, one per line, instead of perturb.prompt and of prompts from the text."
    )
    from_text: int | None = setting(
        None,
        "How many sequences of the text are prompts beside perturb.prompt, of different documents where the text knows "
        "them; intervals are over these. null is 20, or as many as there are; 0 leaves the prompt alone.",
        low=0,
    )
    prompt_group: str | None = setting(
        None,
        "Group of data.group_column that the prompts of perturb.from_text are drawn from; null draws from all of the "
        "text.",
    )
    swap_group: str | None = setting(
        None,
        "Group of data.group_column whose states are swapped in, by perturb.kind=swap and as the control of others; "
        "null takes those of all of the text.",
    )
    points: int = setting(100, "Points of noise or swap; a grid has its own number.", low=1)
    samples: int = setting(1000, "Sequences of the text that the plane, its range and swaps come from.", low=3)
    steps: int = setting(12, "Sublayers after the injection that the arrows average over.", low=1)
    grid: GridConfig = field(default_factory=GridConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
