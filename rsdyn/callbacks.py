"""What rides along a training run: the progress bars, and the losses epoch by epoch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import lightning as L
from tqdm.auto import tqdm

from rsdyn.stream.trajectories import TrajectoryStream


class Progress(L.Callback):
    """A bar over the sequences recorded while the first epoch trains, then a bar over the epochs; first process only.

    Lightning's own bar knows nothing of recording, during which its first epoch would look stuck. One bar at a time,
    since two that live at once leave torn lines behind.
    """

    def __init__(self, stream: TrajectoryStream, own_missing: Callable[[], int]):
        self.stream, self.own_missing = stream, own_missing
        self.recording: tqdm | None = None
        self.training: tqdm | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        missing = self.own_missing()
        if missing:
            where = f" (process 1 of {trainer.world_size})" if trainer.world_size > 1 else ""
            self.recording = _bar(total=missing, desc=f"recording, epoch 1{where}", unit=" sequences")
            self.stream.on_record = self.recording.update
        else:
            self._open_training(trainer)

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
            self.stream.on_record = lambda n: None

    def _close(self) -> None:
        self._close_recording()
        if self.training is not None:
            self.training.refresh()
            self.training.close()
            self.training = None


def _bar(**options: Any) -> tqdm:
    # without a terminal a line every ten seconds is enough for a log
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(dynamic_ncols=True, mininterval=interval, **options)


class History(L.Callback):
    """Training and validation loss of each epoch, ``(epoch, value)`` pairs, epochs counted from 1."""

    def __init__(self) -> None:
        self.train: list[tuple[int, float]] = []
        self.val: list[tuple[int, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for key, pairs in (("train/loss", self.train), ("val/loss", self.val)):
            if key in trainer.callback_metrics:
                pairs.append((trainer.current_epoch + 1, float(trainer.callback_metrics[key])))

    @property
    def best_epoch(self) -> int | None:
        """The epoch with the lowest validation loss."""
        return min(self.val, key=lambda pair: pair[1])[0] if self.val else None
