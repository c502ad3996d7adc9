"""What perturb.py does for ``perturb.kind=skip`` and ``swap_layers``: change layers of the model, text by text."""

from __future__ import annotations

from rsdyn.figures.perturbation import effect_panels
from rsdyn.lm.certificate import certify
from rsdyn.perturbation.layers import changed_layers, measure_layers
from rsdyn.perturbation.prompts import groups_in_words, layers_of, prompts_of
from rsdyn.perturbation.words import effects_answer, effects_table, effects_words
from rsdyn.run.finish import Ending, draw, finish
from rsdyn.run.opening import Source, make_stream, say_certificate, start_records
from rsdyn.run.output import table_columns
from rsdyn.run.progress import stage_bar
from rsdyn.run.run import Run
from rsdyn.run.trainer import device_of
from rsdyn.tracking import show


def change_layers(run: Run, source: Source) -> None:
    """Texts; the model; each layer left out or exchanged in turn; figures, numbers, W&B. No stream is recorded."""
    config, settings = run.config, run.config.perturb
    asked = None if settings.layers is None else layers_of(settings.layers, source.lm.n_layers)
    layers = changed_layers(settings.kind, asked, source.lm.n_layers)
    texts = prompts_of(settings, source.sequences, source.lm, seed=config.seed)
    start_records(run, source, {})
    lm = source.lm.load(dtype=config.lm.dtype, device=device_of(config), head=True)
    with make_stream(run, source, "original").precision():
        certificate = certify(lm, [text.tokens for text in texts], opened_by=source.sequences.opened_by)
        say_certificate(run, "prompts", certificate)
        run.say(f"{len(texts)} text{'s' * (len(texts) > 1)}, {settings.kind} of {len(layers)} layers, one at a time")
        with stage_bar(settings.kind, len(texts), "texts") as done:
            found = measure_layers(lm, texts, layers, settings.kind, done=done)
    panels = effect_panels(found)
    draw(run, panels)
    end = Ending(
        answer=effects_answer(found),
        tables=effects_table(found, table_columns()),
        notes=[*groups_in_words(settings), *effects_words(found)],
        summary={**source.facts(), **found.to_dict()},
        arrays=found.arrays(),
        panels=panels,
        send=lambda to, summary: show.layer_effects(to, summary=summary, found=found),
    )
    finish(run, end)
