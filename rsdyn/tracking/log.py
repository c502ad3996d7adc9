"""What a run shows in Weights & Biases: curves over depth, charts, tables, pictures and its row in the runs table.

The keys are those of ``keys.py``. Everything is on disk before it comes here. Every function does nothing when
``logger`` is None; what W&B does not take is named when the run closes, and ends nothing (`rsdyn.tracking.sending`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rsdyn.figures import interactive
from rsdyn.files import plain
from rsdyn.redaction import redact
from rsdyn.tracking.keys import CHART, CURVE, IMAGE, PAGE, TABLE, curves_of
from rsdyn.tracking.sending import sending

if TYPE_CHECKING:
    from rsdyn.figures.panel import Panel
    from rsdyn.tracking.logger import RunLogger

MAX_ROWS = 20_000  # of a table: W&B takes .4 ms a row, shows 10,000 at once, and cuts at 200,000

Series = dict[str, dict[str, list[float | None]]]
"""``{measure: {series: one value per sublayer}}``: S values, or S - 1 of transitions, None where there is none."""


class Table(NamedTuple):
    """A table: the columns' names, and the rows in the order in which they may be cut off at the end."""

    columns: Sequence[str]
    rows: list[list[Any]]


def log_curves(logger: RunLogger | None, curves: Series, n_sublayers: int) -> None:
    """Log curves over depth, one row per sublayer, against ``depth`` in [0, 1].

    Transitions stand at the sublayer they leave. Values that are not finite are left out. Raises ValueError for a curve
    of neither S nor S - 1 values, and KeyError for a measure that `rsdyn.tracking.keys` does not know.
    """
    if logger is None:
        return
    rows: list[dict[str, Any]] = [{"depth": s / max(n_sublayers - 1, 1)} for s in range(n_sublayers)]
    for measure, series in curves.items():
        curves_of(measure)
        for name, curve in series.items():
            values = plain(curve)
            if len(values) not in (n_sublayers, n_sublayers - 1):
                raise ValueError(
                    f"curves[{measure!r}][{name!r}] has {len(values)} values, but must have one a sublayer "
                    f"({n_sublayers}) or one a transition ({n_sublayers - 1}): check n_sublayers."
                )
            for row, value in zip(rows, values, strict=False):
                if value is not None:
                    row[CURVE.format(measure=measure, series=name)] = value
    with sending(logger, "the curves over depth"):
        for row in rows:
            logger.experiment.log(row)


def log_panels(logger: RunLogger | None, panels: Sequence[Panel], folder: Path) -> None:
    """Log panels as interactive charts ``charts/<key>``, and as their pictures in ``folder``, ``figures/<key>``.

    Pictures that no panel made (the whole of Fig. 1) are logged by the names of their files.
    """
    if logger is None or not panels:
        return
    import wandb

    charts = {CHART.format(key=panel.key): interactive.figure(panel) for panel in panels}
    with sending(logger, "the charts"):
        logger.experiment.log({key: wandb.Plotly(figure) for key, figure in charts.items()})
    pictures = sorted(folder.glob("*.png"))
    with sending(logger, "the figures"):
        logger.experiment.log({IMAGE.format(key=path.stem): wandb.Image(str(path)) for path in pictures})


def log_page(logger: RunLogger | None, path: Path) -> None:
    """Log the run's page, as ``page``."""
    if logger is None or not path.is_file():
        return
    import wandb

    with sending(logger, "the page"):
        logger.experiment.log({PAGE: wandb.Html(str(path), inject=False)})


def log_tables(logger: RunLogger | None, tables: Mapping[str, Table]) -> None:
    """Log tables as ``tables/<name>``, all in one row.

    Numbers that are not finite become empty cells. Of more than `MAX_ROWS` rows the first are kept, and the run's
    summary says so as ``thinned/<name>``.
    """
    if logger is None or not tables:
        return
    import wandb

    thinned: dict[str, str] = {}
    made: dict[str, dict[str, Any]] = {}
    for name, table in tables.items():
        if len(table.rows) > MAX_ROWS:
            thinned[f"thinned/{name}"] = f"the first {MAX_ROWS} of {len(table.rows)} rows; all are in results.npz"
        data = [plain(row) for row in table.rows[:MAX_ROWS]]
        made[TABLE.format(name=name)] = {"columns": list(table.columns), "data": data}
    with sending(logger, "the tables"):
        logger.experiment.log({key: wandb.Table(**parts) for key, parts in made.items()})
        logger.experiment.summary.update(thinned)


def log_summary(logger: RunLogger | None, summary: Mapping[str, Any]) -> None:
    """Put the numbers and texts of a nested dictionary into the run's summary under ``section/name`` keys.

    Lists, None, NaN and infinities have no place in the runs table and are left out.
    """
    if logger is None:
        return
    flat = redact(_flatten(plain(summary)))
    with sending(logger, "the summary"):
        logger.experiment.summary.update(flat)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}/"))
        elif value is not None and not isinstance(value, list):
            flat[prefix + key] = value
    return flat
