"""``RideAlong``: measure the stream while another module trains on it, so that one pass over the LM feeds both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning import LightningModule, Trainer

from rsdyn.analysis import measures as analysis
from rsdyn.analysis.probe import Grouped, ResidualStreamProbe
from rsdyn.metrics.running import CosineSimilarity, Speed
from rsdyn.stream.datamodule import ResidualStreamDataModule
from rsdyn.stream.text.groups import SequenceGroups
from rsdyn.stream.trajectory_datamodule import TrajectoryBatch


class RideAlong(L.Callback):
    """Measures the shards that a ``ResidualStreamDataModule`` hands out in its first epoch.

    Args:
        measures: which; of rotation, the turns of the mean trajectory; of pca, the variance along each component.
            What needs a second pass (cosine and speed without massive units, null models) is analyze.py's.
        samples: measure the first so many sequences; None takes all.
        groups: which of them an interval leaves out together; None takes each for itself.
        mi_estimator, keep, density_threshold: as in ``rsdyn.analysis.settings.AnalysisConfig``.

    ``results`` holds the numbers once the first epoch is over, by the names of
    :mod:`rsdyn.analysis.measures`, on all processes.
    """

    def __init__(
        self,
        *,
        measures: Sequence[str],
        samples: int | None = 1000,
        groups: SequenceGroups | None = None,
        mi_estimator: str = "kde",
        keep: int | None = 1000,
        density_threshold: float | None = None,
        seed: int = 0,
    ):
        self.measures, self.samples, self.groups, self.seed = tuple(measures), samples, groups, seed
        self.mi_estimator, self.keep, self.density_threshold = mi_estimator, keep, density_threshold
        self.results: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stream = self._datamodule(trainer).stream
        first_pass = [m for m in self.measures if m not in ("cosine", "velocity")]
        self.probe = ResidualStreamProbe(
            n_sublayers=stream.n_sublayers,
            n_units=stream.n_units,
            measures=first_pass,
            keep=self.keep,
            groups=self.groups,
        ).to(pl_module.device)
        n_groups = self.probe.n_groups
        self.cosine = Grouped(lambda: CosineSimilarity(stream.n_sublayers), n_groups).to(pl_module.device)
        self.speed = Grouped(lambda: Speed(stream.n_sublayers), n_groups).to(pl_module.device)

    def take(self, batch: TrajectoryBatch) -> None:
        """Count trajectories in, until the first epoch has ended; what the DataModule is given as ``on_shard``."""
        if self.results:
            return
        keep = slice(None) if self.samples is None else batch.sequence < self.samples
        chosen: Any = (None if t is None else t[keep].to(self.probe.device) for t in batch)
        batch = TrajectoryBatch(*chosen)
        x, group = batch.activations, self.probe.group_of(batch.sequence)
        if len(x) == 0:
            return
        self.probe.first_pass(batch)
        if "cosine" in self.measures:
            self.cosine.update(x, group)
        if "velocity" in self.measures:
            self.speed.update(x, group)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.results:
            return
        datamodule = self._datamodule(trainer)
        datamodule.train_statistics(complete=True)  # shards without a training sequence come here
        probe = self.probe
        probe.between_passes()
        if probe.pca is not None:
            self.results |= analysis.components(probe, self.seed)
        probe.second = None  # what PCA leaves unexplained takes a second pass
        probe.finish()
        out = analysis.counts(probe) | analysis.flags(probe, datamodule.stream.dtype)
        if "activations" in self.measures:
            out |= analysis.activations(probe, self.density_threshold)
        if "correlation" in self.measures:
            out |= analysis.correlation(probe)
        if "cosine" in self.measures:
            probe.cosine = self.cosine.states(lambda m: m.state)
            out |= analysis.cosine(probe)
        if "velocity" in self.measures:
            probe.speed = self.speed.states(lambda m: m.state)
            out |= analysis.velocity(probe)
        if "mutual_information" in self.measures:
            out |= analysis.information(probe, self.mi_estimator, self.seed)
        if "rotation" in self.measures:
            sites = len(datamodule.stream.lm.site_names)
            out |= analysis.rotations(probe, [], n=0, shared=False, window=8, sites_per_layer=sites, seed=self.seed)
        self.results |= {k: v.cpu() if hasattr(v, "cpu") else v for k, v in out.items()}
        del self.probe, self.cosine, self.speed

    @staticmethod
    def _datamodule(trainer: Trainer) -> ResidualStreamDataModule:
        return trainer.datamodule  # type: ignore[attr-defined]
