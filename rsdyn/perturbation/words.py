"""What a perturbation found, as a table for a terminal and in words."""

from __future__ import annotations

from typing import Any

from rsdyn.labels import COLUMNS
from rsdyn.perturbation.linear import in_words
from rsdyn.perturbation.measure import Found


def closing_table(found: Found) -> list[str]:
    """The table for a terminal."""
    widths = {name: max(11, len(head) + 2) for name, head in COLUMNS.items()}
    rows = found.rows()
    labels = [_label(found, row) for row in rows]
    wide = max(19, *(len(label) + 1 for label in labels))
    lines = [f"{'layer':<6}{'':<{wide}}" + "".join(f"{head:>{widths[name]}}" for name, head in COLUMNS.items())]
    for row, label in zip(rows, labels, strict=True):
        first = row["condition"] == found.conditions(row["layer"])[0]
        cells = ""
        for name, width in widths.items():
            text = f"{100 * row[name]:.0f} %" if name == "nearer" else f"{row[name]:.4g}"
            cells += f"{'-' if row[name] != row[name] else text:>{width}}"
        lines.append(f"{row['layer'] if first else '':<6}{label:<{wide}}{cells}")
    return [
        *lines,
        "",
        "rel. is the distance over the reference's norm; nearer, the points that end nearer than they were put, in",
        "distance and in that ratio both; contraction, the slope of the log of the two a sublayer, the larger one.",
    ]


def _label(found: Found, row: dict[str, Any]) -> str:
    some = row["n_prompts"] < found.n_prompts
    return f"{row['condition']}, {row['n_prompts']} of {found.n_prompts} prompts" if some else row["condition"]


def words(found: Found, settings: Any) -> list[str]:
    """What the controls say, layer by layer."""
    lines = []
    for layer in found.sublayers:
        shares = {c: 100 * float(found.mean(layer, c, "nearer")) for c in found.conditions(layer)}
        if shares[settings.kind] != shares[settings.kind]:
            lines.append(f"Layer {layer}: nothing follows the injection, so nothing can recover.")
            continue
        controls = ", ".join(f"{share:.0f} % with {c}" for c, share in shares.items() if c != settings.kind)
        here = shares[settings.kind]
        lines.append(
            f"Layer {layer}: {here:.0f} % of the points end nearer than they were put, in distance and in ratio; "
            f"{controls}."
        )
    for layer, linear in found.linear.items():
        lines.append(in_words(layer, linear, float(found.mean(layer, settings.kind, "contraction"))))
    same = {layer: n for layer, n in found.alike.items() if n}
    if same:
        counts = ", ".join(f"{n} at layer {layer}" for layer, n in same.items())
        who, why = ("Tokens", "are") if found.several else ("Sequences", "end in")
        lines.append(
            f"{who} that are in the prompt's own state already are not swapped in: {counts}. At the first sublayer "
            f"they {why} the same token."
        )
    for layer, condition in found.values:
        n = len(found.prompts[layer, condition])
        if n < found.n_prompts:
            lines.append(
                f"Layer {layer}: {condition} is the mean of {n} of the {found.n_prompts} prompts; for the others no "
                "recorded state differs from their own there."
            )
    return lines
