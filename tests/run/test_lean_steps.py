"""What is left out of Lightning's steps is not missed: the same losses, logs and profiles as with it."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.profilers import PassThroughProfiler, SimpleProfiler
from torch import nn
from torch.utils.data import DataLoader

from rsdyn.config.command_line import load_config
from rsdyn.private import LeanModule, NoProfiler
from rsdyn.run.checkpoints import BestCheckpoint
from rsdyn.run.progress import Patience
from rsdyn.run.signals import Stop
from rsdyn.run.trainer import make_trainer


class Step:
    """A training of eight steps, which writes down the hook it is in."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 2)
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.seen.append((self._current_fx_name, loss.item()))
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_batch_end(self, *args):
        self.seen.append(self._current_fx_name)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class Plain(Step, L.LightningModule):
    pass


class Lean(Step, LeanModule):
    pass


def fit(module, profiler):
    torch.manual_seed(1)
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, profiler=profiler,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.randn(16, 4), batch_size=4))
    return module.seen, {k: float(v) for k, v in trainer.callback_metrics.items()}, module.layer.weight.tolist()


def test_lean_steps_are_the_same_steps():
    lean = fit(Lean(), NoProfiler())
    assert lean == fit(Plain(), PassThroughProfiler())
    assert [hook for hook in lean[0] if isinstance(hook, str)] == ["on_train_batch_end"] * 8
    assert {hook[0] for hook in lean[0] if isinstance(hook, tuple)} == {"training_step"}


def test_parameters_modules_and_buffers_are_still_found():
    module = Lean()
    module.scale = nn.Parameter(torch.ones(2))
    module.inner = nn.Linear(2, 2)
    module.register_buffer("mean", torch.zeros(2))
    module.mean = torch.ones(2)
    assert {"scale", "inner.weight", "layer.weight"} < dict(module.named_parameters()).keys()
    assert module.state_dict()["mean"].tolist() == [1, 1]
    with pytest.raises(TypeError, match="cannot assign"):
        module.layer = "no module"


def test_no_profiler_profiles_nested_actions_and_lets_errors_out():
    profiler, done = NoProfiler(), []

    def work():
        with profiler.profile("outer"):
            with profiler.profile("inner"):
                done.append("inner")
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert done == ["inner"] and profiler.summary() == ""


def test_who_asks_for_a_profiler_gets_it():
    profiler = SimpleProfiler()
    fit(Lean(), profiler)
    assert len(profiler.recorded_durations["[Strategy]SingleDeviceStrategy.training_step"]) == 8


def test_the_keys_under_which_callbacks_are_saved_are_lightnings_own(tmp_path):
    """They stand in checkpoints, and a callback that is not found under its own begins anew."""
    for ours in (Patience(3), BestCheckpoint(tmp_path)):
        lightnings = type(ours).__mro__[1].state_key.fget(ours)
        assert ours.state_key == lightnings
        assert ours.state_key.startswith(type(ours).__name__) and "val/loss" in ours.state_key


@pytest.mark.parametrize(("words", "kind"), [([], NoProfiler), (["trainer.options.profiler=simple"], SimpleProfiler)])
def test_the_scripts_trainer_has_none_unless_it_is_asked_for(tmp_path, words, kind):
    run = SimpleNamespace(
        config=load_config(["trainer.accelerator=cpu", *words], "train"), logger=None, stop=Stop(), folder=tmp_path
    )
    assert type(make_trainer(run, []).profiler) is kind
