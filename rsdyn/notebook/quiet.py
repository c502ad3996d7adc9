"""Lightning's lines on its own set-up, kept out of notebooks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning's lines on its own set-up tell a reader of a notebook nothing to act on."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in (r".*does not have many workers.*", r".*`__len__` defined.*", r".*isinstance\(treespec.*",
                            r".*number of training batches.*", r".*dataloader is not resumable.*"):  # fmt: skip
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
