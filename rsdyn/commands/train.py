"""Train the compressing autoencoder on the residual stream of a language model (paper 2.7, Fig. 3).

python train.py                                             the embedded model and text
python train.py --config paper lm.name=meta-llama/Llama-3.1-8B trainer.devices=4
python train.py --help
"""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L

from rsdyn.analysis.stored import flatten_part
from rsdyn.analysis.summary import curves_of
from rsdyn.autoencoder.model import read_checkpoint
from rsdyn.autoencoder.result import Trained
from rsdyn.autoencoder.words import answer, closing_table, foot, widths_in_words
from rsdyn.config.naming import keyed
from rsdyn.figures.autoencoder import training_panels
from rsdyn.labels import stream_name
from rsdyn.run.finish import BEST, Ending, Recorded, draw, finish, in_all_processes, leave
from rsdyn.run.opening import find_source, open_stream, say_positions, start_records, what_decides
from rsdyn.run.output import table_columns
from rsdyn.run.progress import Progress
from rsdyn.run.run import Run, keeping
from rsdyn.run.script import run_script
from rsdyn.run.trainer import make_trainer
from rsdyn.run.training import fit, make_autoencoder, make_callbacks, make_datamodule, make_ride_along, resume_at
from rsdyn.tracking import show


def train(run: Run) -> None:
    """Text, language model, stream; fit with early stopping; test beside PCA; figures, numbers, W&B."""
    config = run.config
    L.seed_everything(config.seed, verbose=False)
    source = find_source(run)
    condition = stream_name(config.data.condition)
    stream = open_stream(run, source, condition)
    identity = what_decides(run, source, stream)
    position = resume_at(run, identity)
    start_records(run, source, {condition: stream})

    # whole sequences are split, and vectors of the training split shuffled, while they are recorded
    progress, riding = Progress(), make_ride_along(run, stream)
    datamodule = make_datamodule(run, stream, progress, riding)
    say_positions(run, stream)
    sizes = {part: len(rows) for part, rows in datamodule.splits.items()}
    run.say(f"Splits: {sizes['train']} training, {sizes['val']} validation, {sizes['test']} test sequences")

    # widths fall geometrically to the bottleneck; Adam on the squared error, until the validation loss stands still
    module = make_autoencoder(run, stream)
    n_parameters = sum(p.numel() for p in module.parameters())
    for line in widths_in_words(module.autoencoder.widths, n_parameters, config.cae):
        run.say(keyed("cae", line))
    callbacks = make_callbacks(run, datamodule, progress, identity)
    trainer = make_trainer(run, [*callbacks, *([riding] if riding else [])])
    with keeping(lambda: callbacks.kept(stream)):
        fit(run, trainer, module, datamodule)
        if riding is not None:
            riding.on_train_epoch_end(trainer, module)  # it resumed where nothing was left to train

    # the epoch with the lowest validation loss is tested, with PCA of as many components beside it
    best = callbacks.best.best_model_path
    with keeping(lambda: f"the training is done, and {best} is its best"):
        module.autoencoder.load_state_dict(read_checkpoint(best)[1])
        trainer.test(module, datamodule=datamodule, verbose=False)
        recorded = Recorded([stream], [in_all_processes(trainer, stream.n_recorded)])
        if trainer.is_global_zero:
            found = callbacks.summary(module, datamodule)
            measured = None if riding is None else riding.results
            counts = stream.positions.counts
            facts = {
                **source.facts(),
                "condition": condition,
                "n_sequences": sizes,
                "n_trajectories": {part: int(counts[rows].sum()) for part, rows in datamodule.splits.items()},
                "positions": stream.positions.rule,
                "resumed_at_step": None if position is None else position.step,
                "sequences_recorded": sum(recorded.counts),
                "lm_loaded": stream.lm_loaded,
                "processes": trainer.world_size,
                "checkpoint": BEST,
            }
            trained = Trained.of(found.results, {**facts, **found.to_dict()})
            panels = training_panels(trained)
            draw(run, panels)
            curves = {} if measured is None else {"analysis": curves_of(measured)}
            lines = {label: keyed("cae", line) for label, line in foot(found, config.cae).items()}
            cache = {} if stream.cache is None else {"Cache": str(stream.cache.folder)}
            end = Ending(
                answer=answer(found),
                tables=closing_table(found, table_columns()),
                foot={**lines, "LM": recorded.words(), **cache},
                summary={**facts, **found.to_dict(), **curves},
                arrays=found.arrays() | ({} if measured is None else flatten_part(measured, "analysis")),
                panels=panels,
                recorded=recorded,
                seconds={"fit": found.seconds},
                send=lambda to, summary: show.training(to, summary=summary, found=trained, measured=measured),
            )
            finish(run, end)
    leave(trainer)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return run_script("train", train, argv)
