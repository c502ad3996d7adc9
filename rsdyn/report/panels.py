"""The pieces of HTML that the page is made of: panels with their controls, tables, notes; every text is escaped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from rsdyn.report.plots import Control, Plot


def panel(plot: Plot) -> str:
    drawn, may, may_not = (escape(part) for part in plot.caption)
    controls = "".join(map(_control, plot.controls))
    kind = "panel wide" if plot.wide else "panel"
    return (
        f'<figure class="{kind}" id="{escape(plot.name)}"><h4>{_title(plot)}</h4>'
        + (f'<div class="controls">{controls}</div>' if controls else "")
        + '<p class="said" aria-live="polite"></p>'
        f'<div class="plot" data-plot="{escape(plot.name)}" role="img" aria-label="{escape(plot.alt)}"></div>'
        f"<figcaption><p>{drawn}</p><p><b>Read it for</b> {may}</p><p><b>Not for</b> "
        f"{may_not}</p></figcaption></figure>"
    )


def _title(plot: Plot) -> str:
    label, _, rest = plot.title.partition("  ")
    save = f'<button type="button" class="save" data-save="{escape(plot.name)}" title="save as SVG">SVG</button>'
    return f"<span>{escape(label)} <i>{escape(rest)}</i></span>{save}"


def _control(control: Control) -> str:
    name, label = escape(control.name), escape(control.label)
    if control.kind == "select":
        options = "".join(
            f'<option value="{escape(value)}"{" selected" if value == control.value else ""}>{escape(text)}</option>'
            for value, text in control.options
        )
        return f'<label>{label} <select data-control="{name}">{options}</select></label>'
    if control.kind == "slider":
        values = [value for value, _ in control.options]
        at = values.index(control.value)
        return (
            f'<label>{label} <output data-shows="{name}">{escape(control.value)}</output>'
            f'<input type="range" min="0" max="{len(values) - 1}" value="{at}" data-control="{name}" '
            f'data-values="{escape(json.dumps(values))}"></label>'
        )
    if control.kind == "switch":
        on, off = (value for value, _ in control.options)
        return (
            f'<label><input type="checkbox" checked data-control="{name}" data-on="{escape(on)}" '
            f'data-off="{escape(off)}">'
            f" {label}</label>"
        )
    if control.kind == "unit":
        return (
            f'<label>{label} <input type="number" min="0" step="1" value="{escape(control.value)}" '
            f'data-control="{name}">'
            f'</label><span class="steps"><button type="button" data-step="-1" data-of="{name}">fewer turns</button>'
            f'<button type="button" data-step="1" data-of="{name}">more turns</button></span>'
        )
    raise ValueError(f"kind is {control.kind!r}, but must be select, slider, switch or unit.")


def html_table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    """A table that becomes a list of labelled values on a narrow page."""
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(
            f'<td data-label="{escape(head)}">{escape(cell)}</td>'
            for head, cell in zip(heads[1:], row[1:], strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def notes(lines: Sequence[str]) -> str:
    return "".join(f'<p class="note">{escape(line)}</p>' for line in lines)
