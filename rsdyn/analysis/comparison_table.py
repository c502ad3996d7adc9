"""A comparison as a terminal, ``comparison.md``, ``comparison.json`` and the page have it: four forms."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rsdyn.analysis.comparison import Cell, Column, Comparison, Row, Series, listed
from rsdyn.analysis.finding import Finding, Value, number
from rsdyn.analysis.model_dynamics import ALPHA, SHUFFLES, ModelDynamics
from rsdyn.analysis.model_similarity import ModelSimilarity
from rsdyn.analysis.results import Measured
from rsdyn.analysis.table import as_markdown as findings_as_markdown
from rsdyn.analysis.table import as_text as findings_as_text
from rsdyn.analysis.table import value_json
from rsdyn.dynamics.dynamical_similarity import COMPONENTS, DELAYS, ITERATIONS

LAYOUT = 1  # of comparison.json
ALSO_LEADING = ("turns_of_random_walk", "turns_innovation_shuffle", "turns_innovation_shuffle_z", "turns_layer_shuffle")
TOLD = (  # rows that the first sentences are of: what is above 0 where the paper's claim holds, and the claim in words
    ("correlation_trend", "Correlations rise with depth"),
    ("cosine_trend", "Successive states align more and more"),
    ("speed_trend", "The stream accelerates"),
    ("information_early_fall", "Information falls in early layers"),
)


def is_leading(row: Finding) -> bool:
    """Whether a row is one of those that a reader sees first; variants and most null models are not."""
    if row.key in ALSO_LEADING:
        return True
    return not row.under and not row.null


class Footnotes:
    """What makes values not comparable, lettered in the order in which it is met."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def marks(self, reasons: Sequence[str]) -> str:
        """The letters of some reasons, such as ``a, b``."""
        for reason in reasons:
            if reason not in self.reasons:
                self.reasons.append(reason)
        return ", ".join(_letter(self.reasons.index(reason)) for reason in reasons)

    def lines(self) -> list[str]:
        return [f"({_letter(i)}) {reason}." for i, reason in enumerate(self.reasons)]


def _letter(i: int) -> str:
    letters = string.ascii_lowercase
    return letters[i] if i < len(letters) else letters[i // len(letters) - 1] + letters[i % len(letters)]


def _as_findings(rows: Sequence[Row], footnotes: Footnotes) -> list[Finding]:
    """Rows as findings whose values are by model, with the letters of what makes them not comparable."""
    found = []
    for row in rows:
        values = {}
        for label, cell in row.cells.items():
            if cell.value is None:
                continue
            marks = footnotes.marks(cell.not_comparable)
            note = f"{cell.value.note} ({marks})" if marks else cell.value.note
            values[label] = replace(cell.value, note=note)
        found.append(replace(row.finding, values=values, detail=False))
    return found


def leading(comparison: Comparison) -> list[Row]:
    """The rows that stand first."""
    return [row for row in comparison.rows if is_leading(row.finding)]


def as_text(comparison: Comparison, width: int | None = None) -> list[str]:
    """The leading rows for a terminal of ``width`` columns, what sets models apart above them."""
    footnotes = Footnotes()
    table = findings_as_text(_as_findings(leading(comparison), footnotes), comparison.labels, width)
    return [*warnings(comparison), "", *table, *_compared_with(comparison, footnotes)]


def as_markdown(comparison: Comparison) -> str:
    """The whole comparison as ``comparison.md`` has it: first the answer, then every row."""
    footnotes = Footnotes()
    first = findings_as_markdown(_as_findings(leading(comparison), footnotes), comparison.labels)
    rest = [row for row in comparison.rows if not is_leading(row.finding)]
    more = findings_as_markdown(_as_findings(rest, footnotes), comparison.labels) if rest else ""
    parts = [f"# {title(comparison)}", *answer(comparison)]
    parts += _section("What sets the models apart", [f"- {line}" for line in warnings(comparison)], join="\n")
    parts += _section("Findings", [first.strip()] if comparison.rows else [])
    parts += [*_compared_with(comparison, footnotes)] if comparison.rows else []
    for series in comparison.series:
        parts += _section(f"Over training: {series.name}", [training_markdown(comparison, series)])
    parts += _section("Similarity between models", similarity_markdown(comparison))
    parts += _section("Dynamics of the models over depth", dynamics_markdown(comparison))
    parts += _section("Every other row", [more.strip()] if more else [])
    return "\n\n".join(parts) + "\n"


def _section(head: str, parts: Sequence[str], join: str = "\n\n") -> list[str]:
    return [f"## {head}", join.join(parts)] if parts else []


def _compared_with(comparison: Comparison, footnotes: Footnotes) -> list[str]:
    if not footnotes.reasons:
        return []
    return [f"Not comparable with {comparison.labels[0]}:", *footnotes.lines()]


def title(comparison: Comparison) -> str:
    """What is compared, in a line."""
    names: dict[str, None] = {}
    for column in comparison.columns:
        if not column.is_twin:
            names.setdefault(column.model.series or column.label)
    names |= dict.fromkeys(comparison.failed)
    return f"Transformer dynamics of {listed(list(names)) or 'no model'}"


def warnings(comparison: Comparison) -> list[str]:
    """What failed and what differs, a sentence or two each, for the head of every output."""
    failed = [f"{label} failed and is left out: {reason}" for label, reason in comparison.failed.items()]
    missing = [
        f"{series.name} has no checkpoint between steps {a} and {b}, where the others are evenly apart."
        for series in comparison.series
        for a, b in series.gaps
    ]
    return [*failed, *(str(difference) for difference in comparison.differences), *missing]


# -- the answer --------------------------------------------------------------------------------------------------------


def answer(comparison: Comparison) -> list[str]:
    """At most six sentences with numbers, before everything else."""
    trained = [column for column in comparison.columns if not column.is_twin]
    if not trained:
        return ["Nothing was measured: no model finished."]
    by_key = {row.key: row for row in comparison.rows}
    sentences = [_counted(trained, comparison)]
    told = [_told(words, by_key[key], trained, comparison) for key, words in TOLD if key in by_key]
    turns = _turns(by_key, trained)
    grown = _grown(comparison)
    return [*sentences, *told[: 5 - bool(turns) - bool(grown)], *turns, *grown]


def _counted(trained: Sequence[Column], comparison: Comparison) -> str:
    facts = [column.model.facts for column in trained if column.model.facts is not None]
    each = sorted({f.n_sequences for f in facts})
    texts = listed(list(dict.fromkeys(f.text for f in facts)))
    models = _models(len(trained))
    failed = f"; {len(comparison.failed)} failed" if comparison.failed else ""
    n = str(each[0]) if len(each) == 1 else f"{each[0]} to {each[-1]}"
    return f"{models} on {n} sequences of {texts}{failed}."


def _told(words: str, row: Row, trained: Sequence[Column], comparison: Comparison) -> str:
    """In how many models a number is above 0, by its interval, and what the untrained ones say of it."""
    above, below, open_ = _signs([row.cells[column.label] for column in trained])
    n = above + below + open_
    if n == 0:
        return f"{words}: not defined in any of {len(trained)} models ({row.finding.statistic})."
    unknown = f" where it is defined (of {len(trained)})" if n < len(trained) else ""
    rest = [f"in {below} it is the other way round"] * (below > 0)
    rest += [f"in {open_} the interval holds 0"] * (open_ > 0)
    twins = _signs([row.cells[column.label] for column in comparison.columns if column.is_twin])
    if sum(twins):
        rest.append(f"of {_models(sum(twins), 'untrained model')} in {twins[0]}")
    more = "; " + ", ".join(rest) if rest else ""
    return f"{words} in {above} of {_models(n)}{unknown} ({row.finding.statistic}){more}."


def _models(n: int, noun: str = "model") -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def _signs(cells: Sequence[Cell]) -> tuple[int, int, int]:
    """How many values are above 0, below 0, and not told apart from it by their intervals."""
    values = [cell.value for cell in cells if cell.value is not None and cell.value.defined]
    low = [value.value if value.low is None or value.low != value.low else value.low for value in values]
    high = [value.value if value.high is None or value.high != value.high else value.high for value in values]
    above, below = sum(x > 0 for x in low), sum(x < 0 for x in high)
    return above, below, len(values) - above - below


def _turns(rows: Mapping[str, Row], trained: Sequence[Column]) -> list[str]:
    row = rows.get("turns_innovation_shuffle_z")
    found = [] if row is None else [v for c in trained if (v := row.cells[c.label].value) is not None and v.defined]
    if not found:
        return []
    sizes = sorted(value.value for value in found)
    span = number(sizes[0]) if len(sizes) == 1 else f"{number(sizes[0])} to {number(sizes[-1])}"
    return [
        f"Mean |R| lies {span} SD from that of a linear process of each model's own steps, the null model that keeps "
        "most (below 0: units turn less)."
    ]


def _grown(comparison: Comparison) -> list[str]:
    """What moves most from the first to the last checkpoint, beside the width of its interval."""
    best: tuple[float, str] = (0.0, "")
    for series in comparison.series:
        first, last = series.labels[0], series.labels[-1]
        for row in leading(comparison):
            a, b = (row.cells[label].value for label in (first, last))
            if a is None or b is None or not (a.defined and b.defined):
                continue
            wide = max(_half_width(a), _half_width(b))
            if wide > 0 and abs(b.value - a.value) / wide > best[0]:
                words = (
                    f"From step {series.steps[0]} to {series.steps[-1]} of {series.name}, what moves most beside its "
                    f"interval is {row.finding.statistic}: {_brief(a)} to {_brief(b)}."
                )
                best = (abs(b.value - a.value) / wide, words)
    return [best[1]] if best[1] else []


def _half_width(value: Value) -> float:
    if value.low is None or value.high is None or value.low != value.low:
        return 0.0
    return (value.high - value.low) / 2


def _brief(value: Value) -> str:
    return str(replace(value, note=""))


# -- over training -----------------------------------------------------------------------------------------------------


def training_rows(comparison: Comparison, series: Series) -> Iterator[tuple[Finding, list[Cell]]]:
    """The leading rows of a training in its own words, with its checkpoints' cells in the order of their steps."""
    first = next(column.model for column in comparison.columns if column.label == series.labels[0])
    own = {finding.key: finding for finding in first.findings}
    for row in leading(comparison):
        cells = [row.cells[label] for label in series.labels]
        if any(cell.value is not None for cell in cells):
            yield own.get(row.key, row.finding), cells


def training_markdown(comparison: Comparison, series: Series) -> str:
    """A table of findings against the training step."""
    lines = ["| measured | " + " | ".join(f"step {step}" for step in series.steps) + " |"]
    lines.append("|" + " --- |" * (len(series.steps) + 1))
    for row, cells in training_rows(comparison, series):
        texts = ["" if cell.value is None else _brief(cell.value) for cell in cells]
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in [row.statistic, *texts]) + " |")
    return "\n".join(lines)


# -- similarity between models -----------------------------------------------------------------------------------------

SIMILARITY = (
    "Debiased linear CKA of the states of two models at the last token of the same texts, whatever their basis and "
    "width: 1 where one is a turned and scaled copy of the other, 0 in expectation where they have nothing in common."
)
SIMILARITY_HEADS = ("models", "sequences", "at the same depth, mean", "highest", "permuted sequences reach")


def similarity_rows(comparison: Comparison) -> list[list[str]]:
    """A row of words per pair of models, under :data:`SIMILARITY_HEADS`."""
    return [
        [
            " and ".join(pair.labels),
            str(pair.n),
            str(_value(pair.mean)),
            number(float(pair.map.nan_to_num(-1.0).max())),
            number(pair.floor),
        ]
        for pair in comparison.similar
    ]


def similarity_markdown(comparison: Comparison) -> list[str]:
    """The parts of the section; none where no model has what it takes and nothing else is to be said."""
    parts = []
    if rows := similarity_rows(comparison):
        lines = ["| " + " | ".join(SIMILARITY_HEADS) + " |", "|" + " --- |" * len(SIMILARITY_HEADS)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        parts = [SIMILARITY, "\n".join(lines)]
    if missing := not_similar(comparison):
        parts.append("\n".join(f"- {line}" for line in missing))
    return parts


def not_similar(comparison: Comparison) -> list[str]:
    """Which models are not compared state by state, a sentence each."""
    return [f"Not compared state by state: {line}." for line in comparison.not_similar]


def _value(measured: Measured) -> Value:
    low, high = (None if end is None else float(end) for end in (measured.low, measured.high))
    return Value(float(measured.value), low, high, n=measured.n)


def _similarity_json(pair: ModelSimilarity) -> dict[str, Any]:
    def numbers(values: Any) -> Any:
        return None if values is None else [round(x, 4) for x in values.tolist()]

    curve = pair.curve
    return {
        "models": list(pair.labels),
        "n_sequences": pair.n,
        "same_depth": value_json(_value(pair.mean)),
        "curve": {
            "depth": numbers(pair.at), "value": numbers(curve.value), "low": numbers(curve.low),
            "high": numbers(curve.high),
        },
        "floor": pair.floor,
        "map": [numbers(row) for row in pair.map],
    }  # fmt: skip


# -- dynamics of models over depth -------------------------------------------------------------------------------------

DYNAMICS = (
    "Dynamical Similarity Analysis (arXiv 2306.10168, package dsa-metric): a linear map from each layer's states to "
    f"the next one's, in {COMPONENTS} components of each model's own stream, and the angle between two such maps under "
    "the best rotation, in radians: 0 where one model moves as a turned and scaled copy of the other. A step is a "
    "layer, so a deeper model takes smaller ones."
)
DYNAMICS_READ = (
    "Told apart: no rotation brings the two nearer than halves of one model's sequences are. Order: of "
    f"{SHUFFLES} orders of one model's steps, how few come as near as the order it has (p, of each pair by itself, the "
    "larger of the two models'); above .05 the distance is what running sums of such steps have in any order."
)
DYNAMICS_HEADS = (
    "models", "sequences", "layers", "distance", "no rotation below", "halves of one model up to",
    "steps in another order, median", "p of the order", "told apart",
)  # fmt: skip
APART = {True: "yes", False: "no", None: "cannot tell"}


def dynamics_rows(comparison: Comparison) -> list[list[str]]:
    """A row of words per pair of models, under :data:`DYNAMICS_HEADS`."""
    return [
        [
            " and ".join(pair.labels),
            str(pair.n),
            " and ".join(map(str, pair.n_layers)),
            number(pair.distance),
            number(pair.at_least),
            number(pair.floor),
            number(float(pair.shuffled.median(1).values.amin())),
            number(pair.p),
            APART[pair.told_apart],
        ]
        for pair in comparison.dynamics
    ]


def dynamics_answer(comparison: Comparison) -> list[str]:
    """What the distances say, in one sentence or two; none where there are none."""
    twins = {column.label for column in comparison.columns if column.is_twin}
    trained = [pair for pair in comparison.dynamics if not twins & set(pair.labels)]
    if not trained:
        return []
    apart = [pair.told_apart for pair in trained].count(True)
    ordered = sum(pair.order_shared for pair in trained)
    nearer = f"{ordered} {'is' if ordered == 1 else 'are'} nearer to each other"
    n = f"{len(trained)} pair{'s' * (len(trained) != 1)} of models"
    sentences = [
        f"Of {n}, {apart} differ{'s' * (apart == 1)} in dynamics over depth by more than halves of one model's "
        f"sequences; {nearer} than to the same steps in another order (p at most .05, which chance alone gives at "
        f"most {ALPHA * len(trained):.1f} of them)."
    ]
    if not ordered:
        sentences.append("So the distances say how large steps are, layer by layer, and nothing of their order.")
    return sentences


def dynamics_markdown(comparison: Comparison) -> list[str]:
    """The parts of the section; none where nobody asked for it."""
    parts = []
    if rows := dynamics_rows(comparison):
        lines = ["| " + " | ".join(DYNAMICS_HEADS) + " |", "|" + " --- |" * len(DYNAMICS_HEADS)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        parts = [*dynamics_answer(comparison), DYNAMICS, DYNAMICS_READ, "\n".join(lines)]
    if missing := no_dynamics(comparison):
        parts.append("\n".join(f"- {line}" for line in missing))
    return parts


def no_dynamics(comparison: Comparison) -> list[str]:
    """Which models' dynamics are not compared, a sentence each."""
    return [f"Dynamics not compared: {line}." for line in comparison.no_dynamics]


def _dynamics_json(pair: ModelDynamics) -> dict[str, Any]:
    return {
        "models": list(pair.labels),
        "n_sequences": pair.n,
        "n_layers": list(pair.n_layers),
        "distance": pair.distance,
        "at_least": pair.at_least,
        "floor": pair.floor,
        "shuffled_median": [float(x) for x in pair.shuffled.median(1).values],
        "p": pair.p,
        "told_apart": pair.told_apart,
    }


# -- JSON --------------------------------------------------------------------------------------------------------------


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as ``comparison.json`` has it."""
    return {
        "layout": LAYOUT,
        "answer": answer(comparison),
        "models": [*map(_column_json, comparison.columns), *_failed_json(comparison)],
        "differences": [
            {"name": d.name, "values": dict(d.values), "rows": d.rows} for d in comparison.differences
        ],
        "warnings": warnings(comparison),
        "rows": [_row_json(row) for row in comparison.rows],
        "similarity": [_similarity_json(pair) for pair in comparison.similar],
        "not_similar": list(comparison.not_similar),
        "dynamics": {
            "components": COMPONENTS, "delays": DELAYS, "iterations": ITERATIONS, "orders": SHUFFLES,
            "pairs": [_dynamics_json(pair) for pair in comparison.dynamics],
        },
        "no_dynamics": list(comparison.no_dynamics),
        "series": [
            {"name": s.name, "steps": list(s.steps), "models": list(s.labels), "gaps": [list(gap) for gap in s.gaps]}
            for s in comparison.series
        ],
    }  # fmt: skip


def _column_json(column: Column) -> dict[str, Any]:
    facts = column.model.facts
    assert facts is not None  # only what was measured has a column
    return {
        "label": column.label,
        "condition": column.condition,
        "of": list(column.of),
        "status": "finished",
        "error": None,
        "series": column.model.series or None,
        "step": None if column.is_twin else column.model.step,
        "text": facts.text,
        "filter": facts.filter,
        "order": facts.order,
        "n_sequences": facts.n_sequences,
        "n_trajectories": facts.n_trajectories,
        "positions": facts.positions,
        "bos": facts.bos,
        "tokenizer": facts.tokenizer,
        "n_sublayers": facts.n_sublayers,
        "n_units": facts.n_units,
        "sites_per_layer": facts.sites_per_layer,
        "rsdyn": facts.version,
        **column.model.about,
    }


def _failed_json(comparison: Comparison) -> list[dict[str, Any]]:
    return [{"label": label, "status": "failed", "error": reason} for label, reason in comparison.failed.items()]


def _row_json(row: Row) -> dict[str, Any]:
    finding = row.finding
    return {
        "key": finding.key,
        "measure": finding.measure,
        "claim": finding.claim,
        "paper": finding.paper,
        "statistic": finding.statistic,
        "under": finding.under,
        "leading": is_leading(finding),
        "values": {label: _cell_json(cell) for label, cell in row.cells.items()},
    }


def _cell_json(cell: Cell) -> dict[str, Any]:
    if cell.value is None:
        return {"value": None, "low": None, "high": None, "n": None, "not_comparable": list(cell.not_comparable)}
    return value_json(cell.value) | {"not_comparable": list(cell.not_comparable)}
