"""A row of the findings as a typed value: what is measured, in each condition, and what is needed to judge it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Value:
    """A measured number and what a reader needs to judge it.

    Attributes:
        value: the number; NaN where it is not defined.
        low, high: ends of its 95 % interval, None where there is none.
        ends: first, middle and last value of the curve, where ``value`` is a trend over depth.
        n: how many trajectories it was measured on.
        seeds: what further models of its kind give, such as untrained ones with other random weights.
        reason: why it is not defined, in words; empty where it is.
        unit: what stands behind the number, such as `` %``.
        note: what stands behind the interval.
        whole: whether it is a count.
    """

    value: float
    low: float | None = None
    high: float | None = None
    ends: tuple[float, float, float] | None = None
    n: int | None = None
    seeds: tuple[float, ...] = ()
    reason: str = ""
    unit: str = ""
    note: str = ""
    whole: bool = False

    @property
    def defined(self) -> bool:
        """Whether there is a number."""
        return self.value == self.value

    def __str__(self) -> str:
        text = (f"{self.value:.0f}" if self.whole and self.defined else number(self.value)) + self.unit
        if self.low is not None and self.high is not None and self.low == self.low:
            text += f" [{number(self.low)}, {number(self.high)}]"
        return text + self.note

    @property
    def ends_text(self) -> str:
        """First, middle and last value of the curve; empty where there are none."""
        return "" if self.ends is None else " → ".join(number(end) for end in self.ends)

    @property
    def seeds_text(self) -> str:
        """The range over all models of its kind, this one included; empty where there is one."""
        known = [x for x in (self.value, *self.seeds) if x == x]
        return f"seeds {number(min(known))} to {number(max(known))}" if self.seeds and known else ""

    @property
    def below(self) -> str:
        """What stands below the value: the curve's ends, and the range over seeds."""
        return "; ".join(text for text in (self.ends_text, self.seeds_text) if text)


@dataclass(frozen=True)
class Finding:
    """One row: what is measured, and its value in each condition.

    Attributes:
        key: the row's name, snake case, the same in every output and in every run.
        measure: the measure it belongs to, one of ``analysis.measures``.
        claim: of the paper; empty where the row belongs to the claim above it.
        paper: the paper's words or number.
        statistic: what is measured, in words.
        values: by condition.
        under: key of the row of which this one is a variant; empty for a row of its own.
        detail: whether a terminal, where there is little room, does without it.
        null: the null model that the row is of; empty for what is the stream's own.
        both_sites: whether it is of steps within layers, which models of one site per layer have not.
        of_main: whether values of other streams rest on the main one too: massive units that are left out are its own,
            and it is what they are compared with.
    """

    key: str
    measure: str
    claim: str
    paper: str
    statistic: str
    values: dict[str, Value] = field(default_factory=dict)
    under: str = ""
    detail: bool = False
    null: str = ""
    both_sites: bool = False
    of_main: bool = False


def number(x: float) -> str:
    """A number as tables have it: three digits behind the point below 10, two above, powers of ten beyond."""
    if x != x:
        return "not defined"
    if x == 0 or 0.001 <= abs(x) < 10000:
        digits = 2 if abs(x) >= 10 else 3
        return f"{x:.{digits}f}".rstrip("0").rstrip(".") if abs(x) >= 1000 else f"{x:.{digits}f}"
    return f"{x:.2e}"
