"""Teleport the residual stream and measure whether it comes back (paper 2.8, Fig. 4D; METHOD section 10).

python perturb.py                                             the embedded model, the paper's prompt, five depths
python perturb.py perturb.off_plane=keep perturb.from_text=20
python perturb.py perturb.kind=noise perturb.noise.sigma=0.3
python perturb.py --help
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from rsdyn import figures
from rsdyn.figures.of_perturbation import panels
from rsdyn.files import write_json
from rsdyn.lm.certificate import certify
from rsdyn.perturbation.measure import find_plane, layers_of, measure, prompts_of, read_trajectories
from rsdyn.perturbation.words import closing_table, words
from rsdyn.report import write_report
from rsdyn.run.opening import (
    device_of,
    find_source,
    open_stream,
    record_certificate,
    say_positions,
    start_records,
)
from rsdyn.run.progress import stage_bar
from rsdyn.run.script import Run, run_script
from rsdyn.tracking import show


def perturb(run: Run) -> None:
    """Text and its plane; prompts and their reference runs; points and controls; recovery; figures, numbers, W&B."""
    config: Any = run.config
    settings = config.perturb
    source = find_source(run)
    layers = layers_of(settings.layers, source.lm.n_layers)
    sublayers = {layer: source.lm.sublayer(layer, settings.site) for layer in layers}
    prompts = prompts_of(
        settings, source.sequences, source.lm, seed=config.seed, chat_template=config.data.chat_template
    )
    stream = open_stream(run, source, samples=settings.samples)
    say_positions(run, stream, settings.samples)
    start_records(run, source, {"original": stream})
    stream.device = device_of(config)
    run.kept = lambda: f"{stream.n_sequences - stream.n_missing()} sequences are in the cache"
    with stage_bar("reading the stream", stream.shards_of(settings.samples), "shards") as done:
        trajectories = read_trajectories(stream, settings.samples, done)
    plane = find_plane(settings, trajectories.x)
    lm = source.lm.load(dtype=config.lm.dtype, device=stream.device, head=True)
    with stream.precision():
        certificate = certify(lm, [prompt.tokens for prompt in prompts], opened_by=source.sequences.opened_by)
    run.say(certificate.line())
    record_certificate(run, "prompts", certificate.to_dict())
    where = f"layers {', '.join(map(str, layers))} ({settings.site}, {settings.position} position)"
    run.say(f"{len(prompts)} prompt{'s' if len(prompts) > 1 else ''}, {settings.kind} at {where}")
    if settings.position == "all":
        run.say(
            "One vector at every position leaves attention nothing to choose from: the prompt does not matter then."
        )
    with stream.precision(), stage_bar(f"{settings.kind} and controls", len(prompts), "prompts") as done:
        found = measure(lm, prompts, sublayers, plane, trajectories, settings, seed=config.seed, done=done)
    _report(run, source, stream, plane, found, layers)


def _report(run: Run, source: Any, stream: Any, plane: Any, found: Any, layers: list[int]) -> None:
    """Write results, figures and summary; send them to W&B; print the closing table."""
    settings: Any = run.config.perturb
    drawn = panels(found, plane, settings)
    for name, figure in drawn.items():
        figures.save(figure, run.folder / "figures", name)
    arrays: dict[str, Any] = found.arrays()
    np.savez_compressed(run.folder / "results.npz", **arrays)
    notes = words(found, settings)
    summary = {
        "lm": source.lm.label,
        "text": source.text,
        "n_sublayers": source.lm.n_sublayers,
        "sites_per_layer": len(source.lm.site_names),
        "n_units": source.lm.n_units,
        "kind": settings.kind,
        "layers": layers,
        "site": settings.site,
        "position": settings.position,
        "off_plane": settings.off_plane,
        "space": settings.space,
        "n_prompts": found.n_prompts,
        "n_points": found.n_points,
        "sequences_alike": found.alike,
        "linear_range": {str(layer): linear._asdict() for layer, linear in found.linear.items()},
        "rows": found.rows(),
        "in_words": notes,
        "seconds": {"total": time.time() - run.started},
    }
    write_json(run.folder / "summary.json", summary)
    run.say()
    for line in [*closing_table(found), "", *notes, ""]:
        run.say(line)
    run.say(f"Time:        {summary['seconds']['total']:.0f} s in all")
    write_report(run.folder)
    recorded = [stream.n_recorded]
    shared = show.Shared(run.logger, run.folder, [stream], recorded, list(drawn), run.config.tracking.artifacts)
    show.perturbation(shared, summary=summary, found=found, checkpoint=settings.checkpoint)
    run.say(f"Run folder:  {run.folder}")
    run.say("             report.html, summary.json, results.npz, figures/")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script("perturb", perturb, argv)
