"""The page's section on Jacobians over depth: the claims of arXiv 2605.14258, what must be known, and the figures."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

from rsdyn.analysis.finding import Value
from rsdyn.report.panels import html_table, notes
from rsdyn.report.reading import RunFiles

# a figure's file -> what it shows; drawn by figures/jacobians.py
FIGURES = {
    "jacobian_eigenvalues": "Eigenvalues of one text's Jacobians in the plane, beside those of the nulls.",
    "jacobian_antisymmetric": "Antisymmetric share of the update: 1 is a rotation, 0 symmetric, one half chance.",
    "jacobian_henrici": "Departure from normality of J.",
    "jacobian_henrici_update": "Departure from normality of the update G = J - I.",
    "jacobian_complex_share": "Share of complex eigenvalues.",
    "jacobian_gain": "Largest singular value of each sublayer.",
    "jacobian_expanding": "Share of directions that grow in each sublayer.",
    "jacobian_exponents": "Lyapunov exponents of the whole depth.",
    "jacobian_exponents_relative": "The same less the growth of the norm: below 0 a direction is lost against it.",
    "jacobian_participation": "How many directions carry the product from each sublayer to the end.",
    "jacobian_linear_range": "What a displacement does over what the Jacobian predicts, against its size.",
}


def jacobians(run: RunFiles) -> str:
    """The section of one run that has the measure, as HTML."""
    found = run.summary["jacobian"]
    series: dict[str, str] = found["series"]
    rows, claim = [], ""
    for row in found["claims"]:
        claim = row["claim"] or claim
        values = [_value(row["values"].get(s)) for s in series]
        held = row["verdict"] + (f" {row['bound']}" if row["bound"] else "")
        rows.append([f"{claim}: {row['statistic']}", row["paper"], *values, held])
    head = ["claim of arXiv 2605.14258: measured here", "paper", *series.values(), "verdict, if"]
    pictures = "".join(_picture(run, name, words) for name, words in FIGURES.items())
    table = html_table(head, rows) + _sink(found.get("sink"))
    return table + notes(found.get("in_words", [])) + f'<div class="panels">{pictures}</div>'


def _sink(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    head = [f"does the sink own the gain? {found['texts']} texts", "ln of the largest gain", "participation"]
    rows = [[row["label"], _value(row["log_gain"]), _value(row["participation"])] for row in found["rows"]]
    return html_table(head, rows)


def _value(value: dict[str, float | None] | None) -> str:
    if value is None or value["value"] is None:
        return "not defined"
    return str(Value(value["value"], value["low"], value["high"]))


def _picture(run: RunFiles, name: str, words: str) -> str:
    path = run.folder / "figures" / f"{name}.png"
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(words)}" style="max-width:100%">'
    return f"<figure>{image}<figcaption>{escape(words)}</figcaption></figure>"
