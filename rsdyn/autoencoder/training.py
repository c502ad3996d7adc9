"""``LitAutoencoder``: how the compressing autoencoder is trained and judged (paper 2.7, METHOD section 8)."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau

from rsdyn.autoencoder.model import CompressingAutoencoder
from rsdyn.autoencoder.summary import collapse_reasons
from rsdyn.dynamics.dimension import participation
from rsdyn.dynamics.moments import (
    Covariance,
    Moments,
    covariance,
    explained_variance,
    massive_units,
    merge_covariance,
    pool,
)
from rsdyn.dynamics.projection import PCA
from rsdyn.errors import NonFiniteError
from rsdyn.metrics.running import MeanLoss, SquaredError, StreamCovariance, StreamMoments
from rsdyn.metrics.samples import FirstSequences
from rsdyn.private import LeanModule, resumes_within_epoch
from rsdyn.stream.datamodule import ResidualStreamDataModule, VectorBatch

RECONSTRUCTIONS = ("cae", "pca", "line", "cae_raw", "pca_raw")  # line: with the latents put on their first component


class LitAutoencoder(LeanModule):
    """Train a :class:`CompressingAutoencoder` on stream vectors; test it beside PCA with as many components.

    Args:
        autoencoder: the constructor arguments of :class:`CompressingAutoencoder`; kept in the checkpoint, from which it
            is rebuilt.
        n_sublayers: ``S``.
        lr: Adam's learning rate (the paper: 1e-3).
        warmup_steps: steps over which the rate rises linearly from near zero (the paper: none).
        schedule: ``plateau`` lowers the rate where the validation loss stands still, ``constant`` (the paper) does not.
        plateau_factor: what the rate is multiplied by then.
        plateau_patience: validations in a row without a better loss that are not yet a plateau.
        bias_init: start of the decoder's last bias, ``default`` (PyTorch's) or ``mean`` (the data mean).

    The statistics that standardise the input are those of the training split, and the first epoch trains while it
    records: they are taken from what has been seen, refreshed whenever the number of steps has doubled, and are exact
    and final before the first validation. After ``trainer.test``, ``results`` holds everything that was measured, and
    in words as ``collapse`` what of it says that the autoencoder collapsed.
    """

    def __init__(
        self,
        *,
        autoencoder: dict[str, Any],
        n_sublayers: int,
        lr: float = 1e-3,
        warmup_steps: int = 200,
        schedule: Literal["plateau", "constant"] = "plateau",
        plateau_factor: float = 0.5,
        plateau_patience: int = 4,
        bias_init: Literal["default", "mean"] = "default",
    ) -> None:
        super().__init__()
        if schedule not in ("plateau", "constant"):
            raise ValueError(f"schedule={schedule!r}: must be plateau or constant.")
        self.save_hyperparameters()
        self.lr, self.warmup_steps, self.bias_init = lr, warmup_steps, bias_init
        self.schedule, self.plateau_factor, self.plateau_patience = schedule, plateau_factor, plateau_patience
        self.n_sublayers = n_sublayers
        self.autoencoder = CompressingAutoencoder(**autoencoder)
        self.train_loss, self.val_loss, self.val_mse = MeanLoss(), MeanLoss(), MeanLoss()
        self._train_loss_so_far: Tensor | None = None
        self._logs_train_loss = False
        self._untold: Tensor | None = None  # the loss of this step, where it is not one that is logged
        self.results: dict[str, Any] = {}

    # -- training ------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        # one kernel for all parameters: a step of the small autoencoder takes 3.4 ms instead of 5.1 on a CPU. Not with
        # float16, where it would unscale the gradients itself and Lightning could not clip them.
        fused = self.trainer.precision != "16-mixed"
        optimizer = torch.optim.Adam(self.autoencoder.parameters(), lr=self.lr, fused=fused)
        schedulers: list[dict[str, Any]] = []
        if self.warmup_steps > 0:
            rise = LinearLR(optimizer, start_factor=1e-3, total_iters=self.warmup_steps)
            schedulers.append({"scheduler": rise, "interval": "step"})
        if self.schedule == "plateau":
            fall = ReduceLROnPlateau(optimizer, factor=self.plateau_factor, patience=self.plateau_patience)
            # Lightning saves it and never steps it: it would do so after the epoch's checkpoint was written, and a run
            # that resumes from there would miss the step. See on_validation_epoch_end.
            schedulers.append({"scheduler": fall, "monitor": "val/loss", "frequency": sys.maxsize})
        return [optimizer], schedulers

    def _look_for_plateau(self, loss: Tensor) -> None:
        if self.trainer.state.fn != "fit" or self.trainer.sanity_checking:
            return
        for each in self.trainer.lr_scheduler_configs:
            if isinstance(each.scheduler, ReduceLROnPlateau):
                each.scheduler.step(float(loss))

    def on_train_epoch_start(self) -> None:
        self._logs_train_loss = False

    def on_train_batch_start(self, batch: VectorBatch, batch_idx: int) -> None:
        if self.current_epoch > 0:
            return
        if batch_idx == 0:
            statistics = self._refresh_statistics()
            if self.bias_init == "mean" and self.global_step == 0 and statistics is not None:
                self.autoencoder.start_bias_at(statistics)
        elif batch_idx >= 16 and batch_idx & (batch_idx - 1) == 0:
            self._refresh_statistics()

    def on_validation_start(self) -> None:
        if self.current_epoch == 0 and not self.trainer.sanity_checking:
            self._refresh_statistics(complete=True)

    def _refresh_statistics(self, *, complete: bool = False) -> Moments | None:
        if self.autoencoder.standardisation == "none" and self.bias_init == "default":
            return None
        local = self._datamodule.train_statistics(complete=complete)
        total = self._sum_moments(local)
        self.autoencoder.set_statistics(total)
        for name in ("mean", "scale"):
            wrong = (~torch.isfinite(getattr(self.autoencoder, name))).nonzero()
            if len(wrong):
                *sublayer, unit = wrong[0].tolist()
                where = f"sublayer {sublayer[0]}, unit {unit}" if sublayer else f"unit {unit}"
                raise NonFiniteError(
                    f"the {name} that standardises the input is not finite at {where}, in epoch {self.current_epoch}. "
                    "Check the LM's weights, or use standardise=none."
                )
        return total

    def _reconstruct(self, batch: VectorBatch) -> tuple[Tensor, Tensor]:
        """What comes back of the input, and the input, both standardised."""
        x = self.autoencoder.standardise(batch.x.to(self.dtype), batch.sublayer)
        return self.autoencoder(x)[1], x

    def training_step(self, batch: VectorBatch, batch_idx: int) -> Tensor:
        loss = mse_loss(*self._reconstruct(batch))
        # on a GPU the look costs a wait for it; what slips through is caught in the mean, and before each checkpoint
        if (batch_idx % 20 == 0 or loss.device.type == "cpu") and not math.isfinite(loss.item()):
            raise self._not_finite(loss, batch, f"the training loss is {loss.item()} in epoch {self.current_epoch}, ")
        self._log_loss(loss.detach(), len(batch.x))
        return loss

    def _log_loss(self, loss: Tensor, n: int) -> None:
        # Lightning's log() takes longer than a step of the small autoencoder: it is called where it has an effect
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        is_due = every > 0 and (self.global_step + 1) % every == 0
        self._untold = None if is_due else loss
        if is_due:
            self.log("train/batch_loss", loss, on_step=True, on_epoch=False)
        # a metric of our own, and not Lightning's mean, because it goes into the checkpoint in the middle of an epoch
        self.train_loss.update(loss, n)
        if not self._logs_train_loss:
            self._logs_train_loss = True
            self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)  # the metric itself, read at the end

    def on_train_batch_end(self, outputs: Any, batch: VectorBatch, batch_idx: int) -> None:
        # asked to stop, Lightning logs this step whatever its number, with the last value that it was told
        if self.trainer.should_stop and self._untold is not None:
            self.log("train/batch_loss", self._untold, on_step=True, on_epoch=False)

    def _not_finite(self, loss: Tensor, batch: VectorBatch, what: str) -> NonFiniteError:
        """Which number went wrong first: a parameter, an activation, or what the network makes of one."""
        cure = f"Lower `lr` (now {self.lr:g}), raise `warmup_steps`, or set standardise=unit."
        wrong = not_finite_name(dict(self.autoencoder.named_parameters()))
        if wrong is not None:
            return NonFiniteError(f"{what}step {self.global_step}: {wrong} of the autoencoder is not finite. {cure}")
        with torch.no_grad():
            x = self.autoencoder.standardise(batch.x.to(self.dtype), batch.sublayer)
            error = (self.autoencoder(x)[1] - x).square().sum(-1)
        rows = (~torch.isfinite(error)).nonzero().flatten()
        row = int(rows[0]) if len(rows) else int(error.argmax())
        where = f"sublayer {int(batch.sublayer[row])} of sequence {int(batch.sequence[row])}"
        at_fault = "the activation itself" if not torch.isfinite(batch.x[row]).all() else "its reconstruction"
        return NonFiniteError(f"{what}step {self.global_step}, at {where} ({at_fault}). {cure}")

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        wrong = not_finite_name(checkpoint["state_dict"])
        if wrong is not None:
            raise NonFiniteError(
                f"{wrong} is not finite after step {self.global_step}, in epoch {self.current_epoch}, so no checkpoint "
                f"is written. Lower `lr` (now {self.lr:g}), raise `warmup_steps`, or set standardise=unit."
            )
        so_far = torch.zeros(self.trainer.world_size, 2, dtype=torch.float64)
        so_far[self.global_rank, 0] = float(self.train_loss.total)
        so_far[self.global_rank, 1] = float(self.train_loss.n)
        checkpoint["train_loss"] = self._sum(so_far).cpu()  # one row per process

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._train_loss_so_far = checkpoint["train_loss"]

    def on_train_start(self) -> None:
        if self._train_loss_so_far is not None and resumes_within_epoch(self.trainer):  # in the middle of an epoch
            self.train_loss.total, self.train_loss.n = self._train_loss_so_far[self.global_rank].to(self.device).clone()
        self._train_loss_so_far = None
        self._logs_train_loss = False

    def validation_step(self, batch: VectorBatch, batch_idx: int) -> None:
        if len(batch.x):
            reconstruction, x = self._reconstruct(batch)
            loss = mse_loss(reconstruction, x)
            if loss.device.type == "cpu" and not torch.isfinite(loss):
                what = f"the validation loss is {loss.item()} after epoch {self.current_epoch}, "
                raise self._not_finite(loss, batch, what)
            self.val_loss.update(loss, len(batch.x))
            raw = self.autoencoder.unstandardise(reconstruction, batch.sublayer)
            self.val_mse.update(mse_loss(raw, batch.x.to(self.dtype)), len(batch.x))

    def on_validation_epoch_end(self) -> None:
        # compute() sums over the processes: each logs the same value
        loss = self.val_loss.compute()
        self.val_loss.reset()
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"the validation loss is {loss.item()} after epoch {self.current_epoch}, so this epoch is not kept. "
                f"Lower `lr` (now {self.lr:g}), raise `warmup_steps`, or set standardise=unit."
            )
        self.log("val/loss", loss.to(torch.float32), sync_dist=True)
        self._look_for_plateau(loss)
        # in raw activations: the loss, in the space that cae.standardise makes, ranks no two of its values
        self.log("val/mse", self.val_mse.compute().to(torch.float32), sync_dist=True)
        self.val_mse.reset()

    # -- test ----------------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        shape = (self.n_sublayers, self.autoencoder.widths[0])
        n_latent = self.autoencoder.widths[-1]
        self._pca, self._pca_raw, self._line, train = self._fit_pca(n_latent)
        self._massive = massive_units(train.mean)
        self._n_constant = int(pool(train).constant.sum())
        self._data = StreamMoments(*shape).to(self.device)
        self._data_raw = StreamMoments(*shape).to(self.device)
        self._errors = {name: SquaredError(*shape).to(self.device) for name in RECONSTRUCTIONS}
        self._latents = StreamMoments(self.n_sublayers, n_latent).to(self.device)
        self._latent_covariance = StreamCovariance(n_latent).to(self.device)
        self._distances = StreamMoments(self.n_sublayers - 1).to(self.device)
        self._samples = FirstSequences(1000).to(self.device)

    def test_step(self, batch: VectorBatch, batch_idx: int) -> None:
        if len(batch.x) == 0:
            return
        raw = batch.x.to(self.dtype)
        x = self.autoencoder.standardise(raw, batch.sublayer)
        latents, reconstruction = self.autoencoder(x)

        def by_sequence(v: Tensor) -> Tensor:
            wide = torch.promote_types(v.dtype, torch.float32)  # under mixed precision the network speaks bf16
            return v.to(wide).reshape(-1, self.n_sublayers, v.shape[-1])

        self._data.update(by_sequence(x))
        self._data_raw.update(by_sequence(raw))
        for name, found, target in (
            ("cae", reconstruction, x),
            ("pca", self._pca.reconstruct(x), x),
            ("line", self.autoencoder.decoder(self._line.reconstruct(latents).to(latents.dtype)), x),
            ("cae_raw", self.autoencoder.unstandardise(reconstruction, batch.sublayer), raw),
            ("pca_raw", self._pca_raw.reconstruct(raw), raw),
        ):
            self._errors[name].update(by_sequence(found), by_sequence(target))
        path = by_sequence(latents)
        self._latents.update(path)
        self._latent_covariance.update(path)
        self._distances.update((path[:, 1:] - path[:, :-1]).norm(dim=-1))
        self._samples.update(path, batch.sequence[:: self.n_sublayers])

    def on_test_epoch_end(self) -> None:
        data, raw = self._data.compute(), self._data_raw.compute()
        latents, distances = self._latents.compute(), self._distances.compute()
        samples, numbers = self._samples.compute()
        errors = {name: metric.compute() for name, metric in self._errors.items()}
        n_elements = float(data.n) * data.mean.numel()
        out: dict[str, Any] = {
            "test_loss": errors["cae"].sum() / n_elements,
            "test_mse": errors["cae_raw"].sum() / n_elements,
            "test_mse_pca": errors["pca_raw"].sum() / n_elements,
            "n_test_sequences": len(self._datamodule.splits["test"]),
            "n_test_trajectories": int(data.n),
            "massive_units": self._massive.nonzero().flatten(),
            "n_constant_units": self._n_constant,
            "mean_latents": latents.mean,
            "latent_distance": distances.mean,
            "latent_distance_std": distances.std,
            "latent_samples": samples,
            "latent_sample_sequences": numbers,
        }
        out["r2_line"] = explained_variance(errors.pop("line"), data)[-1]
        for name, moments in (("cae", data), ("pca", data), ("cae_raw", raw), ("pca_raw", raw)):
            own, about_global, overall = explained_variance(errors[name], moments)
            _, _, without = explained_variance(errors[name], moments, ~self._massive)
            out |= {
                f"ev_{name}": own,
                f"ev_global_{name}": about_global,
                f"r2_{name}": overall,
                f"r2_without_massive_{name}": without,
            }
        spread, data_spread = pool(latents).variance.sum().sqrt(), pool(data).variance.mean().sqrt()
        out["latent_spread"] = spread / data_spread
        scatter = self._latent_covariance.compute().scatter
        out["latent_participation"] = participation(torch.linalg.eigvalsh(scatter).clamp(min=0))
        out["latent_participation_pca"] = participation(self._pca.variance)
        out["collapse"] = collapse_reasons(out)
        out["collapsed"] = bool(out["collapse"])
        self.results = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in out.items()}
        scalars = {k: v for k, v in out.items() if isinstance(v, Tensor) and v.ndim == 0}
        self.log_dict({f"test/{k}": v.to(torch.float32) for k, v in scalars.items()}, sync_dist=True)

    def _fit_pca(self, n_components: int) -> tuple[PCA, PCA, PCA, Moments]:
        """PCA of the training split, and its moments.

        In the autoencoder's space, in raw activations, and of the latents, of these one component: their line.
        """
        states: dict[str, Covariance | None] = {"space": None, "raw": None, "latents": None}
        for batch in self._datamodule.whole_sequences("train"):
            raw = batch.x.to(self.device, torch.float32)
            parts = {"raw": raw, "space": self.autoencoder.standardise(raw, batch.sublayer.to(self.device))}
            parts["latents"] = self.autoencoder.encoder(parts["space"].to(self.dtype)).to(torch.float32)
            for name, x in parts.items():
                before, new = states[name], covariance(x)
                states[name] = new if before is None else merge_covariance(before, new)
        found = []
        for name, state in states.items():
            assert state is not None
            n = 1 if name == "latents" else n_components
            found.append(PCA.from_covariance(self._sum_covariance(state), n).to(self.device))
        statistics = self._sum_moments(self._datamodule.train_statistics(complete=True))
        return found[0], found[1], found[2], statistics

    # -- over processes ------------------------------------------------------------------------------------------------

    @property
    def _datamodule(self) -> ResidualStreamDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def _sum(self, x: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(x.to(self.device, copy=True), reduce_op="sum")

    def _sum_moments(self, local: Moments) -> Moments:
        count = self._sum(local.n)
        mean = self._sum(local.mean * local.n) / count
        away = local.mean.to(mean.device) - mean
        return Moments(count, mean, self._sum(local.m2.to(mean.device) + local.n.to(mean.device) * away.square()))

    def _sum_covariance(self, local: Covariance) -> Covariance:
        count = self._sum(local.n)
        mean = self._sum(local.mean * local.n) / count
        away = local.mean - mean
        return Covariance(count, mean, self._sum(local.scatter + local.n * torch.outer(away, away)))


def not_finite_name(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or Inf, if one does."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None
