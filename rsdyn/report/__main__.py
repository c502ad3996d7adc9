"""One page of several runs: ``python -m rsdyn.report RUN [RUN ...] -o out.html``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rsdyn.errors import UserError
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
        path = report(given.run, given.out, given.title)
    except UserError as error:
        print(f"rsdyn.report: error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{path}  ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
