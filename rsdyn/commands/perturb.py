"""Teleport the residual stream and measure whether it comes back (paper 2.8, Fig. 4D; METHOD section 10).

python perturb.py                                    the embedded model, the paper's prompt and 20 of the text
python perturb.py perturb.off_plane=keep perturb.from_text=50
python perturb.py perturb.kind=noise perturb.noise.sigma=0.3
python perturb.py perturb.kind=skip                  each layer left out in turn
python perturb.py --help
"""

from __future__ import annotations

from collections.abc import Sequence

from rsdyn.commands.change_layers import change_layers
from rsdyn.figures.perturbation import perturbation_panels
from rsdyn.lm.certificate import certify
from rsdyn.lm.continuing.continuation import run_reference
from rsdyn.lm.continuing.layer_calls import check_memories
from rsdyn.perturbation.plane import find_plane, open_autoencoder, read_trajectories
from rsdyn.perturbation.points import measure
from rsdyn.perturbation.prompts import groups_in_words, layers_of, of_group, prompts_of
from rsdyn.perturbation.settings import LAYER_KINDS
from rsdyn.perturbation.words import answer, closing_table, words
from rsdyn.run.finish import Ending, Recorded, draw, finish
from rsdyn.run.opening import Source, find_source, open_stream, say_certificate, say_positions, start_records
from rsdyn.run.output import table_columns
from rsdyn.run.progress import stage_bar
from rsdyn.run.run import Run, keeping
from rsdyn.run.script import run_script
from rsdyn.run.trainer import device_of
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
    config, settings = run.config, run.config.perturb
    layers = layers_of(settings.layers, source.lm.n_layers)
    sublayers = {layer: source.lm.sublayer(layer, settings.site) for layer in layers}
    prompts = prompts_of(settings, source.sequences, source.lm, seed=config.seed)
    if settings.swap_group is not None:  # an unknown one is named before anything is recorded
        of_group(source.sequences, settings.swap_group, "swap_group")
    autoencoder = open_autoencoder(settings, source.lm.n_units)
    check_memories(source.lm.config, source.lm.name)
    stream = open_stream(run, source, samples=settings.samples)
    say_positions(run, stream, settings.samples)
    start_records(run, source, {"original": stream})
    stream.device = device_of(config)
    with keeping(lambda: f"{stream.n_sequences - stream.n_missing()} sequences are in the cache"):
        # what cannot be continued is refused here, before anything is recorded
        lm = source.lm.load(dtype=config.lm.dtype, device=stream.device, head=True)
        with stream.precision():
            certificate = certify(lm, [prompt.tokens for prompt in prompts], opened_by=source.sequences.opened_by)
            run_reference(lm, prompts[0].tokens)
        say_certificate(run, "prompts", certificate)

        # the plane: two principal components of the text's states, or an autoencoder's latents
        stream.record_with(lm)
        with stage_bar("reading the stream", stream.shards_of(settings.samples), "shards") as done:
            trajectories = read_trajectories(stream, settings.samples, done)
        if settings.swap_group is not None:
            members = of_group(source.sequences, settings.swap_group, "swap_group")
            trajectories = trajectories.of_group(members, f"swap_group={settings.swap_group}")
        plane = find_plane(settings, trajectories.x, autoencoder)
        where = f"layers {', '.join(map(str, layers))} ({settings.site}, {settings.position} position)"
        drawn = sum(prompt.sequence is not None for prompt in prompts)
        run.say(f"{len(prompts)} prompt{'s' * (len(prompts) > 1)}, {drawn} of the text; {settings.kind} at {where}")
        if settings.position == "all":
            run.say(
                "One vector at every position leaves attention nothing to choose from: the prompt does not matter then."
            )

        # each point takes the state's place, the layers above run on, and the distance to the reference is followed
        with stream.precision(), stage_bar(f"{settings.kind} and controls", len(prompts), "prompts") as done:
            found = measure(lm, prompts, sublayers, plane, trajectories, settings, seed=config.seed, done=done)

        choices = {name: getattr(settings, name) for name in ("site", "position", "off_plane")}
        ratio = None if plane.ratio is None else plane.ratio.tolist()
        panels = perturbation_panels(found, steps=settings.steps, name=plane.name, ratio=ratio, **choices)
        draw(run, panels)
        recorded = Recorded([stream], [stream.n_recorded])
        summary = {
            **source.facts(),
            **choices,
            "kind": settings.kind,
            "space": settings.space,
            "prompt_group": settings.prompt_group,
            "swap_group": settings.swap_group,
            **found.to_dict(),
            "massive_units": [*plane.massive],
            "massive_share_of_components": None if plane.owned is None else plane.owned.tolist(),
        }
        end = Ending(
            answer=answer(found),
            tables=closing_table(found, table_columns()),
            notes=[*groups_in_words(settings), *words(found, plane)],
            foot={"LM": recorded.words()},
            summary=summary,
            arrays=found.arrays(),
            panels=panels,
            recorded=recorded,
            send=lambda to, said: show.perturbation(to, summary=said, found=found, checkpoint=settings.checkpoint),
        )
        finish(run, end)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return run_script("perturb", perturb, argv)
