"""Checkpoints that survive: written whole or not at all, read without executing anything, resumed exactly.

``best.ckpt`` holds the epoch with the lowest validation loss, ``last.ckpt`` where the run is: between two steps, at an
epoch's end, or where a signal ended it. Either is the autoencoder, the optimiser, the state of the callbacks and
loops, and the settings that made it; never a tensor of the language model, which no module holds.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

import rsdyn
from rsdyn.autoencoder.model import load_plain
from rsdyn.errors import UserError
from rsdyn.files import plain, publish, temporaries
from rsdyn.private import before_batch
from rsdyn.run.signals import Interrupted, Stop

FORMAT = 1
LAST, BEST = "last.ckpt", "best.ckpt"
RESUME_CURE = "Give the last.ckpt in the checkpoints folder of a train.py run, or resume=never."

# Settings that may differ from those of the checkpoint a run resumes from: where things are kept, what is looked at on
# the way, how long to train, on what. All others decide the numbers.
FREE = (
    *("run.", "tracking.", "resume", "cache.dir", "cache.enabled", "analysis.", "perturb."),
    *("trainer.max_epochs", "trainer.patience", "trainer.accelerator", "trainer.timeout"),
)


class WholeCheckpointIO(CheckpointIO):
    """Checkpoints written whole or not at all, and loaded as tensors and plain values only.

    Lightning's own writes to ``$TMPDIR`` first and copies when that is another disk, so a kill or a full disk destroys
    the checkpoint that was there, and it swallows ``PermissionError``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``path``; ``UserError`` in one line when that cannot be done, with the old file intact."""
        path = Path(path)
        content = BytesIO()
        torch.save(checkpoint, content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            publish(path, [content.getbuffer()])
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            cure = "Free some space" if full else "Make the folder writable"
            kept = f"{path.name} is still what it was" if path.exists() else f"no {path.name} was written"
            raise UserError(
                f"run.dir={path.parent.parent}: {path.name} of {len(content.getbuffer()) / 2**20:.1f} MiB cannot be "
                f"saved ({error.strerror or error}); {kept}. {cure} and start again with the same run.dir."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read ``path``; nothing in it is executed, whatever ``weights_only`` says."""
        content: dict[str, Any] = load_plain(path, name="resume", cure=RESUME_CURE, map_location=map_location or "cpu")
        return content

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what a killed run left half written in its checkpoints folder; the caller holds the run folder's lock."""
    if folder.is_dir():
        for path, _ in temporaries(folder):
            path.unlink(missing_ok=True)


# -- what a checkpoint belongs to --------------------------------------------------------------------------------------


class Position(NamedTuple):
    """Where a checkpoint was taken: finished epochs, optimiser steps, and batches of the epoch under way."""

    epoch: int
    step: int
    batch: int

    def __str__(self) -> str:
        where = f"{self.epoch} epoch{'s' * (self.epoch != 1)}"
        return f"after {where}{f' and {self.batch} batches' if self.batch else ''} ({self.step} steps)"


def identity(settings: Mapping[str, Any], *, tokens: str, weights: Any) -> dict[str, Any]:
    """What a checkpoint must agree on with the run that resumes from it.

    ``settings`` are the resolved config as nested dictionaries, secrets taken out; ``tokens`` the digest of the text,
    ``weights`` the identity of the language model.
    """
    return {
        "format": FORMAT,
        "rsdyn": rsdyn.__version__,
        "settings": flatten(plain(settings)),
        "tokens": tokens,
        "weights": plain(weights),
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their full keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {prefix + key: value}
    return flat


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], free: tuple[str, ...] = FREE) -> list[str]:
    """Each full key whose values differ, with both, ``free`` ones (and sections, with their dot) left out."""
    absent = object()
    found = []
    for key in sorted({*theirs, *ours}):
        if any(key == f or (f.endswith(".") and key.startswith(f)) for f in free):
            continue
        a, b = theirs.get(key, absent), ours.get(key, absent)
        if a != b:
            found.append(
                f"{key} is {'not there' if a is absent else a} there and {'absent' if b is absent else b} here"
            )
    return found


def check_checkpoint(path: Path, ours: Mapping[str, Any]) -> Position:
    """See that ``path`` can be gone on from by a run with this :func:`identity`; say where it was taken.

    Raises ``UserError``, naming the keys that differ, when it belongs to another run.
    """
    content = load_plain(path, name="resume", cure=RESUME_CURE)
    theirs = content.get("rsdyn") if isinstance(content, dict) else None
    needed = ("state_dict", "optimizer_states", "loops", "callbacks", "global_step")
    if not isinstance(theirs, dict) or any(key not in content for key in needed):
        raise UserError(f"resume={path}: not a checkpoint of train.py that training can resume from. {RESUME_CURE}")
    if theirs.get("format") != FORMAT:
        raise UserError(
            f"resume={path}: it has format {theirs.get('format')} (rsdyn {theirs.get('rsdyn')}), this rsdyn "
            f"({rsdyn.__version__}) resumes from format {FORMAT}. Use that version, or resume=never."
        )
    differ = differences(theirs["settings"], ours["settings"])
    for name, what in (("tokens", "the text"), ("weights", "the language model's weights")):
        if not differ and theirs[name] != ours[name]:
            differ.append(f"{what} changed under the same name")
    if differ:
        raise UserError(
            f"resume={path}: made with other settings: {'; '.join(differ)}. Give the same ones, or resume=never to "
            "start anew."
        )
    loops = content["loops"]["fit_loop"]
    epochs, batches = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]["current"]
    at_end = epochs["processed"] == epochs["ready"]
    return Position(epochs["processed"], content["global_step"], 0 if at_end else batches["completed"])


# -- when they are written ---------------------------------------------------------------------------------------------


class BestCheckpoint(ModelCheckpoint):
    """``best.ckpt``: the epoch with the lowest validation loss.

    Going on in a folder that was moved, or in a new one, it stays the best of both: Lightning's own forgets it when the
    path is another.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(
            dirpath=folder, filename=Path(BEST).stem, monitor="val/loss", enable_version_counter=False, save_top_k=1
        )

    @cached_property
    def state_key(self) -> str:  # Lightning asks for it in each hook of each step
        return super().state_key

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: it saves after validations, and Lightning's own would look into that in each step."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = Path(str(self.dirpath))

        def moved(path: str) -> str:
            return str(here / Path(path).name) if path else ""

        paths = {key: moved(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        models = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": models, "dirpath": self.dirpath})


class LastCheckpoint(Checkpoint):
    """``last.ckpt``: where the run is, so that it can go on there; and the place where a signal ends it.

    Saved at each epoch's end, on a signal, and between two steps so often that it costs at most one part in a hundred
    of the time (every ten seconds at most). All processes must agree when, since saving takes them all: they compare
    notes before each step of an epoch that records (recording stops early when a signal comes, and hands an empty batch
    over), and before every tenth of the others.

    Args:
        path: of ``last.ckpt``.
        stop: the note of the process' signals.
        identity: see :func:`identity`.
        records_in: whether an epoch may run the language model.
        every_steps: save after so many steps instead of by the clock, for tests.

    ``seconds`` is how long all sessions of the run have trained together, this one included.
    """

    def __init__(
        self,
        path: Path,
        stop: Stop,
        *,
        identity: dict[str, Any],
        records_in: Callable[[int], bool],
        every_steps: int | None = None,
    ) -> None:
        self.path, self.stop, self.identity, self.records_in = path, stop, identity, records_in
        self.every_steps = every_steps
        self._earlier = 0.0
        self._began = self._saved_at = time.monotonic()
        self._cost = 0.0
        self._saved_step = -1

    @property
    def seconds(self) -> float:
        return self._earlier + time.monotonic() - self._began

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier = state_dict["seconds"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["rsdyn"] = self.identity  # in best.ckpt too

    # -- between two steps ---------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = self._saved_at = time.monotonic()
        self._saved_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.stop.deferred = True  # before the first step there was nothing to lose
        if batch_idx % trainer.accumulate_grad_batches:
            return  # gradients in the making are in no checkpoint
        signum, due = self.stop.signum or 0, self._due(trainer)
        if trainer.world_size > 1:
            if batch_idx % 10 and not self.records_in(trainer.current_epoch):
                return
            signum, due = _agree(trainer, signum, due)
        if (signum or due) and trainer.global_step != self._saved_step:
            with before_batch(trainer):
                self._save(trainer)
        if signum:
            self._leave(trainer, signum)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        signum = self.stop.signum or 0
        if trainer.world_size > 1:
            signum, _ = _agree(trainer, signum, False)
        self.stop.deferred = False
        if signum:
            self._leave(trainer, signum)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.stop.deferred = False

    def _leave(self, trainer: L.Trainer, signum: int) -> None:
        self.stop.signum = signum  # which may have come to another process
        self.stop.deferred = False
        raise Interrupted(signum)

    def _due(self, trainer: L.Trainer) -> bool:
        if self.every_steps is not None:
            return trainer.global_step - self._saved_step >= self.every_steps
        return time.monotonic() - self._saved_at >= max(10.0, 100 * self._cost)

    def _save(self, trainer: L.Trainer) -> None:
        began = time.monotonic()
        trainer.save_checkpoint(self.path)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - began
        self._saved_step = trainer.global_step


def _agree(trainer: L.Trainer, signum: int, due: bool) -> tuple[int, bool]:
    """The signal that any process got, and whether any finds a checkpoint due."""
    notes = torch.tensor([signum, int(due)], device=trainer.strategy.root_device)
    torch.distributed.all_reduce(notes, op=torch.distributed.ReduceOp.MAX)
    return int(notes[0]), bool(notes[1])


def take_best_along(checkpoint: Path, folder: Path) -> None:
    """Copy the ``best.ckpt`` beside ``checkpoint`` into another run's folder, which resumes from there.

    Raises ``UserError`` when the checkpoint has a best epoch behind it and its file is gone.
    """
    source, target = checkpoint.parent / BEST, folder / BEST
    if source.resolve() == target.resolve():
        return
    content = load_plain(checkpoint, name="resume", cure=RESUME_CURE)
    state: dict[str, Any] = next(
        (v for k, v in content["callbacks"].items() if k.startswith(BestCheckpoint.__name__)), {}
    )
    if not state.get("best_model_path"):
        return
    if not source.is_file():
        raise UserError(
            f"resume={checkpoint}: the best epoch so far was in {BEST} beside it, which is gone. Put it back, or "
            "resume=never."
        )
    folder.mkdir(parents=True, exist_ok=True)
    publish(target, [source.read_bytes()])
