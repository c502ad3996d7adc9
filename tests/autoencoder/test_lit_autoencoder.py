"""Training and judging the autoencoder, on streams made by hand whose statistics are known."""

import inspect
from itertools import pairwise
from typing import ClassVar

import lightning as L
import numpy as np
import pytest
import torch
from array_stream import ArrayStream
from lightning.pytorch.loggers import Logger

from rsdyn.autoencoder.settings import CaeConfig
from rsdyn.autoencoder.summary import collapse_reasons, is_thin
from rsdyn.autoencoder.training import LitAutoencoder
from rsdyn.errors import NonFiniteError
from rsdyn.stream.datamodule import ResidualStreamDataModule

S, D = 6, 12


def curve(n=128, seed=0, noise=0.05):
    """Trajectories along a closed curve in four dimensions, which no plane holds; units of unlike scale."""
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, 2 * np.pi, (n, 1)) + np.linspace(0, 2, S)
    waves = np.stack([np.cos(angle), np.sin(angle), np.cos(2 * angle), np.sin(2 * angle)], axis=-1)
    x = waves @ rng.normal(size=(4, D)) + noise * rng.normal(size=(n, S, D))
    return torch.from_numpy(x * np.geomspace(0.1, 10, D) + 3).float()


def fit(x, *, epochs=1, callbacks=(), seed=0, logger=False, **options):
    torch.manual_seed(seed)
    standardise = options.pop("standardise", "unit")
    shuffle_shards = options.pop("shuffle_shards", 2)
    trainer_options = {"log_every_n_steps": 7}
    trainer_options |= {k: options.pop(k) for k in ("log_every_n_steps", "precision") if k in options}
    autoencoder = {"d_in": D, "bottleneck": 2, "layers": 4, "standardise": standardise, "n_sublayers": S}
    module = LitAutoencoder(autoencoder=autoencoder, n_sublayers=S, **options)
    data = ResidualStreamDataModule(ArrayStream(x), batch_size=32, shuffle_shards=shuffle_shards)
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=list(callbacks), **trainer_options,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return trainer, module, data


@pytest.mark.parametrize("standardise", ["unit", "unit_sublayer"])
def test_the_statistics_end_as_those_of_the_whole_training_split(standardise):
    """The first steps know only the first shards; before the first validation the statistics are exact."""
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            seen.append(module.autoencoder.mean.clone())

    x = curve()
    _, module, data = fit(x, standardise=standardise, callbacks=[Watch()])
    train = x[data.splits["train"]].double().numpy()
    axis = (0, 1) if standardise == "unit" else 0
    np.testing.assert_allclose(module.autoencoder.mean, train.mean(axis), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(module.autoencoder.scale, train.std(axis), rtol=1e-5)
    assert not torch.equal(seen[0], seen[-1])


def test_statistics_stand_still_after_the_first_epoch():
    means = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            means.append(module.autoencoder.mean.clone())

    fit(curve(), epochs=3, callbacks=[Watch()])
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[0], means[2])


@pytest.mark.parametrize("standardise", ["none", "unit"])
def test_the_decoder_can_start_at_the_mean(standardise):
    first = {}

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            first.setdefault("bias", module.autoencoder.decoder[-1].bias.detach().clone())

    x = curve()
    _, _, data = fit(x, standardise=standardise, bias_init="mean", callbacks=[Watch()], shuffle_shards=100)
    expected = x[data.splits["train"]].mean((0, 1)) if standardise == "none" else torch.zeros(D)
    torch.testing.assert_close(first["bias"], expected, rtol=1e-5, atol=1e-5)


def test_losses_are_means_over_vectors_and_are_logged_where_lightning_logs():
    """The last batch is shorter, and a shard's share of the validation split is any size."""
    steps, sizes, epochs = [], [], []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            steps.append(float(outputs["loss"]))
            sizes.append(len(batch.x))

        def on_train_epoch_end(self, trainer, module):
            losses = []
            with torch.no_grad():
                for batch in trainer.datamodule.whole_sequences("val"):
                    x = module.autoencoder.standardise(batch.x.float(), batch.sublayer)
                    losses.append((module.autoencoder(x)[1] - x).square().mean(-1))
            found = {k: float(trainer.callback_metrics[k]) for k in ("train/loss", "val/loss")}
            epochs.append((found, np.average(steps, weights=sizes), float(torch.cat(losses).mean())))
            steps.clear(), sizes.clear()

    class Kept(Logger):
        name = version = "kept"
        rows: ClassVar[list] = []

        def log_metrics(self, metrics, step=None):
            self.rows.append((step, metrics))

        def log_hyperparams(self, *args, **kwargs):
            pass

    every_step = []
    real = LitAutoencoder.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            LitAutoencoder, "training_step", lambda *a: (loss := real(*a), every_step.append(float(loss.detach())))[0]
        )
        fit(curve(141), epochs=3, callbacks=[Watch()], logger=Kept())
    assert len(epochs) == 3
    for found, train, val in epochs:
        assert found["train/loss"] == pytest.approx(train, rel=1e-12)
        assert found["val/loss"] == pytest.approx(val, rel=1e-6)
    logged = {step: row["train/batch_loss"] for step, row in Kept.rows if "train/batch_loss" in row}
    expected = {step: every_step[step] for step in range(6, len(every_step), 7)}
    assert logged == pytest.approx(expected)
    assert [round(row["train/loss"], 9) for _, row in Kept.rows if "train/loss" in row] == [
        round(train, 9) for _, train, _ in epochs
    ]


class Rows(Logger):
    """A logger that keeps what it is given."""

    name = version = "rows"

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass


@pytest.mark.parametrize("standardise", ["none", "unit", "unit_sublayer"])
def test_the_validation_error_is_that_of_raw_activations(standardise):
    """Whatever the loss is taken in; by numpy, from the autoencoder's own decode(encode(x)) of the split."""
    x, found = curve(141), []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            rows = x[trainer.datamodule.splits["val"]]
            sublayers = torch.arange(S).expand(len(rows), S)
            with torch.no_grad():
                back = module.autoencoder.decode(module.autoencoder.encode(rows, sublayers), sublayers)
            error = ((back.double() - rows.double()) ** 2).mean()
            found.append({k: float(trainer.callback_metrics[k]) for k in ("val/loss", "val/mse")} | {"own": error})

    fit(x, epochs=3, standardise=standardise, callbacks=[Watch()])
    assert len(found) == 3
    for epoch in found:
        assert epoch["val/mse"] == pytest.approx(float(epoch["own"]), rel=1e-5)
        if standardise == "none":
            assert epoch["val/mse"] == epoch["val/loss"]
        else:
            assert epoch["val/mse"] != pytest.approx(epoch["val/loss"], rel=0.1)
    assert found[0]["val/mse"] != pytest.approx(found[1]["val/mse"], rel=1e-3)  # begun anew in each epoch


def test_a_step_at_which_training_is_stopped_is_logged_with_its_own_loss():
    """Lightning logs it out of turn; the loss of the last step that was due must not stand in its place."""
    losses, rows = [], Rows()

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))
            trainer.should_stop = len(losses) == 12

    fit(curve(141), epochs=3, callbacks=[Stop()], logger=rows)
    logged = {step: row["train/batch_loss"] for step, row in rows.rows if "train/batch_loss" in row}
    assert logged[6] == pytest.approx(losses[6]) and logged[11] == pytest.approx(losses[11])
    assert losses[11] != pytest.approx(losses[6], rel=1e-3)


def test_losses_need_not_be_logged():
    rows = Rows()
    trainer, _, _ = fit(curve(64), epochs=2, logger=rows, log_every_n_steps=0)
    assert not any("train/batch_loss" in row for _, row in rows.rows)
    assert "train/loss" in trainer.callback_metrics


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_the_epochs_loss_is_the_mean_over_vectors_in_any_precision(precision):
    steps, sizes, found = [], [], []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            steps.append(float(outputs["loss"]))
            sizes.append(len(batch.x))

        def on_train_epoch_end(self, trainer, module):
            found.append((float(module.train_loss.compute()), np.average(steps, weights=sizes)))
            steps.clear(), sizes.clear()

    fit(curve(1501), epochs=2, callbacks=[Watch()], precision=precision)
    for ours, direct in found:
        assert ours == pytest.approx(direct, rel=1e-9)


def test_warm_up_raises_the_rate():
    rates = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(curve(), warmup_steps=10, lr=1e-2, callbacks=[Watch()])
    assert rates[0] == pytest.approx(1e-5)
    assert all(a < b for a, b in pairwise(rates[:11]))
    assert rates[10:] == pytest.approx([1e-2] * len(rates[10:]))


class Rates(L.Callback):
    """The validation loss of each epoch, and the learning rate with which it was trained."""

    def __init__(self):
        self.losses, self.rates = [], []

    def on_train_batch_end(self, trainer, *args):
        self.last = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_epoch_end(self, trainer, module):
        self.rates.append(self.last)
        self.losses.append(float(trainer.callback_metrics["val/loss"]))


def test_the_rate_falls_on_a_plateau_as_torchs_scheduler_says():
    """Driven through Lightning, epoch by epoch, it is the scheduler fed with the losses by hand."""
    seen = Rates()
    fit(curve(), epochs=16, lr=0.1, warmup_steps=0, plateau_factor=0.3, plateau_patience=1, callbacks=[seen])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=1)
    expected = []
    for loss in seen.losses:
        expected.append(optimizer.param_groups[0]["lr"])
        scheduler.step(loss)
    assert seen.rates == pytest.approx(expected, rel=1e-12)
    assert len(set(seen.rates)) >= 3  # it fell more than once


def test_a_constant_rate_stays_and_a_mistyped_schedule_is_named():
    seen = Rates()
    fit(curve(), epochs=8, lr=0.1, warmup_steps=0, schedule="constant", callbacks=[seen])
    assert seen.rates == [0.1] * 8
    with pytest.raises(ValueError, match="schedule='cosine'"):
        fit(curve(), schedule="cosine")


def test_the_defaults_of_the_module_are_those_of_the_settings():
    settings, parameters = CaeConfig(), inspect.signature(LitAutoencoder).parameters
    shared = ("lr", "warmup_steps", "schedule", "plateau_factor", "plateau_patience", "bias_init")
    assert {k: parameters[k].default for k in shared} == {k: getattr(settings, k) for k in shared}


def test_it_learns_a_curve_that_no_plane_holds_and_is_judged_rightly():
    x = curve(512)
    trainer, module, data = fit(x, epochs=60, lr=3e-3)
    trainer.test(module, datamodule=data, verbose=False)
    results = module.results
    assert results["r2_cae"] > results["r2_pca"] + 0.1
    assert not results["collapsed"]
    test = x[data.splits["test"]]
    with torch.no_grad():
        error = (module.autoencoder.decode(module.autoencoder.encode(test)) - test).double()
    assert results["test_mse"] == pytest.approx(float(error.square().mean()), rel=1e-5)
    assert len(results["latent_samples"]) == len(test)
    assert results["latent_sample_sequences"].tolist() == data.splits["test"].tolist()


def test_an_autoencoder_that_learnt_nothing_is_called_collapsed():
    trainer, module, data = fit(curve(), lr=1e-12)
    trainer.test(module, datamodule=data, verbose=False)
    assert module.results["collapsed"]


def test_latents_on_a_line_are_called_collapsed_and_what_they_fill_is_numpys():
    trainer, module, data = fit(curve(), epochs=2, warmup_steps=0)
    trainer.test(module, datamodule=data, verbose=False)
    rows = curve()[data.splits["test"]].reshape(-1, D)

    def filled():
        with torch.no_grad():
            values = np.linalg.eigvalsh(np.cov(module.autoencoder.encode(rows).double().numpy().T))
        return values.sum() ** 2 / (values**2).sum()

    assert float(module.results["latent_participation"]) == pytest.approx(filled(), rel=1e-4)
    last = module.autoencoder.encoder[-1]
    last.weight.data[1], last.bias.data[1] = 0.5 * last.weight[0], 0.0
    trainer.test(module, datamodule=data, verbose=False)
    assert float(module.results["latent_participation"]) == pytest.approx(1, abs=1e-6) == filled()
    assert module.results["collapsed"]
    assert "its latents lie on a line (they fill 1.000 of 2 dimensions)" in module.results["collapse"]
    assert float(module.results["r2_line"]) == pytest.approx(float(module.results["r2_cae"]), abs=1e-5)


def test_latents_that_are_scaled_and_scaled_back_fill_less_and_lie_on_no_line():
    """The decoder begins with a linear map, so the network computes the same: only what the latents fill is another."""
    trainer, module, data = fit(curve(), epochs=20, warmup_steps=0)
    trainer.test(module, datamodule=data, verbose=False)
    before = module.results
    last, first = module.autoencoder.encoder[-1], module.autoencoder.decoder[0]
    for values in (last.weight.data[1], last.bias.data[1:]):
        values *= 1e-3
    first.weight.data[:, 1] *= 1e3
    trainer.test(module, datamodule=data, verbose=False)
    found = module.results
    assert float(found["r2_cae"]) == pytest.approx(float(before["r2_cae"]), abs=1e-4)
    assert float(found["latent_participation"]) < 1.001

    def explained(latents, x):
        return 1 - float((module.autoencoder.decoder(latents) - x).square().sum() / (x - x.mean(0)).square().sum())

    with torch.no_grad():
        encoded = {
            part: module.autoencoder.standardise(curve()[data.splits[part]].reshape(-1, D)) for part in data.splits
        }
        z = {part: module.autoencoder.encoder(x) for part, x in encoded.items()}
        mean = z["train"].mean(0)
        axis = torch.from_numpy(np.linalg.svd((z["train"] - mean).double().numpy())[2][0]).float()
        on_line = mean + ((z["test"] - mean) @ axis)[:, None] * axis
        expected = explained(on_line, encoded["test"])
    assert float(found["r2_line"]) == pytest.approx(expected, abs=1e-3)
    assert expected < 0.9 * float(found["r2_cae"])
    assert is_thin(found)
    assert not found["collapse"]


def of_test(n_latent=2, spread=0.5, explained=0.6, filled=1.9, line=None):
    return ({} if line is None else {"r2_line": torch.tensor(line)}) | {
        "mean_latents": torch.zeros(S, n_latent), "latent_spread": torch.tensor(spread),
        "r2_cae": torch.tensor(explained), "latent_participation": torch.tensor(filled),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ({}, []),
        ({"filled": 1.21}, []),
        ({"filled": 1.19}, ["lie on a line (they fill 1.190 of 2 dimensions)"]),
        ({"filled": 1.19, "line": 0.59}, ["its latents lie on a line (they fill 1.190 of 2 dimensions)"]),
        ({"filled": 1.01, "line": 0.2}, []),  # thin, and used across
        ({"filled": 1.01, "line": 0.6, "explained": 0.61}, ["lie on a line"]),
        ({"filled": 1.01, "line": -0.3, "explained": -0.3}, ["lie on a line", "no better than the mean"]),
        ({"n_latent": 1, "filled": 1.0}, []),  # one latent is a line by construction
        ({"n_latent": 3, "filled": 1.1}, ["lie on a line (they fill 1.100 of 3 dimensions)"]),
        ({"n_latent": 16, "filled": 1.5}, []),  # a plane is no line, whatever the bottleneck
        ({"spread": 1e-4, "filled": 1.0}, ["barely move (their spread is 1.0e-04 of the data's)"]),
        ({"spread": 0.0, "filled": float("nan")}, ["barely move"]),
        ({"n_latent": 1, "spread": 0.0, "filled": float("nan")}, ["barely move"]),
        ({"explained": -0.3}, ["no better than the mean (explained variance -0.300)"]),
        ({"explained": float("nan")}, ["no better than the mean"]),
        ({"explained": 0.0, "filled": 1.0}, ["lie on a line", "no better than the mean"]),
    ],
)  # fmt: skip
def test_the_ways_in_which_an_autoencoder_collapses(results, words):
    reasons = collapse_reasons(of_test(**results))
    assert len(reasons) == len(words)
    assert all(word in reason for word, reason in zip(words, reasons, strict=True))


def test_a_massive_unit_is_named_and_numbers_without_it_are_given():
    x = curve()
    x[:, :, 4] = 5000 + 100 * torch.randn(x.shape[:2], generator=torch.Generator().manual_seed(0))
    trainer, module, data = fit(x, standardise="none")
    trainer.test(module, datamodule=data, verbose=False)
    results = module.results
    assert results["massive_units"].tolist() == [4]
    # PCA spends a component on it and explains nearly all raw variance with it, and far less of the other units'
    assert results["r2_pca_raw"] > 0.95
    assert results["r2_without_massive_pca_raw"] < results["r2_pca_raw"] - 0.1


@pytest.mark.parametrize("standardise", ["none", "unit", "unit_sublayer"])
def test_a_constant_unit_is_counted(standardise):
    x = curve()
    x[:, :, 7] = 0.1
    trainer, module, data = fit(x, standardise=standardise)
    trainer.test(module, datamodule=data, verbose=False)
    assert module.results["n_constant_units"] == 1
    assert torch.isfinite(module.results["test_mse"])


# -- numbers that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("standardise", ["none", "unit", "unit_sublayer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_activation_that_is_not_finite_is_named(standardise, value):
    x = curve()
    x[41, 2, 3] = value
    data = ResidualStreamDataModule(ArrayStream(x))
    part = next(name for name, rows in data.splits.items() if 41 in rows)
    assert part == "train"
    with pytest.raises(NonFiniteError, match=r"at sequence 41, sublayer 2, unit 3"):
        fit(x, standardise=standardise)


def test_an_activation_of_the_validation_split_is_named():
    x = curve()
    row = int(ResidualStreamDataModule(ArrayStream(x)).splits["val"][0])
    x[row, 4, 1] = float("nan")
    kept = []
    with pytest.raises(
        NonFiniteError, match=rf"validation loss is nan .*sublayer 4 of sequence {row} \(the activation"
    ):
        fit(x, callbacks=[Kept(kept)])
    assert not kept


def test_statistics_that_overflow_are_named():
    x = curve().double()
    x[41, 2, 3] = 1e200
    with pytest.raises(
        NonFiniteError, match=r"statistics of the training split overflow.*sequence 41, sublayer 2, unit 3"
    ):
        fit(x)


class Kept(L.Callback):
    """Counts the epochs that a ModelCheckpoint would have kept."""

    def __init__(self, kept):
        self.kept = kept

    def on_train_epoch_end(self, trainer, module):
        self.kept.append(float(trainer.callback_metrics["val/loss"]))


class Plant(L.Callback):
    """Puts a value that is not finite somewhere, in epoch 1, before step 3 of it."""

    def __init__(self, plant):
        self.plant = plant

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 3):
            self.plant(module, trainer)


def plant_parameter(module, trainer):
    module.autoencoder.encoder[3].weight.data[0, 0] = float("nan")


def plant_bias(module, trainer):
    module.autoencoder.decoder[-1].bias.data[2] = float("inf")


def plant_gradient(module, trainer):
    parameter = module.autoencoder.encoder[0].weight
    handle = parameter.register_hook(lambda grad: (handle.remove(), grad * float("nan"))[1])


def plant_moment(module, trainer):
    state = trainer.optimizers[0].state
    parameter = module.autoencoder.decoder[0].weight
    state[parameter]["exp_avg"][0, 0] = float("inf")


def plant_mean(module, trainer):
    module.autoencoder.mean[3] = float("nan")


def plant_scale(module, trainer):
    module.autoencoder.scale[3] = 0.0


@pytest.mark.parametrize(
    ("plant", "named"),
    [
        (plant_parameter, r"encoder\.3\.weight of the autoencoder"),
        (plant_bias, r"decoder\.9\.bias|decoder\.\d+\.bias of the autoencoder"),
        (plant_gradient, r"encoder\.0\.weight of the autoencoder"),
        (plant_moment, r"decoder\.0\.weight of the autoencoder"),
        (plant_mean, r"sublayer \d+ of sequence \d+ \(its reconstruction\)"),
        (plant_scale, r"sublayer \d+ of sequence \d+ \(its reconstruction\)"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_goes_wrong_in_training_is_named_and_never_kept(plant, named):
    kept = []
    with pytest.raises(NonFiniteError, match=f"training loss is (nan|inf) in epoch 1, step .*({named})"):
        fit(curve(), epochs=3, callbacks=[Plant(plant), Kept(kept)])
    assert len(kept) == 1 and np.isfinite(kept).all()


def test_a_checkpoint_that_is_not_finite_is_not_written(tmp_path):
    """Whatever the loss did not show, on a GPU it is looked at in every twentieth step only."""
    trainer, module, _ = fit(curve())
    module.autoencoder.encoder[0].bias.data[1] = float("nan")
    with pytest.raises(
        NonFiniteError, match=r"autoencoder\.encoder\.0\.bias is not finite .* no checkpoint is written"
    ):
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert not any(tmp_path.iterdir())
