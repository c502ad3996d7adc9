"""What rides along a run: progress bars, losses epoch by epoch, early stopping, an ear for signals."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping
from tqdm.auto import tqdm

from rsdyn.labels import NAMES
from rsdyn.ranks import is_rank_zero
from rsdyn.run.signals import Stop
from rsdyn.stream.datamodule import ResidualStreamDataModule
from rsdyn.stream.trajectory_datamodule import TrajectoryDataModule


class Progress(L.Callback):
    """A bar over the sequences recorded while the first epoch trains, then a bar over the epochs; first process only.

    Lightning's own bar knows nothing of recording, during which its first epoch would look stuck. One bar at a time,
    since two that live at once leave torn lines behind.
    """

    def __init__(self) -> None:
        self.recording: tqdm | None = None
        self.training: tqdm | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        missing = _datamodule(trainer).n_own_missing()
        if missing:
            where = f" (process 1 of {trainer.world_size})" if trainer.world_size > 1 else ""
            self.recording = _bar(total=missing, desc=f"recording, epoch 1{where}", unit=" sequences")
        else:
            self._open_training(trainer)

    def recorded(self, n: int) -> None:
        """Move the bar on by ``n`` sequences that went through the language model."""
        if self.recording is not None:
            self.recording.update(n)

    def _open_training(self, trainer: L.Trainer) -> None:
        self.training = _bar(total=trainer.max_epochs, desc="training")
        self.training.bar_format = "{desc}: {n:.1f}/{total} epochs |{bar}| {elapsed}<{remaining}{postfix}"

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        batches = trainer.num_training_batches
        batch_idx = args[-1]
        if self.training is not None and (batch_idx + 1) % max(1, int(batches) // 20) == 0:
            self.training.update(trainer.current_epoch + (batch_idx + 1) / batches - self.training.n)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._close_recording()
        if self.training is None:
            self._open_training(trainer)
        assert self.training is not None
        metrics = trainer.callback_metrics
        shown = {k: f"{float(metrics[k]):.4g}" for k in ("train/loss", "val/loss") if k in metrics}
        self.training.set_postfix(shown, refresh=False)
        self.training.update(trainer.current_epoch + 1 - self.training.n)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close_recording(self) -> None:
        if self.recording is not None:
            self.recording.close()
            self.recording = None

    def _close(self) -> None:
        self._close_recording()
        if self.training is not None:
            self.training.refresh()
            self.training.close()
            self.training = None


def _datamodule(trainer: L.Trainer) -> ResidualStreamDataModule:
    datamodule: ResidualStreamDataModule = trainer.datamodule  # type: ignore[attr-defined]
    return datamodule


def _trajectories(trainer: L.Trainer) -> TrajectoryDataModule:
    datamodule: TrajectoryDataModule = trainer.datamodule  # type: ignore[attr-defined]
    return datamodule


class ProbeProgress(L.Callback):
    """A bar over the sequences that a probe records, else over the shards of each pass; first process only."""

    def __init__(self, steps: Steps, name: str) -> None:
        self.steps, self.name = steps, steps.named(name)
        self.recording: tqdm | None = None
        self.reading: tqdm | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.steps.done("start", is_step=False)  # all processes are there

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        missing = _trajectories(trainer).n_own_missing()
        if trainer.is_global_zero and missing:
            where = f" (process 1 of {trainer.world_size})" if trainer.world_size > 1 else ""
            self.recording = _bar(
                total=missing, desc=f"{self.name}: recording{where}", unit=" sequences", leave=not sys.stderr.isatty()
            )

    def recorded(self, n: int) -> None:
        """Move the bar on by ``n`` sequences that went through the language model."""
        if self.recording is not None:
            self.recording.update(n)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and trainer.is_global_zero and (self.recording is None or dataloader_idx > 0):
            self._close()
            passes = _trajectories(trainer).passes
            which = f", pass {dataloader_idx + 1} of {passes}" if passes > 1 else ""
            batches = trainer.num_test_batches[dataloader_idx]
            self.reading = _bar(
                total=batches, desc=f"{self.name}: reading{which}", unit=" shards", leave=not sys.stderr.isatty()
            )

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self.reading is not None:
            self.reading.update()

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        for bar in (self.recording, self.reading):
            if bar is not None:
                bar.close()
        self.recording = self.reading = None


class Steps:
    """The steps of a run, one after another: which one it is at, in front of every bar, and the seconds of each part.

    Args:
        total: how many there are.
        started: when the first one began, in seconds since the epoch.
    """

    def __init__(self, total: int, started: float) -> None:
        self.total, self.number = total, 1
        self.seconds: dict[str, float] = {}
        self._last = started

    def done(self, part: str, *, is_step: bool = True) -> None:
        """Count the time since the last call for this part, and go on to the next step."""
        now = time.time()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now
        self.number = min(self.total, self.number + is_step)

    def named(self, what: str) -> str:
        """What a bar of this step says."""
        named = ": ".join(NAMES.get(part, part) for part in what.split(": "))
        return f"step {self.number} of {self.total}, {named}"

    def bar(self, description: str, total: int, unit: str = "units") -> AbstractContextManager[Callable[[int], object]]:
        """A bar over a part of this step, as :func:`stage_bar`."""
        return stage_bar(self.named(description), total, unit, leave=not sys.stderr.isatty())


@contextmanager
def stage_bar(
    description: str, total: int, unit: str = "units", *, leave: bool = True
) -> Iterator[Callable[[int], object]]:
    """A bar over one stage of the work, on the first process; gives the function that moves it on.

    ``leave`` says whether it stays when the stage is done.
    """
    if not is_rank_zero():
        yield lambda n: None
        return
    with _bar(total=total, desc=description, unit=f" {unit}", leave=leave) as bar:
        yield bar.update


def _bar(**options: Any) -> tqdm:
    # without a terminal a line every ten seconds is enough for a log
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(dynamic_ncols=True, mininterval=interval, **options)


class Guard(L.Callback):
    """Lets a signal end a run between batches where nothing defers it."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self.stop.check()

    def on_train_epoch_start(self, *args: Any, **kwargs: Any) -> None:
        self.stop.check()


class Patience(EarlyStopping):
    """Early stopping on the validation loss that a run which goes on does not forget.

    Lightning starts each fit with the intention to train, and takes the patience from the checkpoint: a run that had
    stopped would train an epoch more, and a longer patience would do nothing.
    """

    def __init__(self, patience: int) -> None:
        super().__init__("val/loss", patience=patience)

    @cached_property
    def state_key(self) -> str:  # Lightning asks for it in each hook of each step
        return super().state_key

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.stopped_epoch and self.wait_count < self.patience:
            self.stopped_epoch = 0  # it has more patience now
        trainer.should_stop = self.wait_count >= self.patience

    @property
    def stopped(self) -> bool:
        return self.wait_count >= self.patience


class History(L.Callback):
    """Losses and learning rate of each epoch, ``(epoch, value)`` pairs, epochs counted from 1.

    ``lr`` is the rate that an epoch ends with, after its validation.
    """

    def __init__(self) -> None:
        self.train: list[tuple[int, float]] = []
        self.val: list[tuple[int, float]] = []
        self.lr: list[tuple[int, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for key, pairs in (("train/loss", self.train), ("val/loss", self.val)):
            if key in trainer.callback_metrics:
                pairs.append((trainer.current_epoch + 1, float(trainer.callback_metrics[key])))
        self.lr.append((trainer.current_epoch + 1, float(trainer.optimizers[0].param_groups[0]["lr"])))

    def state_dict(self) -> dict[str, Any]:
        return {"train": list(self.train), "val": list(self.val), "lr": list(self.lr)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train, self.val, self.lr = (list(state_dict[key]) for key in ("train", "val", "lr"))

    @property
    def best_epoch(self) -> int | None:
        """The epoch with the lowest validation loss."""
        return min(self.val, key=lambda pair: pair[1])[0] if self.val else None
