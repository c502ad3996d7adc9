"""Findings of several models beside each other: a row per finding, a column per model, and what sets them apart.

Nothing is measured here. A column is what one analysis found of one model's stream of the text, or of its untrained
twin's; a value beside the first model's is compared with it, and says in words what makes that unfair: another text,
another number of sequences, another tokenizer's BOS. :class:`Difference` says the same of all models at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rsdyn.analysis.finding import Finding, Value
from rsdyn.analysis.model_dynamics import ModelDynamics, dynamics_between
from rsdyn.analysis.model_similarity import ModelSimilarity, similarities
from rsdyn.analysis.results import DepthStates, Grams
from rsdyn.analysis.settings import UNTRAINED


@dataclass(frozen=True)
class Facts:
    """What decides whether two models' numbers can stand beside each other; all of it as a reader would say it.

    Attributes:
        text: name, split and revision of the text.
        filter: which rows of it are kept.
        order: which of those come first, and by which seed.
        n_sequences, n_trajectories: how many were measured; several tokens of a sequence make several trajectories.
        positions: which tokens' states.
        bos: what opens each sequence; None where a run of an older version does not say.
        own_bos: whether that is what the tokenizer itself has for it.
        tokenizer: kind and size of the vocabulary.
        n_sublayers, n_units, sites_per_layer: ``S``, ``D``, and 1 where attention and MLP write at once.
        computed: number formats, and what the weights were quantised to.
        settings: how it was measured, ``analysis.`` keys by their full names.
        version: of rsdyn.
    """

    text: str
    filter: str
    order: str
    n_sequences: int
    n_trajectories: int
    positions: str
    bos: str | None
    own_bos: bool
    tokenizer: str | None
    n_sublayers: int
    n_units: int
    sites_per_layer: int
    computed: str
    settings: Mapping[str, Any]
    version: str


@dataclass(frozen=True)
class Curve:
    """A curve over depth from 0 to 1: ``at``, ``values`` and the ends of its interval, ``(n,)`` each."""

    at: np.ndarray
    values: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclass(frozen=True)
class Model:
    """What an analysis found of one model, or why there is none.

    Attributes:
        label: what the model is called, unlike all others.
        facts: None where nothing was measured, and
        failure: says why.
        findings: with values by condition; ``conditions`` has the first one, which the model's column is of, in front.
        curves: by condition, then by the measure's path.
        grams: by condition, what the similarity with other models is made of; of those that have it.
        states: by condition, what the dynamical distance from other models is made of; of those that have it.
        series: the training that it is a checkpoint of, and
        step: the step of it; None for a model by itself.
        about: where it comes from, for ``comparison.json``.
    """

    label: str
    facts: Facts | None = None
    findings: tuple[Finding, ...] = ()
    conditions: tuple[str, ...] = ()
    curves: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)
    grams: Mapping[str, Grams] = field(default_factory=dict)
    states: Mapping[str, DepthStates] = field(default_factory=dict)
    series: str = ""
    step: int | None = None
    failure: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """A column: a model, or the untrained twin that models of one shape share.

    Attributes:
        condition: the stream it shows.
        of: the labels of the models whose stream it is; more than one for a twin alone.
        model: what was measured.
    """

    label: str
    condition: str
    of: tuple[str, ...]
    model: Model

    @property
    def is_twin(self) -> bool:
        return self.condition == UNTRAINED and self.label not in self.of

    @property
    def curves(self) -> Mapping[str, Curve]:
        return self.model.curves.get(self.condition, {})

    @property
    def grams(self) -> Grams | None:
        return self.model.grams.get(self.condition)

    @property
    def states(self) -> DepthStates | None:
        return self.model.states.get(self.condition)


@dataclass(frozen=True)
class Cell:
    """A value, and in words what makes it not comparable with the first model's; None where there is no value."""

    value: Value | None
    not_comparable: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A finding with a cell per column, by label; the rest is as in :class:`Finding`."""

    finding: Finding
    cells: Mapping[str, Cell]

    @property
    def key(self) -> str:
        return self.finding.key


def listed(words: Sequence[str], most: int = 6) -> str:
    """Words with commas and an ``and``; of many the first ones, and how many more there are."""
    if len(words) > most:
        words = [*words[: most - 1], f"{len(words) - most + 1} more"]
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)


@dataclass(frozen=True)
class Difference:
    """A fact that is not the same for all models.

    Attributes:
        name: what it is called.
        values: by label.
        rows: those that it makes unfair, in words.
        series: labels of the checkpoints of each training, which is named by itself where all of them agree.
    """

    name: str
    values: Mapping[str, str]
    rows: str
    series: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        groups: dict[str, list[str]] = {}
        for label, value in self.values.items():
            groups.setdefault(value, []).append(label)
        for labels in groups.values():
            for name, of in self.series.items():
                if len(of) > 1 and set(of) <= set(labels):
                    labels[labels.index(of[0])] = name
                    labels[:] = [label for label in labels if label not in of]
        told = "; ".join(f"{value} ({listed(labels)})" for value, labels in groups.items())
        return f"{self.name} differ{'' if self.name.endswith('s') else 's'}: {told}. {self.rows}"


@dataclass(frozen=True)
class Series:
    """Checkpoints of one training in the order of their steps; ``gaps`` are pairs of steps that lack one between."""

    name: str
    steps: tuple[int, ...]
    labels: tuple[str, ...]
    gaps: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Comparison:
    """All of it.

    Attributes:
        columns, rows, differences, series: of what was measured.
        failed: the models of which there is nothing, with the reason of each.
        similar: each pair of columns whose sequences are of the same texts, and
        not_similar: which are not compared in this way, and why.
        dynamics: each pair of columns whose dynamics over depth are compared, where that was asked for, and
        no_dynamics: which are not, and why.
    """

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    series: tuple[Series, ...]
    failed: Mapping[str, str]
    similar: tuple[ModelSimilarity, ...] = ()
    not_similar: tuple[str, ...] = ()
    dynamics: tuple[ModelDynamics, ...] = ()
    no_dynamics: tuple[str, ...] = ()

    @property
    def labels(self) -> list[str]:
        return [column.label for column in self.columns]


# -- what may differ ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fact:
    """A fact to compare.

    Attributes:
        name: what it is called.
        of: its value as words; None where a run does not say.
        touches: the rows that it makes unfair, and
        rows: the same in words.
        alike: whether two values that differ as words are one all the same.
    """

    name: str
    of: Callable[[Facts], str | None]
    touches: Callable[[Finding], bool] = lambda row: True
    rows: str = "No row is comparable across it."
    alike: Callable[[Facts, Facts], bool] = lambda a, b: False

    def differs(self, a: Facts, b: Facts) -> bool:
        one, other = self.of(a), self.of(b)
        return one is not None and other is not None and one != other and not self.alike(a, b)


def _of_measures(*measures: str) -> Callable[[Finding], bool]:
    return lambda row: row.measure in measures


def _setting(name: str, key: str, *measures: str) -> _Fact:
    def of(facts: Facts) -> str | None:
        found = facts.settings.get(key)
        return f"{key}={found}" if key in facts.settings else None

    return _Fact(name, of, _of_measures(*measures), f"It touches the rows on {listed(_words(measures))}.")


def _words(measures: Sequence[str]) -> list[str]:
    return [measure.replace("_", " ") for measure in measures]


def _nothing(row: Finding) -> bool:
    return False


STEPS = ("correlation", "cosine", "velocity", "mutual_information", "rotation")
FACTS = (
    _Fact("Text", lambda f: f.text),
    _Fact("Filter", lambda f: f.filter),
    _Fact("N", lambda f: f"{f.n_sequences} sequences" if f.n_trajectories == f.n_sequences
          else f"{f.n_sequences} sequences, {f.n_trajectories} trajectories",
          rows="Information, rotations and dimensions depend on N themselves; of other rows the intervals say how much "
          "wider they are."),
    _Fact("Positions", lambda f: f.positions),
    _Fact("What opens a sequence (BOS)", lambda f: f.bos,
          alike=lambda a, b: a.own_bos and b.own_bos and a.tokenizer != b.tokenizer),
    _Fact("Order of sequences", lambda f: f.order, _nothing,
          "They are other sequences of the same text; the intervals cover that where they were drawn at random."),
    _Fact("Tokenizer", lambda f: f.tokenizer, _nothing,
          "The text is the same and its tokens are not, so the recorded tokens are other words."),
    _Fact("Sites per layer", lambda f: str(f.sites_per_layer), _of_measures(*STEPS),
          "With one site a step spans a whole layer, and rows on steps within and across layers are missing."),
    _Fact("Depth", lambda f: f"{f.n_sublayers} sublayers",
          _of_measures("rotation"), "Turns are counted over depth: more of it has more."),
    _Fact("Width", lambda f: f"{f.n_units} units", lambda row: "explained_trend" in (row.key, row.under),
          "A number of common components is a larger share of fewer units."),
    _setting("Estimator of information", "analysis.mi.estimator", "mutual_information"),
    _setting("Threshold of activity", "analysis.density_threshold", "activations"),
    _setting("Trajectories kept", "analysis.keep", "mutual_information", "pca", "rotation"),
    _Fact("Surrogates", lambda f: _joined(f.settings, "analysis.rotation.surrogates", "analysis.rotation.window"),
          lambda row: row.measure == "rotation" and row.key != "turns", "It touches the rows on null models."),
    _Fact("What intervals leave out", lambda f: _joined(f.settings, "analysis.resample"), _nothing,
          "Values are comparable, their intervals are not."),
    _Fact("Number formats", lambda f: f.computed, _nothing, "Rounding is not the same."),
    _Fact("Version of rsdyn", lambda f: f.version, _nothing, "Rows that an older version has not are empty."),
)  # fmt: skip


def _joined(settings: Mapping[str, Any], *keys: str) -> str | None:
    found = [f"{key}={settings[key]}" for key in keys if key in settings]
    return ", ".join(found) or None


def differences(models: Mapping[str, Facts], series: Mapping[str, Sequence[str]] | None = None) -> list[Difference]:
    """The facts that are not the same for all ``models``; one that a model does not say is not one that differs.

    ``series`` are the labels of the checkpoints of each training.
    """
    found = []
    for fact in FACTS:
        told = {label: words for label, facts in models.items() if (words := fact.of(facts)) is not None}
        some = [models[label] for label in told]
        if any(fact.differs(some[0], other) for other in some[1:]):
            found.append(Difference(fact.name, told, fact.rows, series or {}))
    return found


def not_comparable(row: Finding, mine: Facts, theirs: Facts) -> tuple[str, ...]:
    """What makes a row's value unlike that of a model with the facts ``theirs``, in words; empty where nothing does."""
    found = []
    for fact in FACTS:
        if fact.differs(mine, theirs) and fact.touches(row):
            found.append(f"{fact.name}: {fact.of(mine)}, not {fact.of(theirs)}")
    return tuple(found)


# -- the comparison ----------------------------------------------------------------------------------------------------


def compare(models: Sequence[Model]) -> Comparison:
    """Put what was measured of ``models`` beside each other, compared with the first of them that was measured.

    Raises ``ValueError`` when two have one label.
    """
    labels = [model.label for model in models]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"label={twice[0]!r} is given to two models: each needs one of its own.")
    measured = {model.label: model for model in models if model.facts is not None}
    facts = {label: model.facts for label, model in measured.items() if model.facts is not None}
    series = _series(list(measured.values()))
    columns = _columns(list(measured.values()))
    first = next(iter(facts.values()), None)
    rows = [] if first is None else _rows(columns, first)
    failed = {model.label: model.failure for model in models if model.facts is None}
    of_series = {one.name: one.labels for one in series}
    trained_first = sorted(columns, key=lambda column: column.is_twin)
    similar, unlike = similarities({c.label: c.grams for c in trained_first if c.grams is not None})
    dynamics, apart = dynamics_between({c.label: c.states for c in trained_first if c.states is not None})
    asked = any(_measured("dsa", column) for column in columns)
    return Comparison(
        tuple(columns),
        tuple(rows),
        tuple(differences(facts, of_series)),
        tuple(series),
        failed,
        tuple(similar),
        (*_without(columns, "similarity", lambda column: column.grams), *unlike),
        tuple(dynamics),
        (*_without(columns, "dsa", lambda column: column.states), *apart) if asked else (),
    )


def _without(columns: Sequence[Column], measure: str, kept: Callable[[Column], object]) -> list[str]:
    """Which columns lack what a measure keeps of their states to compare, and why, those of one reason together."""
    reasons: dict[str, list[str]] = {}
    for column in columns:
        if kept(column) is None and column.model.facts is not None:
            reasons.setdefault(_why_nothing_kept(measure, column), []).append(column.label)
    return [f"{listed(labels)}: {reason}" for reason, labels in reasons.items()]


def _why_nothing_kept(measure: str, column: Column) -> str:
    facts = column.model.facts
    assert facts is not None
    if not _measured(measure, column):
        return f"{measure} is not among the measures"
    if facts.positions != "last":
        return f"models are compared at last tokens, and these trajectories are of others ({facts.positions})"
    kept = "similarities" if measure == "similarity" else "states"
    return f"the run keeps no {kept} of single sequences: another version made it, or its text is not known"


def _measured(measure: str, column: Column) -> bool:
    return column.model.facts is not None and measure in column.model.facts.settings.get("analysis.measures", ())


def _columns(models: Sequence[Model]) -> list[Column]:
    """A column per model, and behind the last of those that share an untrained twin one for that.

    Models of one shape have one twin where seeds and text are the same: its numbers are equal but for rounding.
    """
    columns: list[Column] = []
    twins: dict[tuple[Any, ...], list[str]] = {}
    for model in models:
        columns.append(Column(model.label, model.conditions[0], (model.label,), model))
        if UNTRAINED in model.conditions[1:]:
            twins.setdefault(_fingerprint(model), []).append(model.label)
    by_label = {model.label: model for model in models}
    for of in twins.values():
        names = {by_label[label].series or label for label in of}
        name = names.pop() if len(names) == 1 else of[0]
        place = max(i for i, column in enumerate(columns) if column.label in of)
        twin = Column(f"{name}-{UNTRAINED}", UNTRAINED, tuple(of), by_label[of[0]])
        columns.insert(place + 1, twin)
    return columns


def _fingerprint(model: Model) -> tuple[Any, ...]:
    rows = [row for row in model.findings if UNTRAINED in row.values and _is_of_twin_alone(row)]
    values = [(row.key, float(f"{row.values[UNTRAINED].value:.9g}")) for row in rows]
    shape = (model.facts.n_sublayers, model.facts.n_units) if model.facts is not None else ()
    return (shape, *((key, value) for key, value in values if value == value))


def _is_of_twin_alone(row: Finding) -> bool:
    """Whether the untrained stream's value has nothing of the trained one's in it.

    A null model that is this very stream has.
    """
    return row.null != UNTRAINED and not row.of_main


def _rows(columns: Sequence[Column], first: Facts) -> list[Row]:
    """All findings that any column has, in the order of the column that has most, others where they stand."""
    order: list[str] = []
    known: dict[str, Finding] = {}
    for column in sorted(columns, key=lambda c: -len(c.model.findings)):
        before = -1
        for finding in column.model.findings:
            if finding.key not in known:
                known[finding.key] = finding
                order.insert(before + 1, finding.key)
            before = order.index(finding.key)
    rows = [Row(known[key], {c.label: _cell(known[key], c, first) for c in columns}) for key in order]
    return [row for row in rows if any(cell.value is not None for cell in row.cells.values())]


def _cell(row: Finding, column: Column, first: Facts) -> Cell:
    mine = column.model.facts
    assert mine is not None  # only what was measured has a column
    found = next((f for f in column.model.findings if f.key == row.key), None)
    value = None if found is None else found.values.get(column.condition)
    if found is None or value is None:
        return Cell(None, (_why_missing(row, found, mine, first),))
    reasons = not_comparable(row, mine, first)
    if found.statistic != row.statistic:
        reasons = (*reasons, f"here it is: {found.statistic}")
    return Cell(value, reasons)


def _why_missing(row: Finding, found: Finding | None, mine: Facts, first: Facts) -> str:
    if found is not None:
        return "not measured of this stream"
    if row.both_sites and mine.sites_per_layer == 1:
        return "one site per layer: no steps within layers"
    if row.measure not in mine.settings.get("analysis.measures", [row.measure]):
        return f"{row.measure.replace('_', ' ')} was not measured"
    if mine.version != first.version:
        return f"rsdyn {mine.version} has no such row"
    return "no such row here"


# -- over training -----------------------------------------------------------------------------------------------------


def _series(models: Sequence[Model]) -> list[Series]:
    """Trainings of which at least two checkpoints with different steps were measured."""
    names = dict.fromkeys(model.series for model in models if model.series and model.step is not None)
    found = []
    for name in names:
        of = sorted((m.step, m.label) for m in models if m.series == name and m.step is not None)
        steps = tuple(step for step, _ in of)
        if len(set(steps)) > 1:
            found.append(Series(name, steps, tuple(label for _, label in of), gaps(steps)))
    return found


def gaps(steps: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Pairs of successive steps with one missing between, where the others are equally far apart, or equal factors.

    Most of the distances, or of the ratios, must agree for that; the leading zero of a row of ratios does not count.
    """
    known = sorted(set(steps))
    for values in (known, [step for step in known if step > 0]):
        as_ratios = values is not known
        apart = [b / a if as_ratios else float(b - a) for a, b in itertools.pairwise(values)]
        usual = min(apart, key=lambda x: (-sum(bool(np.isclose(x, y)) for y in apart), x), default=0.0)
        agree = sum(bool(np.isclose(usual, x)) for x in apart)
        if agree < 2 or 2 * agree <= len(apart):
            continue
        missing = []
        for a, b, x in ((*pair, x) for pair, x in zip(itertools.pairwise(values), apart, strict=True)):
            times = np.log(x) / np.log(usual) if as_ratios else x / usual
            if times > 1.5 and np.isclose(times, round(times)):
                missing.append((a, b))
        return tuple(missing)
    return ()
