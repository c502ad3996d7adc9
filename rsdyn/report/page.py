"""The page itself: sections in the order of the paper, one file that asks nothing of the network.

Everything that comes from a run's files is escaped; the scripts of the page are allowed by their hashes alone, so that
nothing else on it could run.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import rsdyn
from rsdyn.errors import UserError
from rsdyn.figures.colours import DARK, LIGHT
from rsdyn.files import plain
from rsdyn.report import what_ran
from rsdyn.report.figure1 import figure1
from rsdyn.report.figure2 import figure2
from rsdyn.report.figure3 import figure3
from rsdyn.report.figure4 import figure4
from rsdyn.report.figure4d import effects_table, figure4d, layer_effects, table
from rsdyn.report.jacobians import jacobians
from rsdyn.report.panels import html_table, notes, panel
from rsdyn.report.plots import Plot, counted, number
from rsdyn.report.reading import RunFiles
from rsdyn.report.streams import Stream, streams_of

SCRIPTS = ("data.js", "widgets.js", "controls.js")  # one after the other, in one scope
HOW = (
    "Touch a name in a legend to switch its line off or on, drag over a figure to look closer, and double-click to "
    "come back. Under each figure stands what is drawn, what to read it for, and what not."
)
ARXIV = "Fernando & Guitchounts 2025, arXiv 2502.12131"


@dataclass
class Page:
    """The parts of the page, as they are put together."""

    title: str
    sections: list[tuple[str, str, str]] = field(default_factory=list)  # identifier, heading, HTML
    plots: list[Plot] = field(default_factory=list)
    shared: dict[str, Any] = field(default_factory=dict)

    def add(self, identifier: str, heading: str, html: str) -> None:
        self.sections.append((identifier, heading, html))

    def panels(self, plots: Sequence[Plot]) -> str:
        self.plots += plots
        return '<div class="panels">' + "".join(map(panel, plots)) + "</div>"


def make_page(runs: Sequence[RunFiles], title: str | None = None) -> str:
    """The whole page of some runs, as HTML."""
    models = list(dict.fromkeys(run.model for run in runs))
    page = Page(title or f"Transformer dynamics of {' and '.join(models)}")
    streams = streams_of(runs)
    page.add("what", "What was run", what_ran.section(runs))
    if any(run.summary["findings"] for run in runs if run.script == "analyze"):
        page.add("findings", "Findings", what_ran.findings(runs))
    if plots := figure1(streams):
        page.add("figure-1", "Figure 1: the stream over depth", notes([HOW]) + page.panels(plots))
    plots, shared = figure2(streams)
    if plots:
        page.shared |= shared
        page.add("figure-2", "Figure 2: turns of units", page.panels(plots))
    _training(page, runs, streams)
    if plots := figure4(streams):
        page.add("figure-4", "Figure 4A–C: principal components", page.panels(plots))
    _perturbation(page, runs)
    if some := [run for run in runs if "jacobian" in run.summary]:
        page.add("jacobians", "Jacobians over depth", _several(some, lambda run, key: jacobians(run)))
    return _html(page, runs)


def _sites(run: RunFiles, runs: Sequence[RunFiles]) -> int | None:
    """Sites of a layer, from the run or from another of its model."""
    return next((r.sites_per_layer for r in (run, *runs) if r.model == run.model and r.sites_per_layer), None)


def _several(runs: Sequence[RunFiles], make: Callable[[RunFiles, str], str]) -> str:
    """A part a run, headed by its name when there are several."""
    parts = []
    for i, run in enumerate(runs):
        head = f"<h3>{escape(run.name)} <small>{escape(run.model)}</small></h3>" if len(runs) > 1 else ""
        parts.append(head + make(run, str(i)))
    return "".join(parts)


def _training(page: Page, runs: Sequence[RunFiles], streams: Sequence[Stream]) -> None:
    some = [run for run in runs if run.script == "train"]
    if not some:
        return

    def make(run: RunFiles, key: str) -> str:
        beside = [s for s in streams if s.run.model == run.model]
        return _training_table(run) + page.panels(figure3(run, beside, _sites(run, runs), key))

    page.add("figure-3", "Figure 3: the compressing autoencoder", _several(some, make))


def _training_table(run: RunFiles) -> str:
    test, summary = run.summary["test"], run.summary
    n_latent = summary["widths"][-1]
    rows = [("test MSE, raw activations", "test_mse", "test_mse_pca"),
            ("explained variance, raw activations", "r2_cae_raw", "r2_pca_raw")]  # fmt: skip
    if summary.get("standardise", "none") != "none":
        rows.append((f"explained variance, standardised ({summary['standardise']})", "r2_cae", "r2_pca"))
    n_massive = len(test.get("massive_units", []))
    if n_massive:
        rows.append(
            (f"without the {counted(n_massive, 'massive unit')}", "r2_without_massive_cae", "r2_without_massive_pca")
        )
    body = [[label, number(test.get(a), 4), number(test.get(b), 4)] for label, a, b in rows]
    sizes = summary["n_sequences"]
    lines = [
        f"Widths {' '.join(map(str, summary['widths']))} and back; {sizes['train']:,} training, {sizes['val']:,} "
        f"validation and {sizes['test']:,} test sequences. An autoencoder that PCA with as many components beats has "
        "not learnt the manifold."
    ]
    if test.get("collapsed"):
        lines.append("The autoencoder collapsed: its latents barely move, or it is no better than the mean.")
    return html_table(["of the test sequences", "autoencoder", f"PCA, {n_latent} components"], body) + notes(lines)


def _perturbation(page: Page, runs: Sequence[RunFiles]) -> None:
    some = [run for run in runs if run.script == "perturb"]
    if not some:
        return

    def make(run: RunFiles, key: str) -> str:
        if run.changed_layers:
            told = notes(run.summary.get("in_words", []))
            return page.panels(layer_effects(run, key)) + html_table(*effects_table(run)) + told
        plots, shared = figure4d(run, key)
        page.shared.update(shared)
        heads, rows = table(run)
        note = (
            "rel. is the distance over the reference's norm, as put and at the end; nearer, the points that end "
            "nearer than they were put in distance and in that ratio both; contraction, the slope of the log of the "
            "two per sublayer, the larger one: below 0 is contraction. Over several prompts, shares are means and the "
            "other numbers medians."
        )
        return page.panels(plots) + html_table(heads, rows) + notes([note, *run.summary.get("in_words", [])])

    page.add("figure-4d", "Figure 4D: perturbation and recovery", _several(some, make))


# --- the file ---------------------------------------------------------------------------------------------------------


def in_script(data: Any) -> str:
    """JSON that can stand in a script element: no ``<``, so that it cannot end it."""
    text = json.dumps(plain(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _resource(name: str) -> str:
    return (files("rsdyn.report") / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() + "'"


def _plotly() -> str:
    """Plotly's own file of the installed version, as text."""
    from plotly.offline import get_plotlyjs

    # the page's parser reads the script's text with its line ends made one
    return get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")


def colours() -> str:
    """The figures' colours as custom properties, for the light page and the dark one."""

    def properties(theme: dict[str, str]) -> str:
        return "".join(f"--{name}:{value};" for name, value in theme.items())

    return (
        f":root{{color-scheme:light dark;{properties(LIGHT)}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{properties(DARK)}}}}}"
        f":root[data-printing]{{{properties(LIGHT)}}}"
    )


def _html(page: Page, runs: Sequence[RunFiles]) -> str:
    plotly = _plotly()
    code = '"use strict";(() => {\n' + "".join(map(_resource, SCRIPTS)) + "})();"
    packed = base64.b64encode(gzip.compress(plotly.encode(), 9, mtime=0)).decode()
    data = {
        "plots": {
            plot.name: {
                "traces": plot.traces, "layout": plot.layout, "widget": plot.widget, "source": plot.source,
                "controls": [c.name for c in plot.controls],
            }
            for plot in page.plots
        },
        "shared": page.shared,
        "values": {c.name: c.value for plot in page.plots for c in plot.controls},
    }  # fmt: skip
    policy = (
        f"default-src 'none'; script-src {_hash(code)} {_hash(plotly)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    contents = "".join(f'<li><a href="#{i}">{escape(heading)}</a></li>' for i, heading, _ in page.sections)
    sections = "".join(
        f'<section id="{i}"><h2>{escape(heading)}</h2>{body}</section>' for i, heading, body in page.sections
    )
    of = f"{counted(len(runs), 'run')} of rsdyn {escape(rsdyn.__version__)}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(page.title)}</title><style>{colours()}{_resource('page.css')}</style></head>\n"
        f"<body><header><h1>{escape(page.title)}</h1><p>{of}, measured after {escape(ARXIV)}.</p></header>"
        f'<div class="columns"><nav aria-label="Contents"><ol>{contents}</ol></nav><main>'
        '<noscript><p class="note">The figures of this page are drawn by a script that is in it. Without scripts, '
        "see the pictures in the runs' own figures folders.</p></noscript>"
        f'<p id="trouble" class="note" hidden></p>{sections}</main></div>\n'
        f'<script type="application/json" id="data">{in_script(data)}</script>\n'
        f'<script type="text/plain" id="plotly">{packed}</script>\n'
        f"<script>{code}</script></body></html>\n"
    )


def write_page(html: str, out: str | Path) -> Path:
    """Write the page whole or not at all; UserError when it cannot be written there."""
    from rsdyn.files import write_text

    path = Path(out).expanduser()
    if os.path.isdir(path):  # False, where Path.is_dir raises, for a name that is too long
        raise UserError(f"-o {out} is a folder: name a file in it, as in -o {path / 'report.html'}.")
    if not os.path.isdir(path.parent):
        raise UserError(f"-o {out}: there is no folder {path.parent}. Make it first, or write elsewhere.")
    try:
        write_text(path, html)
    except OSError as error:
        raise UserError(
            f"-o {out}: the page cannot be written there ({error.strerror or error}). Choose a file that you may write."
        ) from error
    return path
