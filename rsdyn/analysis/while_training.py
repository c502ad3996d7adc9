"""``RideAlong``: measure the stream while another module trains on it, so that one pass over the LM feeds both."""

from __future__ import annotations

import lightning as L
from lightning import LightningModule, Trainer

from rsdyn.analysis.collected import Collected
from rsdyn.analysis.measure import How
from rsdyn.analysis.results import ConditionResults, on_cpu
from rsdyn.analysis.settings import AnalysisConfig
from rsdyn.analysis.streams import measure_stream
from rsdyn.stream.datamodule import ResidualStreamDataModule
from rsdyn.stream.text.groups import SequenceGroups
from rsdyn.stream.trajectory_datamodule import TrajectoryBatch


class RideAlong(L.Callback):
    """Measures the shards that a ``ResidualStreamDataModule`` hands out in its first epoch.

    Args:
        settings: what to measure, of how many sequences; what needs a second pass (curves without massive units, what
            components explain) and null models are analyze.py's.
        groups: which sequences an interval leaves out together; None takes each for itself.
        seed: of what is random.

    ``results`` holds the numbers once the first epoch is over, on all processes.
    """

    def __init__(self, settings: AnalysisConfig, *, groups: SequenceGroups | None = None, seed: int = 0) -> None:
        self.settings, self.groups, self.seed = settings, groups, seed
        self.results: ConditionResults | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stream = self._datamodule(trainer).stream
        self.collected = Collected(
            n_sublayers=stream.n_sublayers,
            n_units=stream.n_units,
            measures=self.settings.measures,
            keep=self.settings.keep,
            components=self.settings.components,
            groups=self.groups,
            sites_per_layer=len(stream.lm.site_names),
            once=True,
        ).to(pl_module.device)

    def take(self, batch: TrajectoryBatch) -> None:
        """Count trajectories in, until the first epoch has ended; what the DataModule is given as ``on_shard``."""
        if self.results is not None:
            return
        samples, device = self.settings.samples, self.collected.frozen_steps.device
        keep = slice(None) if samples is None else batch.sequence < samples
        chosen = TrajectoryBatch(*(None if t is None else t[keep].to(device) for t in batch))  # type: ignore[arg-type]
        if len(chosen.activations):
            self.collected.first_pass(chosen)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.results is not None:
            return
        datamodule = self._datamodule(trainer)
        datamodule.train_statistics(complete=True)  # shards without a training sequence come here
        self.collected.between_passes()
        self.collected.finish()
        how = How(self.settings, len(datamodule.stream.lm.site_names), self.seed, nulls=False)
        self.results = on_cpu(measure_stream(self.collected, how, datamodule.stream.dtype))
        del self.collected

    @staticmethod
    def _datamodule(trainer: Trainer) -> ResidualStreamDataModule:
        return trainer.datamodule  # type: ignore[attr-defined]
