"""The findings as a terminal, ``findings.md`` and ``summary.json`` have them: one table, three forms."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from textwrap import wrap
from typing import Any

from rsdyn.analysis.finding import Finding, Value
from rsdyn.labels import NAMES


class Notes:
    """Why values are not defined, numbered in the order in which they are met."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def cell(self, value: Value | None) -> str:
        """A value as text, with the number of its note."""
        if value is None:
            return ""
        if value.defined or not value.reason:
            return str(value)
        if value.reason not in self.reasons:
            self.reasons.append(value.reason)
        return f"{value} ({self.reasons.index(value.reason) + 1})"

    def lines(self) -> list[str]:
        """The notes, one per reason."""
        return [f"({i}) {reason[0].upper()}{reason[1:]}." for i, reason in enumerate(self.reasons, 1)]


def as_text(table: Sequence[Finding], conditions: Sequence[str], width: int | None = None) -> list[str]:
    """The table for a terminal of ``width`` columns (default: this one's, 80 where there is none).

    The claim and the paper's word, then per statistic its values and, for a trend, the first, middle and last value of
    its curve. Values stand beside the words where there is room, under them where there is less, and one per line where
    there is little. Rows marked ``detail`` are for the page and ``findings.md``.
    """
    width = shutil.get_terminal_size().columns if width is None else width
    table, notes = [row for row in table if not row.detail], Notes()
    cells = [[notes.cell(row.values.get(c)) for c in conditions] for row in table]
    ends = [[row.values[c].below if c in row.values else "" for c in conditions] for row in table]
    named = [NAMES.get(c, c) for c in conditions]
    cell = 2 + max(map(len, [*named, *(text for row in [*cells, *ends] for text in row)]), default=0)
    left = 2 + max((len(_label(row)) for row in table), default=0)
    if left + cell * len(conditions) - 2 <= width:
        lines = _beside(table, named, cells, ends, left, cell)
    elif 4 + cell * len(conditions) - 2 <= width:
        lines = _below(table, named, cells, ends, cell, width)
    else:
        lines = _stacked(table, named, cells, ends, width)
    return lines + [line for note in notes.lines() for line in _wrapped(note, width, "    ")]


def _label(row: Finding) -> str:
    return ("    " if row.under else "  ") + row.statistic


def _wrapped(text: str, width: int, hang: str) -> list[str]:
    indent = text[: len(text) - len(text.lstrip())]
    return wrap(text.strip(), max(width, 20), initial_indent=indent, subsequent_indent=indent + hang) or [""]


def _heads(row: Finding, width: int) -> list[str]:
    if not row.claim:
        return []
    return _wrapped(f"{row.claim[0].upper()}{row.claim[1:]} (paper: {row.paper})", width, "  ")


def _line(left: str, texts: Iterable[str], cell: int) -> str:
    return (left + "".join(f"{text:<{cell}}" for text in texts)).rstrip()


Cells = Sequence[Sequence[str]]


def _beside(
    table: Sequence[Finding], conditions: Sequence[str], cells: Cells, ends: Cells, left: int, cell: int
) -> list[str]:
    lines = [_line(" " * left, conditions, cell)]
    for row, values, around in zip(table, cells, ends, strict=True):
        lines += _heads(row, left + cell * len(conditions))
        lines.append(_line(f"{_label(row):<{left}}", values, cell))
        if any(around):
            lines.append(_line(" " * left, around, cell))
    return lines


def _below(
    table: Sequence[Finding], conditions: Sequence[str], cells: Cells, ends: Cells, cell: int, width: int
) -> list[str]:
    lines = [_line("    ", conditions, cell)]
    for row, values, around in zip(table, cells, ends, strict=True):
        lines += [*_heads(row, width), *_wrapped(_label(row), width, "  "), _line("    ", values, cell)]
        if any(around):
            lines.append(_line("    ", around, cell))
    return lines


def _stacked(table: Sequence[Finding], conditions: Sequence[str], cells: Cells, ends: Cells, width: int) -> list[str]:
    lines: list[str] = []
    name, value = (2 + max(map(len, texts), default=0) for texts in (conditions, [t for row in cells for t in row]))
    for row, values, around in zip(table, cells, ends, strict=True):
        lines += [*_heads(row, width), *_wrapped(_label(row), width, "  ")]
        for condition, text, beside in zip(conditions, values, around, strict=True):
            if not text:
                continue
            known = f"      {condition:<{name}}{text:<{value}}"
            parts = [known + beside] if len(known + beside) <= width else [known, f"        {beside}"]
            if len(known.rstrip()) > width:
                parts = [f"      {condition}", f"        {text}", f"        {beside}"]
            lines += [part.rstrip() for part in parts if part.strip()]
    return lines


def as_markdown(table: Sequence[Finding], conditions: Sequence[str], intervals: str = "") -> str:
    """The table as ``findings.md`` has it, with the notes below; ``intervals`` says what they are over."""
    head, notes = (
        ["claim of the paper", "paper, Llama 3.1 8B", "measured here", "N", *(NAMES.get(c, c) for c in conditions)],
        Notes(),
    )
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in table:
        values = [row.values.get(c) for c in conditions]
        cells = [notes.cell(v) + (f"<br>{v.below}" if v is not None and v.below else "") for v in values]
        indent = "&emsp;" if row.under else ""
        cells = [row.claim, row.paper, indent + row.statistic, count_of(values), *cells]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    below = "".join(f"\n{line}\n" for line in notes.lines())
    if any(v.ends for row in table for v in row.values.values()):
        below += "\nUnder a trend: the first, middle and last value of its curve.\n"
    if intervals and any(v.low is not None for row in table for v in row.values.values()):
        below += f"\n{intervals}\n"
    return "\n".join(lines) + "\n" + below


def count_of(values: Sequence[Value | None]) -> str:
    """N of a row: one number where its conditions agree."""
    counts = [v.n for v in values if v is not None and v.n is not None]
    return ", ".join(str(n) for n, _ in groupby(counts)) if counts else ""


def as_json(table: Sequence[Finding]) -> list[dict[str, Any]]:
    """The table as ``summary.json`` has it."""
    return [
        {
            "key": row.key,
            "measure": row.measure,
            "claim": row.claim,
            "paper": row.paper,
            "statistic": row.statistic,
            "under": row.under,
            "detail": row.detail,
            "null": row.null,
            "both_sites": row.both_sites,
            "of_main": row.of_main,
            "values": {c: value_json(v) for c, v in row.values.items()},
        }
        for row in table
    ]


def value_json(value: Value) -> dict[str, Any]:
    """A value as files have it; its unit and its note stand by themselves and in the text."""
    first, middle, last = value.ends or (None, None, None)
    return {
        "value": value.value,
        "low": value.low,
        "high": value.high,
        "first": first,
        "middle": middle,
        "last": last,
        "n": value.n,
        "seeds": list(value.seeds),
        "reason": None if value.defined else value.reason or None,
        "unit": value.unit,
        "note": value.note,
        "whole": value.whole,
        "text": str(value),
    }


def from_json(rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """The table that :func:`as_json` made, read back; also of version 0.1, which kept less of it.

    Raises ``KeyError`` or ``TypeError`` for what is no such table.
    """
    return [
        Finding(
            row["key"],
            row["measure"],
            row["claim"],
            row["paper"],
            row["statistic"],
            {c: _value_from(v) for c, v in row["values"].items()},
            row.get("under", ""),
            row.get("detail", False),
            row.get("null", ""),
            row.get("both_sites", False),
            row.get("of_main", False),
        )
        for row in rows
    ]


def _value_from(value: Mapping[str, Any]) -> Value:
    ends = tuple(value.get(end) for end in ("first", "middle", "last"))
    return Value(
        math.nan if value["value"] is None else value["value"],
        value.get("low"),
        value.get("high"),
        None if ends[0] is None else tuple(math.nan if end is None else end for end in ends),  # type: ignore[arg-type]
        value.get("n"),
        tuple(math.nan if seed is None else seed for seed in value.get("seeds") or ()),
        value.get("reason") or "",
        value.get("unit", " %" if re.match(r"\S+ %", str(value.get("text"))) else ""),
        value.get("note", ""),
        value.get("whole", False),
    )
