"""What a perturbation found, as a table for a terminal and in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from textwrap import wrap

from rsdyn.dynamics.resampling import Interval
from rsdyn.labels import COLUMNS
from rsdyn.perturbation.layers import LayerEffect, LayerEffects
from rsdyn.perturbation.linear import HEADS, NOTE, linear_cells
from rsdyn.perturbation.plane import Plane
from rsdyn.perturbation.result import STILL, BeyondStill, Found, Row
from rsdyn.perturbation.said import said_in_words

MOST_LAYERS = 5  # that an answer speaks of one by one

# -- points ------------------------------------------------------------------------------------------------------------


def answer(found: Found) -> list[str]:
    """What was found, in at most six sentences: whether points come back beyond what standing still feigns."""
    told = [b for b in found.beyond_still if b.nearer.value.isfinite()]
    if not told:
        return ["Nothing follows the injection, so nothing can recover."]
    said = []
    if len(told) > 1:
        above = [str(b.layer) for b in told if float(b.nearer.low) > 0]
        below = [str(b.layer) for b in told if float(b.nearer.high) < 0]
        said.append(
            f"Of {len(told)} layers, more points end nearer to their reference than if they never moved at "
            f"{_layers(above)}, and fewer at {_layers(below)} (95 % intervals beyond 0)."
        )
    places = sorted({round(k * (len(told) - 1) / (MOST_LAYERS - 1)) for k in range(MOST_LAYERS)})
    for beyond in (told[place] for place in places):
        shares = (100 * float(found.measured(beyond.layer, c, "nearer").value) for c in (found.kind, STILL))
        here, still = (f"{share:.0f} %" for share in shares)
        said.append(
            f"Layer {beyond.layer}: {here} of the points, {still} of those that stay put; {_difference(beyond)}."
        )
    return said


def _layers(numbers: list[str]) -> str:
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(numbers)}" if numbers else "none"


def closing_table(found: Found, columns: int = 120) -> list[str]:
    """The table for a terminal of so many ``columns``: a row per layer and condition, in parts where it is narrow."""
    widths = {name: max(11, len(head) + 2) for name, head in COLUMNS.items()}
    labels = [_label(found, row) for row in found.rows]
    wide = max(19, *(len(label) + 1 for label in labels))
    n_parts = -(-sum(widths.values()) // max(columns - wide - 6, 24))
    names, lines = list(COLUMNS), list[str]()
    size = -(-len(names) // n_parts)
    for part in (names[start : start + size] for start in range(0, len(names), size)):
        lines += [""] if lines else []
        lines.append(f"{'layer':<6}{'':<{wide}}" + "".join(f"{COLUMNS[name]:>{widths[name]}}" for name in part))
        for row, label in zip(found.rows, labels, strict=True):
            first = row.condition == found.conditions(row.layer)[0]
            text = "".join(f"{_cell(name, row[name]):>{widths[name]}}" for name in part)
            lines.append(f"{row.layer if first else '':<6}{label:<{wide}}{text}")
    return [*lines, "", *table_notes(found), *linear_table(found)]


def linear_table(found: Found) -> list[str]:
    """How far outside the linear range the points lie, and what the Jacobian predicts of them: a row per layer."""
    if not found.linear:
        return []
    widths = [max(10, len(head) + 2) for head in HEADS]
    lines = [f"{'layer':<6}" + "".join(f"{head:>{width}}" for head, width in zip(HEADS, widths, strict=True))]
    for layer, linear in found.linear.items():
        row = linear_cells(linear, found.of_prompt(layer, found.kind, "contraction"))
        lines.append(f"{layer:<6}" + "".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
    return ["", *lines, "", *wrap(NOTE, 104)]


def table_notes(found: Found) -> list[str]:
    """How the table is to be read."""
    lines = [
        "rel. is the distance over the reference's norm; nearer, the points that end nearer than they were put, in",
        "distance and in that ratio both; contraction, the slope of the log of the two per sublayer, the larger one.",
    ]
    if len(found.sample) > 1:
        over = f"{len(found.sample)} prompts of the text" if found.drawn else f"{len(found.sample)} prompts"
        lines.append(f"Over {over}: shares are means, the other numbers medians.")
    return lines


def _cell(name: str, value: float) -> str:
    if value != value:
        return "-"
    return f"{100 * value:.0f} %" if name == "nearer" else f"{value:.4g}"


def _label(found: Found, row: Row) -> str:
    some = row.prompts < len(found.sample)
    return f"{row.condition}, {row.prompts} of {len(found.sample)} prompts" if some else row.condition


def words(found: Found, plane: Plane) -> list[str]:
    """What the points do beyond standing still, layer by layer, and what the other controls do."""
    rows = {(row.layer, row.condition): row for row in found.rows}
    lines = plane.words()
    for beyond in found.beyond_still:
        shares = {c: rows[beyond.layer, c]["nearer"] for c in found.conditions(beyond.layer)}
        here, still = shares.pop(found.kind), shares.pop(STILL)
        if here != here:
            lines.append(f"Layer {beyond.layer}: nothing follows the injection, so nothing can recover.")
            continue
        others = ", ".join(f"{100 * share:.0f} % with {condition}" for condition, share in shares.items())
        lines.append(
            f"Layer {beyond.layer}: {100 * here:.0f} % of the points end nearer than they were put, and "
            f"{100 * still:.0f} % of points that stay put: {_difference(beyond)}. {_verdict(beyond)} ({others}.)"
        )
    if found.drawn and 0 not in found.drawn:
        lines.append(_of_the_prompt(found))
    lines += said_in_words(found.said)
    ratios = [b for b in found.beyond_still if b.mse_ratio.value.isfinite()]
    if ratios:
        text = ", ".join(f"{_with_ends(b.mse_ratio, '.2f')} at layer {b.layer}" for b in ratios)
        lines.append(f"MSE in the plane (the paper's measure), over that of points that stay put: {text}.")
    return [*lines, *_not_swapped(found)]


def _difference(beyond: BeyondStill) -> str:
    points = Interval(*(100 * end for end in beyond.nearer))
    over = f" over {beyond.prompts} prompts" if beyond.prompts > 1 else ""
    return f"a difference of {_with_ends(points, '+.0f')} percentage points{over}"


def _verdict(beyond: BeyondStill) -> str:
    """What the interval of the difference allows to be said."""
    low, high = float(beyond.nearer.low), float(beyond.nearer.high)
    if not (low == low and high == high):
        return "One prompt says nothing of others."
    if low > 0:
        return "They recover beyond what standing still feigns."
    if high < 0:
        return "Fewer than of points that never move: no recovery."
    return "Not told apart from points that never move."


def _of_the_prompt(found: Found) -> str:
    """The written prompt's own shares, which are not part of the sample."""
    parts = []
    for layer in found.sublayers:
        ours, still = (found.of_prompt(layer, condition, "nearer") for condition in (found.kind, STILL))
        if ours == ours:
            parts.append(f"{100 * ours:.0f} and {100 * still:.0f} % at layer {layer}")
    own = "; ".join(parts) if parts else "nothing follows the injection"
    return f"The first prompt, which is drawn in the figures, alone (points, and points that stay put): {own}."


def _with_ends(found: Interval, form: str) -> str:
    value = f"{float(found.value):{form}}"
    low, high = float(found.low), float(found.high)
    return f"{value} [{low:{form}}, {high:{form}}]" if low == low and high == high else value


def _not_swapped(found: Found) -> list[str]:
    lines = []
    same = {layer: n for layer, n in found.alike.items() if n}
    if same:
        counts = ", ".join(f"{n} at layer {layer}" for layer, n in same.items())
        who, why = ("Tokens", "are") if found.several else ("Sequences", "end in")
        lines.append(
            f"{who} that are in the first prompt's own state already are not swapped in: {counts}. At the first "
            f"sublayer they {why} the same token."
        )
    for layer, condition in found.values:
        n, of = len(found.counted(layer, condition)), len(found.sample)
        if n < of:
            lines.append(
                f"Layer {layer}: {condition} is over {n} of the {of} prompts; for the others no recorded state differs "
                "from their own there."
            )
    return lines


# -- layers ------------------------------------------------------------------------------------------------------------


def effects_answer(found: LayerEffects) -> list[str]:
    """What was found, in at most six sentences: which layers the predictions hang on."""
    return effects_words(found)[:2]


def effects_table(found: LayerEffects, columns: int = 120) -> list[str]:
    """The table for a terminal of so many ``columns``: a row per layer that was skipped, or exchanged with the next."""
    wide = (8, 12, 20, 14, 26) if columns >= 80 else (6, 8, 18, 11, 18)
    lines = [_row(("layer", "KL, nats", "95 %", "perplexity", "95 %"), wide)]
    for effect in found.effects:
        label = f"{effect.layer}" if found.kind == "skip" else f"{effect.layer}, {effect.layer + 1}"
        kl, more = effect.kl, effect.perplexity
        cells = (label, f"{float(kl.value):.4g}", _ends(kl), percent(float(more.value)), _ends(more, percent))
        lines.append(_row(cells, wide))
    return lines


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"{cells[0]:<{len(first)}}" + "".join(others)


def percent(value: float) -> str:
    """A change in per cent, with as many digits as one reads."""
    return f"{value:+,.1f} %" if abs(value) < 100 else f"{value:+,.0f} %"


def _ends(found: Interval, form: Callable[[float], str] = "{:.3g}".format) -> str:
    low, high = float(found.low), float(found.high)
    return f"[{form(low).removesuffix(' %')}, {form(high).removesuffix(' %')}]" if low == low and high == high else "-"


def effects_words(found: LayerEffects) -> list[str]:
    """Which layers the predictions hang on, and which not."""
    effects = found.effects
    what = "left out" if found.kind == "skip" else "exchanged with the next"
    worst = sorted(effects, key=lambda e: -float(e.kl.value))[:3]
    least = min(effects, key=lambda e: float(e.kl.value))
    n_texts, n_tokens = len(found.sample), int(found.n_tokens[found.sample].sum())
    over = f"{n_texts} text{'s' * (n_texts > 1)} of {n_tokens} predicted tokens"
    lines = [
        f"Perplexity of the plain model: {_with_ends(found.perplexity, '.4g')}, over {over}.",
        f"The predictions change most with these {what}: {'; '.join(map(_effect, worst))}. Least: {_effect(least)}.",
    ]
    lines += [_improving(effects, what, n_texts)] if n_texts > 1 else ["One text says nothing of others."]
    middle = [float(e.kl.value) for e in effects if 0 < e.layer < max(e.layer for e in effects)]
    if len(middle) > 1:
        ends = max(float(effects[0].kl.value), float(effects[-1].kl.value))
        middle.sort()
        lines.append(
            f"The layers between the first and the last: median KL {middle[len(middle) // 2]:.3g}, largest "
            f"{middle[-1]:.3g} nats; of the first and the last the larger is {ends:.3g}."
        )
    return lines


def _effect(effect: LayerEffect) -> str:
    change = percent(float(effect.perplexity.value))
    return f"layer {effect.layer} (KL {_with_ends(effect.kl, '.3g')} nats, perplexity {change})"


def _improving(effects: list[LayerEffect], what: str, n_texts: int) -> str:
    """Whether any change makes the texts more probable, beyond chance."""
    better = [e.layer for e in effects if float(e.loss.high) < 0]
    open_ = [e.layer for e in effects if float(e.loss.low) <= 0 <= float(e.loss.high)]
    lower = f"layer{'s' * (len(better) > 1)} {', '.join(map(str, better))}" if better else "no layer"
    text = f"Perplexity falls, with an interval over {n_texts} texts below 0, when {lower} is {what}"
    return text + (f"; it is not told from unchanged for {', '.join(map(str, open_))}." if open_ else ".")
