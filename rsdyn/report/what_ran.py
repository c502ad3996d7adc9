"""The sections of the page that are words and tables: what was found, the paper's claims, and what was run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from rsdyn.analysis import group_table
from rsdyn.figures.panel import brief, counted
from rsdyn.labels import NAMES
from rsdyn.report.html import html_table, notes
from rsdyn.report.reading import RunFiles

BOLD = "What differs at Holm p < 0.05 is bold; of several groups findings.md has the difference and p of every one."
WHAT = {"train": "training of the autoencoder", "analyze": "analysis", "perturb": "perturbation"}


def answers(runs: Sequence[RunFiles]) -> str:
    """What each run answers, in its own few sentences; empty where none has any."""
    parts = []
    for run in runs:
        if sentences := run.summary.get("answer"):
            head = f"<h3>{escape(run.name)} <small>{escape(run.model)}</small></h3>" if len(runs) > 1 else ""
            parts.append(head + "".join(f"<p>{escape(str(line))}</p>" for line in sentences))
    return "".join(parts)


def section(runs: Sequence[RunFiles]) -> str:
    """A list of facts a run, with its settings and packages folded away."""
    return '<div class="runs">' + "".join(map(_run, runs)) + "</div>"


def facts(run: RunFiles) -> list[tuple[str, str]]:
    """What a reader must know of a run: the model and the text first, then how it was made."""
    summary, made = run.summary, run.provenance
    lm = made.get("lm") or {}
    found = [("model", _joined(run.model, lm.get("commit"), lm.get("identity")))]
    shape = counted(run.n_sublayers, "sublayer")
    if "n_units" in summary:
        shape += f" of {counted(int(summary['n_units']), 'unit')}"
    found.append(("stream", shape))
    found.append(("text", _text_of(run)))
    for condition, certificate in (made.get("certificates") or {}).items():
        name = NAMES.get(condition, condition)
        found.append((f"certificate, {name}", in_words(certificate)))
    if run.script == "analyze":
        found.append(("streams", ", ".join(NAMES.get(c, c) for c in summary["conditions"])))
    if run.script == "perturb":
        settings = run.config.get("perturb") or {}
        if settings.get("prompts") is None:
            found.append(("prompt", str(settings.get("prompt"))))
        prompts = counted(int(summary["n_prompts"]), "prompt")
        if drawn := int(summary.get("n_drawn", 0)):
            prompts += f", {drawn} of them sequences of the text"
        where = f"{summary['kind']} at layers {', '.join(map(str, summary['layers']))}"
        points = "" if run.changed_layers else f"{counted(int(summary['n_points']), 'point')}, "
        found.append(("perturbation", f"{where}, {points}{prompts}"))
    found.append(("seed", str(run.config.get("seed", made.get("seed")))))
    git = made.get("git") or {}
    changed = ", with changes that were not committed" if git.get("dirty") else ""
    found.append(
        ("code", f"rsdyn {made.get('rsdyn')}" + (f", commit {str(git['commit'])[:12]}{changed}" if git else ""))
    )
    found.append(("machine", _machine(made)))
    started, seconds = str(made.get("started", "")).replace("T", " "), (summary.get("seconds") or {}).get("total")
    found.append(("started", started + (f"; {seconds:.0f} s" if seconds is not None else "")))
    found.append(("command", at_home(" ".join(map(str, made.get("argv", []))))))
    return found


def _run(run: RunFiles) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts(run))
    versions = "\n".join(f"{k} {v}" for k, v in (run.provenance.get("versions") or {}).items())
    return (
        f'<article class="run"><h3>{escape(run.name)} <small>{escape(WHAT[run.script])}</small></h3><dl>{rows}</dl>'
        f"<details><summary>Settings</summary><pre>{escape(at_home(run.config_text))}</pre></details>"
        f"<details><summary>Versions</summary><pre>{escape(versions)}</pre></details></article>"
    )


def _text_of(run: RunFiles) -> str:
    n = run.summary.get("n_sequences")
    if isinstance(n, dict):
        n = sum(n.values())
    data = run.config.get("data") or {}
    rule = f"{data['l_min'] + 1} to {data['l_max'] - 1} characters" if {"l_min", "l_max"} <= data.keys() else None
    condition = run.summary.get("condition")
    return _joined(str(run.summary["text"]), counted(int(n), "sequence") if n is not None else None, rule,
                   condition if condition not in (None, "original") else None)  # fmt: skip


def _machine(made: dict[str, Any]) -> str:
    cpu, gpus = made.get("cpu") or {}, made.get("gpus") or []
    names = [str(gpu.get("name")) for gpu in gpus]
    gpu = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names)) if names else "no GPU"
    return _joined(cpu.get("model"), counted(int(cpu["cores"]), "core") if cpu.get("cores") else None, gpu)


def _joined(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)


def at_home(text: str) -> str:
    """The text without the path of one's home folder, which need not be shared with the page."""
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def in_words(value: Any) -> str:
    """A nested record as one line: ``name value; name value``."""
    if isinstance(value, dict):
        return "; ".join(f"{str(k).replace('_', ' ')} {in_words(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(in_words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# --- findings ---------------------------------------------------------------------------------------------------------


def findings(runs: Sequence[RunFiles]) -> str:
    """The paper's claims beside what was measured, a table a run, and what a reader must know in words."""
    analyses = [run for run in runs if run.script == "analyze"]
    parts = [
        '<p class="note">What the paper reports is of Llama 3.1 8B and stands beside what was measured here; nothing '
        "on this page says that a claim holds. Intervals are by the jackknife, of rank correlations by "
        "simulation from it, and do not cover the choice of model or of text. Under a trend: the first, middle and "
        "last value of its curve. Turns are clockwise.</p>"
    ]
    for run in analyses:
        if len(analyses) > 1:
            parts.append(f"<h3>{escape(run.name)} <small>{escape(run.model)}</small></h3>")
        over = notes([run.results.main.counts.intervals]) if run.measured else ""
        parts += [_table(run), over, _without_largest(run)]
        parts += [f'<p class="note">{escape(line)}</p>' for line in run.summary.get("in_words", [])]
    return "".join(parts)


def by_group(runs: Sequence[RunFiles]) -> str:
    """The findings by group of sequences, a table a run that has groups; empty where none has."""
    parts = []
    for run in runs:
        found = run.results.by_group
        if found is None:
            continue
        if len(runs) > 1:
            parts.append(f"<h3>{escape(run.name)} <small>{escape(run.model)}</small></h3>")
        names = ["measured", "N", *group_table.heads(found)]
        body = []
        for row in group_table.rows(found):
            cells = ""
            for name, cell, clear in zip(names[2:], row.cells, row.clear, strict=True):
                below = "; ".join(filter(None, (cell.interval, cell.below if clear else "")))
                bold = ' class="clear"' if clear else ""
                cells += f'<td{bold} data-label="{escape(name)}">{_with_below(_minus(cell.value), _minus(below))}</td>'
            kind = ' class="of"' if row.under else ""
            body.append(
                f'<tr><th scope="row"{kind}>{escape(row.label)}</th><td data-label="N">{row.n}</td>{cells}</tr>'
            )
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
        parts.append(f"<p>{escape(group_table.headline(found))}</p>")
        parts.append(f'<table class="findings"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>')
        parts.append(notes([f"{group_table.HOW} {BOLD}", *found.notes]))
    return "".join(parts)


def _table(run: RunFiles) -> str:
    conditions = run.summary["conditions"]
    heads = ["measured", "N", *(NAMES.get(c, c) for c in conditions)]
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    body = []
    for row in run.summary["findings"]:
        if row["claim"]:
            claim = escape(row["claim"][:1].upper() + row["claim"][1:])
            body.append(
                f'<tr class="claim"><th colspan="{len(heads)}" scope="colgroup">{claim} '
                f'<span class="paper">paper: {escape(row["paper"])}</span></th></tr>'
            )
        cells = "".join(
            f'<td data-label="{escape(name)}">{_cell(row["values"][c])}</td>' if c in row["values"] else "<td></td>"
            for c, name in zip(conditions, heads[2:], strict=True)
        )
        counts = dict.fromkeys(v.get("n") for v in row["values"].values() if v.get("n") is not None)
        cells = f'<td data-label="N">{", ".join(f"{n:,}" for n in counts)}</td>{cells}'
        kind = ' class="of"' if row.get("under") else ""
        told = not row["claim"] and row["paper"] not in ("", "not given")
        paper = f'<span class="paper">paper: {escape(row["paper"])}</span>' if told else ""
        body.append(f'<tr><th scope="row"{kind}>{escape(row["statistic"].strip())} {paper}</th>{cells}</tr>')
    return f'<table class="findings"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _without_largest(run: RunFiles) -> str:
    """The findings of the first condition against how many of the largest units are left out, folded away."""
    found = run.summary.get("without_largest")
    if not found:
        return ""
    condition = run.summary["conditions"][0]
    rows = [
        [row["statistic"], *(brief(x) for x in row["values"][condition])]
        for row in found["rows"]
        if condition in row["values"]
    ]
    if not rows:
        return ""
    units = ", ".join(f"{u} ({brief(x)} times)" for u, x in zip(found["units"], found["ratios"], strict=True))
    heads = ["largest units left out", *map(str, found["counts"])]
    words = (
        f"The largest units of {NAMES.get(condition, condition)}, by how often the median |mean| theirs is: {units}."
    )
    table = html_table(heads, rows) + notes([words])
    return f"<details><summary>The same without the largest units</summary>{table}</details>"


def _cell(value: dict[str, Any]) -> str:
    """A value with, below it, why it is not defined, or the first, middle and last value of its curve."""
    text, below = escape(_told(value)), ""
    if value.get("value") is None and value.get("reason"):
        below = str(value["reason"])
    elif value.get("first") is not None:
        below = " → ".join(brief(value.get(end)) for end in ("first", "middle", "last"))
    return _with_below(text, below, escaped=True)


def _with_below(text: str, below: str, *, escaped: bool = False) -> str:
    text = text if escaped else escape(text)
    return f'<div>{text}<div class="below">{escape(below)}</div></div>' if below else text


def _told(value: dict[str, Any]) -> str:
    """A value with its interval, as the run's own findings table has it."""
    if "text" in value:
        text = str(value["text"])
    else:  # of a run before the text was kept: without the notes in it
        from rsdyn.analysis.finding import Value

        found = float("nan") if value["value"] is None else value["value"]
        text = str(Value(found, value.get("low"), value.get("high")))
    return _minus(text)


def _minus(text: str) -> str:
    """A text whose numbers have a minus sign in place of a hyphen."""
    return re.sub(r"(?<![\w.])-(?=\d)", "\N{MINUS SIGN}", text)
