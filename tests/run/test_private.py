"""What Lightning and W&B keep private and we touch is still there, and nothing private is touched elsewhere."""

import re
from pathlib import Path

import lightning as L
import pytest
import wandb
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from rsdyn import private

ROOT = Path(__file__).parents[2]
PRIVATE = re.compile(
    r"_signal_connector|_SubprocessScriptLauncher|_current_fx_name|trainer\.fit_loop|wandb\.sdk"
    r"|\._log_artifact"
)


@pytest.fixture
def trainer(tmp_path):
    return L.Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", default_root_dir=tmp_path,
    )  # fmt: skip


def test_nothing_private_is_touched_in_another_file():
    found = {
        path.relative_to(ROOT).as_posix(): PRIVATE.findall(path.read_text(encoding="utf-8"))
        for path in (ROOT / "rsdyn").rglob("*.py")
    }
    touched = {name for name, names in found.items() if names}
    assert touched == {"rsdyn/private.py"}


def test_lightning_lets_its_signal_handlers_be_left_out(trainer):
    assert callable(trainer._signal_connector.register_signal_handlers)
    private.leave_signals_alone(trainer)
    assert trainer._signal_connector.register_signal_handlers() is None


def test_lightnings_count_of_batches_is_where_it_is_read(trainer):
    progress = trainer.fit_loop.epoch_loop.batch_progress
    progress.current.ready, progress.total.ready, progress.is_last_batch = 5, 25, True
    assert private.batches_begun(trainer) == 5
    assert private.resumes_within_epoch(trainer) is False
    with private.before_batch(trainer):
        assert (progress.current.ready, progress.total.ready, progress.is_last_batch) == (4, 24, False)
    assert (progress.current.ready, progress.total.ready, progress.is_last_batch) == (5, 25, True)


def test_children_are_handed_over():
    class Strategy:
        launcher = _SubprocessScriptLauncher.__new__(_SubprocessScriptLauncher)

    Strategy.launcher.procs = ["child"]
    Strategy.launcher.launch = lambda function, *args, **kwargs: function(*args, **kwargs)
    trainer, adopted = type("Trainer", (), {"strategy": Strategy}), []
    private.adopt_children(trainer, lambda procs: adopted.extend(procs))
    assert Strategy.launcher.launch(lambda x: x + 1, 2) == 3
    assert adopted == ["child"] and Strategy.launcher.procs == []


def test_wandb_has_the_call_underneath():
    assert callable(wandb.Run._log_artifact)
