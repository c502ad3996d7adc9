"""Which options of Lightning's Trainer a run can honour, said before any work is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rsdyn.errors import UserError
from rsdyn.options import show

# What rsdyn hands to the Trainer itself, and the key to use instead of trainer.options.
RESERVED = {
    "max_epochs": "trainer.max_epochs",
    "devices": "trainer.devices",
    "num_nodes": "trainer.num_nodes",
    "accelerator": "trainer.accelerator",
    "precision": "trainer.precision",
    "logger": "tracking.mode",
    "callbacks": "trainer.patience",
    "default_root_dir": "run.dir",
    "plugins": "trainer.precision",
}

_VALIDATION = "the best epoch, and when to stop, are told by the validation loss at the end of each epoch"
# Options that would take away what a run rests on: (why, what to use instead).
_NEVER = {
    "fast_dev_run": ("it leaves no checkpoint to test", "data.limit=60 trainer.max_epochs=1 for a quick look"),
    "barebones": ("it leaves no checkpoint to test", "data.limit=60 trainer.max_epochs=1 for a quick look"),
    "enable_checkpointing": ("the best epoch is tested from its checkpoint", "run.dir for where it is kept"),
    "overfit_batches": (
        "it takes the validation sequences from those that are trained on, and stops nothing",
        "data.limit for a small text",
    ),
    "max_time": ("a run that ends within an epoch has no best one", "trainer.max_epochs, or a signal, which saves"),
    "val_check_interval": (_VALIDATION, "trainer.options.check_val_every_n_epoch for fewer validations"),
}
_HARMLESS: dict[str, tuple[Any, ...]] = {  # the values with which these do nothing
    "fast_dev_run": (False, 0),
    "barebones": (False,),
    "enable_checkpointing": (True, None),
    "overfit_batches": (0, 0.0),
    "max_time": (None,),
    "val_check_interval": (None, 1.0),
}
# Shares of the data, each with the key that says how much there is.
_LIMITS = {
    "limit_train_batches": "data.limit",
    "limit_val_batches": "data.val_size",
    "limit_test_batches": "data.test_size",
    "limit_predict_batches": "data.limit",
}


def check_trainer_options(options: Mapping[str, Any], *, script: str, max_epochs: int) -> None:
    """Raise ``UserError`` for an option that a run could not honour to its end, with the reason and the cure.

    Args:
        options: ``trainer.options``.
        script: ``train`` or ``analyze``.
        max_epochs: ``trainer.max_epochs``.
    """
    for name, value in options.items():
        given = f"trainer.options.{name}={show(value)} is not allowed"
        if name in RESERVED:
            raise UserError(f"{given}: rsdyn sets {name} of lightning's Trainer itself. Use {RESERVED[name]} instead.")
        if name in _NEVER and not _is_one_of(value, _HARMLESS[name]):
            why, instead = _NEVER[name]
            raise UserError(f"{given}: {why}. Use {instead}.")
        if name in _LIMITS and value is not None:
            measured = script == "analyze" or name == "limit_test_batches"
            if measured and not _is_one_of(value, (1.0,)):
                instead = "analysis.samples" if script == "analyze" else "data.test_size"
                raise UserError(f"{given}: a part of the sequences would be measured. Use {instead}.")
            if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
                raise UserError(
                    f"{given}: it leaves out what every run needs, and must be a share or a number of batches above 0. "
                    f"For less data use {_LIMITS[name]}."
                )
        if name == "check_val_every_n_epoch" and not (isinstance(value, int) and 1 <= value <= max_epochs):
            raise UserError(
                f"{given}: {_VALIDATION} that has one, and trainer.max_epochs={max_epochs} would see none. Give a "
                f"whole number from 1 to {max_epochs}."
            )
        if name in ("max_steps", "min_steps", "min_epochs") and value is not None and value != -1:
            if name == "max_steps" and value == 0:
                raise UserError(f"{given}: nothing would be trained. Give -1 for no limit, or a number of steps.")
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UserError(f"{given}: it must be a whole number >= 0.")


def check_max_steps(options: Mapping[str, Any], *, batches: int) -> None:
    """Raise ``UserError`` where ``trainer.options.max_steps`` would end a run within its first epoch of ``batches``."""
    steps = options.get("max_steps")
    needed = -(-batches // int(options.get("accumulate_grad_batches") or 1))
    if steps is not None and 0 < steps < needed:
        raise UserError(
            f"trainer.options.max_steps={steps} ends within the first epoch of {needed} steps, and {_VALIDATION}. Give "
            f"{needed} or more, or a smaller data.limit."
        )


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether a value is one of some, where ``1`` is not ``True`` and ``1`` batch is not ``1.0`` of them."""
    return any(type(value) is type(each) and value == each for each in values)
