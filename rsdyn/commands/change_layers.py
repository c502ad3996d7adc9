"""What perturb.py does for ``perturb.kind=skip`` and ``swap_layers``: change layers of the model, text by text."""

from __future__ import annotations

import time
from typing import Any

from rsdyn.figures import static
from rsdyn.figures.perturbation import effect_panels
from rsdyn.files import write_results
from rsdyn.lm.certificate import certify
from rsdyn.perturbation.layers import LayerEffects, changed_layers, measure_layers
from rsdyn.perturbation.prompts import layers_of, prompts_of
from rsdyn.perturbation.words import effects_table, effects_words
from rsdyn.report import write_report
from rsdyn.run.opening import Source, device_of, make_stream, record_certificate, start_records
from rsdyn.run.progress import stage_bar
from rsdyn.run.script import Run
from rsdyn.tracking import show


def change_layers(run: Run, source: Source) -> None:
    """Texts; the model; each layer left out or exchanged in turn; figures, numbers, W&B. No stream is recorded."""
    config: Any = run.config
    settings = config.perturb
    asked = None if settings.layers is None else layers_of(settings.layers, source.lm.n_layers)
    layers = changed_layers(settings.kind, asked, source.lm.n_layers)
    texts = prompts_of(settings, source.sequences, source.lm, seed=config.seed)
    start_records(run, source, {})
    lm = source.lm.load(dtype=config.lm.dtype, device=device_of(config), head=True)
    with make_stream(run, source, "original").precision():
        certificate = certify(lm, [text.tokens for text in texts], opened_by=source.sequences.opened_by)
        run.say(certificate.line())
        record_certificate(run, "prompts", certificate.to_dict())
        run.say(f"{len(texts)} text{'s' * (len(texts) > 1)}, {settings.kind} of {len(layers)} layers, one at a time")
        with stage_bar(settings.kind, len(texts), "texts") as done:
            found = measure_layers(lm, texts, layers, settings.kind, done=done)
    _report(run, source, found)


def _report(run: Run, source: Source, found: LayerEffects) -> None:
    """Write results, figures and summary; send them to W&B; print the closing table."""
    panels = effect_panels(found)
    for panel in panels:
        static.save(panel, run.folder / "figures")
    notes = effects_words(found)
    summary = {
        **source.facts(),
        "kind": found.kind,
        "layers": found.layers,
        "n_prompts": len(found.n_tokens),
        "n_drawn": len(found.drawn),
        "n_tokens": int(found.n_tokens[found.sample].sum()),
        "perplexity": float(found.perplexity.value),
        "effects": [effect.to_dict() for effect in found.effects],
        "in_words": notes,
        "seconds": {"total": time.time() - run.started},
    }
    write_results(run.folder, found.arrays(), summary)
    run.say()
    for line in [*effects_table(found), "", *notes, ""]:
        run.say(line)
    run.say(f"Time:        {summary['seconds']['total']:.0f} s in all")
    write_report(run.folder)
    shared = show.Shared(run.logger, run.folder, [], [], [panel.key for panel in panels], run.config.tracking.artifacts)
    show.layer_effects(shared, summary=summary, found=found)
    run.say(f"Run folder:  {run.folder}")
    run.say("             report.html, summary.json, results.npz, figures/")
