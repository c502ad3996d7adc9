"""The settings of the measures: `analysis.` keys."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rsdyn.analysis.results import MEASURES as ALL_MEASURES
from rsdyn.labels import SURROGATES
from rsdyn.options import (
    setting,
)

MEASURES = ("activations", "correlation", "cosine", "velocity", "mutual_information", "rotation", "pca")  # of a stream
SHAPE = ("curvature", "dimension", "similarity", "dsa")  # of trajectories, beside the paper's measures
READOUT = "readout"  # runs the model with its head
PHASES = "phases"  # of what the other measures give
MASSIVE = "massive"  # of single tokens, so it says most with data.positions=all
UNTRAINED = "untrained"  # the condition whose stream is an untrained model's
JACOBIAN = "jacobian"  # of the model at a text's states: costly, and asked for by name
OF_STREAM = tuple(name for name in ALL_MEASURES if name not in (READOUT, PHASES))  # made of a stream that is recorded


def needs_streams(measures: Sequence[str]) -> bool:
    """Whether any of ``measures`` is made of recorded streams; the others run the model themselves."""
    return any(measure in OF_STREAM for measure in measures)


CONDITIONS = ("original", "token_shuffled", "shuffled_keep_last", "untrained")


STREAM_NULLS = ("token_shuffled", "untrained")  # null models that are other streams
NULLS = (*SURROGATES, *STREAM_NULLS)


@dataclass
class MiConfig:
    """Mutual information between consecutive sublayers, unit by unit."""

    estimator: Literal["kde", "kde_resub", "copula", "ksg", "paper_literal"] = setting(
        "kde",
        "Gaussian KDE on a grid or at the samples, Gaussian copula, nearest neighbours, or the paper's sum as printed.",
    )


@dataclass
class RotationConfig:
    """Turns of single units in the plane of activation and gradient, against null models."""

    nulls: list[str] | None = setting(
        None,
        "Null models, from the one that keeps most (innovation_shuffle, which claims rest on) to the paper's "
        "(layer_shuffle); null takes all that the conditions allow, but for layer_shuffle_regradient.",
        choices=NULLS,
    )
    surrogates: int = setting(1000, "Surrogates of each null model.", low=1)
    shared: bool = setting(
        False,
        "The same random numbers for all units, instead of each unit's own; p of all units together and "
        "innovation_shuffle always share them.",
    )
    window: int = setting(
        8, "Increments in a window of increment_shuffle_scaled and increment_shuffle_windowed.", low=2
    )
    units: list[int] | None = setting(
        None,
        "Units whose portraits are drawn (12 at most); null takes the three that turn most and three at random.",
        low=0,
    )


@dataclass
class JacobianConfig:
    """Derivatives of the stream from each sublayer to the next, against matched nulls (arXiv 2605.14258)."""

    texts: int = setting(20, "Sequences of the text, drawn at random, at whose last tokens to differentiate.", low=1)
    seeds: int = setting(3, "Untrained models, and ones of permuted weights, that the texts are shared out to.", low=1)
    sublayers: list[int] | None = setting(
        None, "Sublayers whose eigenvalues are drawn; null is the first, the middle and the last one.", low=0
    )


@dataclass
class ReadoutConfig:
    """What the stream says at each sublayer, beside what the model says at its end."""

    samples: int = setting(64, "Sequences of which each sublayer's distribution is read, from the first one on.", low=1)
    lens: str | None = setting(
        None,
        "What reads a sublayer: null is the model's own final norm and head (logit lens); else a file, of a Jacobian "
        "lens (rsdyn lens), or .safetensors with weight (S, D, D) and bias (S, D), an affine map per sublayer.",
    )
    examples: int = setting(5, "Sequences whose likeliest tokens are shown sublayer by sublayer.", low=0)


@dataclass
class AnalysisConfig:
    """What analyze.py measures, and what train.py measures on the way with analysis.on_train=true."""

    measures: list[str] = setting(
        list(MEASURES),
        "What to measure; the others are asked for by name: massive (which says most with data.positions=all), "
        "curvature, dimension, similarity, dsa (how alike models move over depth; needs dsa-metric), readout, phases "
        "(change points of the other curves over depth), norm, jacobian.",
        choices=(*ALL_MEASURES, JACOBIAN),
    )
    conditions: list[str] = setting(
        list(CONDITIONS),
        "Streams to measure: the text, its tokens shuffled (the paper's control), shuffled but for the last one, whose "
        "stream is recorded, and the text in an untrained LM of the same shape.",
        choices=CONDITIONS,
    )
    untrained_seeds: int | None = setting(
        None,
        "Untrained LMs, each with random weights of its own, so that untrained has a spread; null is 3 for an LM of at "
        "most 20 million parameters, else 1.",
        low=1,
    )
    samples: int | None = setting(1000, "Measure the first N sequences; null takes all.", low=1, also=("n_samples",))
    resample: Literal["documents", "sequences"] = setting(
        "documents",
        "What the 95 % intervals leave out: whole documents, for how far a number would move with other documents; or "
        "sequences, for how far with other sequences of the same ones.",
    )
    density_threshold: float | None = setting(
        None,
        "A unit is active where its |mean activation| passes this; null takes half the RMS of the last sublayer's, and "
        "without massive units half that of the others'.",
        above=0,
    )
    keep: int | None = setting(
        1000,
        "At most this many trajectories, of as many sequences as can be, for what needs every sample in memory: mutual "
        "information, rotations of single sequences, the null model token_shuffled, and dimensions; null keeps all.",
        low=3,
    )
    components: int | None = setting(
        None, "Principal components kept; null is 100, or as many as there are.", low=2, also=("n_components",)
    )
    on_train: bool = setting(False, "Measure while train.py records, so that one pass over the LM feeds both.")
    mi: MiConfig = field(default_factory=MiConfig)
    rotation: RotationConfig = field(default_factory=RotationConfig)
    readout: ReadoutConfig = field(default_factory=ReadoutConfig)
    jacobian: JacobianConfig = field(default_factory=JacobianConfig)
