"""A page of panels alone, as figures describe them: sections of HTML, panels among them, in one file."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import rsdyn
from rsdyn.figures import interactive
from rsdyn.figures.panel import Panel
from rsdyn.report.page import ARXIV, SCRIPTS, _hash, _plotly, _resource, colours, in_script


@dataclass
class Page:
    """The parts of the page, as they are put together."""

    title: str
    sections: list[tuple[str, str, str]] = field(default_factory=list)  # identifier, heading, HTML
    plots: list[Panel] = field(default_factory=list)

    def add(self, identifier: str, heading: str, html: str) -> None:
        self.sections.append((identifier, heading, html))

    def panels(self, plots: Sequence[Panel]) -> str:
        self.plots += plots
        return '<div class="panels">' + "".join(map(_panel, plots)) + "</div>"


def _panel(one: Panel) -> str:
    drawn, read_for, not_for = (escape(part) for part in one.caption)
    bands = f" Bands: {escape(one.bands)}." if one.bands else ""
    save = f'<button type="button" class="save" data-save="{escape(one.key)}" title="save as SVG">SVG</button>'
    return (
        f'<figure class="panel" id="{escape(one.key)}"><h4><span><i>{escape(one.title)}</i></span>{save}</h4>'
        '<p class="said" aria-live="polite"></p>'
        f'<div class="plot" data-plot="{escape(one.key)}" role="img" aria-label="{escape(one.alt)}"></div>'
        f"<figcaption><p>{drawn}{bands}</p><p><b>Read it for</b> {read_for}</p><p><b>Not for</b> "
        f"{not_for}</p></figcaption></figure>"
    )


def whole_page(page: Page, of: str) -> str:
    """The file: styles, sections, the numbers of the panels, and the scripts that draw them."""
    plotly = _plotly()
    code = '"use strict";(() => {\n' + "".join(map(_resource, SCRIPTS)) + "})();"
    packed = base64.b64encode(gzip.compress(plotly.encode(), 9, mtime=0)).decode()
    data = {"plots": {plot.key: interactive.for_page(plot) | {"widget": None, "source": None} for plot in page.plots},
            "shared": {}, "values": {}}  # fmt: skip
    policy = (
        f"default-src 'none'; script-src {_hash(code)} {_hash(plotly)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    contents = "".join(f'<li><a href="#{i}">{escape(heading)}</a></li>' for i, heading, _ in page.sections)
    sections = "".join(
        f'<section id="{i}"><h2>{escape(heading)}</h2>{body}</section>' for i, heading, body in page.sections
    )
    told = f"{escape(of)}, rsdyn {escape(rsdyn.__version__)}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(page.title)}</title><style>{colours()}{_resource('page.css')}</style></head>\n"
        f"<body><header><h1>{escape(page.title)}</h1><p>{told}, measured after {escape(ARXIV)}.</p></header>"
        f'<div class="columns"><nav aria-label="Contents"><ol>{contents}</ol></nav><main>'
        '<noscript><p class="note">The figures of this page are drawn by a script that is in it. Without scripts, '
        "see the pictures in the figures folder beside it.</p></noscript>"
        f'<p id="trouble" class="note" hidden></p>{sections}</main></div>\n'
        f'<script type="application/json" id="data">{in_script(data)}</script>\n'
        f'<script type="text/plain" id="plotly">{packed}</script>\n'
        f"<script>{code}</script></body></html>\n"
    )
