"""The findings by group of sequences, as a terminal, ``findings.md``, the page and ``summary.json`` have them.

One table, from :class:`~rsdyn.analysis.results.ByGroup`: a row per finding. Of two groups it has a column each, their
difference, p and p adjusted for all rows (Holm); of several a column each, with the difference from the rest below.
"""

from __future__ import annotations

import shutil
from textwrap import wrap
from typing import Any, NamedTuple

import torch

from rsdyn.analysis.finding import Value, number
from rsdyn.analysis.group_design import LEAST
from rsdyn.analysis.results import ByGroup, GroupRow

LEVEL = 0.05
HOW = (
    "In brackets: 95 % intervals that leave out whole documents in turn. p: how many of the permutations of labels "
    "give a difference as large; Holm: adjusted for all rows and groups of this table. What depends on how many "
    "sequences there are (N in the row) is compared at equal N, of larger groups a random part."
)


class Cell(NamedTuple):
    """A cell of the table as text: a value, its interval, and what stands below it."""

    value: str
    interval: str = ""
    below: str = ""

    @property
    def text(self) -> str:
        """The value with its interval."""
        return f"{self.value} {self.interval}".strip()

    @property
    def whole(self) -> str:
        """All of it in one line."""
        return f"{self.text}; {self.below}" if self.below else self.text


class Row(NamedTuple):
    """A row of the table as text.

    Attributes:
        label: what is measured; ``under`` and ``detail`` as in :class:`rsdyn.analysis.finding.Finding`.
        n: on how many trajectories, where that is the same for all compared groups and not all that they have.
        cells: one for each column.
        clear: of each column, whether what it stands for is significant after Holm's adjustment.
    """

    key: str
    label: str
    under: bool
    detail: bool
    n: str
    cells: list[Cell]
    clear: list[bool]

    @property
    def differs(self) -> bool:
        """Whether any is."""
        return any(self.clear)


def heads(found: ByGroup) -> list[str]:
    """The columns."""
    counts = zip(found.names, found.sequences.tolist(), strict=True)
    names = [f"{name} ({n} sequence{'s' * (n != 1)})" for name, n in counts]
    if len(names) == 2 and found.first:
        return [*names, found.contrasts[0], "p", "Holm"]
    return names


def rows(found: ByGroup) -> list[Row]:
    """The table, with a text in every cell."""
    two = len(found.names) == 2
    table = []
    for key, row in found.rows.items():
        cells = []
        for g, name in enumerate(found.names):
            below = ""
            if not two and name in found.first:
                c = found.first.index(name)
                below = f"{_signed(difference_of(row, c))} from the rest, p {_p(row.p[c])} (Holm {_p(row.p_holm[c])})"
            value = value_of(row, g)
            missing = "" if value.defined else "too few sequences" if row.n[g] < LEAST else "not defined"
            cells.append(Cell(missing or number(value.value), _ends(value), below))
        if two and found.first:
            less = difference_of(row, 0)
            cells += [Cell(_sign(less) + number(less.value), _ends(less)), Cell(_p(row.p[0])), Cell(_p(row.p_holm[0]))]
        n = str(int(row.n.max())) if row.equal_n and int(row.n.max()) else ""
        holm = dict(zip(found.first, (row.p_holm < LEVEL).tolist(), strict=True))
        clear = [any(holm.values())] * len(cells) if two else [holm.get(name, False) for name in found.names]
        table.append(Row(key, row.statistic, bool(row.under), row.detail, n, cells, clear))
    return table


def value_of(row: GroupRow, group: int) -> Value:
    """A group's value with its interval."""
    low, high = row.interval[:, group].tolist()
    known = low == low and high == high
    return Value(float(row.value[group]), low if known else None, high if known else None, n=int(row.n[group]))


def difference_of(row: GroupRow, contrast: int) -> Value:
    """The difference of a contrast with its interval."""
    low, high = row.difference_interval[:, contrast].tolist()
    known = low == low and high == high
    return Value(float(row.difference[contrast]), low if known else None, high if known else None)


def _ends(value: Value) -> str:
    return "" if value.low is None or value.high is None else f"[{number(value.low)}, {number(value.high)}]"


def _sign(value: Value) -> str:
    return "+" if value.defined and value.value > 0 else ""


def _signed(value: Value) -> str:
    return _sign(value) + str(value)


def _p(p: torch.Tensor) -> str:
    x = float(p)
    return "–" if x != x else f"{x:.4f}" if x < 0.001 else f"{x:.3f}"


def headline(found: ByGroup) -> str:
    """One sentence: how many rows differ between groups, and the one that does most."""
    table = [row for row in found.rows.values() if not row.detail]
    if not found.first:
        return f"Groups {' and '.join(found.names)} are too small to be compared."
    between = found.contrasts[0].replace(" - ", " and ") if len(found.names) == 2 else "a group and the rest"
    differs = [row for row in table if bool((row.p_holm < LEVEL).any())]
    if not differs:
        return (
            f"By group: none of {len(table)} findings differs between {between} beyond what permuted labels give "
            "(Holm p < 0.05)."
        )
    most = max(differs, key=_clear)
    c = int((most.difference.abs() / _half(most)).nan_to_num(0.0).argmax())
    name = found.first[c]
    values = dict(zip(found.names, (number(float(x)) for x in most.value), strict=True))
    if len(found.names) > 2:
        said = f"{values[name]} in {name}, {_signed(difference_of(most, c))} from the rest"
    else:
        said = f"{values[name]} in {name}, {values[found.second[c]]} in {found.second[c]}"
    return (
        f"By group: {len(differs)} of {len(table)} findings differ between {between} (Holm p < 0.05), most clearly "
        f"{most.statistic}: {said}."
    )


def _half(row: GroupRow) -> torch.Tensor:
    return (row.difference_interval[1] - row.difference_interval[0]) / 2


def _clear(row: GroupRow) -> float:
    """The largest difference of a row in halves of its interval."""
    known = (row.difference.abs() / _half(row)).nan_to_num(0.0, posinf=0.0)
    return float(torch.where(row.p_holm < LEVEL, known, 0.0).max())


def as_text(found: ByGroup, width: int | None = None) -> list[str]:
    """The table for a terminal of ``width`` columns; of several groups those alone that differ from the rest.

    Details, and all rows and groups, are in ``findings.md`` and on the page.
    """
    width = shutil.get_terminal_size().columns if width is None else width
    table = [row for row in rows(found) if not row.detail]
    lines: list[str] = []
    several = len(found.names) > 2
    if several and found.first:
        table = [row for row in table if row.differs]
    names = heads(found)
    label = max((len(row.label) + 4 * row.under + 2 for row in table), default=0) + 2
    widths = [
        max(len(names[i]), *(len(row.cells[i].text) for row in table)) + 2 if table else 0 for i in range(len(names))
    ]
    if not several and label + sum(widths) <= width:
        lines.append("By group".ljust(label) + "".join(n.ljust(w) for n, w in zip(names, widths, strict=True)))
        for row in table:
            left = ("    " if row.under else "  ") + row.label
            cells = "".join(cell.text.ljust(w) for cell, w in zip(row.cells, widths, strict=True))
            lines.append(left.ljust(label) + cells)
    else:
        if table:
            lines.append("By group" + (", what differs from the rest (all of it: findings.md)" if several else ""))
        for row in table:
            lines += wrap(row.label, max(20, width), initial_indent="  ", subsequent_indent="    ")
            told = [
                f"{name}: {cell.whole}"
                for name, cell, clear in zip(names, row.cells, row.clear, strict=True)
                if clear or not (several and found.first)
            ]
            if not several and found.first:
                told[2:] = [f"{told[2]}, p {row.cells[3].text} (Holm {row.cells[4].text})"]
            for said in told:
                lines += wrap(said, max(20, width), initial_indent="      ", subsequent_indent="        ")
    lines = [line.rstrip() for line in lines]
    for note in found.notes:
        lines += wrap(note, max(20, width), initial_indent="  ", subsequent_indent="  ")
    return lines


def as_markdown(found: ByGroup) -> str:
    """The table as ``findings.md`` has it, under a heading of its own."""
    head = ["by group", "N", *heads(found)]
    lines = ["## By group", "", headline(found), "", "| " + " | ".join(map(_cell, head)) + " |"]
    lines.append("|" + " --- |" * len(head))
    for row in rows(found):
        cells = [cell.text + (f"<br>{cell.below}" if cell.below else "") for cell in row.cells]
        all_cells = [("&emsp;" if row.under else "") + row.label, row.n, *cells]
        lines.append("| " + " | ".join(map(_cell, all_cells)) + " |")
    lines += ["", HOW, *(part for note in found.notes for part in ("", note))]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def as_json(found: ByGroup) -> dict[str, Any]:
    """The table as ``summary.json`` has it; what is not defined is null."""

    def ends(value: Value) -> dict[str, Any]:
        return {"value": _known(value.value), "low": value.low, "high": value.high}

    table = []
    for key, row in found.rows.items():
        values = {name: {**ends(value_of(row, g)), "n": int(row.n[g])} for g, name in enumerate(found.names)}
        differences = {
            name: {**ends(difference_of(row, c)), "p": _known(float(row.p[c])), "p_holm": _known(float(row.p_holm[c]))}
            for c, name in enumerate(found.contrasts)
        }
        table.append(
            {
                "key": key,
                "measure": row.measure,
                "statistic": row.statistic,
                "under": row.under,
                "detail": row.detail,
                "equal_n": row.equal_n,
                "values": values,
                "differences": differences,
            }
        )
    return {
        "sequences": dict(zip(found.names, found.sequences.tolist(), strict=True)),
        found.over: dict(zip(found.names, found.documents.tolist(), strict=True)),
        "unlabelled": found.unlabelled,
        "contrasts": list(found.contrasts),
        "exchange": found.exchange,
        "movable": found.movable,
        "permutations": found.permutations,
        "rows": table,
        "anywhere_over_depth": {
            key: {name: _known(float(p)) for name, p in zip(found.contrasts, curve.p, strict=True)}
            for key, curve in found.curves.items()
        },
        "answer": headline(found),
        "in_words": list(found.notes),
    }


def _known(x: float) -> float | None:
    return x if x == x else None
