"""``fit_autoencoder``: the paper's compressing autoencoder on trajectories at hand, judged beside PCA."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from rsdyn.autoencoder.model import CompressingAutoencoder
from rsdyn.autoencoder.training import LitAutoencoder
from rsdyn.notebook.quiet import quiet
from rsdyn.run.checkpoints import BestCheckpoint
from rsdyn.run.progress import History, Patience
from rsdyn.stream.datamodule import ResidualStreamDataModule
from rsdyn.stream.kept import KeptStream
from rsdyn.stream.recorded import Trajectories


@dataclass(frozen=True, repr=False)
class FittedAutoencoder:
    """A trained autoencoder, and how it and PCA did on sequences that neither saw.

    Attributes:
        model: encodes and decodes activations ``(..., D)``; the weights of the best epoch.
        explained_variance, explained_variance_pca: of the whole test split, in the space of the loss.
        explained_variance_raw, explained_variance_raw_pca: the same in raw activations.
        by_sublayer, by_sublayer_pca: ``(S,)``, about each sublayer's own mean (paper, Fig. 3D).
        mean_latents: ``(S, K)``, the mean path (Fig. 3B).
        latent_participation: participation ratio of the latents: 1 on a line, ``K`` where they fill their space.
        collapsed: whether the autoencoder is no better than the mean, barely moves, or lies on a line.
        widths: of the encoder, input and bottleneck included.
        losses: ``(epoch, training loss)`` and ``(epoch, validation loss)`` pairs.
        results: everything that the test measured, by name.
    """

    model: CompressingAutoencoder
    losses: dict[str, list[tuple[int, float]]]
    best_epoch: int | None
    results: dict[str, Any]

    @property
    def widths(self) -> list[int]:
        return list(self.model.widths)

    @property
    def explained_variance(self) -> float:
        return float(self.results["r2_cae"])

    @property
    def explained_variance_pca(self) -> float:
        return float(self.results["r2_pca"])

    @property
    def explained_variance_raw(self) -> float:
        return float(self.results["r2_cae_raw"])

    @property
    def explained_variance_raw_pca(self) -> float:
        return float(self.results["r2_pca_raw"])

    @property
    def by_sublayer(self) -> Tensor:
        return self.results["ev_cae"]

    @property
    def by_sublayer_pca(self) -> Tensor:
        return self.results["ev_pca"]

    @property
    def mean_latents(self) -> Tensor:
        return self.results["mean_latents"]

    @property
    def latent_participation(self) -> float:
        return float(self.results["latent_participation"])

    @property
    def collapsed(self) -> bool:
        return bool(self.results["collapsed"])

    def encode(self, activations: Tensor) -> Tensor:
        """Latents ``(..., K)`` of activations ``(..., D)``."""
        with torch.inference_mode():
            return self.model.encode(activations.to(torch.float32))

    def decode(self, latents: Tensor) -> Tensor:
        """Activations ``(..., D)`` of latents ``(..., K)``."""
        with torch.inference_mode():
            return self.model.decode(latents)

    def __repr__(self) -> str:
        k = self.widths[-1]
        words = (
            f"FittedAutoencoder({self.widths[0]} to {k}: explained variance {self.explained_variance:.3f}, PCA's "
            f"{self.explained_variance_pca:.3f}"
        )
        filled = f", latents fill {self.latent_participation:.2f} of {k} dimensions" if k > 1 else ""
        return words + filled + ("; collapsed)" if self.collapsed else ")")


def fit_autoencoder(
    x: Trajectories,
    bottleneck: int = 2,
    *,
    layers: int | None = None,
    standardise: str = "unit",
    lr: float = 1e-3,
    batch_size: int = 512,
    max_epochs: int = 100,
    patience: int = 10,
    val_size: float = 0.1,
    test_size: float = 0.15,
    device: str = "auto",
    seed: int = 0,
) -> FittedAutoencoder:
    """Train the compressing autoencoder with early stopping and test it beside PCA (paper 2.7, Fig. 3).

    Sequences, not vectors, are split into training, validation and test, so that no text is in two of them.

    Args:
        x: what :func:`rsdyn.record` gave.
        bottleneck: ``K``, the latent dimensions.
        layers: widths per half, input and bottleneck included; default a rule that does not starve the bottleneck.
        standardise: ``unit``, ``unit_sublayer``, or ``none`` (the paper).
        lr: Adam's learning rate.
        batch_size: vectors in a batch, shuffled across sequences.
        max_epochs: most passes over the training split.
        patience: epochs without a better validation loss before training stops.
        val_size, test_size: fractions of the sequences, or their numbers.
        device: ``auto`` (a GPU if there is one), ``cpu`` or ``gpu``.
        seed: of the split, the order and the weights.

    Raises:
        UserError: too few sequences to split, a bottleneck wider than the stream, a setting that is not allowed.
        TypeError: where ``x`` is not :class:`~rsdyn.stream.recorded.Trajectories`.
    """
    if not isinstance(x, Trajectories):
        raise TypeError(f"x: {type(x).__name__} is not taken; give Trajectories, as rsdyn.record does.")
    stream = KeptStream(x)
    L.seed_everything(seed, verbose=False)
    datamodule = ResidualStreamDataModule(
        stream, val_size=val_size, test_size=test_size, batch_size=batch_size, seed=seed
    )
    module = LitAutoencoder(
        autoencoder={
            "d_in": stream.n_units,
            "bottleneck": bottleneck,
            "layers": layers,
            "standardise": standardise,
            "n_sublayers": stream.n_sublayers,
        },
        n_sublayers=stream.n_sublayers,
        lr=lr,
    )
    history = History()
    with tempfile.TemporaryDirectory() as folder, quiet():
        best = BestCheckpoint(Path(folder))
        trainer = L.Trainer(
            max_epochs=max_epochs,
            accelerator="cpu" if device == "auto" and not torch.cuda.is_available() else device,
            devices=1,
            logger=False,
            callbacks=[Patience(patience), history, best],
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        trainer.fit(module, datamodule=datamodule)
        model = CompressingAutoencoder.from_checkpoint(best.best_model_path)
        module.autoencoder.load_state_dict(model.state_dict())
        trainer.test(module, datamodule=datamodule, verbose=False)
    return FittedAutoencoder(
        model, {"train": history.train, "val": history.val}, history.best_epoch, dict(module.results)
    )
