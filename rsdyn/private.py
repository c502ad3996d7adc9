"""Every touch of what Lightning and W&B keep private, each with its reason.

Checked on lightning 2.6.6 and wandb 0.28 to 0.31; ``pyproject.toml`` caps both at the next minor release, in which a
private name may go without a word. ``tests/run/test_private.py`` asks whether each is still there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

if TYPE_CHECKING:
    from wandb import Artifact

# -- Lightning: signals and children -----------------------------------------------------------------------------------


def leave_signals_alone(trainer: L.Trainer) -> None:
    """Keep Lightning from taking over the signals, which are ours (``run/signals.py``).

    Its SIGTERM handler broadcasts from inside the handler, which hangs two processes that both got the signal; its
    SIGUSR1 handler asks SLURM for the job again, without asking the user.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def adopt_children(trainer: L.Trainer, adopt: Callable[[list[Any]], object]) -> None:
    """Call ``adopt`` with the processes that a DDP launcher starts, once they are there.

    Lightning's own observer, which would kill all of them on the first one's end, then has nothing left to look after.
    """
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return
    launch = launcher.launch

    def launch_and_adopt(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def adopt_first(*args: Any, **kwargs: Any) -> Any:
            adopt(launcher.procs)
            launcher.procs.clear()
            return function(*args, **kwargs)

        return launch(adopt_first, *args, **kwargs)

    launcher.launch = launch_and_adopt  # type: ignore[method-assign]


# -- Lightning: where a run is -----------------------------------------------------------------------------------------


def batches_begun(trainer: L.Trainer) -> int:
    """How many batches of this epoch have begun: not 0 where a run resumes in the middle of one.

    Lightning's own count, which is in each checkpoint, and not a state of the loader's: that one is restored only where
    nobody asked for the number of steps before.
    """
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready


def resumes_within_epoch(trainer: L.Trainer) -> bool:
    """Whether training starts in the middle of an epoch."""
    return trainer.fit_loop.restarting


@contextmanager
def before_batch(trainer: L.Trainer) -> Iterator[None]:
    """Take the batch that is about to be trained on out of Lightning's count, while a checkpoint is written.

    In ``on_train_batch_start`` it is counted as ready, and maybe as the epoch's last; a run that resumes from there
    would log one step too many, and take the epoch for finished but for its validation. Lightning's own place to save,
    ``on_train_batch_end``, will not do: at the last batch of an epoch the validation would be skipped, and a signal
    that stops recording comes before a batch, not after one.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    is_last = progress.is_last_batch
    progress.total.ready -= 1
    progress.current.ready -= 1
    progress.is_last_batch = False
    try:
        yield
    finally:
        progress.total.ready += 1
        progress.current.ready += 1
        progress.is_last_batch = is_last


# -- Lightning: what it does some fifty times in each step whether or not it is of use ---------------------------------
# A step of a small autoencoder takes 1.4 ms here, and Lightning and what rides along added 1.1: 0.2 of them were these.
# Who asks for a profiler (``trainer.options.profiler``) gets it.

_NOTHING = nullcontext()


class NoProfiler(PassThroughProfiler):
    """Measures nothing, and makes no generator to do so: 60 of them a step take 0.1 ms."""

    def profile(self, action_name: str) -> AbstractContextManager:  # type: ignore[override]
        return _NOTHING


class LeanModule(L.LightningModule):
    """A module that does not look for parameters in the name of the hook that runs.

    Lightning writes that name down before and after each hook, 48 times a step, and ``nn.Module`` examines each
    attribute that is set on it: 0.1 ms.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)


# -- W&B ---------------------------------------------------------------------------------------------------------------


def log_artifact(run: Any, artifact: Artifact, *, uses: bool) -> None:
    """Log an artifact that a run made, or with ``uses`` one that it used.

    ``use_artifact`` refuses offline runs and waits for the server online; the call underneath does neither. What a user
    created is nobody's output, so the mark is for what is used alone, as in ``use_artifact``.
    """
    run._log_artifact(artifact, is_user_created=uses, use_after_commit=uses)


def add_reference(artifact: Artifact, path: Path, digest: str) -> None:
    """Add where a file lies, with a checksum that is known already: W&B's own way would read the file again."""
    from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry
    from wandb.sdk.lib.paths import LogicalPath

    artifact.manifest.add_entry(
        ArtifactManifestEntry(
            path=LogicalPath(path.name), ref=path.absolute().as_uri(), digest=digest, size=path.stat().st_size
        )
    )
