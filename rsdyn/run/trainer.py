"""Lightning's Trainer and the devices that a config asks for."""

from __future__ import annotations

import difflib
import inspect
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn.parallel import DistributedDataParallel

from rsdyn.config.schema import Config
from rsdyn.errors import UserError
from rsdyn.private import NoProfiler, adopt_children, leave_signals_alone
from rsdyn.ranks import in_batch_script
from rsdyn.run.checkpoints import WholeCheckpointIO
from rsdyn.run.progress import Guard
from rsdyn.run.run import Run


def on_gpu(config: Config) -> bool:
    """Whether the run computes on GPUs, as :func:`make_trainer` decides."""
    return config.trainer.accelerator != "cpu" and torch.cuda.is_available()


def device_of(config: Config) -> torch.device:
    """Where a script of one process computes."""
    return torch.device("cuda" if on_gpu(config) else "cpu")


def processes_here(run: Run) -> int:
    """How many processes this run has on one machine; ``perturb.py`` has one."""
    devices = run.config.trainer.devices
    if run.script == "perturb":
        return 1
    if devices == "auto":
        return torch.cuda.device_count() if on_gpu(run.config) else 1
    return devices if isinstance(devices, int) else sum(part != "" for part in devices.split(","))


def make_trainer(run: Run, callbacks: list[L.Callback]) -> L.Trainer:
    """Lightning's Trainer: the ``trainer`` section, our defaults, and ``trainer.options`` over them.

    Raises ``UserError`` for an option Lightning does not have, or a device this machine does not have.
    """
    settings = run.config.trainer
    accelerator = settings.accelerator
    if accelerator == "auto" and not torch.cuda.is_available():
        accelerator = "cpu"  # Lightning would take Apple's MPS, which has no float64, and the statistics need it
    arguments: dict[str, Any] = {
        "max_epochs": settings.max_epochs,
        "devices": settings.devices,
        "num_nodes": settings.num_nodes,
        "accelerator": accelerator,
        "precision": settings.precision,
        "logger": run.logger or False,
        "callbacks": [*callbacks, Guard(run.stop)],
        "default_root_dir": run.folder,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,  # validation before training would record what training is about to
        "log_every_n_steps": 20,
        "use_distributed_sampler": False,
        "plugins": [WholeCheckpointIO()],
        "profiler": NoProfiler(),
    }
    if in_batch_script():  # Lightning would wait for processes that srun starts, or refuse the job's --ntasks
        arguments["plugins"].append(LightningEnvironment())
    if settings.devices != 1 or settings.num_nodes > 1:
        # the buffers are equal everywhere; syncing them in each forward would hang processes with fewer batches
        new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        no_sync: dict[str, Any] = {"forward_sync_buffers" if new_name else "broadcast_buffers": False}
        arguments["strategy"] = DDPStrategy(timeout=timedelta(seconds=settings.timeout), **no_sync)
    known = inspect.signature(L.Trainer).parameters
    for name, value in settings.options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            cure = f"Did you mean trainer.options.{near[0]}?" if near else f"It has: {', '.join(known)}."
            raise UserError(f"trainer.options.{name}={value}: lightning's Trainer has no such argument. {cure}")
    try:
        trainer = L.Trainer(**(arguments | settings.options))
    except (MisconfigurationException, TypeError, ValueError, RuntimeError) as error:
        given = f"devices={settings.devices}, accelerator={settings.accelerator}, precision={settings.precision}"
        options = f", options={settings.options}" if settings.options else ""
        reason = " ".join(str(error).split())
        raise UserError(f"trainer ({given}{options}): lightning refuses this: {reason}") from error
    leave_signals_alone(trainer)
    adopt_children(trainer, run.stop.adopt)
    return trainer
