"""The measures of a stream: a module each, under the measure's name in ``analysis.measures``, with its ``MEASURE``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from rsdyn.analysis.measure import Measure
from rsdyn.analysis.settings import OF_STREAM

__all__ = ["OF_STREAM", "measure_of"]


def measure_of(name: str) -> Measure[Any]:
    """The measure of a name of :data:`OF_STREAM`."""
    found: Measure[Any] = import_module(f"{__name__}.{name}").MEASURE
    return found
