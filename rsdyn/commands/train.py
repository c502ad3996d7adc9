"""Train the compressing autoencoder on the residual stream of a language model (paper 2.7, Fig. 3).

python train.py                                             the embedded model and text
python train.py --config paper lm.name=meta-llama/Llama-3.1-8B trainer.devices=4
python train.py --help
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from rsdyn import figures
from rsdyn.analysis.checks import check_settings
from rsdyn.analysis.flat import flat_results, typed_results
from rsdyn.analysis.results import ConditionResults
from rsdyn.analysis.stored import flatten_part
from rsdyn.analysis.summary import curves_of
from rsdyn.analysis.while_training import RideAlong
from rsdyn.autoencoder.model import read_checkpoint
from rsdyn.autoencoder.summary import dimensions_filled
from rsdyn.autoencoder.training import LitAutoencoder
from rsdyn.autoencoder.widths import MARGIN, default_layers, is_starved
from rsdyn.config.schema import named_by_keys
from rsdyn.config.trainer_options import check_max_steps
from rsdyn.errors import UserError
from rsdyn.files import write_results
from rsdyn.labels import stream_name
from rsdyn.report import write_report
from rsdyn.run.checkpoints import LAST, BestCheckpoint, LastCheckpoint, check_checkpoint, take_best_along
from rsdyn.run.opening import (
    find_source,
    make_trainer,
    open_stream,
    processes_here,
    say_positions,
    start_records,
    what_decides,
)
from rsdyn.run.progress import History, Patience, Progress
from rsdyn.run.script import Run, run_script
from rsdyn.stream.datamodule import ResidualStreamDataModule
from rsdyn.stream.text.groups import sequence_groups
from rsdyn.tracking import show


def train(run: Run) -> None:
    """Text, language model, stream; fit with early stopping; test beside PCA; figures, numbers, W&B."""
    config: Any = run.config  # its choices are plain strings, checked when the config was read
    L.seed_everything(config.seed, verbose=False)
    source = find_source(run)
    condition = stream_name(config.data.condition)
    stream = open_stream(run, source, condition)
    identity = what_decides(run, source, stream)
    position = start_at(run, identity)
    start_records(run, source, {condition: stream})

    analysis = config.analysis
    riding = [
        RideAlong(
            measures=analysis.measures,
            samples=analysis.samples,
            groups=sequence_groups(stream.sequences, analysis.samples, resample=analysis.resample),
            mi_estimator=analysis.mi.estimator,
            keep=analysis.keep,
            density_threshold=analysis.density_threshold,
            seed=config.seed,
        )
    ] * analysis.on_train
    progress = Progress()
    with named_by_keys("data"):
        datamodule = ResidualStreamDataModule(
            stream,
            val_size=config.data.val_size,
            test_size=config.data.test_size,
            batch_by=config.data.batch_by,
            batch_size=config.data.batch_size,
            shuffle_shards=config.data.shuffle_shards,
            seed=config.seed,
            on_record=progress.recorded,
            stop=run.stop,
            on_shard=lambda batch: [ride.take(batch) for ride in riding],
        )
    module = LitAutoencoder(
        autoencoder={
            "d_in": stream.n_units,
            "bottleneck": config.cae.bottleneck,
            "layers": config.cae.layers,
            "count": config.cae.count,
            "standardise": config.cae.standardise,
            "n_sublayers": stream.n_sublayers,
        },
        n_sublayers=stream.n_sublayers,
        lr=config.cae.lr,
        warmup_steps=config.cae.warmup_steps,
        schedule=config.cae.schedule,
        plateau_factor=config.cae.plateau_factor,
        plateau_patience=config.cae.plateau_patience,
        bias_init=config.cae.bias_init,
    )
    n_processes = processes_here(run) * config.trainer.num_nodes
    check_max_steps(config.trainer.options, batches=datamodule.n_train_batches // n_processes)
    n_parameters = sum(p.numel() for p in module.parameters())
    sizes = {part: len(rows) for part, rows in datamodule.splits.items()}
    say_positions(run, stream)
    run.say(f"Splits: {sizes['train']} training, {sizes['val']} validation, {sizes['test']} test sequences")
    widths = module.autoencoder.widths
    run.say(f"CAE:  widths {' '.join(map(str, widths))} and back, {n_parameters:,} parameters")
    if is_starved(widths):
        enough = default_layers(widths[0], widths[-1], config.cae.count)
        run.say(
            f"Warning: the narrowest inner layer has {min(widths[1:-1])} units, and latents behind fewer than "
            f"{widths[-1] + MARGIN} (cae.bottleneck + {MARGIN})"
        )
        run.say(f"         tend to lie on a line. Lower cae.layers to {enough}, or leave it out.")

    history = History()
    folder = run.folder / "checkpoints"
    best = BestCheckpoint(folder)
    last = LastCheckpoint(folder / LAST, run.stop, identity=identity, records_in=datamodule.records_in)
    stopping = Patience(config.trainer.patience)
    if analysis.on_train:
        check_settings(
            analysis,
            n_sequences=min(analysis.samples or stream.n_sequences, stream.n_sequences),
            n_trajectories=stream.n_trajectories(0, analysis.samples),
            n_sublayers=stream.n_sublayers,
            n_units=stream.n_units,
            sites_per_layer=len(stream.lm.site_names),
        )
    trainer = make_trainer(run, [stopping, history, progress, *riding, best, last])
    run.kept = lambda: _kept(stream, best, last)
    if run.resume is not None and trainer.is_global_zero:
        take_best_along(run.resume, folder)
    trainer.fit(module, datamodule=datamodule, ckpt_path=run.resume, weights_only=True)
    for ride in riding:
        ride.on_train_epoch_end(trainer, module)  # it went on from where nothing was left to train
    run.kept = lambda: f"the training is done, and {best.best_model_path} is its best"
    _, weights = read_checkpoint(best.best_model_path)
    module.autoencoder.load_state_dict(weights)
    trainer.test(module, datamodule=datamodule, verbose=False)

    n_recorded = int(
        trainer.strategy.reduce(torch.tensor(stream.n_recorded, device=trainer.strategy.root_device), reduce_op="sum")
    )

    if trainer.is_global_zero:
        results = module.results
        summary = {
            "lm": stream.lm.label,
            "text": run.provenance["text"],
            "condition": condition,
            "n_sequences": sizes,
            "n_trajectories": {
                part: int(stream.positions.counts[rows].sum()) for part, rows in datamodule.splits.items()
            },
            "positions": stream.positions.rule,
            "n_sublayers": stream.n_sublayers,
            "sites_per_layer": len(stream.lm.site_names),
            "n_units": stream.n_units,
            "widths": widths,
            "n_parameters": n_parameters,
            "standardise": config.cae.standardise,
            "epochs": len(history.val),
            "best_epoch": history.best_epoch,
            "best_val_loss": best.best_model_score,
            "stopped_early": stopping.stopped,
            "seconds": {"fit": last.seconds, "total": time.time() - run.started},
            "resumed_at_step": None if position is None else position.step,
            "sequences_recorded": n_recorded,
            "lm_loaded": stream.lm_loaded,
            "dropped_vectors_per_epoch": datamodule.dropped,
            "processes": trainer.world_size,
            "test": _numbers(results),
            **_sublayer_lists(results),
            "history": {"train": history.train, "val": history.val, "lr": history.lr},
            "checkpoint": str(Path(best.best_model_path).relative_to(run.folder)),
        }
        flat = riding[0].results if riding else {}
        measured = typed_results(flat) if flat else None
        _report(run, stream, module, history, summary, results, measured)
    trainer.strategy.barrier()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def start_at(run: Run, identity: dict[str, Any]) -> Any:
    """See that the checkpoint which the run goes on from is its own, and say where it was taken; None without one."""
    if run.resume is None:
        return None
    position = check_checkpoint(run.resume, identity)
    if position.epoch > run.config.trainer.max_epochs:
        raise UserError(
            f"resume={run.resume} was taken {position}, past trainer.max_epochs="
            f"{run.config.trainer.max_epochs}. Raise trainer.max_epochs to at least {position.epoch}, or resume=never."
        )
    run.say(f"Resume: {run.resume}, {position}")
    return position


def _kept(stream: Any, best: Any, last: Any) -> str:
    parts = []
    if stream.cache is not None:
        done = stream.n_sequences - stream.n_missing()
        parts.append(f"{done} of {stream.n_sequences} sequences are in the cache and will not be recorded again")
    path = best.best_model_path
    parts.append(f"the best autoencoder so far is {path}" if path else "no epoch was finished")
    if last.path.exists():
        parts.append(f"the same command goes on from {last.path}")
    return "; ".join(parts)


def _numbers(results: dict[str, Any]) -> dict[str, Any]:
    """The scalars of the test and the names of what it flagged."""
    scalars = {k: float(v) for k, v in results.items() if getattr(v, "ndim", None) == 0}
    return scalars | {
        k: results[k]
        for k in (
            *("n_test_sequences", "n_test_trajectories", "n_constant_units", "massive_units"),
            *("collapsed", "collapse"),
        )
    }


def _sublayer_lists(results: dict[str, Any]) -> dict[str, Any]:
    """One list a sublayer (or transition) each: unless named, about each sublayer's own mean, in the loss's space."""
    lists = {}
    for ours, name in (("cae", "explained_variance"), ("pca", "explained_variance_pca2")):
        lists[name] = results[f"ev_{ours}"]
        lists[f"{name}_global"] = results[f"ev_global_{ours}"]
        lists[f"{name}_raw"] = results[f"ev_{ours}_raw"]
    return lists | {k: results[k] for k in ("latent_distance", "latent_distance_std")}


def _report(
    run: Run,
    stream: Any,
    module: Any,
    history: Any,
    summary: dict[str, Any],
    results: dict[str, Any],
    measured: ConditionResults | None,
) -> None:
    """Write results, figures and summary; send them to W&B; print the closing table."""
    n_sites = len(stream.lm.site_names)
    n_latent = module.autoencoder.widths[-1]
    pca_name = f"PCA, {n_latent} components"
    samples = results["latent_samples"]
    if not stream.positions.is_last:  # in the corpus' order, where a hundred may be the tokens of one sequence
        samples = samples[:: max(1, len(samples) // 100)]
    distance, std = results["latent_distance"], results["latent_distance_std"]
    filled = dimensions_filled(results["latent_participation"], n_latent)
    title = f"mean latents: {filled}" if n_latent > 1 else None
    panels = {
        "fig3b_latent_trajectory": figures.latent_trajectory(
            results["mean_latents"], samples[:100], sites_per_layer=n_sites, title=title
        ),
        "fig3c_latent_distance": figures.latent_distance(
            distance, (distance - std, distance + std), sites_per_layer=n_sites, spread_label="± 1 SD over sequences"
        ),
        "fig3d_explained_variance": figures.explained_variance(
            {"autoencoder": results["ev_cae"], pca_name: results["ev_pca"]}, sites_per_layer=n_sites
        ),
        "loss": figures.loss_curves(history.train, history.val, history.best_epoch),
    }
    for name, figure in panels.items():
        figures.save(figure, run.folder / "figures", name)
    arrays = {"widths": np.array(module.autoencoder.widths)}
    arrays |= {k: v.numpy() for k, v in results.items() if hasattr(v, "numpy")}
    if measured is not None:
        arrays |= flatten_part(measured, "analysis")
        summary["analysis"] = curves_of(measured)
    write_results(run.folder, arrays, summary)
    write_report(run.folder)
    recorded = [summary["sequences_recorded"]]
    shared = show.Shared(run.logger, run.folder, [stream], recorded, list(panels), run.config.tracking.artifacts)
    show.training(shared, summary=summary, results=results, measured=flat_results(measured) if measured else {})
    _closing_table(run, stream, summary, pca_name)


def _closing_table(run: Run, stream: Any, summary: dict[str, Any], pca_name: str) -> None:
    test, widths = summary["test"], (44, 14, 20)
    n_latent = summary["widths"][-1]
    space = {"none": "raw", "unit": "unit-standardised", "unit_sublayer": "unit- and sublayer-standardised"}
    n_massive = len(test["massive_units"])
    # the median, since the first sublayers have next to no variance of their own and values in the minus hundreds
    typical = [float(summary[k].nanmedian()) for k in ("explained_variance", "explained_variance_pca2")]
    rows = [
        ("", "autoencoder", pca_name),
        ("test MSE, raw activations", f"{test['test_mse']:.5g}", f"{test['test_mse_pca']:.5g}"),
        ("explained variance, raw", f"{test['r2_cae_raw']:.4f}", f"{test['r2_pca_raw']:.4f}"),
        (f"explained variance, {space[summary['standardise']]}", f"{test['r2_cae']:.4f}", f"{test['r2_pca']:.4f}"),
        (
            f"  without the {n_massive} massive units",
            f"{test['r2_without_massive_cae']:.4f}",
            f"{test['r2_without_massive_pca']:.4f}",
        ),
        ("  of each sublayer by itself, median", f"{typical[0]:.4f}", f"{typical[1]:.4f}"),
    ]
    if n_latent > 1:
        ours, theirs = (f"{test[k]:.2f}" for k in ("latent_participation", "latent_participation_pca"))
        rows.append((f"dimensions that the latents fill, of {n_latent}", ours, theirs))
    if summary["standardise"] == "none":
        del rows[3]  # it says the same as the row before it
    run.say()
    for label, *values in rows:
        run.say(f"{label:<{widths[0]}}" + "".join(f"{v:>{w}}" for v, w in zip(values, widths[1:], strict=True)))
    run.say()
    stop = "stopped early" if summary["stopped_early"] else "all of them"
    recorded, seconds = summary["sequences_recorded"], summary["seconds"]
    run.say(f"Epochs:      {summary['epochs']}, {stop}; the best was epoch {summary['best_epoch']}")
    run.say(f"Time:        {seconds['fit']:.0f} s to fit, {seconds['total']:.0f} s in all")
    run.say(f"LM:          {recorded} sequences recorded" if recorded else "LM:          not loaded, all was cached")
    if dropped := summary["dropped_vectors_per_epoch"]:
        run.say(f"Dropped:     {dropped} training vectors an epoch, so that all processes take as many steps")
    if test["collapsed"]:
        run.say(f"Warning:     the autoencoder collapsed: {', and '.join(test['collapse'])}.")
        run.say(f"             {_advice(run.config.cae, summary['widths'])}")
    if stream.cache is not None:
        run.say(f"Cache:       {stream.cache.folder}")
    run.say(f"Run folder:  {run.folder}")
    run.say("             report.html, summary.json, results.npz, figures/, checkpoints/best.ckpt")


def _advice(cae: Any, widths: list[int]) -> str:
    """Which settings may keep an autoencoder from collapsing."""
    settings = ["cae.standardise=unit"] * (cae.standardise == "none")
    if is_starved(widths):
        settings.append(f"cae.layers={default_layers(widths[0], widths[-1], cae.count)}")
    if cae.warmup_steps < 500:
        settings.append("cae.warmup_steps=500")
    return f"Try {', '.join([*settings, f'cae.lr={cae.lr / 3:.1g}'])}, or another seed."


def main(argv: Sequence[str] | None = None) -> int:
    return run_script("train", train, argv)
