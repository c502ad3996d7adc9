"""The compressing autoencoder (CAE): stream vectors through a narrow bottleneck and back (paper 2.7, Fig. 3).

A plain module, so that it can be used without a Trainer: ``CompressingAutoencoder.from_checkpoint("best.ckpt")``.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self, final, get_args

import torch
from torch import Tensor, nn

from rsdyn.autoencoder.widths import Count, default_layers, geometric_widths, paper_layers
from rsdyn.dynamics.moments import Moments, pool
from rsdyn.dynamics.projection import Projection
from rsdyn.errors import UserError

Standardisation = Literal["none", "unit", "unit_sublayer"]
CHECKPOINT_CURE = "Give the best.ckpt in the checkpoints folder of a train.py run."


def _stack(widths: list[int]) -> nn.Sequential:
    """Linear, LayerNorm, ReLU for each step of ``widths``; the last step is linear alone."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(a, b))
        if i < len(widths) - 2:
            layers += [nn.LayerNorm(b), nn.ReLU()]
    return nn.Sequential(*layers)


@final
class CompressingAutoencoder(Projection):
    """Encoder and mirrored decoder over geometric widths, with the standardisation of its input inside.

    Args:
        d_in: width of the stream, ``D``.
        bottleneck: latent dimensions, ``K``.
        layers: the paper's ``k``, see :func:`geometric_widths` for ``count``; None for :func:`default_layers`,
            ``paper`` for :func:`paper_layers`.
        standardise: ``none`` (the paper), ``unit`` (zero mean and unit variance a unit), or ``unit_sublayer`` (a unit
            and sublayer, which takes the mean trajectory itself out). The statistics are buffers, set by
            :meth:`set_statistics` and stored in the checkpoint.
        n_sublayers: ``S``; needed for ``unit_sublayer``.

    ``encode`` and ``decode`` speak raw activations. The network itself works in the standardised space, where the loss
    is taken: :meth:`standardise`, :meth:`forward`.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        d_in: int,
        bottleneck: int = 2,
        layers: int | Literal["paper"] | None = None,
        *,
        count: Count = "widths",
        standardise: Standardisation = "none",
        n_sublayers: int | None = None,
    ) -> None:
        super().__init__()
        if standardise not in get_args(Standardisation):
            raise ValueError(f"standardise={standardise!r}: must be one of {', '.join(get_args(Standardisation))}.")
        if standardise == "unit_sublayer" and n_sublayers is None:
            raise ValueError("n_sublayers=None: standardise='unit_sublayer' needs the number of sublayers.")
        if layers is None:
            layers = default_layers(d_in, bottleneck, count)
        elif layers == "paper":
            layers = paper_layers(d_in, bottleneck)
        elif isinstance(layers, str):
            raise ValueError(f"layers={layers!r}: must be a whole number, 'paper' or None.")
        self.widths = geometric_widths(d_in, bottleneck, layers, count)
        self.standardisation = standardise
        self.encoder = _stack(self.widths)
        self.decoder = _stack(self.widths[::-1])
        shape = (n_sublayers, d_in) if standardise == "unit_sublayer" and n_sublayers else (d_in,)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))

    def set_statistics(self, statistics: Moments) -> int:
        """Take the standardisation from ``(S, D)`` moments of the training split.

        Returns how many entries are constant. A constant unit has no scale: it is left at 1, and so costs no loss.
        """
        if self.standardisation == "none":
            return 0
        used = pool(statistics) if self.standardisation == "unit" else statistics
        constant = used.constant
        self.mean.copy_(used.mean)
        self.scale.copy_(torch.where(constant, 1.0, used.std))
        return int(constant.sum())

    @torch.no_grad()
    def start_bias_at(self, statistics: Moments) -> None:
        """Start the decoder's last bias at the data mean, in the network's space (``cae.bias_init: mean``)."""
        last = self.decoder[-1]
        assert isinstance(last, nn.Linear)
        # after standardisation the mean is zero by construction, whichever of the two it was
        mean = pool(statistics).mean if self.standardisation == "none" else torch.zeros_like(statistics.mean[0])
        last.bias.copy_(mean)

    def standardise(self, x: Tensor, sublayer: Tensor | None = None) -> Tensor:
        """Raw activations ``(..., D)`` to the space of the loss; ``sublayer`` ``(...)`` for ``unit_sublayer``."""
        if self.standardisation == "none":
            return x
        mean, scale = self._statistics(sublayer)
        return (x - mean) / scale

    def unstandardise(self, x: Tensor, sublayer: Tensor | None = None) -> Tensor:
        """The inverse of :meth:`standardise`."""
        if self.standardisation == "none":
            return x
        mean, scale = self._statistics(sublayer)
        return x * scale + mean

    def _statistics(self, sublayer: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.standardisation != "unit_sublayer":
            return self.mean, self.scale
        if sublayer is None:
            raise ValueError(
                "sublayer=None: an autoencoder with standardise='unit_sublayer' needs each vector's sublayer."
            )
        return self.mean[sublayer], self.scale[sublayer]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents ``(..., K)`` and reconstruction ``(..., D)`` of *standardised* vectors ``(..., D)``."""
        z = self.encoder(x)
        return z, self.decoder(z)

    def encode(self, x: Tensor, sublayer: Tensor | None = None) -> Tensor:
        return self.encoder(self.standardise(x, sublayer))

    def decode(self, z: Tensor, sublayer: Tensor | None = None) -> Tensor:
        return self.unstandardise(self.decoder(z), sublayer)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> Self:
        """Rebuild the autoencoder of a checkpoint written by ``train.py``, on the CPU, in eval mode; no Trainer needed.

        Nothing in the file is executed (``weights_only``). Raises ``UserError`` when the file is not such a checkpoint.
        """
        hyper, state = read_checkpoint(path)
        if hyper.get("layers") in (None, "paper"):  # a rule chose, which may have been another: count them
            maps = sum(key.startswith("encoder.") and getattr(t, "ndim", 0) == 2 for key, t in state.items())
            hyper = {**hyper, "layers": maps + (hyper.get("count", "widths") == "widths")}
        try:
            model = cls(**hyper)
            model.load_state_dict(state)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"checkpoint={path}: its weights do not fit the autoencoder it describes, "
                f"{_brief(hyper)}. {CHECKPOINT_CURE}"
            ) from error
        return model.eval()


def read_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The autoencoder's constructor arguments and weights in a checkpoint, with every way it can be wrong explained.

    Nothing in the file is executed. Raises ``UserError`` for a file that is missing, damaged, not ours, or that holds
    anything but tensors and plain values.
    """
    content = load_plain(path, name="checkpoint", cure=CHECKPOINT_CURE)
    hyper = _entry(_entry(content, "hyper_parameters"), "autoencoder")
    weights = _entry(content, "state_dict")
    if not isinstance(hyper, dict) or not isinstance(weights, dict):
        raise UserError(f"checkpoint={path}: not made by rsdyn, it holds no autoencoder. {CHECKPOINT_CURE}")
    prefix = "autoencoder."
    return hyper, {k.removeprefix(prefix): v for k, v in weights.items() if str(k).startswith(prefix)}


def load_plain(path: str | Path, *, name: str, cure: str, map_location: Any = "cpu") -> Any:
    """What a file of ``torch.save`` holds: tensors and plain values; ``UserError`` for anything else, never executed.

    ``name`` is what the message calls the file (a key of the config), ``cure`` its last sentence.
    """
    variable = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    if os.environ.get(variable, "").lower() in ("1", "y", "yes", "true"):  # what PyTorch takes for true
        raise UserError(
            f"{variable}={os.environ[variable]}: it asks PyTorch to execute code found in checkpoints, which rsdyn "
            f"never does. Unset it (unset {variable}) and start again."
        )
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{name}={path}: no such file. {cure}")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # a flipped byte raises almost anything, AssertionError was seen
        raise UserError(
            f"{name}={path}: cannot be read ({type(error).__name__}); it is damaged, no checkpoint, or holds more "
            f"than tensors and plain values, which rsdyn does not load. {cure}"
        ) from error


def _entry(content: Any, key: str) -> Any:
    return content.get(key) if isinstance(content, dict) else None


def _brief(hyper: dict[str, Any]) -> str:
    text = ", ".join(f"{k}={v}" for k, v in hyper.items())
    return text if len(text) <= 200 else text[:200] + "…"
