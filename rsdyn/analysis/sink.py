"""Does the sink own the gain of the whole depth? The first token's state and the massive units, each held or not.

Attention that looks for nothing goes to the first token, which its massive units mark. A derivative without that token
in its context has attention that must go elsewhere, to the token itself, and so a gain that the model in its context
has not; and what gains may do so by way of a few massive units. Each is taken away in turn (METHOD section 12).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsdyn.analysis.finding import Value, number
from rsdyn.dynamics.jacobian import products_to_the_end
from rsdyn.dynamics.moments import massive_units
from rsdyn.dynamics.resampling import jackknife
from rsdyn.lm.jacobians import Context, reference_run, sublayer_jacobians
from rsdyn.lm.model import LanguageModel

SINK_TEXTS = 20  # texts that are differentiated again without the sink
SINK_VERSION = 1  # raise it whenever a text would give other numbers
PRODUCTS = ("product_gain", "product_participation")  # of the product from a sublayer to the end
HELD = {
    "full": "full context",
    "massive": "massive units held",
    "rest": "the first token taken out of the context",
    "first": "nothing but the first token in the context",
    "none": "one token alone",
}
_CONTEXTS: tuple[Context, ...] = ("rest", "first")
MASSIVE, ALONE = "massive", "alone"  # the two questions
MAJORITY = 0.5  # of the gain, in nats: what owns it has more than this

Curves = dict[str, np.ndarray]


def massive_of(lm: LanguageModel, texts: Sequence[np.ndarray]) -> Tensor:
    """Units that are massive at the first or at the last token of these texts: a boolean mask ``(D,)``."""
    stream = lm.record(texts, positions=[np.array([0, len(tokens) - 1]) for tokens in texts])
    first, last = (massive_units(stream[i::2].double().mean(0)) for i in range(2))
    return first | last


def measure_sink(lm: LanguageModel, tokens: np.ndarray, massive: Tensor) -> dict[str, Curves]:
    """``PRODUCTS`` ``(S,)`` of one text with the sink held or taken away; ``massive`` ``(D,)`` marks units.

    ``massive`` is the derivative of all other units with those held where they are, at every sublayer: their rows and
    columns are struck out. It is there when any unit is massive. ``rest`` and ``first`` are the contexts of
    :func:`rsdyn.lm.jacobians.sublayer_jacobians`.
    """
    reference = reference_run(lm, tokens)
    found: dict[str, Curves] = {}
    for context in _CONTEXTS:
        found[context] = products(sublayer_jacobians(lm, tokens, context=context, reference=reference))
    if massive.any():
        js = sublayer_jacobians(lm, tokens, reference=reference)
        kept = (~massive).nonzero()[:, 0].to(js.device)
        found[MASSIVE] = products(js[:, kept][:, :, kept])
    return found


def products(js: Tensor) -> Curves:
    """``PRODUCTS`` of the Jacobians ``(S, D, D)``."""
    return {name: values.cpu().numpy() for name, values in zip(PRODUCTS, products_to_the_end(js), strict=True)}


@dataclass(frozen=True)
class SinkRow:
    """The whole depth in one of ``HELD``: ln of its largest gain, and the participation ratio of its sigma squared."""

    key: str
    label: str
    log_gain: Value
    participation: Value


@dataclass(frozen=True)
class SinkFinding:
    """What the sink has to do with the gain of the whole depth, over ``texts`` texts.

    Attributes:
        rows: by ``HELD``, those that were measured.
        without_first: ln of the gain without the first token in the context, less that with it.
        units: the massive units.
        shares: of ``massive``, the part of the gain in full context (in nats) that is gone once the massive units are
            held; of ``alone``, the part of what one token alone gains beyond full context that is gone once the first
            token is put back into its context. NaN where there is no gain to share out.
        verdicts: ``owns it`` when the whole interval of the share is above one half, ``does not`` when it is below,
            else ``not decided``; empty for what is not defined.
    """

    rows: list[SinkRow]
    without_first: Value
    units: list[int]
    texts: int
    shares: dict[str, Value]
    verdicts: dict[str, str]


def sink_finding(curves: Mapping[str, Curves], units: Sequence[int], groups: Sequence[np.ndarray]) -> SinkFinding:
    """Rows, shares and verdicts of :func:`measure_sink`'s curves ``(texts, S)`` beside those of ``full`` and ``none``.

    ``groups`` are the rows of each document, which an interval (delete-one jackknife) leaves out together.
    """
    kept = {key: curves[key] for key in HELD if key in curves}
    logs = {key: np.log(c["product_gain"][:, 0]) for key, c in kept.items()}
    few = {key: c["product_participation"][:, 0] for key, c in kept.items()}
    n = len(logs["full"])

    def mean(values: np.ndarray) -> Callable[[np.ndarray], float]:
        return lambda rows: float(values[rows].mean())

    rows = [
        SinkRow(key, HELD[key], _over_texts(mean(logs[key]), groups, n), _over_texts(mean(few[key]), groups, n))
        for key in kept
    ]
    without_first = _over_texts(mean(logs["rest"] - logs["full"]), groups, n)
    shares = {ALONE: _share(logs["none"] - logs["first"], logs["none"] - logs["full"], groups, n)}
    if MASSIVE in logs:
        shares[MASSIVE] = _share(logs["full"] - logs[MASSIVE], logs["full"], groups, n)
    verdicts = {name: _verdict(share) for name, share in shares.items()}
    return SinkFinding(rows, without_first, list(units), n, shares, verdicts)


def _over_texts(of: Callable[[np.ndarray], float], groups: Sequence[np.ndarray], n: int) -> Value:
    value = of(np.arange(n))
    if len(groups) < 2:
        return Value(value, n=n)
    without = [of(np.setdiff1d(np.arange(n), rows)) for rows in groups]
    found = jackknife(torch.tensor(value, dtype=torch.float64), torch.tensor(without, dtype=torch.float64))
    return Value(value, float(found.low), float(found.high), n=n)


def _share(gone: np.ndarray, whole: np.ndarray, groups: Sequence[np.ndarray], n: int) -> Value:
    """A ratio of means; not defined where the whole is not told from none, or is below it."""
    size = _over_texts(lambda rows: float(whole[rows].mean()), groups, n)
    if (size.value if size.low is None else size.low) <= 0:
        return Value(float("nan"), n=n, reason="there is no gain to share out")
    return _over_texts(lambda rows: float(gone[rows].mean() / whole[rows].mean()), groups, n)


def _verdict(share: Value) -> str:
    if not share.defined:
        return ""
    low, high = (share.value if end is None else end for end in (share.low, share.high))
    return "owns it" if low > MAJORITY else "does not" if high < MAJORITY else "not decided"


# --- in words -------------------------------------------------------------------------------------------------------


def sink_table(found: SinkFinding) -> list[str]:
    """The table for a terminal."""
    wide = max(len(_label(found, row)) for row in found.rows) + 2
    lines = [f"Does the sink own the gain? ln of the largest gain of the whole depth, mean of {_texts(found)}"]
    lines.append(f"  {'':<{wide}}{'ln gain':<26}participation of sigma^2")
    for row in found.rows:
        lines.append(f"  {_label(found, row):<{wide}}{row.log_gain!s:<26}{row.participation}")
    return lines


def sink_markdown(found: SinkFinding) -> str:
    """The same as a table of Markdown, under a heading."""
    lines = [
        f"## Does the sink own the gain? {_texts(found)}",
        "",
        "| whole depth | ln of its largest gain | participation |",
    ]
    lines.append("| --- | --- | --- |")
    lines += [f"| {_label(found, row)} | {row.log_gain} | {row.participation} |" for row in found.rows]
    return "\n".join(lines) + "\n"


def sink_words(found: SinkFinding) -> list[str]:
    """What the table says."""
    change = found.without_first
    lines = [f"Taking the first token out of the context changes ln of the gain by {change}."]
    alone = found.shares[ALONE]
    if alone.defined:
        lines.append(
            f"Of what one token alone gains beyond full context, {_percent(alone)} (in nats) is gone once the first "
            f"token's state is back in its context{_said(found, ALONE)}: so much of the excess is attention "
            "that has no sink to go to."
        )
    else:
        lines.append(
            "One token alone gains no more than in its context: there is nothing that the first token holds down."
        )
    if not found.units:
        lines.append("No unit is massive at the first or the last token, so none was held.")
    elif found.shares[MASSIVE].defined:
        lines.append(
            f"Of the gain in full context, {_percent(found.shares[MASSIVE])} (in nats) is gone once the massive units "
            f"are held at every sublayer{_said(found, MASSIVE)}."
        )
    else:
        lines.append("The gain of the whole depth is not above 1, so there is none for massive units to own.")
    return lines


def _said(found: SinkFinding, question: str) -> str:
    if found.shares[question].low is None:
        return ""
    return {
        "owns it": ", by its interval more than half",
        "does not": ", by its interval less than half",
        "not decided": ", and its interval does not tell whether that is half",
    }[found.verdicts[question]]


def sink_json(found: SinkFinding) -> dict[str, Any]:
    """For ``summary.json``."""

    def numbers(value: Value) -> dict[str, float | None]:
        return {"value": value.value if value.defined else None, "low": value.low, "high": value.high}

    return {
        "texts": found.texts,
        "massive_units": found.units,
        "without_first": numbers(found.without_first),
        "rows": [
            {
                "key": r.key,
                "label": _label(found, r),
                "log_gain": numbers(r.log_gain),
                "participation": numbers(r.participation),
            }
            for r in found.rows
        ],
        "shares": {name: numbers(share) | {"verdict": found.verdicts[name]} for name, share in found.shares.items()},
    }


def _label(found: SinkFinding, row: SinkRow) -> str:
    return f"{row.label} ({', '.join(map(str, found.units))})" if row.key == MASSIVE else row.label


def _texts(found: SinkFinding) -> str:
    return f"{found.texts} text{'s' * (found.texts > 1)}"


def _percent(share: Value) -> str:
    value = f"{number(100 * share.value)} %"
    return (
        value
        if share.low is None or share.high is None
        else f"{value} [{number(100 * share.low)}, {number(100 * share.high)}]"
    )
