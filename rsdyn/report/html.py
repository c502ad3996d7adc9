"""The pieces of HTML that the page is made of: panels with their controls, tables, notes; every text is escaped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from rsdyn.figures.panel import Control, Panel


def panel(one: Panel) -> str:
    """A panel's place on the page: heading, controls, what is said, the plot, and the caption in three parts."""
    drawn, read_for, not_for = (escape(part) for part in one.caption)
    bands = f" Bands: {escape(one.bands)}." if one.bands else ""
    controls = "".join(map(_control, one.controls))
    kind = "panel wide" if one.wide else "panel"
    return (
        f'<figure class="{kind}" id="{escape(one.key)}"><h4>{_title(one)}</h4>'
        + (f'<div class="controls">{controls}</div>' if controls else "")
        + '<p class="said" aria-live="polite"></p>'
        f'<div class="plot" data-plot="{escape(one.key)}" role="img" aria-label="{escape(one.alt)}"></div>'
        f"<figcaption><p>{drawn}{bands}</p><p><b>Read it for</b> {read_for}</p><p><b>Not for</b> "
        f"{not_for}</p></figcaption></figure>"
    )


def _title(one: Panel) -> str:
    label = f"Fig. {one.figure}" if one.figure else ""
    save = f'<button type="button" class="save" data-save="{escape(one.key)}" title="save as SVG">SVG</button>'
    return f"<span>{escape(label)} <i>{escape(one.title)}</i></span>{save}"


def _control(control: Control) -> str:
    name, label = escape(control.name), escape(control.label)
    values = escape(json.dumps([value for value, _ in control.options]))
    if control.kind == "menu":
        options = "".join(
            f'<option value="{escape(value)}"{" selected" if value == control.value else ""}>{escape(text)}</option>'
            for value, text in control.options
        )
        return f'<label>{label} <select data-control="{name}">{options}</select></label>'
    if control.kind == "steps":
        at = [value for value, _ in control.options].index(control.value)
        shows, now = escape(json.dumps(dict(control.options))), escape(control.label_of(control.value))
        return (
            f'<label>{label} <output data-shows="{name}" data-labels="{shows}">{now}</output>'
            f'<input type="range" min="0" max="{len(control.options) - 1}" value="{at}" data-control="{name}" '
            f'data-values="{values}"></label>'
        )
    return (
        f'<label>{label} <input type="number" min="0" step="1" value="{escape(control.value)}" data-control="{name}" '
        f'data-values="{values}"></label><span class="steps"><button type="button" data-step="-1" data-of="{name}">'
        f'fewer turns</button><button type="button" data-step="1" data-of="{name}">more turns</button></span>'
    )


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
    """Lines as notes of the page."""
    return "".join(f'<p class="note">{escape(line)}</p>' for line in lines)
