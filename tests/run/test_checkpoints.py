"""Checkpoints: whole or not at all, whatever happens; what they hold; what reading one may do."""

import errno
import os
import random
import resource
import signal
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from array_stream import ArrayStream
from lightning.pytorch.callbacks import ModelCheckpoint

from rsdyn.autoencoder.model import CompressingAutoencoder
from rsdyn.autoencoder.training import LitAutoencoder
from rsdyn.errors import UserError
from rsdyn.run.checkpoints import BestCheckpoint, Position, WholeCheckpointIO, differences, flatten, sweep
from rsdyn.stream.datamodule import ResidualStreamDataModule


def content(version, size=300_000):
    return {"version": version, "weights": torch.full((size,), float(version))}


def version_of(path):
    """The version of a checkpoint that is whole."""
    found = torch.load(path, weights_only=True)
    assert (found["weights"] == found["version"]).all()
    return found["version"]


def in_child(work):
    """Run ``work`` in a fork of this process; gives its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        work()
        code = 0
    finally:
        os._exit(code)


# -- killed while saving -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_while_saving(tmp_path, monkeypatch, kills):
    """A child does nothing but save, so it is killed inside a save; the last whole checkpoint is always there."""
    if Path("/dev/shm").is_dir():  # what Lightning stages its checkpoints in, on another file system
        monkeypatch.setenv("TMPDIR", "/dev/shm")
    path, draw = tmp_path / "checkpoints" / "last.ckpt", random.Random(0)
    io, version, strays, moved_on = WholeCheckpointIO(), 0, 0, 0
    io.save_checkpoint(content(0), path)
    done = 0
    while done < kills or (strays == 0 and done < 100 * kills):  # a slow fork may be killed before it saves
        done += 1

        def save_on_and_on(first=version + 1):
            for v in range(first, first + 1000):
                io.save_checkpoint(content(v), path)

        pid = in_child(save_on_and_on)
        time.sleep(draw.uniform(0.005, 0.04))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        found = version_of(path)
        assert found >= version
        moved_on += found > version
        version = found
        strays += len(list(path.parent.iterdir())) - 1
        sweep(path.parent)
        assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
    print(f"{done} kills: {done} whole checkpoints, {strays} left half a temporary file, {moved_on} had saved anew")
    assert strays > 0  # so it was killed inside a save


# -- the disk ----------------------------------------------------------------------------------------------------------


def check_refused(io, path, what):
    with pytest.raises(UserError) as caught:
        io.save_checkpoint(content(2), path)
    message = str(caught.value)
    assert "\n" not in message and "last.ckpt of 1.1 MiB cannot be saved" in message and what in message
    assert f"run.dir={path.parent.parent}" in message and "last.ckpt is still what it was" in message
    assert version_of(path) == 1
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync", "replace", "open"])
@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "Free some space"), (errno.EDQUOT, "Free some space"), (errno.EACCES, "Make the folder writable"),
     (errno.EIO, "start again with the same run.dir")],
)  # fmt: skip
def test_a_disk_that_is_full_or_fails_keeps_the_old_checkpoint(tmp_path, monkeypatch, call, number, said):
    io, path = WholeCheckpointIO(), tmp_path / "checkpoints" / "last.ckpt"
    io.save_checkpoint(content(1), path)
    real = getattr(os, call)

    def failing(*args, **kwargs):
        if call == "open" and not str(args[0]).endswith(".tmp"):
            return real(*args, **kwargs)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        check_refused(io, path, said)
    io.save_checkpoint(content(3), path)  # once there is space
    assert version_of(path) == 3


def test_a_file_that_may_not_grow_keeps_the_old_checkpoint(tmp_path):
    """By the kernel's own refusal, halfway: no call is made to fail."""
    io, path = WholeCheckpointIO(), tmp_path / "checkpoints" / "last.ckpt"
    io.save_checkpoint(content(1), path)

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
        check_refused(io, path, "Free some space")

    assert os.waitpid(in_child(limited), 0)[1] == 0
    assert version_of(path) == 1


# -- what is in one ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An autoencoder of a real size, trained for two steps, and its best.ckpt."""
    folder = tmp_path_factory.mktemp("trained")
    x = torch.randn(24, 4, 1024, generator=torch.Generator().manual_seed(0))
    autoencoder = {"d_in": 1024, "bottleneck": 2, "layers": None, "standardise": "unit_sublayer", "n_sublayers": 4}
    module = LitAutoencoder(autoencoder=autoencoder, n_sublayers=4)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=[BestCheckpoint(folder)], plugins=[WholeCheckpointIO()],
    )  # fmt: skip
    trainer.fit(module, datamodule=ResidualStreamDataModule(ArrayStream(x), batch_size=32))
    return module, folder / "best.ckpt"


def test_a_checkpoint_holds_the_autoencoder_and_the_optimiser_and_is_as_large_as_they(trained):
    module, path = trained
    found = torch.load(path, weights_only=True)
    assert all(name.startswith("autoencoder.") for name in found["state_dict"])

    def n_bytes(tree):
        if isinstance(tree, torch.Tensor):
            return tree.numel() * tree.element_size()
        values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
        return sum(map(n_bytes, values))

    autoencoder = sum(t.numel() * t.element_size() for t in module.autoencoder.state_dict().values())
    optimiser = 2 * sum(p.numel() * p.element_size() for p in module.parameters())
    assert n_bytes(found) == pytest.approx(autoencoder + optimiser, rel=0.01)
    assert path.stat().st_size == pytest.approx(autoencoder + optimiser, rel=0.01)


def test_a_checkpoint_is_read_back_to_the_bit(trained):
    module, path = trained
    model = CompressingAutoencoder.from_checkpoint(path)
    assert all(torch.equal(v, module.autoencoder.state_dict()[k]) for k, v in model.state_dict().items())


class Hostile:
    """What executes code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("forced", [False, True])
def test_reading_executes_nothing(tmp_path, monkeypatch, forced):
    path, executed = tmp_path / "x.ckpt", tmp_path / "executed"
    torch.save({"state_dict": {}, "hyper_parameters": Hostile(executed)}, path)
    torch.load(path, weights_only=False)
    assert executed.exists()  # so it is hostile indeed
    executed.unlink()
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    said = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1" if forced else "holds more than tensors and plain values"
    for read in (
        CompressingAutoencoder.from_checkpoint,
        lambda path: WholeCheckpointIO().load_checkpoint(path, weights_only=False),
    ):
        with pytest.raises(UserError) as caught:
            read(path)
        assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not executed.exists()


# -- the callbacks and the comparisons ---------------------------------------------------------------------------------


def test_the_best_epoch_stays_the_best_when_the_folder_moves(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    score = torch.tensor(0.5)
    state = {**BestCheckpoint(old).state_dict(), "best_model_path": str(old / "best.ckpt"), "best_model_score": score,
             "best_k_models": {str(old / "best.ckpt"): score}, "kth_value": score,
             "kth_best_model_path": str(old / "best.ckpt")}  # fmt: skip
    callback = BestCheckpoint(new)
    callback.load_state_dict(state)
    assert callback.best_model_path == callback.kth_best_model_path == str(new / "best.ckpt")
    assert callback.best_k_models == {str(new / "best.ckpt"): score} and callback.best_model_score == score
    forgetful = ModelCheckpoint(dirpath=new, monitor="val/loss")
    with pytest.warns(UserWarning, match="dirpath has changed"):
        forgetful.load_state_dict(state)
    assert not forgetful.best_k_models  # why BestCheckpoint is there


def test_settings_that_decide_the_numbers_are_compared():
    ours = flatten({"seed": 0, "cae": {"lr": 1e-3}, "run": {"dir": "a"}, "trainer": {"max_epochs": 3, "options": {}}})
    assert ours == {"seed": 0, "cae.lr": 1e-3, "run.dir": "a", "trainer.max_epochs": 3, "trainer.options": {}}
    assert differences(ours, ours) == []
    assert differences(ours | {"run.dir": "b", "trainer.max_epochs": 9}, ours) == []
    assert differences(ours | {"cae.lr": 0.1}, ours) == ["cae.lr is 0.1 there and 0.001 here"]
    assert differences({**ours, "x": 1}, ours) == ["x is 1 there and absent here"]


def test_a_position_in_words():
    assert str(Position(1, 18, 0)) == "after 1 epoch (18 steps)"
    assert str(Position(2, 51, 15)) == "after 2 epochs and 15 batches (51 steps)"
