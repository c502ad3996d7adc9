"""The programs: each file reads like a section of the paper's methods."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from rsdyn.run.run import Run
from rsdyn.run.script import run_script


def main(script: str, argv: Sequence[str] | None = None) -> int:
    """Run ``train``, ``analyze`` or ``perturb`` and return its exit code.

    The program's own file, whose imports take seconds, is read once the settings hold: ``--help`` and a mistyped key
    answer in a fraction of one.
    """

    def work(run: Run) -> None:
        getattr(import_module(f"rsdyn.commands.{script}"), script)(run)

    return run_script(script, work, argv)
