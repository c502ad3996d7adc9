"""What an analysis found, as typed values: a dataclass per measure, gathered per stream and per run.

``S`` sublayers, ``D`` units, ``G`` groups of sequences, ``C`` numbers of largest units left out. Everything is a
float64 tensor unless it says otherwise. :mod:`rsdyn.analysis.stored` flattens these for ``results.npz`` and reads them
back, by the fields alone: a new field needs nothing there.

This module imports no torch, since the settings take the names of the measures from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Measured:
    """A measured number or curve, and what is needed to judge it.

    Attributes:
        value: ``(...)``: ``()`` a number, ``(S,)`` a curve over sublayers, ``(S - 1,)`` one over transitions.
        interval: ``(2, ...)`` low and high end at 95 %, over groups of sequences; None where there is none.
        groups: ``(G, ...)`` the value without each group of sequences, for what is smooth in them.
        draws: ``(N, ...)`` values of simulated data, for what moves in steps, as shares and turns do.
        std: ``(...)`` the standard deviation over sequences, where the value is a mean over them.
        left_out: ``(C, ...)`` the value without each number of the largest units (:attr:`Flags.left_out_counts`).
        seeds: ``(K, ...)`` the value of further streams of its kind, such as untrained models of other seeds.
        n: on how many trajectories it was measured; None for all of them (:attr:`Counts.trajectories`).
        without_massive: the same without massive units; None where there are none.
    """

    value: Tensor
    interval: Tensor | None = None
    groups: Tensor | None = None
    draws: Tensor | None = None
    std: Tensor | None = None
    left_out: Tensor | None = None
    seeds: Tensor | None = None
    n: int | None = None
    without_massive: Measured | None = None

    @property
    def low(self) -> Tensor | None:
        """The interval's low end ``(...)``."""
        return None if self.interval is None else self.interval[0]

    @property
    def high(self) -> Tensor | None:
        """The interval's high end ``(...)``."""
        return None if self.interval is None else self.interval[1]


@dataclass(frozen=True, eq=False)
class Counts:
    """How many trajectories were measured, and what the intervals leave out.

    Attributes:
        trajectories, bos, sinks: how many there are, and how many of them are BOS and sinks.
        groups: how many groups of sequences the intervals leave out, one at a time.
        intervals_over: what the groups are made of, in words, such as ``40 documents``.
        intervals_note: what is to be said beside an interval; empty where the groups are enough.
    """

    trajectories: int
    bos: int
    sinks: int
    groups: int
    intervals_over: str = "sequences"
    intervals_note: str = ""

    @property
    def intervals(self) -> str:
        """What intervals are over, in a sentence."""
        return f"In brackets: 95 % intervals, which leave out {self.intervals_over}, in {self.groups} groups."


@dataclass(frozen=True, eq=False)
class Flags:
    """Units that a reader must know of. Numbers of units are int64.

    Attributes:
        largest_units, largest_ratios: ``(K,)`` the largest units, largest first, and how often the median ``|mean|``
            each one's is where it is most; the same for all conditions of a run.
        left_out_counts: ``(C,)`` int64, how many of them are left out in each ``left_out``.
        massive_units, massive_ratios: those beyond the threshold, in the order of their numbers.
        unusable_units: that hold NaN or infinities, and are left out of everything.
        constant: ``(S,)`` int64, units that are constant, by sublayer; ``constant_units`` at every sublayer.
        few_levels: ``(S,)`` int64, units of which storage in bf16 leaves few different values.
        frozen_steps: ``(S - 1,)`` share of steps that rounding makes none; ``frozen_units`` in most steps.
    """

    largest_units: Tensor
    largest_ratios: Tensor
    left_out_counts: Tensor
    massive_units: Tensor
    massive_ratios: Tensor
    unusable_units: Tensor
    constant: Tensor
    constant_units: Tensor
    few_levels: Tensor
    frozen_steps: Tensor
    frozen_units: Tensor

    @property
    def known(self) -> bool:
        """Whether units were looked at: not where no stream was recorded."""
        return len(self.left_out_counts) > 0


# -- the measures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Activations:
    """Mean activations, and how dense they are (paper 2.2, Fig. 1B).

    Attributes:
        mean, std: ``(S, D)`` over sequences.
        density: ``(S,)`` share of units whose ``|mean|`` passes ``density_threshold``.
        density_threshold: in units of activation; without massive units it is ``density_threshold_without_massive``.
        participation: ``(S,)`` participation ratio of the mean vector, in units.
    """

    mean: Tensor
    std: Tensor
    density: Measured
    density_threshold: float
    participation: Measured
    density_threshold_without_massive: float | None = None


@dataclass(frozen=True, eq=False)
class ByLastToken:
    """Correlation between last tokens and within them (METHOD section 0.7).

    Attributes:
        between, between_units: at the first transition, each last token counted once: ``()`` mean over units, ``(D,)``.
        within, within_units: at the first transition of the second layer, within last tokens, likewise; None where
            there is no second layer.
    """

    between: Measured
    between_units: Tensor
    within: Measured | None = None
    within_units: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Correlation:
    """Correlation of each unit between sublayers, over sequences (paper 2.3, Fig. 1C and D).

    Attributes:
        units: ``(S - 1, D)`` Pearson's r from each sublayer to the next; NaN where a unit is constant.
        mean: ``(S - 1,)`` over units.
        undefined: ``(S - 1,)`` int64, units without one.
        pair_counts: ``(D, bins)`` of all pairs of sublayers, how many have each r; ``pair_edges`` ``(bins + 1,)``.
        pairs_below: ``(D,)`` pairs below 0, which are in no bin; ``negative_pairs`` their share of all pairs.
        pair_means: ``(pairs,)`` over units; ``unit_means`` ``(D,)`` over pairs.
        by_last_token: None where the last tokens are not known.
    """

    units: Tensor
    mean: Measured
    undefined: Tensor
    pair_counts: Tensor
    pair_edges: Tensor
    pairs_below: Tensor
    negative_pairs: float
    pair_means: Tensor
    unit_means: Tensor
    by_last_token: ByLastToken | None = None


@dataclass(frozen=True, eq=False)
class Cosine:
    """Cosine of successive states (paper 2.3, Fig. 1E): ``(S - 1,)``, mean over sequences.

    Attributes:
        by_position: ``(P, S - 1)`` by range of positions; None where positions are not known.
    """

    mean: Measured
    by_position: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Velocity:
    """Length of the step from each sublayer to the next (paper 2.4, Fig. 1F): ``(S - 1,)``, mean over sequences.

    Attributes:
        speed: in units of activation.
        relative: over the norm of the state that the step starts from (METHOD section 0.12).
        by_position, relative_by_position: ``(P, S - 1)`` by range of positions; None where they are not known.
    """

    speed: Measured
    relative: Measured
    by_position: Tensor | None = None
    relative_by_position: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Norm:
    """Length of the state at each sublayer: ``(S,)``, mean over sequences."""

    mean: Measured


@dataclass(frozen=True, eq=False)
class MutualInformation:
    """Mutual information of each unit between successive sublayers, nats (paper 2.5, Fig. 1G and H).

    Attributes:
        estimator: its name; of ``paper_literal`` the numbers are no information, and the true one is ``true``.
        units: ``(S - 1, D)``.
        mean: ``(S - 1,)`` over units.
        floor: ``(S - 1,)`` the mean over some units for pairs made of different sequences.
        undefined, infinite: ``(S - 1,)`` int64, units without an estimate, and with an infinite one.
        between_tokens: ``(S - 1,)`` between last tokens, each one sample; None where they are not known.
        true, true_units: ``mean`` and ``units`` of the estimator ``kde``, beside ``paper_literal``.
    """

    estimator: str
    units: Tensor
    mean: Measured
    floor: Tensor
    undefined: Tensor
    infinite: Tensor
    between_tokens: Measured | None = None
    true: Measured | None = None
    true_units: Tensor | None = None


@dataclass(frozen=True, eq=False)
class NullTest:
    """A statistic of each unit against a null model, and its mean over units (of turns: of ``|R|``).

    Attributes:
        mean, std: ``(D,)`` of the surrogates of each unit.
        z, p, q_normal: ``(D,)`` of each unit, NaN where it has none; ``q_normal`` is the false discovery rate by ``z``.
        delta, q: ``(D,)`` the unit's value less ``mean``, and the false discovery rate by ``p``; None of regularity.
        over_units: what the null's mean over units is, on average; where it is another stream, that stream's.
        over_units_std, over_units_z, over_units_p: its SD over surrogates, how many of them the stream lies above it,
            and p; None where a null has no surrogates, as an untrained model.
        surrogates: ``(n,)`` the mean over units of each surrogate; None for another stream.
        example: ``(D,)`` one surrogate of each unit, for a distribution over units.
        walks_beyond: which share of random walks this null rejects at p < .05.
    """

    mean: Tensor
    std: Tensor
    z: Tensor
    p: Tensor
    q_normal: Tensor
    over_units: float
    delta: Tensor | None = None
    q: Tensor | None = None
    over_units_std: float | None = None
    over_units_z: float | None = None
    over_units_p: float | None = None
    surrogates: Tensor | None = None
    example: Tensor | None = None
    walks_beyond: float | None = None


@dataclass(frozen=True, eq=False)
class Regularity:
    """The largest share of a unit's steps at one frequency, Fisher's g (METHOD section 0.4).

    Attributes:
        units: ``(D,)``.
        mean: ``()`` over units.
        nulls: by null model, from the one that keeps most.
    """

    units: Tensor
    mean: Measured
    nulls: dict[str, NullTest] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Rotation:
    """Turns of each unit in the plane of activation and gradient, against null models (paper 2.6, Fig. 2).

    Attributes:
        turns: ``(D,)`` of the mean trajectory, counter-clockwise positive.
        mean_abs: ``()`` mean of ``|turns|`` over units.
        trajectory: ``(S, D)`` the mean trajectory.
        per_sequence: ``(D,)`` mean over sequences of each one's own turns.
        zero_tangents: ``(D,)`` share of steps that do not move.
        random_walk: mean ``|R|`` of random walks of equal length; None where no null was asked for.
        nulls: by null model, from the one that keeps most; other streams last.
        regularity: None where the depth is too small for it.
    """

    turns: Tensor
    mean_abs: Measured
    trajectory: Tensor
    per_sequence: Tensor
    zero_tangents: Tensor
    random_walk: float | None = None
    nulls: dict[str, NullTest] = field(default_factory=dict)
    regularity: Regularity | None = None


@dataclass(frozen=True, eq=False)
class Plane:
    """Trajectories in the plane, or the first ``K`` components, of a stream.

    Attributes:
        mean: ``(S, K)`` the mean trajectory.
        samples: ``(n, S, K)`` single ones.
        ratio: ``(K',)`` share of the variance along each component.
    """

    mean: Tensor
    samples: Tensor
    ratio: Tensor


@dataclass(frozen=True, eq=False)
class OverDepth:
    """How many components each sublayer needs, and how much of it the common ones hold (paper Fig. 4C).

    Attributes:
        explained: ``(S,)`` share of each sublayer's variance that the common components explain.
        dimensions: ``(S,)`` participation ratio of the variances along each sublayer's own components.
        components_90: ``(S,)`` how many of them hold 90 % of its variance.
    """

    explained: Measured
    dimensions: Measured
    components_90: Measured


@dataclass(frozen=True, eq=False)
class PrincipalComponents:
    """Principal components of the stream (paper 2.8, Fig. 4A-C).

    Attributes:
        ratio: ``(K,)`` share of the variance along each.
        components: ``(10, D)`` the first ones; ``components_without_massive`` the same without massive units.
        massive_loadings: ``(K, M)`` squared loadings of the massive units on each.
        control: smoothed random walks with the stream's steps, in the plane that they make.
        half_angles: ``(2,)`` degrees between the planes of two halves of the sequences; None with too few.
        latents: the stream in its first components; None where there was no second pass, as on the way of a training.
        over_depth: likewise.
    """

    ratio: Measured
    components: Tensor
    massive_loadings: Tensor
    control: Plane
    components_without_massive: Tensor | None = None
    half_angles: Tensor | None = None
    latents: Plane | None = None
    over_depth: OverDepth | None = None


@dataclass(frozen=True, eq=False)
class ByToken:
    """A curve over depth of each class of token, :data:`rsdyn.metrics.running.TOKEN_CLASSES`; None without tokens."""

    first_token: Measured | None = None
    sinks: Measured | None = None
    others: Measured | None = None


@dataclass(frozen=True, eq=False)
class MassiveActivations:
    """The largest activations by class of token, where they are written, and norms by position.

    ``T`` classes of token, :data:`rsdyn.metrics.running.TOKEN_CLASSES`; one without tokens is NaN. ``U`` units.

    Attributes:
        largest: ``(T, S)`` the largest absolute value; ``unit`` ``(T, S)`` int64, of which unit it is.
        typical: ``(T, S)`` the median over units of the mean absolute value.
        counts: ``(T,)`` tokens of each class.
        top: ``(U,)`` int64, the units that stand out most; ``curves`` ``(T, U, S)`` the largest value of each.
        onset, before, after: ``(T, U)`` at which sublayer each has been written, and its value on either side.
        unwritten: ``(T, U)`` the first sublayer behind the peak with less than half of it, -1 where there is none.
        ratio: how often the median ``|activation|`` of a state its largest one is, geometric mean over tokens ``(S,)``.
        massive: ``(T, S)`` the share of tokens whose state has a massive activation as the paper defines it.
        normal_ratio: the geometric mean in states of as many independent normal units; 95 % of such states are below
            ``normal_quantile``. ``normal_p`` ``(T, S)``: two-sided, of the ratio's difference from it; NaN without
            groups, and where all states are one.
        norm_by_position: ``(P, S)`` by range of positions; None where positions are not known.
    """

    largest: Tensor
    unit: Tensor
    typical: Tensor
    counts: Tensor
    top: Tensor
    curves: Tensor
    onset: Tensor
    before: Tensor
    after: Tensor
    unwritten: Tensor
    ratio: ByToken
    massive: Tensor
    normal_ratio: float
    normal_quantile: float
    normal_p: Tensor
    norm_by_position: Tensor | None = None


@dataclass(frozen=True, eq=False)
class StepNull:
    """A mean over sequences and sublayers against a null model of a path's steps.

    Attributes:
        value: of the stream.
        mean, std: of the null model; ``z`` the value's distance from its mean in these standard deviations.
        p: two-sided.
    """

    value: float
    mean: float
    std: float
    z: float
    p: float


@dataclass(frozen=True, eq=False)
class Curvature:
    """How curved and how long the way over depth is, and over tokens (METHOD section 14).

    Attributes:
        angle: ``(S - 2,)`` radians between successive steps, mean over sequences; pi/2 where they are independent.
        mean_angle: ``()`` over sublayers.
        straightness: ``()`` distance from first state to last over the length of the way, mean over sequences;
            ``scaled_straightness`` with each step divided by the RMS over sequences at its place.
        length: ``()`` of the way, in units of activation.
        nulls: of ``mean_angle``, by null model; ``nulls_without_massive`` the same without massive units.
        straightness_nulls, scaled_straightness_nulls: of the *squared* straightness, likewise.
        over_tokens: ``(S,)`` radians between successive differences of neighbouring tokens' states, mean over tokens;
            without massive units also without position 0. None where single tokens were recorded.
        by_position: ``(P, S - 2)`` ``angle`` by range of positions; None where positions are not known.
    """

    angle: Measured
    mean_angle: Measured
    straightness: Measured
    scaled_straightness: Measured
    length: Measured
    nulls: dict[str, StepNull] = field(default_factory=dict)
    nulls_without_massive: dict[str, StepNull] = field(default_factory=dict)
    straightness_nulls: dict[str, StepNull] = field(default_factory=dict)
    scaled_straightness_nulls: dict[str, StepNull] = field(default_factory=dict)
    over_tokens: Measured | None = None
    by_position: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Dimension:
    """How many dimensions the states of each sublayer fill, ``(S,)`` each (METHOD section 14).

    Attributes:
        participation: participation ratio of the variances along a sublayer's own components.
        components_90: how many of them hold 90 % of its variance.
        effective_rank: the exponential of the entropy of the singular values.
        matrix_entropy: von Neumann entropy of the Gram matrix, in nats.
        twonn, mle: intrinsic dimensions by nearest neighbours.
        repeated: int64, states that repeat others and are left out of these two.
        by_position: ``(P, S)`` of each of them by range of positions, from ``n_by_position`` tokens of each range; NaN
            where a range has fewer. Empty where positions are not known.
        n_by_position: the same number for all ranges, since these depend on it.
        nulls: mean over sublayers of ``twonn`` and ``mle`` of the first ``n_nulls`` states, against Gaussian states of
            the same covariance (:func:`rsdyn.dynamics.dimension.mixed`); of the main stream.
    """

    participation: Measured
    components_90: Measured
    effective_rank: Measured
    matrix_entropy: Measured
    twonn: Measured
    mle: Measured
    repeated: Tensor
    by_position: dict[str, Tensor] = field(default_factory=dict)
    n_by_position: int = 0
    nulls: dict[str, StepNull] = field(default_factory=dict)
    n_nulls: int = 0


@dataclass(frozen=True, eq=False)
class Grams:
    """The geometry of a stream's first sequences, kept to be compared with another model's of the same texts.

    Attributes:
        pairs: ``(S, N (N - 1) / 2)`` float16, products of all pairs of centred states at each sublayer, in units of
            their RMS (:func:`rsdyn.dynamics.similarity.packed`).
        texts: ``(N,)`` int64, a digest of each sequence's text, whatever its tokens are.
        group: ``(N,)`` int64, which of them an interval leaves out together.
    """

    pairs: Tensor
    texts: Tensor
    group: Tensor


@dataclass(frozen=True, eq=False)
class Similarity:
    """Debiased CKA of the states of sublayers (METHOD section 14).

    Attributes:
        map: ``(S, S)`` of all pairs; ``map_without_massive`` where there are massive units.
        adjacent: ``(S - 1,)`` of each sublayer with the next.
        floor: ``(n, S - 1)`` the same where sequences do not belong together.
        with_main: ``(S,)`` of each sublayer with that of the main stream, for the same sequences; None of that stream.
        grams: for a comparison of models; of the main stream and an untrained model, at last tokens of a known text.
        by_position: ``(P, S - 1)`` ``adjacent`` by range of positions; None where positions are not known.
    """

    map: Tensor
    adjacent: Measured
    floor: Tensor | None = None
    map_without_massive: Tensor | None = None
    with_main: Measured | None = None
    grams: Grams | None = None
    by_position: Tensor | None = None


@dataclass(frozen=True, eq=False)
class DepthStates:
    """The states behind a stream's layers in a few of its components, kept to be compared with another model's.

    Attributes:
        states: ``(N, L - 1, K)`` float32, about their mean over sequences, layer by layer.
        texts, group: as in :class:`Grams`.
    """

    states: Tensor
    texts: Tensor
    group: Tensor


@dataclass(frozen=True, eq=False)
class DepthDynamics:
    """Dynamical similarity of a stream over depth, layer by layer (METHOD section 14).

    Attributes:
        share: ``()`` of the variance that the components hold, each layer at unit size.
        predicted: ``()`` of the steps of held-out sequences, what a linear map of the state predicts.
        halves: ``(n,)`` distances between halves of the stream's own sequences, radians: what chance alone gives.
        with_main: ``()`` distance from the main stream; None of that stream.
        states: for a comparison of models; of the main stream and an untrained model, at last tokens of a known text.
    """

    share: Measured
    predicted: Measured
    halves: Tensor
    with_main: Measured | None = None
    states: DepthStates | None = None


@dataclass(frozen=True, eq=False)
class PhaseResults:
    """Change points over depth of the curves of a stream, all together (:mod:`rsdyn.dynamics.phases`).

    Attributes:
        curves: the paths of the curves that were analysed, averaged over the sublayers of each layer.
        n: how many change points are beyond chance.
        places: ``(K, K)`` int64: in row k - 1 the best k, each the first layer of a new phase; -1 behind them.
        low, high: ``(K, K)`` ends of the middle 95 % of these places over simulated data; -1 where there is none.
        gain, p: ``(K,)`` by how much the k-th lowers the logarithm of the cost, and its p over all k.
        null_gain: ``(K, n)`` of phase-randomised curves.
    """

    curves: tuple[str, ...]
    n: int
    places: Tensor
    low: Tensor
    high: Tensor
    gain: Tensor
    p: Tensor
    null_gain: Tensor


@dataclass(frozen=True, eq=False)
class Example:
    """What one sequence's stream says at each sublayer, and at the end.

    Attributes:
        text: what the model has read, its end; ``follows`` is the token that comes next in the text.
        tokens: the ``k`` likeliest tokens at each of ``S + 1`` places, as text, one place after another; empty where
            the lens does not read.
        probability: ``(S + 1, k)``.
    """

    text: str
    follows: str
    tokens: tuple[str, ...]
    probability: Tensor


@dataclass(frozen=True, eq=False)
class ReadoutResults:
    """What the stream says at each sublayer beside what it says at the end (METHOD section 13).

    Curves ``(S,)`` are means over sequences; NaN where the lens does not read.

    Attributes:
        lens: what the states are read with.
        kl: KL(final || here), nats.
        entropy: of the distribution here, nats.
        rank: of the final top token here, as the logarithm of 1 + rank, the first being 0; it spans decades.
        probability: of the final top token here.
        agreement: share of sequences whose top token is the final one.
        commit: ``()`` the first sublayer from which the top token stays, mean; ``S`` where it changes at the end.
        committed: ``(S + 1,)`` share of sequences that have committed by each sublayer.
        examples: single sequences, by number.
        commonest: ``()`` share of sequences whose final top token is the commonest one: how often a readout that always
            said that would agree.
        commonest_token: that token, as text.
        by_position: ``(P, S)`` of each curve by range of positions, at one token of each sequence that reaches the
            range; NaN where none does. Empty where last tokens alone are measured, and of other streams than the main.
    """

    lens: str
    kl: Measured
    entropy: Measured
    rank: Measured
    probability: Measured
    agreement: Measured
    commit: Measured
    committed: Tensor
    examples: dict[str, Example] = field(default_factory=dict)
    by_position: dict[str, Tensor] = field(default_factory=dict)
    commonest: Measured | None = None
    commonest_token: str = ""


# -- what was found of a stream and of a run ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ConditionResults:
    """What was measured of one stream. A field after ``flags`` is a measure, by its name in ``analysis.measures``.

    A measure that was not asked for is None.
    """

    counts: Counts
    flags: Flags
    activations: Activations | None = None
    correlation: Correlation | None = None
    cosine: Cosine | None = None
    velocity: Velocity | None = None
    mutual_information: MutualInformation | None = None
    rotation: Rotation | None = None
    pca: PrincipalComponents | None = None
    massive: MassiveActivations | None = None
    curvature: Curvature | None = None
    dimension: Dimension | None = None
    similarity: Similarity | None = None
    readout: ReadoutResults | None = None
    phases: PhaseResults | None = None
    norm: Norm | None = None
    dsa: DepthDynamics | None = None


MEASURES = tuple(f.name for f in fields(ConditionResults) if f.name not in ("counts", "flags"))


@dataclass(frozen=True, eq=False)
class GroupCurve:
    """A curve over depth by group of sequences; ``L`` groups, ``C`` contrasts, ``S'`` places or 1 (METHOD section 15).

    Attributes:
        path: where the whole's stands in a :class:`ConditionResults`, such as ``cosine/mean``.
        words: what it is.
        value: ``(L, S')``; NaN where a group has too few sequences for it.
        interval: ``(2, L, S')`` low and high end at 95 %; NaN where there is none.
        difference: ``(C, S')`` of each contrast; ``difference_interval`` ``(2, C, S')``.
        p: ``(C,)`` of a difference this large anywhere over depth; NaN where there is no contrast.
        n: ``(L,)`` int64, on how many trajectories each group's is measured.
        equal_n: whether it depends on how many sequences there are, and is compared at equal N.
        without_massive: whether massive units are left out of it.
    """

    path: str
    words: str
    value: Tensor
    interval: Tensor
    difference: Tensor
    difference_interval: Tensor
    p: Tensor
    n: Tensor
    equal_n: bool = False
    without_massive: bool = False


@dataclass(frozen=True, eq=False)
class GroupRow:
    """A finding by group of sequences; ``L`` groups, ``C`` contrasts.

    Attributes:
        measure, statistic, under, detail: as in :class:`rsdyn.analysis.finding.Finding`.
        value: ``(L,)``; NaN where it is not defined. ``interval`` ``(2, L)``, NaN where there is none.
        difference: ``(C,)`` of each contrast; ``difference_interval`` ``(2, C)``.
        p, p_holm: ``(C,)`` over permutations of labels, and adjusted for all rows and contrasts.
        n: ``(L,)`` int64, on how many trajectories each group's is measured.
        equal_n: as in :class:`GroupCurve`.
    """

    measure: str
    statistic: str
    value: Tensor
    interval: Tensor
    difference: Tensor
    difference_interval: Tensor
    p: Tensor
    p_holm: Tensor
    n: Tensor
    equal_n: bool = False
    under: str = ""
    detail: bool = False


@dataclass(frozen=True, eq=False)
class ByGroup:
    """The main stream by group of sequences, with the difference between groups.

    Attributes:
        names: of the ``L`` groups that are there.
        sequences, documents: ``(L,)`` int64, how many each has; what documents are is said by ``over``.
        unlabelled: sequences without a label, which are in the whole alone.
        first, second: of each contrast, a group, and the other or ``the rest``.
        over: ``documents``, ``blocks`` of the text or ``sequences``: what intervals leave out and p exchange.
        exchange: whether whole ones exchange labels (``documents``), or sequences ``within`` them.
        movable: how many sequences can have another label under a permutation.
        permutations: of the labels; of information and dimensions fewer, where many are as large early.
        curves, rows: by key.
        notes: what a reader must know, in sentences.
    """

    names: tuple[str, ...]
    sequences: Tensor
    documents: Tensor
    unlabelled: int
    first: tuple[str, ...]
    second: tuple[str, ...]
    over: str
    exchange: str
    movable: int
    permutations: int
    curves: dict[str, GroupCurve] = field(default_factory=dict)
    rows: dict[str, GroupRow] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def contrasts(self) -> tuple[str, ...]:
        """The contrasts in words, such as ``correct - wrong``."""
        return tuple(f"{a} - {b}" for a, b in zip(self.first, self.second, strict=True))


@dataclass(frozen=True, eq=False)
class AnalysisResults:
    """What an analysis found.

    Attributes:
        conditions: by name, in order, the main one first.
        measures: that were asked for, in order.
        sites_per_layer: 1 or 2.
        n_sublayers, n_units: ``S`` and ``D``.
        by_group: the main stream by group of sequences; None where they have no labels.
    """

    conditions: dict[str, ConditionResults]
    measures: tuple[str, ...]
    sites_per_layer: int
    n_sublayers: int
    n_units: int
    by_group: ByGroup | None = None

    @property
    def main(self) -> ConditionResults:
        """The first condition, which the others stand beside."""
        return next(iter(self.conditions.values()))

    @property
    def main_name(self) -> str:
        """The first condition's name."""
        return next(iter(self.conditions))


T = TypeVar("T")


def curves(found: object, name: str = "") -> Iterator[tuple[str, Measured]]:
    """Everything measured with an interval in a result, by its path of fields, such as ``correlation/mean``.

    The variant without massive units is part of a value and no value of its own.
    """
    if isinstance(found, Measured):
        yield name, found
    elif is_dataclass(found) and not isinstance(found, type):
        for f in fields(found):
            yield from curves(getattr(found, f.name), f"{name}/{f.name}" if name else f.name)
    elif isinstance(found, dict):
        for key, value in found.items():
            yield from curves(value, f"{name}/{key}")


def on_cpu(found: T) -> T:
    """The same result, off any GPU."""
    return each_tensor(found, lambda x: x.cpu())


def each_tensor(found: T, change: Callable[[Tensor], Tensor]) -> T:
    """The same result with every tensor in it changed."""

    def changed(part: Any) -> Any:
        if is_dataclass(part) and not isinstance(part, type):
            return replace(part, **{f.name: changed(getattr(part, f.name)) for f in fields(part)})
        if isinstance(part, dict):
            return {key: changed(value) for key, value in part.items()}
        return change(part) if hasattr(part, "numpy") else part

    new: T = changed(found)
    return new
