"""``ResidualStreamProbe``: collect what the measures need through ``trainer.test``, on one process or several."""

from __future__ import annotations

import lightning as L

from rsdyn.analysis.collected import Collected
from rsdyn.stream.trajectory_datamodule import TrajectoryBatch


class ResidualStreamProbe(L.LightningModule):
    """Feeds ``collected`` in one pass over the stream or two; use with a ``TrajectoryDataModule`` of its ``n_passes``.

    Args:
        collected: what is fed, new.
    """

    def __init__(self, collected: Collected) -> None:
        super().__init__()
        self.collected = collected
        self._between = False

    def test_step(self, batch: TrajectoryBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx == 0:
            self.collected.first_pass(batch)
            return
        self._end_first_pass()
        self.collected.second_pass(batch)

    def on_test_epoch_end(self) -> None:
        self._end_first_pass()
        self.collected.finish()

    def _end_first_pass(self) -> None:
        if not self._between:
            self._between = True
            self.collected.between_passes()
