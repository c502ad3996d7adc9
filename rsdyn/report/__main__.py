"""One page of several runs: ``python -m rsdyn.report RUN [RUN ...] -o out.html``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rsdyn.errors import UserError
from rsdyn.files import CONFIG, PROVENANCE, RESULTS, SUMMARY
from rsdyn.report import report


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and say where it is; 2 for a mistake that the user can mend, with one message."""
    parser = argparse.ArgumentParser(
        prog="python -m rsdyn.report",
        description="Make one self-contained page of finished runs; it opens from disk, without a network.",
        epilog="Runs of one model become series of one panel; two models are compared over their depth from 0 to 1.",
    )
    parser.add_argument("run", nargs="+", metavar="RUN", help="a run folder of train.py, analyze.py or perturb.py")
    parser.add_argument("-o", "--out", default="report.html", help="the page to write (default: report.html)")
    parser.add_argument("--title", help="the page's heading (default: the models' names)")
    given = parser.parse_args(argv)
    try:
        path = report(finished(given.run), given.out, given.title)
    except UserError as error:
        print(f"rsdyn.report: error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{path}  ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def finished(folders: Sequence[str]) -> list[str]:
    """The runs that have their results; of several, those that have none yet are named and skipped.

    Raises ``UserError`` where none is left. One run alone is returned as it is.
    """
    if len(folders) == 1:
        return [*folders]
    going = [folder for folder in folders if is_unfinished(Path(folder).expanduser())]
    for folder in going:
        print(f"rsdyn.report: {folder} is not finished: skipped", file=sys.stderr)
    if len(going) == len(folders):
        raise UserError(f"None of these {len(folders)} runs is finished. Wait for one to end, or start it again.")
    return [folder for folder in folders if folder not in going]


def is_unfinished(folder: Path) -> bool:
    """Whether a folder is of a run that was started and has not left its results yet."""
    started = (folder / PROVENANCE).is_file() and (folder / CONFIG).is_file()
    return started and not ((folder / SUMMARY).is_file() and (folder / RESULTS).is_file())


if __name__ == "__main__":
    sys.exit(main())
