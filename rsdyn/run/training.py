"""What train.py needs beside the stream: the objects that a config asks for, and where a run resumes."""

from __future__ import annotations

from typing import Any, NamedTuple

import lightning as L

from rsdyn.analysis.checks import check_settings
from rsdyn.analysis.while_training import RideAlong
from rsdyn.autoencoder.summary import TrainingSummary
from rsdyn.autoencoder.training import LitAutoencoder
from rsdyn.config.trainer_options import check_max_steps
from rsdyn.errors import UserError
from rsdyn.run.checkpoints import LAST, BestCheckpoint, LastCheckpoint, Position, check_checkpoint, take_best_along
from rsdyn.run.early import autoencoder_arguments
from rsdyn.run.progress import History, Patience, Progress
from rsdyn.run.run import Run
from rsdyn.run.trainer import processes_here
from rsdyn.stream.datamodule import ResidualStreamDataModule
from rsdyn.stream.text.groups import sequence_groups
from rsdyn.stream.trajectories import TrajectoryStream


def resume_at(run: Run, identity: dict[str, Any]) -> Position | None:
    """Check that the checkpoint which the run resumes from is its own, and say where it was taken; None without one."""
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


def make_datamodule(
    run: Run, stream: TrajectoryStream, progress: Progress, riding: RideAlong | None
) -> ResidualStreamDataModule:
    """The training, validation and test batches of a stream; recording is told to who shows it and who rides along."""
    data = run.config.data
    listening = {} if riding is None else {"on_shard": riding.take}
    datamodule = ResidualStreamDataModule(
        stream,
        val_size=data.val_size,
        test_size=data.test_size,
        batch_by=data.batch_by,
        batch_size=data.batch_size,
        shuffle_shards=data.shuffle_shards,
        seed=run.config.seed,
        on_record=progress.recorded,
        stop=run.stop,
        **listening,
    )
    trainer = run.config.trainer
    n_processes = processes_here(run) * trainer.num_nodes
    check_max_steps(trainer.options, batches=datamodule.n_train_batches // n_processes)
    return datamodule


def make_autoencoder(run: Run, stream: TrajectoryStream) -> LitAutoencoder:
    """The autoencoder of the ``cae`` section for a stream, and how it is trained."""
    cae = run.config.cae
    return LitAutoencoder(
        autoencoder=autoencoder_arguments(cae, stream.n_units, stream.n_sublayers),
        n_sublayers=stream.n_sublayers,
        lr=cae.lr,
        warmup_steps=cae.warmup_steps,
        schedule=cae.schedule,
        plateau_factor=cae.plateau_factor,
        plateau_patience=cae.plateau_patience,
        bias_init=cae.bias_init,
    )


def make_ride_along(run: Run, stream: TrajectoryStream) -> RideAlong | None:
    """What measures the stream while it is recorded (``analysis.on_train``); None where nobody asked."""
    analysis = run.config.analysis
    if not analysis.on_train:
        return None
    check_settings(
        analysis,
        n_sequences=min(analysis.samples or stream.n_sequences, stream.n_sequences),
        n_trajectories=stream.n_trajectories(0, analysis.samples),
        n_sublayers=stream.n_sublayers,
        n_units=stream.n_units,
        sites_per_layer=len(stream.lm.site_names),
    )
    return RideAlong(
        analysis,
        groups=sequence_groups(stream.sequences, analysis.samples, resample=analysis.resample),
        seed=run.config.seed,
    )


class Callbacks(NamedTuple):
    """What rides along a training: the patience, the losses, the bar, and the two checkpoints."""

    patience: Patience
    history: History
    progress: Progress
    best: BestCheckpoint
    last: LastCheckpoint

    def kept(self, stream: TrajectoryStream) -> str:
        """What a training that is cut short leaves behind."""
        parts = []
        if stream.cache is not None:
            done = stream.n_sequences - stream.n_missing()
            parts.append(f"{done} of {stream.n_sequences} sequences are in the cache and will not be recorded again")
        path = self.best.best_model_path
        parts.append(f"the best autoencoder so far is {path}" if path else "no epoch was finished")
        if self.last.path.exists():
            parts.append(f"the same command resumes from {self.last.path}")
        return "; ".join(parts)

    def summary(self, module: LitAutoencoder, datamodule: ResidualStreamDataModule) -> TrainingSummary:
        """The training and the test that ``module`` has behind it."""
        assert self.best.best_model_score is not None, "an epoch was finished"
        return TrainingSummary(
            results=module.results,
            widths=module.autoencoder.widths,
            standardise=module.autoencoder.standardisation,
            n_parameters=sum(p.numel() for p in module.parameters()),
            epochs=len(self.history.val),
            best_epoch=self.history.best_epoch,
            best_val_loss=float(self.best.best_model_score),
            stopped_early=self.patience.stopped,
            losses={"train": self.history.train, "val": self.history.val, "lr": self.history.lr},
            seconds=self.last.seconds,
            dropped=datamodule.dropped,
        )


def make_callbacks(
    run: Run, datamodule: ResidualStreamDataModule, progress: Progress, identity: dict[str, Any]
) -> Callbacks:
    """Early stopping, losses and checkpoints of a run."""
    folder = run.folder / "checkpoints"
    last = LastCheckpoint(folder / LAST, run.stop, identity=identity, records_in=datamodule.records_in)
    return Callbacks(Patience(run.config.trainer.patience), History(), progress, BestCheckpoint(folder), last)


def fit(run: Run, trainer: L.Trainer, module: LitAutoencoder, datamodule: ResidualStreamDataModule) -> None:
    """Train, from the checkpoint that the run resumes from where it has one."""
    if run.resume is not None and trainer.is_global_zero:
        take_best_along(run.resume, run.folder / "checkpoints")
    trainer.fit(module, datamodule=datamodule, ckpt_path=run.resume, weights_only=True)
