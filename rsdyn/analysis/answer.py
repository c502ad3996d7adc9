"""What an analysis found, in at most six sentences with their numbers: what terminal, findings and page begin with."""

from __future__ import annotations

from collections.abc import Sequence

from rsdyn.analysis.finding import Finding, Value, number
from rsdyn.analysis.settings import UNTRAINED
from rsdyn.labels import NAMES

MOST = 6
NULLS = ("innovation_shuffle", "layer_shuffle")  # the one that claims rest on, and the paper's


class _Rows:
    """The rows of a table by their keys, each with the value of the first condition."""

    def __init__(self, table: Sequence[Finding], conditions: Sequence[str]) -> None:
        self._rows = {row.key: row.values for row in table}
        self._main, self._conditions = conditions[0], conditions

    def __getitem__(self, key: str) -> Value | None:
        return self.of(key, self._main)

    def of(self, key: str, condition: str) -> Value | None:
        """The value in a condition; None where it was not measured, or is not defined."""
        value = self._rows.get(key, {}).get(condition)
        return value if value is not None and value.defined else None

    def untrained(self, key: str) -> str:
        """The untrained model's value in brackets, where there is one beside the main condition."""
        value = self.of(key, UNTRAINED) if self._main != UNTRAINED else None
        return "" if value is None else f" ({NAMES[UNTRAINED]}: {number(value.value)})"


def answer(table: Sequence[Finding], conditions: Sequence[str]) -> list[str]:
    """The sentences, a measure each, of the first condition: what turned out beside the nulls and the paper's words."""
    if not table:
        return []
    rows = _Rows(table, conditions)
    said = (make(rows) for make in (_turns, _correlation, _steps, _information, _dimensions, _density))
    return [sentence for sentence in said if sentence][:MOST]


def _turns(rows: _Rows) -> str:
    turns = rows["turns"]
    if turns is None:
        return ""
    parts = [f"Units turn {turns} times on average"]
    if (walk := rows["turns_of_random_walk"]) is not None:
        parts.append(f"a random walk of equal length {number(walk.value)}")
    for null in NULLS:
        if (value := rows[f"turns_{null}"]) is not None:
            parts.append(f"{NAMES[null]} {value}")
    return "; ".join(parts) + "."


def _correlation(rows: _Rows) -> str:
    mean, first = rows["correlation_mean"], rows["correlation_first"]
    if mean is None or first is None:
        return ""
    return (
        f"From one sublayer to the next a unit correlates by {number(mean.value)} on average"
        f"{rows.untrained('correlation_mean')}, at the first transition by {number(first.value)} (paper: above 0.8)."
    )


def _sentence(parts: Sequence[str]) -> str:
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _steps(rows: _Rows) -> str:
    speed, relative, cosine = rows["speed_trend"], rows["relative_speed_trend"], rows["cosine_trend"]
    parts = []
    if speed is not None:
        parts.append(f"The length of a step goes {_over_depth(speed)}")
    if relative is not None:
        parts.append(f"over the state's norm {_over_depth(relative)}")
    if cosine is not None:
        parts.append(f"the cosine of successive states {_over_depth(cosine)}")
    return _sentence(parts)


def _information(rows: _Rows) -> str:
    fall = rows["information_early_fall"]
    if fall is None:
        return ""
    unit = f", from {fall.n} trajectories" if fall.n else ""
    return (
        f"A unit's information from one sublayer to the next, at the first transition less in the last two thirds, is "
        f"{fall} nats{rows.untrained('information_early_fall')}{unit} (paper: falls sharply)."
    )


def _dimensions(rows: _Rows) -> str:
    filled, needed = rows["dimensions_trend"], rows["components_90_trend"]
    parts = []
    if filled is not None:
        parts.append(f"the states of a sublayer fill {_over_depth(filled)} dimensions")
    if needed is not None:
        parts.append(f"90 % of their variance needs {_over_depth(needed)} components (paper: fewer in later layers)")
    return _sentence(parts)


def _density(rows: _Rows) -> str:
    share = rows["density_trend"]
    return "" if share is None else f"The share of active units goes {_over_depth(share)}."


def _over_depth(value: Value) -> str:
    """First, middle and last value of a curve, and its rank correlation with depth."""
    ends = value.ends_text or number(value.value)
    return f"{ends} (trend {number(value.value)})"
