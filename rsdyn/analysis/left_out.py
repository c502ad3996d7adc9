"""Each finding without 0, 1, 2, 4, 8 and 16 of the largest units, so that no threshold decides (METHOD 0.10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rsdyn.analysis.finding import number
from rsdyn.analysis.findings import of_row, rows
from rsdyn.analysis.results import AnalysisResults
from rsdyn.analysis.shape_rows import WITHOUT_LARGEST, shape_rows


@dataclass(frozen=True)
class LeftOut:
    """A row of the findings without some of the largest units.

    Attributes:
        key, measure, statistic, under: those of the row (:class:`~rsdyn.analysis.finding.Finding`).
        values: by condition, one number per number of units left out.
    """

    key: str
    measure: str
    statistic: str
    under: str
    values: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class LargestUnits:
    """What the largest units do to the findings.

    Attributes:
        counts: numbers of units left out, the same for all conditions.
        units: the largest units, largest first.
        ratios: how often the median ``|mean|`` each one's is, where it is most.
        rows: the findings without them.
    """

    counts: list[int]
    units: list[int]
    ratios: list[float]
    rows: list[LeftOut]


def without_largest(results: AnalysisResults) -> LargestUnits:
    """The findings without the largest units, which were found once, on the first condition."""
    flags, found = results.main.flags, []
    for measure, row in rows(results):
        there = {c: curve.left_out for c, (_, curve) in of_row(measure, row, results).items()}
        values = {c: [float(row.of(x)) for x in curves] for c, curves in there.items() if curves is not None}
        if values:
            found.append(LeftOut(row.key, measure, row.statistic, row.under, values))
    found += _of_shape(results)
    units, ratios = flags.largest_units.tolist(), flags.largest_ratios.tolist()
    return LargestUnits(flags.left_out_counts.tolist(), units, ratios, found)


def _of_shape(results: AnalysisResults) -> list[LeftOut]:
    """The rows of curvature and dimension that are measured without the largest units too."""
    known, found = {row.key: row for row in shape_rows(results)}, []
    for key, (of, to) in WITHOUT_LARGEST.items():
        left = {c: m.left_out for c, r in results.conditions.items() if (m := of(r)) is not None}
        values = {c: [float(to(x)) for x in curves] for c, curves in left.items() if curves is not None}
        if values:
            row = known[key]
            found.append(LeftOut(key, row.measure, row.statistic, row.under, values))
    return found


def as_markdown(found: LargestUnits, condition: str) -> str:
    """The part of ``findings.md``: which units are largest, and the findings of one condition without them.

    Empty where none of its findings is measured without them.
    """
    if not any(condition in row.values for row in found.rows):
        return ""
    named = ", ".join(f"{u} ({number(ratio)})" for u, ratio in zip(found.units, found.ratios, strict=True))
    lines = [
        "## Without the largest units",
        "",
        f"The largest units of {condition}, and how often the median |mean| theirs is where it is most: {named}. The "
        f"same units are left out of all conditions; the table is of {condition}, summary.json has the others.",
        "",
        "| units left out | " + " | ".join(map(str, found.counts)) + " |",
        "|" + " --- |" * (len(found.counts) + 1),
    ]
    for row in found.rows:
        if condition in row.values:
            name = ("&emsp;" if row.under else "") + row.statistic.replace("|", "\\|")
            lines.append(f"| {name} | " + " | ".join(map(number, row.values[condition])) + " |")
    return "\n".join(lines) + "\n"


def without_largest_of(data: Mapping[str, Any] | None) -> LargestUnits | None:
    """What :func:`as_json` gave, read back; a number that JSON has not is NaN."""
    if data is None:
        return None

    def numbers(values: Sequence[float | None]) -> list[float]:
        return [float("nan") if value is None else float(value) for value in values]

    of_row = ("key", "measure", "statistic", "under")
    rows = [
        LeftOut(**{name: row[name] for name in of_row}, values={c: numbers(v) for c, v in row["values"].items()})
        for row in data["rows"]
    ]
    return LargestUnits(list(data["counts"]), list(data["units"]), numbers(data["ratios"]), rows)


def as_json(found: LargestUnits) -> dict[str, Any]:
    """What ``summary.json`` has of it."""
    of_row = ("key", "measure", "statistic", "under", "values")
    return {
        "counts": found.counts,
        "units": found.units,
        "ratios": found.ratios,
        "rows": [{name: getattr(row, name) for name in of_row} for row in found.rows],
    }
