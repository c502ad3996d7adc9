"""Save the W&B layout: ``python -m rsdyn.tracking.workspace``, or with ``--print`` only show it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rsdyn.errors import UserError
from rsdyn.tracking.keys import SCRIPT
from rsdyn.tracking.session import project_of

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

PROGRAM = "python -m rsdyn.tracking.workspace"
METRIC = "val/mse"  # what configs/sweep-cae*.yaml lower, in raw activations, so that all of its runs compare
INSTALL = "pip install wandb-workspaces"


def main(argv: Sequence[str] | None = None) -> int:
    """Build the workspace and the report, save them, and say where they are; 2 for a mistake that the user can mend."""
    given = _parser().parse_args(argv)
    try:
        check(given.project, given.runs)
        _need_package()
        if given.print:
            print(json.dumps(specs(given.project, given.runs, by_model=given.by_model, script=given.script), indent=2))
        else:
            for address in save(given.project, given.entity, given.runs, by_model=given.by_model, script=given.script):
                print(address)
    except UserError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Save a layout in W&B: a workspace with a section for each figure of the paper, and a report that "
        "compares runs.",
        epilog="Each call saves a new workspace and a new report; older ones stay as they are.",
    )
    parser.add_argument(
        "--entity", help="user or team that owns the project (default: WANDB_ENTITY, else the key's own)"
    )
    parser.add_argument(
        "--project", default=project_of(None), help="tracking.project of the runs (default: %(default)s)"
    )
    parser.add_argument(
        "--runs", nargs="+", default=[], metavar="ID", help="the runs that the report compares (default: all finished)"
    )
    parser.add_argument(
        "--by-model", action="store_true", help="draw the mean of each model's runs, not one line per run"
    )
    parser.add_argument(
        "--script", choices=sorted(set(SCRIPT.values())), help="only the sections and runs of this one (default: all)"
    )
    parser.add_argument("--print", action="store_true", help="print what would be sent, as JSON, and send nothing")
    return parser


def check(project: str, runs: Sequence[str]) -> None:
    """Raise UserError for a project or a run that W&B could not have."""
    if not re.fullmatch(r"[^/\\#?%:\x00-\x1f]{1,128}", project):
        raise UserError(
            f"--project={project} is no project's name: give one of 1 to 128 letters without any of / \\ # ? % :, and "
            "its owner as --entity."
        )
    for run in runs:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", run):
            raise UserError(
                f"--runs {run} is no run's id: give the last part of its address in W&B, such as 1mbku38n, which "
                "provenance.json has as wandb_id."
            )


def _need_package() -> None:
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError(f"layouts are built by the package wandb-workspaces, which is not installed. Run {INSTALL}.")


def specs(
    project: str, runs: Sequence[str] = (), *, by_model: bool = False, script: str | None = None
) -> dict[str, Any]:
    """What would be sent, as plain containers: ``{"workspace": ..., "report": ...}``; no server is asked."""
    workspace, report = build(project, "", runs, by_model=by_model, script=script)
    sent = {"workspace": workspace._to_model().spec, "report": report._to_model().spec}
    return {name: json.loads(spec.model_dump_json(by_alias=True, exclude_none=True)) for name, spec in sent.items()}


def build(
    project: str, entity: str, runs: Sequence[str], *, by_model: bool, script: str | None = None
) -> tuple[ws.Workspace, wr.Report]:
    """The workspace and the report, not yet saved."""
    from rsdyn.tracking.workspace.comparison import comparison
    from rsdyn.tracking.workspace.layout import workspace

    layout = workspace(project, entity, by_model=by_model, metric=METRIC, script=script)
    return layout, comparison(project, entity, runs)


def save(
    project: str, entity: str | None, runs: Sequence[str] = (), *, by_model: bool = False, script: str | None = None
) -> tuple[str, str]:
    """Save both, and return their addresses.

    Raises UserError without a key, without a server that answers, for a project that is not there, and for what the
    server refuses.
    """
    from rsdyn.tracking.session import wandb_mode

    # WANDB_MODE says where runs go; a layout can only go to a server
    mode, line = wandb_mode("auto", {name: value for name, value in os.environ.items() if name != "WANDB_MODE"})
    if mode != "online":
        reason = line.partition(";")[0].removeprefix("W&B: ")
        raise UserError(
            f"{reason}: a layout is saved on W&B's server. Set WANDB_API_KEY or run `wandb login`, or see with --print "
            "what would be sent."
        )
    import wandb

    try:
        # the same owner as the runs have: what WANDB_ENTITY or the settings say, else the key's own
        entity = entity or wandb.setup().settings.entity or wandb.Api().default_entity or ""
    except Exception as error:  # W&B raises of every kind, and nothing of ours is in here
        raise _refused(project, entity, error) from error
    workspace, report = build(project, entity, runs, by_model=by_model, script=script)
    try:
        report.save()  # first, because it looks for the project before it sends anything
        workspace.save()
    except Exception as error:
        raise _refused(project, entity, error) from error
    return workspace.url, report.url


def _refused(project: str, entity: str | None, error: Exception) -> UserError:
    from rsdyn.redaction import redact

    reason = redact(str(error).partition("\n")[0].rstrip(".") or type(error).__name__)
    return UserError(
        f"W&B did not take the layout for --project={project} of --entity={entity or '(none)'}: {reason}. Check both, "
        "the key, and that a run has been uploaded there."
    )


if __name__ == "__main__":
    sys.exit(main())
