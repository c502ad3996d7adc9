"""What single sequences say sublayer by sublayer, as tables that one can open and scroll."""

from __future__ import annotations

from html import escape

from rsdyn.analysis.results import Example, ReadoutResults
from rsdyn.figures.over_depth import sublayer_names
from rsdyn.figures.panel import array
from rsdyn.report.html import html_table
from rsdyn.report.reading import RunFiles


def examples(run: RunFiles) -> str:
    """The likeliest tokens at each sublayer of some sequences of a run's main stream; empty where none were kept."""
    results = run.results
    found = results.main.readout
    if found is None or not found.examples:
        return ""
    names = (*sublayer_names(results.n_sublayers, results.sites_per_layer), "the end")
    tables = [_table(number, one, names, opened=i == 0) for i, (number, one) in enumerate(found.examples.items())]
    return f"<p>{escape(run.model)}: {escape(_about(found))}</p>" + "".join(tables)


def _about(found: ReadoutResults) -> str:
    return (
        f"the likeliest next tokens behind three quarters of a sequence, read through the {found.lens}, with their "
        "probabilities; the last row is the model's own answer."
    )


def _table(number: str, one: Example, names: tuple[str, ...], *, opened: bool) -> str:
    probability = array(one.probability)
    k = probability.shape[1]
    rows = []
    for s, name in enumerate(names):
        cells = [
            f"{_shown(token)} {100 * p:.1f} %" if p == p else ""
            for token, p in zip(one.tokens[s * k : (s + 1) * k], probability[s], strict=True)
        ]
        rows.append([name, *cells])
    head = ["read at", "likeliest", *(f"{i}." for i in range(2, k + 1))]
    told = f"sequence {number}: … {one.text[-80:]} → {_shown(one.follows)} in the text"
    body = f'<div class="readout">{html_table(head, rows)}</div>'
    return f"<details{' open' if opened else ''}><summary>{escape(told)}</summary>{body}</details>"


def _shown(token: str) -> str:
    """A token in quotation marks, with what cannot be seen made visible."""
    return "“" + token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") + "”"
