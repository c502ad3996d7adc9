"""The report page: what runs left on disk, as one self-contained page that opens without a network.

``write_report(folder)`` writes ``report.html`` into a run's own folder; ``python -m rsdyn.report RUN [RUN ...] -o
out.html`` makes one page of several runs. The page is made from the run's files alone: no model and no stream is read
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["report", "write_report"]

FILE = "report.html"


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` into the folder of one finished run, and return its path.

    Raises UserError for a folder that is not a finished run of ours, or that cannot be written.
    """
    folder = Path(folder)
    return report([folder], folder / FILE)


def report(folders: Sequence[str | Path], out: str | Path, title: str | None = None) -> Path:
    """Write one page of all the runs, and return its path.

    Raises UserError for a folder that is not a finished run of ours, for runs that cannot stand in one comparison, and
    for a page that cannot be written.
    """
    from rsdyn.report.page import make_page, write_page
    from rsdyn.report.reading import read_runs

    return write_page(make_page(read_runs(folders), title), out)
