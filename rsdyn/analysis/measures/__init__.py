"""The measures of a stream: a module each, under the measure's name in ``analysis.measures``, with its ``MEASURE``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from rsdyn.analysis.measure import Measure
from rsdyn.analysis.results import MEASURES
from rsdyn.analysis.settings import PHASES, READOUT

OF_STREAM = tuple(name for name in MEASURES if name not in (READOUT, PHASES))  # made of one stream that was collected


def measure_of(name: str) -> Measure[Any]:
    """The measure of a name of :data:`OF_STREAM`."""
    found: Measure[Any] = import_module(f"{__name__}.{name}").MEASURE
    return found
