"""The page itself: what was found first, then the figures in the order of the paper, and what was run at the foot.

It is one file that asks nothing of the network. Everything that comes from a run's files is escaped; the scripts of
the page are allowed by their hashes alone, so that nothing else on it could run.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import rsdyn
from rsdyn.analysis.left_out import without_largest_of
from rsdyn.analysis.results import Measured
from rsdyn.analysis.unit_surrogates import AGAIN, TurnHistograms, turn_histograms
from rsdyn.figures import interactive
from rsdyn.figures.analysis import analysis_panels
from rsdyn.figures.autoencoder import training_panels
from rsdyn.figures.colours import DARK, LIGHT
from rsdyn.figures.groups import SECTION
from rsdyn.figures.jacobians import jacobian_panels
from rsdyn.figures.panel import Panel, array, brief, counted
from rsdyn.figures.perturbation import effect_panels, perturbation_panels
from rsdyn.figures.rotations import histogram_units
from rsdyn.figures.streams import Analysis, streams_of
from rsdyn.files import output_file, plain, write_text, writing
from rsdyn.labels import COLUMNS
from rsdyn.perturbation.linear import HEADS, NOTE, LinearRange, linear_cells
from rsdyn.perturbation.result import Found
from rsdyn.perturbation.words import percent
from rsdyn.report import readout, what_ran
from rsdyn.report.html import html_table, notes, panel
from rsdyn.report.reading import RunFiles

SCRIPTS = ("data.js", "choosing.js", "controls.js")  # one after the other, in one scope
HOW = (
    "Touch a name in a legend to switch its line off or on, drag over a figure to look closer, and double-click to "
    "come back. Under each figure stands what is drawn, what to read it for, and what not."
)
ARXIV = "Fernando & Guitchounts 2025, arXiv 2502.12131"
SECTIONS = {
    "1": ("figure-1", "Figure 1: the stream over depth"),
    "2": ("figure-2", "Figure 2: turns of units"),
    "4": ("figure-4", "Figure 4A–C: principal components"),
}  # fmt: skip


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
        return '<div class="panels">' + "".join(map(panel, plots)) + "</div>"


def make_page(runs: Sequence[RunFiles], title: str | None = None) -> str:
    """The whole page of some runs, as HTML."""
    models = list(dict.fromkeys(run.model for run in runs))
    page = Page(title or f"Transformer dynamics of {' and '.join(models)}")
    if answer := what_ran.answers(runs):
        page.add("answer", "What was found", answer)
    if any(run.summary["findings"] for run in runs if run.script == "analyze"):
        page.add("findings", "Findings", what_ran.findings(runs))
    measured = [run for run in runs if run.measured]
    drawn = _analyses(measured)
    by_group = [one for one in drawn if one.section == SECTION]
    if tables := what_ran.by_group(measured):
        page.add("groups", "By group", tables + page.panels(by_group))
    drawn = [one for one in drawn if one not in by_group]
    for part in ("1", "2"):
        _figure(page, drawn, part)
    _training(page, runs, measured)
    _figure(page, drawn, "4")
    if shape := [one for one in drawn if not one.figure]:  # of no figure of the paper
        page.add("shape", "Readout and shape over depth", page.panels(shape))
    if any(said := [readout.examples(run) for run in measured]):
        page.add("readout", "What the stream says", "".join(said))
    _perturbation(page, runs)
    if some := [run for run in runs if "jacobian" in run.summary]:
        page.add("jacobians", "Jacobians over depth", _several(some, lambda run, key: _jacobians(page, run, key)))
    page.add("what", "What was run", what_ran.section(runs))
    return whole_page(page, counted(len(runs), "run"))


def _figure(page: Page, drawn: Sequence[Panel], part: str) -> None:
    if plots := [one for one in drawn if one.figure.startswith(part)]:
        identifier, heading = SECTIONS[part]
        page.add(identifier, heading, notes([HOW] * (part == "1")) + page.panels(plots))


def _analyses(runs: Sequence[RunFiles]) -> list[Panel]:
    if not runs:
        return []
    streams = streams_of([Analysis(run.results, run.model, run.name, int(run.summary["n_sequences"])) for run in runs])
    first = runs[0]
    largest = without_largest_of(first.summary.get("without_largest")) if len(runs) == 1 else None
    return analysis_panels(streams, largest=largest, seed=first.seed, histograms=histograms(first))


def histograms(run: RunFiles) -> dict[str, TurnHistograms]:
    """Turns of the surrogates of the units of a run's first stream, under the nulls that are quickly drawn again."""
    rotation = run.results.main.rotation
    if rotation is None:
        return {}
    settings, units = run.rotation_settings, histogram_units(array(rotation.turns))
    return {
        null: turn_histograms(
            rotation.trajectory, null, units, settings, sites_per_layer=run.results.sites_per_layer, seed=run.seed
        )
        for null in AGAIN
        if null in rotation.nulls
    }


def _several(runs: Sequence[RunFiles], make: Callable[[RunFiles, str], str]) -> str:
    """A part a run, headed by its name when there are several, whose panels' keys then end in a number."""
    parts = []
    for i, run in enumerate(runs):
        head = f"<h3>{escape(run.name)} <small>{escape(run.model)}</small></h3>" if len(runs) > 1 else ""
        parts.append(head + make(run, f"-{i}" if len(runs) > 1 else ""))
    return "".join(parts)


def _named(panels: Sequence[Panel], key: str) -> list[Panel]:
    return [one.with_key(key) for one in panels] if key else list(panels)


# -- training ----------------------------------------------------------------------------------------------------------


def _training(page: Page, runs: Sequence[RunFiles], analyses: Sequence[RunFiles]) -> None:
    some = [run for run in runs if run.script == "train"]
    if not some:
        return

    def make(run: RunFiles, key: str) -> str:
        beside: dict[str, Measured] = {}
        for other in analyses:
            found = other.results.conditions.get(str(run.summary["condition"]))
            if other.model == run.model and found and found.pca and found.pca.over_depth and not beside:
                n = len(found.pca.ratio.value)
                beside[f"PCA, {n} components (analysis)"] = found.pca.over_depth.explained
        return _training_table(run) + page.panels(_named(training_panels(run.trained, beside), key))

    page.add("figure-3", "Figure 3: the compressing autoencoder", _several(some, make))


def _training_table(run: RunFiles) -> str:
    test, summary = run.summary["test"], run.summary
    n_latent = summary["widths"][-1]
    rows = [("test MSE, raw activations", "test_mse", "test_mse_pca"),
            ("explained variance, raw activations", "r2_cae_raw", "r2_pca_raw")]  # fmt: skip
    if summary.get("standardise", "none") != "none":
        rows.append((f"explained variance, standardised ({summary['standardise']})", "r2_cae", "r2_pca"))
    if n_latent > 1 and "r2_line" in test:
        rows.append(("the same with the latents put on their longest axis", "r2_line", ""))
    n_massive = len(test.get("massive_units", []))
    if n_massive:
        rows.append(
            (f"without the {counted(n_massive, 'massive unit')}", "r2_without_massive_cae", "r2_without_massive_pca")
        )
    if n_latent > 1 and "latent_participation" in test:
        rows.append((f"dimensions that the latents fill, of {n_latent}", "latent_participation",
                     "latent_participation_pca"))  # fmt: skip
    body = [[label, brief(test.get(a), 4), brief(test.get(b), 4)] for label, a, b in rows]
    sizes = summary["n_sequences"]
    lines = [
        f"Widths {' '.join(map(str, summary['widths']))} and back; {sizes['train']:,} training, {sizes['val']:,} "
        f"validation and {sizes['test']:,} test sequences. An autoencoder that PCA with as many components beats has "
        "not learnt the manifold."
    ]
    if test.get("collapsed"):
        reasons = test.get("collapse") or ["its latents barely move, or it is no better than the mean"]
        lines.append(f"The autoencoder collapsed: {', and '.join(reasons)}.")
    return html_table(["of the test sequences", "autoencoder", f"PCA, {n_latent} components"], body) + notes(lines)


# -- perturbation ------------------------------------------------------------------------------------------------------

NEARER = (
    "rel. is the distance over the reference's norm, as put and at the end; nearer, the points that end nearer than "
    "they were put in distance and in that ratio both; contraction, the slope of the log of the two per sublayer, the "
    "larger one: below 0 is contraction. Over several prompts, shares are means and the other numbers medians."
)


def _perturbation(page: Page, runs: Sequence[RunFiles]) -> None:
    some = [run for run in runs if run.script == "perturb"]
    if not some:
        return

    def make(run: RunFiles, key: str) -> str:
        told = run.summary.get("in_words", [])
        if run.changed_layers:
            return page.panels(_named(effect_panels(run.effects), key)) + _effects_table(run) + notes(told)
        settings, found = run.config.get("perturb") or {}, run.points
        how = {name: run.summary[name] for name in ("site", "position", "off_plane") if name in run.summary}
        name = "latent" if run.summary.get("space") == "cae" else "component"
        plots = perturbation_panels(found, steps=int(settings.get("steps", 12)), name=name, **how)
        return page.panels(_named(plots, key)) + _points_table(found) + notes([NEARER, *told]) + _linear_table(run)

    page.add("figure-4d", "Figure 4D: perturbation and recovery", _several(some, make))


def _linear_table(run: RunFiles) -> str:
    """How far outside the linear range each layer's points lie, and what the Jacobian predicts; empty without it."""
    rows = []
    for layer, found in (run.summary.get("linear_range") or {}).items():
        numbers = {name: float("nan") if value is None else float(value) for name, value in found.items()}
        numbers["outside"] = float(found["outside"] or "inf")  # JSON has no infinity
        linear = LinearRange(*(numbers[name] for name in LinearRange._fields))
        rows.append([f"layer {layer}", *linear_cells(linear, numbers["measured"])])
    return html_table(["layer, points", *HEADS], rows) + notes([NOTE]) if rows else ""


def _points_table(found: Found) -> str:
    """One row per layer and condition, as the closing table has them."""
    rows = []
    for row in found.rows:
        cells = []
        for name in COLUMNS:
            value, low, high = map(float, row.values[name])
            form = (lambda v: f"{100 * v:.0f} %") if name == "nearer" else brief
            ends = f" [{form(low).removesuffix(' %')}, {form(high).removesuffix(' %')}]" if low == low else ""
            cells.append(("not defined" if value != value else form(value)) + ends)
        some = f", {row.prompts} of {len(found.sample)} prompts" if row.prompts < len(found.sample) else ""
        rows.append([f"layer {row.layer}, {row.condition}{some}", *cells])
    return html_table(["layer, what was put in", *COLUMNS.values()], rows)


def _effects_table(run: RunFiles) -> str:
    rows = []
    for effect in run.effects.effects:
        cells = []
        for one, form in ((effect.kl, brief), (effect.perplexity, percent)):
            value, low, high = map(float, one)
            cells += ["–" if value != value else form(value), f"[{form(low)}, {form(high)}]" if low == low else "–"]
        rows.append([str(effect.layer), *cells])
    return html_table(["layer", "KL, nats", "95 %", "perplexity", "95 %"], rows)


# -- Jacobians ---------------------------------------------------------------------------------------------------------


def _jacobians(page: Page, run: RunFiles, key: str) -> str:
    """The claims of arXiv 2605.14258, what must be known, and the figures."""
    found: Mapping[str, Any] = run.summary["jacobian"]
    series: dict[str, str] = found["series"]
    rows, claim = [], ""
    for row in found["claims"]:
        claim = row["claim"] or claim
        values = [_claimed(row["values"].get(s)) for s in series]
        held = row["verdict"] + (f" {row['bound']}" if row["bound"] else "")
        rows.append([f"{claim}: {row['statistic']}", row["paper"], *values, held])
    head = ["claim of arXiv 2605.14258: measured here", "paper", *series.values(), "verdict, if"]
    plots = _named(jacobian_panels(run.jacobians), key)
    table = html_table(head, rows) + _sink(found.get("sink"))
    return table + notes(found.get("in_words", [])) + page.panels(plots)


def _sink(found: Mapping[str, Any] | None) -> str:
    """Whether the first token's state and massive units own the gain."""
    if found is None:
        return ""
    head = [f"does the sink own the gain? {found['texts']} texts", "ln of the largest gain", "participation"]
    rows = [[row["label"], _claimed(row["log_gain"]), _claimed(row["participation"])] for row in found["rows"]]
    return html_table(head, rows)


def _claimed(value: Mapping[str, float | None] | None) -> str:
    if value is None or value["value"] is None:
        return "not defined"
    ends = f" [{brief(value['low'])}, {brief(value['high'])}]" if value["low"] is not None else ""
    return brief(value["value"]) + ends


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


def whole_page(page: Page, of: str) -> str:
    """The page as one file; ``of`` says what it is of, such as ``3 runs``."""
    plotly = _plotly()
    code = '"use strict";(() => {\n' + "".join(map(_resource, SCRIPTS)) + "})();"
    packed = base64.b64encode(gzip.compress(plotly.encode(), 9, mtime=0)).decode()
    data = {
        "plots": {plot.key: interactive.for_page(plot) for plot in page.plots},
        "values": {c.name: c.value for plot in page.plots for c in plot.controls},
    }
    policy = (
        f"default-src 'none'; script-src {_hash(code)} {_hash(plotly)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    contents = "".join(f'<li><a href="#{i}">{escape(heading)}</a></li>' for i, heading, _ in page.sections)
    sections = "".join(
        f'<section id="{i}"><h2>{escape(heading)}</h2>{body}</section>' for i, heading, body in page.sections
    )
    made = f"{escape(of)} of rsdyn {escape(rsdyn.__version__)}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(page.title)}</title><style>{colours()}{_resource('page.css')}</style></head>\n"
        f"<body><header><h1>{escape(page.title)}</h1><p>{made}, measured after {escape(ARXIV)}.</p></header>"
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
    path = output_file(out, "-o")
    with writing(f"-o {out}"):
        write_text(path, html)
    return path
