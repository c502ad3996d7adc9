"""The programs: each file reads like a section of the paper's methods."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from importlib import import_module

from rsdyn.run.run import Run
from rsdyn.run.script import run_script


def main(script: str, argv: Sequence[str] | None = None) -> int:
    """Run ``train``, ``analyze`` or ``perturb`` and return its exit code.

    The program's own file, whose imports take seconds, is read once the settings hold: ``--help`` and a mistyped key
    answer in a fraction of one.
    """
    # What modules are made of stays. To look for garbage among it takes a fifth of the imports' time, and more than a
    # second when the process ends.
    collects = gc.isenabled()
    gc.disable()

    def work(run: Run) -> None:
        program = getattr(import_module(f"rsdyn.commands.{script}"), script)
        gc.freeze()
        if collects:
            gc.enable()
        program(run)

    try:
        return run_script(script, work, argv)
    finally:
        if argv is None:  # the process ends with it
            gc.freeze()
        if collects:
            gc.enable()
