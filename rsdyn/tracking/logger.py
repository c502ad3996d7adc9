"""Lightning's W&B logger, which never ends a training: what W&B refuses is lost, and named when the run closes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from rsdyn.tracking.sending import sending


class RunLogger(WandbLogger):
    """`WandbLogger` around a run of ours (`rsdyn.tracking.session.make_wandb_logger`).

    Attributes:
        lost: what W&B did not take, with the reason of the first time.
        logged: whether it was given losses or test results.
        variables: environment variables as they were before the run, None once it is closed.
    """

    def __init__(self, run: Any, *, project: str, save_dir: str, variables: Mapping[str, str | None]) -> None:
        super().__init__(experiment=run, project=project, save_dir=save_dir)
        self.lost: dict[str, str] = {}
        self.logged = False
        self.variables: Mapping[str, str | None] | None = variables

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.logged = True
        with sending(self, "losses and test results"):
            super().log_metrics(metrics, step)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log nothing: the run has the resolved config already, and the module's arguments would be there twice."""
