"""The settings of the autoencoder: `cae.` keys."""

from dataclasses import dataclass
from typing import Literal

from rsdyn.options import LAYERS, SHARE, is_layers, is_share, setting


@dataclass
class CaeConfig:
    """The compressing autoencoder."""

    bottleneck: int = setting(2, "Units in the bottleneck, the latent dimensions.", low=1, also=("latent_dim",))
    layers: int | Literal["paper"] | None = setting(
        None,
        "k, the widths per half, input and bottleneck included, at least 2 (cae.count=maps counts maps instead). null: "
        "as many, up to the paper's ratio, as leave each inner layer cae.bottleneck + 4 units, 8 for 4096 to 2 and 5 "
        "for 128 to 2. paper: the paper's ratio, 10 and 6.",
        allowed=LAYERS,
        test=is_layers,
        also=("k", "depth"),
    )
    count: Literal["widths", "maps"] = setting("widths", "What cae.layers counts.")
    lr: float = setting(1e-3, "Learning rate of Adam.", above=0, also=("learning_rate",))
    standardise: Literal["none", "unit", "unit_sublayer"] = setting(
        "unit",
        "Scaling of the input: none (the paper), per unit, or per unit and sublayer, by the training split.",
        also=("standardize", "normalise", "normalize"),
    )
    bias_init: Literal["default", "mean"] = setting(
        "default", "Start of the decoder's last bias: PyTorch's, or the data mean."
    )
    warmup_steps: int = setting(
        200, "Steps over which the learning rate rises from 0; 0 is the paper's.", low=0, also=("warmup",)
    )
    schedule: Literal["plateau", "constant"] = setting(
        "plateau",
        "Learning rate after that: lowered wherever the validation loss stands still, or constant (the paper).",
        also=("lr_schedule", "scheduler"),
    )
    plateau_factor: float = setting(
        0.5, "What the learning rate is multiplied by on a plateau.", allowed=SHARE, test=is_share
    )
    plateau_patience: int = setting(
        4,
        "Epochs in a row without a better validation loss that are not yet a plateau (trainer.patience of them end the "
        "training).",
        low=0,
    )
