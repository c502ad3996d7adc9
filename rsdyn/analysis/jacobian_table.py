"""The claims of arXiv 2605.14258 in words: for a terminal, for ``findings.md`` and for ``summary.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rsdyn.analysis.finding import number
from rsdyn.analysis.jacobians import DIRECTIONS, NULL_TEXTS, SERIES, Claim, JacobianResult, depths_of
from rsdyn.analysis.sink import sink_json, sink_markdown, sink_table, sink_words

PAPER = "arXiv 2605.14258"


def as_text(result: JacobianResult, table: Sequence[Claim]) -> list[str]:
    """The table for a terminal: a claim, and below it each series with its interval."""
    wide = max(len(SERIES[s].label) for s in result.series) + 2
    lines = [f"Jacobians over depth, {_texts(result)}: the claims of {PAPER}", ""]
    for claim in table:
        if claim.claim:
            lines.append(f"{claim.claim[0].upper()}{claim.claim[1:]} (paper: {claim.paper})")
        verdict = f"   {_verdict(claim)}" if claim.verdict else ""
        lines.append(f"  {claim.statistic}{verdict}")
        lines += [f"    {SERIES[s].label:<{wide}}{value}" for s, value in claim.values.items()]
    sink = result.sink_finding()
    return lines if sink is None else [*lines, "", *sink_table(sink)]


def answer(table: Sequence[Claim]) -> str:
    """A sentence that counts the claims by their verdicts, with the numbers of those that hold for this model alone."""
    judged = [claim for claim in table if claim.verdict]
    alone = [f"{claim.statistic}, {claim.values['full']}" for claim in judged if claim.verdict == "holds"]
    told = [f"{len(alone)} hold{'' if len(alone) != 1 else 's'}" + (f" ({'; '.join(alone)})" if alone else "")]
    for verdict in dict.fromkeys(claim.verdict for claim in judged if claim.verdict != "holds"):
        n = sum(claim.verdict == verdict for claim in judged)
        told.append(f"{n} {'not' if verdict == 'not' else verdict}")
    return f"Of {len(judged)} claims of {PAPER}, {', '.join(told)}."


def as_markdown(result: JacobianResult, table: Sequence[Claim]) -> str:
    """The same as a table of Markdown, under a heading."""
    labels = [SERIES[s].label for s in result.series]
    head = [f"claim of {PAPER}", "paper", "measured here", "holds if", *labels, "verdict"]
    lines = [f"## Jacobians over depth, {_texts(result)}", "", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for claim in table:
        values = [str(claim.values[s]) if s in claim.values else "" for s in result.series]
        cells = [claim.claim, claim.paper, claim.statistic, claim.bound, *values, _verdict(claim)]
        lines.append(f"| {' | '.join(cells)} |")
    sink = result.sink_finding()
    return "\n".join(lines) + "\n" + ("" if sink is None else "\n" + sink_markdown(sink))


def as_json(result: JacobianResult, table: Sequence[Claim]) -> dict[str, Any]:
    """What ``summary.json`` has of it: numbers, verdicts, the mean curves and the ends of the linear range."""
    rows = [
        {
            **{k: getattr(c, k) for k in ("key", "claim", "paper", "statistic", "verdict", "bound")},
            "also": list(c.also),
            "values": {s: {"value": v.value, "low": v.low, "high": v.high, "n": v.n} for s, v in c.values.items()},
        }
        for c in table
    ]
    counted = {s: int(result.curves[s]["singular"].sum()) for s in result.series}
    return {
        "texts": len(result.curves["full"]["growth"]),
        "dtype": result.dtype,
        "series": {s: SERIES[s].label for s in result.series},
        "claims": rows,
        "singular": counted,
        "in_words": words(result),
        "sink": None if (sink := result.sink_finding()) is None else sink_json(sink),
        "linear_range": {"depths": depths_of(result.n_layers * result.sites), "ends": result.ranges()},
    }


def words(result: JacobianResult) -> list[str]:
    """What a reader must know beside the table."""
    growth = float(result.mean("full", "growth"))
    exponents = result.mean("full", "exponents")
    below = 100 * float((exponents < growth).mean())
    lines = [
        "J is the derivative of the last token's state from one sublayer to the next, G = J - I. In full context the "
        "other tokens' keys and values are held, which is exact in a causal model; one token alone is no derivative of "
        "what the model does with a text. Both shares and Henrici's departure depend on the stream's inner product: "
        "they are those of its own orthonormal basis, and stay under rotations of it alone.",
        f"The norm of the stream grows by {number(growth)} nats per layer, and {below:.0f} % of the exponents lie "
        "below that: a direction that contracts relative to the norm is what any network whose norm grows has, so look "
        "at the untrained column.",
        _of_intervals(result),
    ]
    if ends := result.ranges():
        depths = depths_of(result.n_layers * result.sites)
        told = "; ".join(f"{d}: {', '.join(_size(x) for x in ends[d])}" for d in DIRECTIONS)
        lines.append(
            "A displacement behaves as the Jacobian predicts (its length at the end within a factor of two) up to "
            f"these sizes, in norms of the state, at sublayers {', '.join(map(str, depths))}. {told}."
        )
    if (sink := result.sink_finding()) is not None:
        lines += sink_words(sink)
    counted = {s: int(result.curves[s]["singular"].sum()) for s in result.series}
    if any(counted.values()):
        told = ", ".join(f"{n} ({SERIES[s].label})" for s, n in counted.items() if n)
        lines.append(f"Jacobians that are singular to working precision, log|det| = -inf or rounding: {told}.")
    if result.dtype != "float32":
        lines.append(f"The model is in {result.dtype}; its Jacobians were computed in float32.")
    return lines


def _of_intervals(result: JacobianResult) -> str:
    n = len(result.curves["full"]["growth"])
    if len(result.groups(n)) < 2:
        return (
            "One document says nothing of others: there are no intervals, and a verdict is of what was measured alone."
        )
    return (
        "Intervals are over documents (delete-one jackknife, bootstrap for rank correlations); random matrices are "
        f"drawn for {min(n, NULL_TEXTS)} texts. A verdict needs the whole interval on the claim's side of its bound."
    )


def _texts(result: JacobianResult) -> str:
    n = len(result.curves["full"]["growth"])
    return f"{n} text{'s' if n > 1 else ''}"


def _size(x: float) -> str:
    return "beyond 1" if x == float("inf") else "below 0.001" if x != x else f"{x:.2g}"


def _verdict(claim: Claim) -> str:
    also = [SERIES[s].label for s in claim.also if s != "untrained"]
    return claim.verdict + (f" (also: {', '.join(also)})" if also else "")
