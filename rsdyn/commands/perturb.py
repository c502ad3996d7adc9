"""Teleport the residual stream and measure whether it comes back (paper 2.8, Fig. 4D; METHOD section 10).

python perturb.py                                    the embedded model, the paper's prompt and 20 of the text
python perturb.py perturb.off_plane=keep perturb.from_text=50
python perturb.py perturb.kind=noise perturb.noise.sigma=0.3
python perturb.py perturb.kind=skip                  each layer left out in turn
python perturb.py --help
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rsdyn.commands.change_layers import change_layers
from rsdyn.figures import static
from rsdyn.figures.perturbation import perturbation_panels
from rsdyn.files import write_results
from rsdyn.lm.certificate import certify
from rsdyn.lm.continuing.continuation import run_reference
from rsdyn.lm.continuing.layer_calls import check_memories
from rsdyn.perturbation.plane import Plane, find_plane, open_autoencoder, read_trajectories
from rsdyn.perturbation.points import measure
from rsdyn.perturbation.prompts import layers_of, prompts_of
from rsdyn.perturbation.result import Found
from rsdyn.perturbation.settings import LAYER_KINDS
from rsdyn.perturbation.words import closing_table, words
from rsdyn.report import write_report
from rsdyn.run.opening import (
    Source,
    device_of,
    find_source,
    open_stream,
    record_certificate,
    say_positions,
    start_records,
)
from rsdyn.run.progress import stage_bar
from rsdyn.run.script import Run, run_script
from rsdyn.stream.trajectories import TrajectoryStream
from rsdyn.tracking import show


def perturb(run: Run) -> None:
    """Change layers of the model, or move points: prompts, plane, points and controls, recovery, results."""
    source = find_source(run)
    if run.config.perturb.kind in LAYER_KINDS:
        change_layers(run, source)
    else:
        move_points(run, source)


def move_points(run: Run, source: Source) -> None:
    """Prompts and a model that can be continued; the text's plane; points and controls in it; recovery; results."""
    config: Any = run.config
    settings = config.perturb
    layers = layers_of(settings.layers, source.lm.n_layers)
    sublayers = {layer: source.lm.sublayer(layer, settings.site) for layer in layers}
    prompts = prompts_of(settings, source.sequences, source.lm, seed=config.seed)
    autoencoder = open_autoencoder(settings, source.lm.n_units)
    check_memories(source.lm.config, source.lm.name)
    stream = open_stream(run, source, samples=settings.samples)
    say_positions(run, stream, settings.samples)
    start_records(run, source, {"original": stream})
    stream.device = device_of(config)
    run.kept = lambda: f"{stream.n_sequences - stream.n_missing()} sequences are in the cache"
    # what cannot be continued is refused here, before anything is recorded
    lm = source.lm.load(dtype=config.lm.dtype, device=stream.device, head=True)
    with stream.precision():
        certificate = certify(lm, [prompt.tokens for prompt in prompts], opened_by=source.sequences.opened_by)
        run_reference(lm, prompts[0].tokens)
    run.say(certificate.line())
    record_certificate(run, "prompts", certificate.to_dict())
    stream.record_with(lm)
    with stage_bar("reading the stream", stream.shards_of(settings.samples), "shards") as done:
        trajectories = read_trajectories(stream, settings.samples, done)
    plane = find_plane(settings, trajectories.x, autoencoder)
    where = f"layers {', '.join(map(str, layers))} ({settings.site}, {settings.position} position)"
    drawn = sum(prompt.sequence is not None for prompt in prompts)
    run.say(f"{len(prompts)} prompt{'s' * (len(prompts) > 1)}, {drawn} of the text; {settings.kind} at {where}")
    if settings.position == "all":
        run.say(
            "One vector at every position leaves attention nothing to choose from: the prompt does not matter then."
        )
    with stream.precision(), stage_bar(f"{settings.kind} and controls", len(prompts), "prompts") as done:
        found = measure(lm, prompts, sublayers, plane, trajectories, settings, seed=config.seed, done=done)
    _report(run, source, stream, plane, found)


def _report(run: Run, source: Source, stream: TrajectoryStream, plane: Plane, found: Found) -> None:
    """Write results, figures and summary; send them to W&B; print the closing table."""
    settings: Any = run.config.perturb
    panels = perturbation_panels(
        found,
        steps=settings.steps,
        name=plane.name,
        ratio=plane.ratio,
        **{name: getattr(settings, name) for name in ("site", "position", "off_plane")},
    )
    for panel in panels:
        static.save(panel, run.folder / "figures")
    notes = words(found, plane)
    summary = {
        **source.facts(),
        **{name: getattr(settings, name) for name in ("kind", "site", "position", "off_plane", "space")},
        "layers": [*found.sublayers],
        "n_prompts": found.n_prompts,
        "n_drawn": len(found.drawn),
        "n_points": found.n_points,
        "sequences_alike": found.alike,
        "linear_range": {str(layer): linear._asdict() for layer, linear in found.linear.items()},
        "massive_units": [*plane.massive],
        "massive_share_of_components": None if plane.owned is None else plane.owned.tolist(),
        "rows": [row.to_dict() for row in found.rows],
        "beyond_still": [beyond.to_dict() for beyond in found.beyond_still],
        "in_words": notes,
        "seconds": {"total": time.time() - run.started},
    }
    write_results(run.folder, found.arrays(), summary)
    run.say()
    for line in [*closing_table(found), "", *notes, ""]:
        run.say(line)
    run.say(f"Time:        {summary['seconds']['total']:.0f} s in all")
    write_report(run.folder)
    recorded = [stream.n_recorded]
    shared = show.Shared(
        run.logger, run.folder, [stream], recorded, [panel.key for panel in panels], run.config.tracking.artifacts
    )
    show.perturbation(shared, summary=summary, found=found, checkpoint=settings.checkpoint)
    run.say(f"Run folder:  {run.folder}")
    run.say("             report.html, summary.json, results.npz, figures/")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script("perturb", perturb, argv)
