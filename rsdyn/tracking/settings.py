"""The settings of Weights & Biases: `tracking.` keys."""

from dataclasses import dataclass
from typing import Literal

from rsdyn.options import (
    setting,
)


@dataclass
class TrackingConfig:
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = setting(
        "auto",
        "auto is online when a W&B key is there, else offline.",
        also=("wandb", "logger"),
    )
    project: str | None = setting(None, "Project that the run belongs to; null is $WANDB_PROJECT, else rsdyn.")
    entity: str | None = setting(None, "User or team that owns the project; null is $WANDB_ENTITY, else the key's own.")
    artifacts: bool = setting(
        True, "Whether results, the best checkpoint and the cache's manifest become artifacts; shards never do."
    )
