"""The settings of the autoencoder: `cae.` keys."""

from dataclasses import dataclass

from rsdyn.options import (
    setting,
)


@dataclass
class CaeConfig:
    """The compressing autoencoder."""

    bottleneck: int = setting(2, "Units in the bottleneck, the latent dimensions.", low=1, also=("latent_dim",))
    layers: int | None = setting(
        None,
        "k, the widths per half, input and bottleneck included, at least 2 (cae.count=maps counts maps instead); "
        "null keeps the paper's ratio: 10 for 4096 to 2, 6 for 128 to 2.",
        low=1,
        also=("k", "depth"),
    )
    count: str = setting("widths", "What cae.layers counts.", choices=("widths", "maps"))
    lr: float = setting(1e-3, "Learning rate of Adam.", above=0, also=("learning_rate",))
    standardise: str = setting(
        "unit",
        "Scaling of the input: none (the paper), per unit, or per unit and sublayer, by the training split.",
        choices=("none", "unit", "unit_sublayer"),
        also=("standardize", "normalise", "normalize"),
    )
    bias_init: str = setting(
        "default", "Start of the decoder's last bias: PyTorch's, or the data mean.", choices=("default", "mean")
    )
    warmup_steps: int = setting(0, "Steps over which the learning rate rises from 0.", low=0)
