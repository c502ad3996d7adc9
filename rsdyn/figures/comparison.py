"""Panels of a comparison: findings as dots with intervals, curves over depth from 0 to 1, findings against steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rsdyn.analysis.comparison import Cell, Column, Comparison, Row, Series
from rsdyn.analysis.comparison_table import leading, training_rows
from rsdyn.analysis.finding import Finding, Value
from rsdyn.figures.colours import LOOKS, Look
from rsdyn.figures.over_depth import SHARED_DEPTH, sublayer_names
from rsdyn.figures.panel import (
    Axis,
    Caption,
    Control,
    HeatMap,
    Line,
    Mark,
    Panel,
    Rule,
    Scale,
    array,
    brief,
    in_words,
)

INTERVALS = "95 % intervals"
COLOURS = ("ink", "c1", "c4", "within", "c2", "c3", "c6", "c5", "cross")
ROOM = 40  # characters of words along an axis, in a panel of 370 pixels
BESIDE_NAMES = 28  # the same where the names of models take the left of it
LONGEST = 26  # characters of a model's name beside an axis
ALSO_DRAWN = ("turns_innovation_shuffle_z", "relative_speed_trend")  # beside the rows that a claim is made of


class Drawn(NamedTuple):
    """How a curve of a comparison is drawn: its name in ``Column.curves``, its title, what its axis says, and how."""

    name: str
    title: str
    unit: str
    scale: Scale = "linear"
    percent: bool = False
    from_zero: bool = False


CURVES = (
    Drawn("correlation/mean", "Correlation of successive sublayers", "mean r over units", "fisher"),
    Drawn("cosine/mean", "Cosine of successive states", "mean cosine", "fisher"),
    Drawn("velocity/relative", "Step over the state's norm", "step over norm", "log"),
    Drawn("mutual_information/mean", "Information of successive sublayers", "nats", from_zero=True),
    Drawn("activations/density", "Active units", "share of units", percent=True, from_zero=True),
    Drawn("activations/participation", "Units that share the mean", "share of units", percent=True, from_zero=True),
    Drawn("pca/over_depth/dimensions", "Dimensions filled", "participation ratio", from_zero=True),
    Drawn("dimension/twonn", "Intrinsic dimension, TwoNN", "dimension", from_zero=True),
    Drawn("dimension/effective_rank", "Effective rank", "dimensions", from_zero=True),
    Drawn("curvature/angle", "Angle between successive steps", "radians (independent: 1.571)"),
    Drawn("similarity/adjacent", "Similarity of successive sublayers", "CKA"),
    Drawn("readout/kl", "How far the readout is from the end", "KL(final || here), nats", from_zero=True),
    Drawn("readout/agreement", "Agreement with the final top token", "share of sequences", percent=True,
          from_zero=True),
    Drawn("readout/entropy", "Entropy of the readout", "nats", from_zero=True),
)  # fmt: skip


def looks(columns: Sequence[Column]) -> dict[str, Look]:
    """A look per column: a colour per model, and an untrained twin dotted, in that of the first model it belongs to."""
    found: dict[str, Look] = {}
    models = [column.label for column in columns if not column.is_twin]
    for i, label in enumerate(models):
        found[label] = Look(COLOURS[i % len(COLOURS)], "solid" if i < len(COLOURS) else "dash")
    for column in columns:
        if column.is_twin:
            found[column.label] = Look(found[column.of[0]].colour, "dot")
    return found


# -- dots and intervals ------------------------------------------------------------------------------------------------


def is_drawn(finding: Finding) -> bool:
    """Whether a row has a panel: those that claims are made of have, and what must be seen beside them."""
    return bool(finding.claim) or finding.key in ALSO_DRAWN


def finding_panels(comparison: Comparison) -> list[Panel]:
    """A panel per claim: a line per model, its value as a dot and its interval as a bar."""
    return [_dots(row, comparison) for row in leading(comparison) if is_drawn(row.finding)]


def _dots(row: Row, comparison: Comparison) -> Panel:
    marks: list[Mark] = []
    values = [row.cells[column.label].value for column in comparison.columns]
    if _reaches_zero(values):
        marks.append(Rule(name="zero", x=0.0))
    for i, column in enumerate(comparison.columns):
        marks += _dot(column, row.cells[column.label], i)
    n = len(comparison.columns)
    names = tuple((float(i), shortened(column.label)) for i, column in enumerate(comparison.columns))
    finding = row.finding
    first = comparison.labels[0]
    return Panel(
        key=f"compare_{row.key}",
        title=_title(finding),
        marks=tuple(marks),
        x=Axis(_statistic(finding, BESIDE_NAMES), limits=_limits(values)),
        y=Axis(limits=(n - 0.4, -0.6), ticks=names),
        caption=Caption(
            f"{_capital(finding.statistic)}: a dot per model and its 95 % interval; untrained twins are rings. "
            f"{_claimed(finding)}",
            "which models differ by more than their intervals.",
            f"what is drawn as a square: it is not comparable with {first}; the table says why.",
        ),
        tall=max(0.55, (110 + 22 * n) / 320),
        alt=f"{finding.statistic}: " + "; ".join(
            f"{label} {'not there' if cell.value is None else cell.value}" for label, cell in row.cells.items()
        ),
    )  # fmt: skip


def _dot(column: Column, cell: Cell, at: int) -> list[Mark]:
    value = cell.value
    if value is None or not value.defined:
        return []
    look = LOOKS["untrained"]._replace(dash="solid") if column.is_twin else Look("ink", "solid")
    found: list[Mark] = []
    if value.low is not None and value.high is not None:
        ends, y = np.array([value.low, value.high]), np.array([at, at], dtype=float)
        found.append(Line(name=column.label, x=ends, y=y, look=look, legend=False, width=0.8))
    marker = "square" if cell.not_comparable else "ring" if column.is_twin else "circle"
    words = "; ".join([f"{column.label}: {value}", *cell.not_comparable])
    found.append(
        Line(
            name=column.label,
            x=np.array([value.value]),
            y=np.array([float(at)]),
            look=look,
            marker=marker,  # type: ignore[arg-type]
            size=0.7 if marker == "ring" else 1.6,
            line=False,
            legend=False,
            text=(words,),
        )
    )
    return found


def _ends(values: Sequence[Value | None]) -> tuple[float, float] | None:
    """The least and the largest of values and intervals; None without any."""
    found = [x for v in values if v is not None for x in (v.value, v.low, v.high) if x is not None and x == x]
    return (min(found), max(found)) if found else None


def _reaches_zero(values: Sequence[Value | None]) -> bool:
    """Whether 0 lies among the values and intervals, or so near that it is worth its room."""
    low, high = _ends(values) or (1.0, 1.0)
    return low - 0.25 * (high - low) <= 0 <= high + 0.25 * (high - low)


def _limits(values: Sequence[Value | None]) -> tuple[float, float] | None:
    """Ends of the axis, with room beside the outermost values, and 0 where it is near."""
    ends = _ends(values)
    if ends is None:
        return None
    low, high = ends
    if _reaches_zero(values):
        low, high = min(low, 0.0), max(high, 0.0)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - pad, high + pad


def shortened(label: str) -> str:
    """A name as there is room for beside an axis: of a long one the end, which tells checkpoints apart."""
    return label if len(label) <= LONGEST else "…" + label[1 - LONGEST :]


def _title(finding: Finding) -> str:
    return _capital(finding.claim or finding.statistic)


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _statistic(finding: Finding, room: int = ROOM) -> str:
    """What is measured as there is room for along an axis: the caption has all of it."""
    words = finding.statistic
    if len(words) > room:
        words = words.rpartition(", ")[2]
    return words if len(words) <= room else words[: room - 2].rpartition(" ")[0] + " …"


def _claimed(finding: Finding) -> str:
    return f"The paper, of Llama 3.1 8B: {finding.paper}." if finding.paper not in ("", "not given") else ""


# -- curves over depth -------------------------------------------------------------------------------------------------


def curve_panels(comparison: Comparison) -> list[Panel]:
    """A panel per curve that any model has, over depth from the first sublayer to the last."""
    styles = looks(comparison.columns)
    found = []
    for drawn in CURVES:
        marks: list[Mark] = []
        told = []
        for column in comparison.columns:
            curve = column.curves.get(drawn.name)
            if curve is None or not np.isfinite(curve.values).any():
                continue
            marks.append(
                Line(
                    name=column.label, x=curve.at, y=curve.values, low=curve.low, high=curve.high,
                    look=styles[column.label],
                )
            )  # fmt: skip
            where = [f"{at:.0%} of depth" for at in curve.at]
            told.append(in_words(column.label, curve.values, where))
        if marks:
            found.append(_curve_panel(drawn, tuple(marks), told, comparison))
    return found


def _curve_panel(drawn: Drawn, marks: tuple[Mark, ...], told: Sequence[str], comparison: Comparison) -> Panel:
    n_depths = {column.model.facts.n_sublayers for column in comparison.columns if column.model.facts is not None}
    deep = f" Depths are {', '.join(map(str, sorted(n_depths)))} sublayers." if len(n_depths) > 1 else ""
    return Panel(
        key=f"depth_{drawn.name.replace('/', '_')}",
        title=drawn.title,
        marks=marks,
        x=SHARED_DEPTH,
        y=Axis(drawn.unit, scale=drawn.scale, percent=drawn.percent, from_zero=drawn.from_zero),
        caption=Caption(
            f"A line per model, dotted for its untrained twin.{deep}",
            "where along the depth models part.",
            "sizes, where the list above says that N, sites or width differ.",
        ),
        bands=INTERVALS,
        alt="; ".join(told),
    )


# -- similarity between models -----------------------------------------------------------------------------------------


def similarity_panels(comparison: Comparison) -> list[Panel]:
    """CKA of all sublayers of one model with all of another, and of each model with the first at the same depth."""
    if not comparison.similar:
        return []
    return [_similarity_map(comparison), *_with_the_first(comparison)]


def _similarity_map(comparison: Comparison) -> Panel:
    sites = {c.label: c.model.facts.sites_per_layer for c in comparison.columns if c.model.facts is not None}
    marks: list[Mark] = []
    options = []
    for k, pair in enumerate(comparison.similar):
        one, other = pair.labels
        rows, columns = pair.map.shape
        marks.append(
            HeatMap(name=f"{one} and {other}", when={"models": str(k)}, z=array(pair.map),
                    x=np.linspace(0, 1, columns), labels=sublayer_names(rows, sites[one]), low=0.0, high=1.0,
                    colours="shares", bar="CKA")
        )  # fmt: skip
        options.append((str(k), f"{shortened(one)} and {shortened(other)}"))
    n_texts = {pair.n for pair in comparison.similar}
    n = comparison.similar[0].n
    told = "; ".join(
        f"{' and '.join(pair.labels)} {brief(float(pair.mean.value))} at the same depth" for pair in comparison.similar
    )
    return Panel(
        key="similarity_between_models", title="Similarity of two models", marks=tuple(marks), tall=1.3,
        controls=(Control("models", "models", tuple(options), "0", shown=tuple(value for value, _ in options[:4])),),
        x=Axis("depth of the second model"), y=Axis("sublayer of the first model", names=True), own_axes=True,
        caption=Caption(
            "Debiased linear CKA of the states of all sublayers of one model with all of another, at the last token of "
            f"{n if len(n_texts) == 1 else 'the'} texts that both were given. Permuted sequences reach "
            f"{brief(max(pair.floor for pair in comparison.similar))} in 2.5 % of the pairs of sublayers.",
            "which depths of two models hold the same geometry of texts: along the diagonal where in the same order.",
            "the same computation: an untrained model resembles a trained one where both hold the last token.",
        ),
        alt=f"Heat maps of sublayers by sublayers. {told}.",
    )  # fmt: skip


def _with_the_first(comparison: Comparison) -> list[Panel]:
    first = comparison.similar[0].labels[0]
    pairs = [pair for pair in comparison.similar if pair.labels[0] == first]
    styles = looks(comparison.columns)
    marks: list[Mark] = [
        Rule(name="sequences permuted, 97.5 %", y=max(pair.floor for pair in pairs), look=Look("muted", "dash"))
    ]
    told = []
    for pair in pairs:
        low, high = (None if end is None else array(end) for end in (pair.curve.low, pair.curve.high))
        at, values = array(pair.at), array(pair.curve.value)
        marks.append(Line(name=pair.labels[1], x=at, y=values, low=low, high=high, look=styles[pair.labels[1]]))
        told.append(in_words(pair.labels[1], values, [f"{x:.0%} of depth" for x in at]))
    return [
        Panel(
            key="similarity_at_the_same_depth", title=f"Similarity with {first}", marks=tuple(marks), x=SHARED_DEPTH,
            y=Axis(f"CKA with {shortened(first)}", limits=(-0.05, 1.05)),
            caption=Caption(
                f"Debiased linear CKA of each sublayer of {first} with that of another model at the same share of the "
                "depth, on the same texts. Rule: what permuted sequences reach.",
                "whether two models come to the same geometry of texts, and how deep.",
                "the likeness of untrained twins as something learned: it is what tokens and architecture give.",
            ),
            bands=INTERVALS,
            alt="; ".join(told),
        )
    ]  # fmt: skip


# -- dynamics of models over depth -------------------------------------------------------------------------------------


def dynamics_panels(comparison: Comparison) -> list[Panel]:
    """A map of models by models: how far their dynamics over depth are apart."""
    pairs = comparison.dynamics
    if not pairs:
        return []
    labels = [c.label for c in comparison.columns if any(c.label in pair.labels for pair in pairs)]
    place = {label: i for i, label in enumerate(labels)}
    z = np.full((len(labels), len(labels)), np.nan)
    for pair in pairs:
        i, j = (place[label] for label in pair.labels)
        z[i, j] = z[j, i] = pair.distance
    names = tuple(f"{i} {shortened(label)}" for i, label in enumerate(labels, start=1))
    at = np.arange(len(labels), dtype=float)
    floor = max(pair.floor for pair in pairs)
    nearest = min(pairs, key=lambda pair: pair.distance)
    told = "; ".join(f"{' and '.join(pair.labels)} {brief(pair.distance)}" for pair in pairs)
    return [
        Panel(
            key="dynamics_between_models", title="Distance of dynamics over depth",
            marks=(
                HeatMap(name="distance", z=z, x=at, labels=names, columns=names, low=0.0, high=float(np.nanmax(z)),
                        colours="amounts", bar="DSA, radians"),
            ),
            x=Axis("model, by the number of its row", ticks=tuple((x, f"{x + 1:.0f}") for x in at.tolist())),
            y=Axis(limits=(len(at) - 0.5, -0.5), ticks=tuple(zip(at.tolist(), names, strict=True))),
            tall=max(0.6, (110 + 22 * len(at)) / 320),
            note=f"nearest: {' and '.join(nearest.labels)}, {brief(nearest.distance)}",
            caption=Caption(
                "The angle between the linear maps from layer to layer of two models under the best rotation (DSA), "
                f"radians. Halves of one model's sequences are up to {brief(floor)} apart.",
                "which models move alike from layer to layer; whether trained ones are nearer to each other than to "
                "untrained ones.",
                "a small distance as a shared computation, unless the table's p of the order is small: any running sum "
                "moves by little more than the identity.",
            ),
            alt=f"Distances of dynamics over depth. {told}.",
        )
    ]  # fmt: skip


# -- over training -----------------------------------------------------------------------------------------------------


def training_panels(comparison: Comparison, series: Series) -> list[Panel]:
    """A panel per claim: its value at each checkpoint, beside the untrained twin's."""
    place = places(series.steps)
    axis = Axis("training step", ticks=tuple((float(x), f"{s:,}") for x, s in zip(place, series.steps, strict=True)))
    twin = next((c for c in comparison.columns if c.is_twin and set(c.of) & set(series.labels)), None)
    rows = {row.key: row for row in comparison.rows}
    number = comparison.series.index(series)
    found = []
    for finding, cells in training_rows(comparison, series):
        if not is_drawn(finding):
            continue
        marks: list[Mark] = []
        if twin is not None and (at := rows[finding.key].cells[twin.label].value) is not None and at.defined:
            ends = np.array([place[0], place[-1]], dtype=float)
            low, high = (None if e is None else np.full(2, e) for e in (at.low, at.high))
            marks.append(Line(name="untrained", x=ends, y=np.full(2, at.value), low=low, high=high))
        values = [cell.value for cell in cells]
        marks.append(_against_steps(series, place, values))
        found.append(
            Panel(
                key=f"training_{number}_{finding.key}",
                title=_title(finding),
                marks=tuple(marks),
                x=axis,
                y=Axis(_statistic(finding)),
                caption=Caption(
                    f"{_capital(finding.statistic)}: a dot per checkpoint of {series.name}. {_claimed(finding)}",
                    "when in training it comes, and whether it was there before.",
                    "what happens between two checkpoints.",
                ),
                bands=INTERVALS,
                alt=f"{finding.statistic}: " + "; ".join(
                    f"step {step} {'not there' if v is None else v}"
                    for step, v in zip(series.steps, values, strict=True)
                ),
            )
        )  # fmt: skip
    return found


def _against_steps(series: Series, place: np.ndarray, values: Sequence[Value | None]) -> Line:
    def numbers(of: Mapping[int, float | None]) -> np.ndarray:
        return np.array([np.nan if of[i] is None else of[i] for i in range(len(values))], dtype=float)

    y = numbers({i: None if v is None else v.value for i, v in enumerate(values)})
    # where there is no interval the value itself stands for it, so that the band of the others has no gap
    low = numbers({i: None if v is None else v.value if v.low is None else v.low for i, v in enumerate(values)})
    high = numbers({i: None if v is None else v.value if v.high is None else v.high for i, v in enumerate(values)})
    words = tuple(f"step {s:,}: {'not there' if v is None else v}" for s, v in zip(series.steps, values, strict=True))
    return Line(
        name=series.name, x=place, y=y, low=low, high=high, marker="circle", look=Look("ink", "solid"), text=words
    )


def places(steps: Sequence[int]) -> np.ndarray:
    """Where steps are drawn: at themselves, or at their logarithms where that sets them more evenly apart.

    The logarithm of 0 is one place before the first.
    """
    positive = np.unique([step for step in steps if step > 0]).astype(float)
    if len(positive) < 3 or _unevenness(np.log2(positive)) >= _unevenness(positive):
        return np.array(steps, dtype=float)
    return np.array([1 + np.log2(step / positive[0]) if step > 0 else 0.0 for step in steps])


def _unevenness(at: np.ndarray) -> float:
    """The distances of points, their standard deviation over their mean."""
    apart = np.diff(at)
    return float(apart.std() / apart.mean())


def comparison_panels(comparison: Comparison) -> dict[str, list[Panel]]:
    """All panels, by the section of the page that they are in."""
    found = {"findings": finding_panels(comparison), "depth": curve_panels(comparison)}
    found["similarity"] = similarity_panels(comparison)
    found["dynamics"] = dynamics_panels(comparison)
    for i, series in enumerate(comparison.series):
        found[f"training-{i}"] = training_panels(comparison, series)
    return {section: panels for section, panels in found.items() if panels}
