"""The page of a comparison: the answer, what sets the models apart, findings side by side, curves, training steps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from rsdyn.analysis.comparison import Cell, Comparison, Row, Series
from rsdyn.analysis.comparison_table import (
    DYNAMICS,
    DYNAMICS_HEADS,
    DYNAMICS_READ,
    SIMILARITY,
    SIMILARITY_HEADS,
    Footnotes,
    answer,
    dynamics_answer,
    dynamics_rows,
    leading,
    no_dynamics,
    not_similar,
    similarity_rows,
    title,
    training_rows,
    warnings,
)
from rsdyn.analysis.finding import number
from rsdyn.figures import static
from rsdyn.figures.comparison import comparison_panels
from rsdyn.figures.panel import Panel
from rsdyn.report.html import html_table, notes
from rsdyn.report.page import HOW, Page, whole_page, write_page

PAGE = "comparison.html"
FACTS = (
    ("text", lambda f: f.text), ("sequences (N)", lambda f: f"{f.n_sequences:,}"), ("filter", lambda f: f.filter),
    ("order", lambda f: f.order), ("positions", lambda f: f.positions), ("opens a sequence", lambda f: f.bos),
    ("tokenizer", lambda f: f.tokenizer), ("sublayers", lambda f: str(f.n_sublayers)),
    ("sites per layer", lambda f: str(f.sites_per_layer)), ("units", lambda f: str(f.n_units)),
    ("number formats", lambda f: f.computed), ("rsdyn", lambda f: f.version),
)  # fmt: skip


def write_comparison(folder: Path, comparison: Comparison) -> Path:
    """Write ``comparison.html`` and the figures of its panels into ``folder``; the page's path."""
    panels = comparison_panels(comparison)
    for panel in [one for of_section in panels.values() for one in of_section]:
        static.save(panel, folder / "figures")
    return write_page(comparison_page(comparison, panels), folder / PAGE)


def comparison_page(comparison: Comparison, panels: Mapping[str, Sequence[Panel]]) -> str:
    """The whole page, as HTML."""
    page = Page(title(comparison))
    page.add("answer", "In short", "".join(f"<p>{escape(sentence)}</p>" for sentence in answer(comparison)))
    if lines := warnings(comparison):
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        page.add("apart", "What sets the models apart", f'<ul class="warnings">{items}</ul>')
    if comparison.rows:
        page.add("findings", "Findings, model by model", _findings(comparison))
    if "findings" in panels:
        page.add("dots", "The same as dots and intervals", page.panels(panels["findings"]))
    for i, series in enumerate(comparison.series):
        drawn = page.panels(panels.get(f"training-{i}", []))
        page.add(f"training-{i}", f"Over training: {series.name}", drawn + _training(comparison, series))
    if "depth" in panels:
        page.add("depth", "Curves over depth", notes([HOW]) + page.panels(panels["depth"]))
    if comparison.similar or comparison.not_similar:
        page.add(
            "similarity",
            "Similarity between models",
            _similarity(comparison, page.panels(panels.get("similarity", []))),
        )
    if comparison.dynamics or comparison.no_dynamics:
        drawn = page.panels(panels.get("dynamics", []))
        page.add("dynamics", "Dynamics of the models over depth", _dynamics(comparison, drawn))
    page.add("what", "What was compared", _facts(comparison))
    n = len({column.of[0] for column in comparison.columns} | set(comparison.failed))
    return whole_page(page, f"{n} model{'s' * (n > 1)}")


def _findings(comparison: Comparison) -> str:
    footnotes = Footnotes()
    first = leading(comparison)
    rest = [row for row in comparison.rows if row not in first]
    head = _table(first, comparison, footnotes)
    more = _table(rest, comparison, footnotes) if rest else ""
    told = (
        "In brackets: 95 % intervals over documents or sequences of the text. Under a trend: the first, middle and "
        "last value of its curve. Letters: what makes a value not comparable with "
        f"{comparison.labels[0]}."
    )
    below = notes(footnotes.lines())
    folded = f"<details><summary>Every other row</summary>{more}</details>" if rest else ""
    return notes([told]) + head + below + folded


def _table(rows: Sequence[Row], comparison: Comparison, footnotes: Footnotes) -> str:
    """A row per finding and a column per model; a claim stands over its rows."""
    labels = comparison.labels
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in ["measured", *labels])
    body = []
    for row in rows:
        finding = row.finding
        if finding.claim:
            claim = escape(finding.claim[:1].upper() + finding.claim[1:])
            body.append(
                f'<tr class="claim"><th colspan="{len(labels) + 1}" scope="colgroup">{claim} '
                f'<span class="paper">paper: {escape(finding.paper)}</span></th></tr>'
            )
        cells = "".join(
            f'<td data-label="{escape(label)}">{_cell(row.cells[label], footnotes)}</td>' for label in labels
        )
        kind = ' class="of"' if finding.under else ""
        body.append(f'<tr><th scope="row"{kind}>{escape(finding.statistic)}</th>{cells}</tr>')
    return (
        f'<div class="wide-table"><table class="findings compared"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(cell: Cell, footnotes: Footnotes) -> str:
    """A value with, below it, its interval, the ends of its curve, and the letters of what makes it unfair."""
    value = cell.value
    if value is None:
        return f'<div class="below">{escape("; ".join(cell.not_comparable))}</div>'
    marks = footnotes.marks(cell.not_comparable)
    lines = []
    if value.low is not None and value.high is not None and value.low == value.low:
        lines.append(f"[{number(value.low)}, {number(value.high)}]")
    lines += [value.note.strip().removeprefix("(").removesuffix(")"), value.ends_text, value.seeds_text]
    if not value.defined:
        lines.append(value.reason)
    below = "".join(f'<div class="below">{escape(_minus(line))}</div>' for line in lines if line)
    letters = f'<sup title="{escape("; ".join(cell.not_comparable))}">{marks}</sup>' if marks else ""
    return f"<div>{escape(_minus(number(value.value) + value.unit))}{letters}{below}</div>"


def _minus(text: str) -> str:
    """A text with true minus signs before its numbers."""
    return re.sub(r"(?<![\w.])-(?=\d)", "\N{MINUS SIGN}", text)


def _training(comparison: Comparison, series: Series) -> str:
    heads = ["measured", *(f"step {step:,}" for step in series.steps)]
    rows = [
        [finding.statistic, *("" if cell.value is None else str(cell.value) for cell in cells)]
        for finding, cells in training_rows(comparison, series)
    ]
    return f"<details><summary>The same as a table</summary>{html_table(heads, rows)}</details>"


def _similarity(comparison: Comparison, drawn: str) -> str:
    """How alike the models are on the same texts, and which are not compared, and why."""
    missing = notes(not_similar(comparison))
    if not comparison.similar:
        return missing
    table = html_table(SIMILARITY_HEADS, similarity_rows(comparison), "numbers compared")
    folded = f'<details><summary>Every pair as a table</summary><div class="wide-table">{table}</div></details>'
    return f"{notes([SIMILARITY])}{drawn}{missing}{folded}"


def _dynamics(comparison: Comparison, drawn: str) -> str:
    """How far the models' dynamics over depth are apart, what that is held against, and which are not compared."""
    missing = notes(no_dynamics(comparison))
    if not comparison.dynamics:
        return missing
    told = "".join(f"<p>{escape(sentence)}</p>" for sentence in dynamics_answer(comparison))
    table = html_table(DYNAMICS_HEADS, dynamics_rows(comparison), "numbers compared")
    folded = f'<details><summary>Every pair as a table</summary><div class="wide-table">{table}</div></details>'
    return f"{told}{notes([DYNAMICS, DYNAMICS_READ])}{drawn}{missing}{folded}"


def _facts(comparison: Comparison) -> str:
    """A row per fact and a column per model, those that differ first; then where each run lies."""
    columns = [column for column in comparison.columns if not column.is_twin]
    heads = ["", *(column.label for column in columns)]
    facts = [column.model.facts for column in columns]
    rows = [[name, *(str((f and of(f)) or "not said") for f in facts)] for name, of in FACTS]
    rows.sort(key=lambda row: len(set(row[1:])) == 1)
    table = html_table(heads, rows, "numbers compared")
    runs = notes([f"{c.label}: {c.model.about.get('run')}, {c.model.about.get('identity')}" for c in columns])
    failed = notes([f"{label} failed: {reason}" for label, reason in comparison.failed.items()])
    return (
        f'<div class="wide-table">{table}</div>{failed}<details><summary>Where the runs lie</summary>{runs}</details>'
    )
