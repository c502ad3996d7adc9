"""What Lightning does some fifty times in each step whether or not it is of use, left out.

A step of a small autoencoder takes 1.4 ms here, and Lightning and what rides along added 1.1: 0.2 of them were these.
Nothing else changes: who asks for a profiler (``trainer.options.profiler``) gets it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
from lightning.pytorch.profilers import PassThroughProfiler

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
