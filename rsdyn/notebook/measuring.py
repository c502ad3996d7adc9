"""``measure``: the paper's measures of trajectories at hand, beside their controls."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

import rsdyn
from rsdyn.analysis import group_table
from rsdyn.analysis.by_label import by_group, given_by_group
from rsdyn.analysis.checks import check_settings
from rsdyn.analysis.collected import Collected
from rsdyn.analysis.finding import Finding
from rsdyn.analysis.findings import findings
from rsdyn.analysis.group_design import Labelled, check_groups
from rsdyn.analysis.measure import How
from rsdyn.analysis.measures.rotation import compare_streams
from rsdyn.analysis.probe import ResidualStreamProbe
from rsdyn.analysis.results import AnalysisResults, ByGroup, ConditionResults, NullTest, curves, on_cpu
from rsdyn.analysis.settings import CONDITIONS, MEASURES, OF_STREAM, PHASES, AnalysisConfig, RotationConfig
from rsdyn.analysis.shape import with_phases
from rsdyn.analysis.shape_rows import shape_in_words, shape_rows
from rsdyn.analysis.stored import flatten
from rsdyn.analysis.streams import measure_stream
from rsdyn.analysis.summary import in_words, numbers_of
from rsdyn.analysis.table import as_json, as_text
from rsdyn.config.schema import Config, to_yaml
from rsdyn.errors import UserError
from rsdyn.figures import static
from rsdyn.figures.analysis import analysis_panels
from rsdyn.figures.panel import Panel
from rsdyn.figures.streams import Analysis, streams_of
from rsdyn.files import CONFIG, PROVENANCE, write_json, write_results, write_text
from rsdyn.notebook.quiet import quiet
from rsdyn.notebook.recording import Origin, read
from rsdyn.report import report
from rsdyn.stream.kept import KeptStream
from rsdyn.stream.recorded import Trajectories
from rsdyn.stream.trajectory_datamodule import TrajectoryDataModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTROLS = {"shuffled": "token_shuffled", **{c: c for c in CONDITIONS[1:]}}  # what may be typed for each


# which measure draws a panel of the paper, and how its file name begins
class Curve(NamedTuple):
    """A curve over depth with the ends of its 95 % interval, each ``(S,)`` or ``(S - 1,)``."""

    value: Tensor
    low: Tensor | None
    high: Tensor | None


class Rotations(NamedTuple):
    """Turns of single units.

    Attributes:
        turns: ``(D,)`` clockwise turns of each unit's mean trajectory.
        mean: mean |R| over units.
        nulls: by null model, what each says: ``p`` of each unit, ``over_units`` (mean |R| of its surrogates), ...
    """

    turns: Tensor
    mean: float
    nulls: dict[str, NullTest]


@dataclass(frozen=True, repr=False)
class Stream:
    """What was measured of one stream; each property raises ``UserError`` where its measure was not asked for.

    Attributes:
        name: ``original``, or that of a control.
        results: everything that was measured, by measure.
    """

    name: str
    results: ConditionResults

    def curve(self, name: str) -> Curve:
        """Anything measured, by its path in the results, such as ``velocity/relative``, with its interval."""
        known = dict(curves(self.results))
        if name not in known:
            raise UserError(f"name={name!r}: this was not measured. There is {', '.join(sorted(known))}.")
        return Curve(known[name].value, known[name].low, known[name].high)

    @property
    def correlation(self) -> Curve:
        """Mean over units of the correlation between successive sublayers."""
        return self.curve("correlation/mean")

    @property
    def cosine(self) -> Curve:
        """Mean cosine between successive states."""
        return self.curve("cosine/mean")

    @property
    def speed(self) -> Curve:
        """Mean length of the step between successive states."""
        return self.curve("velocity/speed")

    @property
    def mutual_information(self) -> Curve:
        """Mean over units of the information between successive sublayers, nats."""
        return self.curve("mutual_information/mean")

    @property
    def rotation(self) -> Rotations:
        """Turns of units, and what each null model says of them."""
        found = self.results.rotation
        if found is None:
            raise UserError("rotation was not measured: leave measures out, or name it there.")
        return Rotations(-found.turns, float(found.mean_abs.value), found.nulls)


@dataclass(frozen=True, repr=False)
class Groups:
    """What was measured by group of sequences; its ``repr`` is a table, in a notebook too.

    Attributes:
        results: everything, as arrays.
    """

    results: ByGroup

    @property
    def names(self) -> tuple[str, ...]:
        """The groups."""
        return self.results.names

    def curve(self, name: str, group: str) -> Curve:
        """A curve of one group, such as ``curve("cosine", "correct")``, with its interval."""
        return Curve(*_place(self.results, name, group, self.results.names, "value", "interval"))

    def difference(self, name: str, group: str | None = None) -> Curve:
        """The difference in a curve between two groups, or of several between ``group`` and the rest."""
        first = self.results.first
        if not first:
            raise UserError("no two groups are large enough to be compared.")
        wanted = first[0] if group is None and len(first) == 1 else str(group)
        return Curve(*_place(self.results, name, wanted, first, "difference", "difference_interval"))

    def __repr__(self) -> str:
        return "\n".join([group_table.headline(self.results), *group_table.as_text(self.results)])

    def _repr_html_(self) -> str:
        """The findings by group as a table, for a notebook."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", "N", *group_table.heads(self.results)))
        rows = []
        for row in group_table.rows(self.results):
            cells = [row.label, row.n, *(cell.whole for cell in row.cells)]
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
        said = "".join(f"<p>{html.escape(note)}</p>" for note in self.results.notes)
        return (
            f"<p>{html.escape(group_table.headline(self.results))}</p><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table>{said}"
        )


def _place(
    found: ByGroup, name: str, group: str, groups: Sequence[str], value: str, ends: str
) -> tuple[Tensor, Tensor, Tensor]:
    if name not in found.curves:
        raise UserError(f"name={name!r}: by group there is {', '.join(found.curves)}.")
    if group not in groups:
        raise UserError(f"group={group!r}: there is {', '.join(groups)}.")
    i, curve = groups.index(group), found.curves[name]
    low, high = getattr(curve, ends)[:, i]
    return getattr(curve, value)[i], low, high


@dataclass(frozen=True, repr=False)
class Found(Stream):
    """What was measured of trajectories, beside their controls.

    Attributes:
        controls: the other streams, by name.
        findings: the paper's claims, each with its value in every stream.
        notes: what a reader must know, in sentences.
        x: the trajectories.
        by_group: every curve and finding by group of sequences, where ``x`` has at least two groups; else None.
    """

    controls: dict[str, Stream]
    findings: list[Finding]
    notes: list[str]
    x: Trajectories
    settings: AnalysisConfig
    by_group: Groups | None = None

    def __getitem__(self, name: str) -> Stream:
        """The stream of a control, or ``original``."""
        name = CONTROLS.get(name, name)
        if name == self.name:
            return self
        if name not in self.controls:
            raise UserError(f"{name!r} was not measured; there is {', '.join([self.name, *self.controls])}.")
        return self.controls[name]

    @property
    def streams(self) -> dict[str, ConditionResults]:
        """The results of every stream, the main one first."""
        return {self.name: self.results} | {name: c.results for name, c in self.controls.items()}

    def finding(self, key: str) -> Finding:
        """A row of the findings by its key."""
        rows = {row.key: row for row in self.findings}
        if key not in rows:
            raise UserError(f"key={key!r}: the findings here have {', '.join(rows)}.")
        return rows[key]

    @property
    def panels(self) -> list[Panel]:
        """All panels of what was measured, as :mod:`rsdyn.figures.static` and ``interactive`` draw them."""
        return analysis_panels(streams_of([Analysis(self._found())]))

    def plot(self, panel: str) -> Figure:
        """A panel of the paper, such as ``1E``, with its controls and intervals, as a matplotlib figure."""
        known = {one.key: one for one in self.panels}
        letters = {one.figure: one for one in reversed(known.values())}  # the first of each letter
        found = known.get(panel) or letters.get(panel.upper())
        if found is None:
            raise UserError(
                f"panel={panel!r}: what was measured here has the panels {', '.join(sorted(letters))}, and by name "
                f"{', '.join(known)}."
            )
        return static.draw(found)

    def report(self, path: str | Path) -> Path:
        """Write the page of an analysis, one file that opens without a network; gives its path."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / f"{self.x.label}-analysis"
            folder.mkdir()
            config = Config()
            config.analysis = self.settings
            write_text(folder / CONFIG, to_yaml(config))
            write_json(folder / PROVENANCE, {"script": "analyze", "rsdyn": rsdyn.__version__})
            write_results(folder, flatten(self._found()), self._summary())
            return report([folder], Path(path).expanduser())

    def _found(self) -> AnalysisResults:
        _, n_sublayers, n_units = self.x.shape
        return AnalysisResults(
            self.streams, tuple(self.settings.measures), self.x.sites_per_layer, n_sublayers, n_units,
            None if self.by_group is None else self.by_group.results,
        )  # fmt: skip

    def _summary(self) -> dict[str, Any]:
        x = self.x
        n = len(x.sequence.unique())
        return {
            "lm": x.label,
            "text": "given texts",
            "conditions": list(self.streams),
            "measures": list(self.settings.measures),
            "n_sequences": n,
            "n_trajectories": len(x),
            "positions": "last" if n == len(x) else "as recorded",
            "n_sublayers": x.shape[1],
            "n_units": x.shape[2],
            "sites_per_layer": x.sites_per_layer,
            "sequences_recorded": 0,
            "processes": 1,
            "findings": as_json(self.findings),
            "in_words": self.notes,
            **({} if self.by_group is None else {"by_group": group_table.as_json(self.by_group.results)}),
            **numbers_of(self._found()),
            "seconds": {"total": 0.0, "parts": {}},
        }

    def __repr__(self) -> str:
        lines = [f"Found({self.x.label}, {len(self.x)} trajectories)", *as_text(self.findings, list(self.streams))]
        return "\n".join([*lines, *([] if self.by_group is None else ["", repr(self.by_group)])])

    def _repr_html_(self) -> str:
        """The findings as a table, for a notebook."""
        streams = list(self.streams)
        head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", "paper", *streams))
        rows = []
        for row in self.findings:
            cells = [row.claim or row.statistic, row.paper, *(str(row.values.get(s, "")) for s in streams)]
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        return table + ("" if self.by_group is None else self.by_group._repr_html_())


def measure(
    x: Trajectories,
    controls: Sequence[str] = ("shuffled", "untrained"),
    *,
    measures: Sequence[str] | None = None,
    surrogates: int = 1000,
    nulls: Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[int], object] = lambda n: None,
) -> Found:
    """Measure trajectories as a dynamical system, beside controls (paper 2.2 to 2.6, 2.8).

    Args:
        x: what :func:`rsdyn.record` gave.
        controls: streams to stand beside: ``shuffled`` (the tokens of each text permuted), ``shuffled_keep_last``,
            ``untrained`` (a model of the same shape with random weights). They are recorded from the model and tokens
            that ``x`` came from; of trajectories that were loaded from a file there are none.
        measures: which, by the names of ``analysis.measures``; default the paper's. Of the others a stream alone gives
            ``massive``, ``curvature``, ``dimension``, ``similarity``, ``dsa``, ``norm`` and ``phases``.
        surrogates: of each null model of the rotations.
        nulls: null models of the rotations; default those that the streams allow.
        seed: of shuffles, surrogates and random weights.
        progress: called with the number of sequences after each batch of a control.

    Where ``x`` has groups, ``found.by_group`` has every curve and finding of it by group, with the difference between
    groups, its interval and a p over permutations of the labels; sequences count as independent there.

    Raises:
        UserError: too few sequences, a control that cannot be recorded, a name that is not known.
        TypeError: where ``x`` is not :class:`~rsdyn.stream.recorded.Trajectories`.
    """
    if not isinstance(x, Trajectories):
        raise TypeError(f"x: {type(x).__name__} is not taken; give Trajectories, as rsdyn.record does.")
    if isinstance(controls, str):
        raise TypeError(f"controls: give a list, such as [{controls!r}].")
    wrong = [c for c in controls if c not in CONTROLS]
    if wrong:
        raise UserError(f"controls={list(controls)}: {wrong[0]!r} is not known; there is {', '.join(CONTROLS)}.")
    possible = [*OF_STREAM, PHASES]
    chosen = list(MEASURES) if measures is None else list(measures)
    wrong = [m for m in chosen if m not in possible]
    if wrong or not chosen:
        what = f"{wrong[0]!r} is not" if wrong else "give at least"
        raise UserError(f"measures={chosen}: {what} one of {', '.join(possible)}.")
    if controls and not isinstance(x.origin, Origin):
        raise UserError(
            "controls: these trajectories do not know what model and tokens they were recorded from, so no control of "
            "them can be recorded. Give controls=[]."
        )
    streams = {"original": x}
    for control in dict.fromkeys(CONTROLS[c] for c in controls):
        origin: Origin = x.origin
        recorded = read(origin.stream(control, seed=seed), None, x.groups, None, None, progress)
        streams[control] = recorded if len(recorded) == len(x) else _same_rows(recorded, x)
    settings = replace(
        AnalysisConfig(),
        measures=chosen,
        conditions=list(streams),
        samples=None,
        rotation=replace(RotationConfig(), surrogates=surrogates, nulls=None if nulls is None else list(nulls)),
    )
    n = len(x.sequence.unique())
    sites = x.sites_per_layer
    check_settings(
        settings,
        n_sequences=n,
        n_trajectories=len(x),
        n_sublayers=x.shape[1],
        n_units=x.shape[2],
        sites_per_layer=sites,
    )
    labelled, why_not = _labelled(x, settings.keep)
    L.seed_everything(seed, verbose=False)
    collected: dict[str, Collected] = {}
    results: dict[str, ConditionResults] = {}
    how = How(settings, sites, seed)
    for name, recorded in streams.items():
        main = next(iter(collected.values()), None)
        stream = KeptStream(recorded)
        collected[name] = Collected(
            n_sublayers=x.shape[1],
            n_units=x.shape[2],
            measures=chosen,
            keep=settings.keep,
            components=settings.components,
            name=name,
            largest=None if main is None else main.largest,
            sites_per_layer=sites,
            tokens="last" if stream.positions.is_last else "all" if stream.positions.rule == "all" else "some",
            keeps=main is None and labelled is not None,
        )
        with quiet(), tempfile.TemporaryDirectory() as folder:
            trainer = L.Trainer(
                accelerator="cpu" if not torch.cuda.is_available() else "auto",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                default_root_dir=folder,
            )
            passes = TrajectoryDataModule(stream, passes=collected[name].n_passes)
            trainer.test(ResidualStreamProbe(collected[name]), datamodule=passes, verbose=False)
        results[name] = measure_stream(collected[name], how._replace(main=main), stream.dtype)
    if "rotation" in chosen:
        results = compare_streams(collected, results, how)
    results = {c: on_cpu(r) for c, r in results.items()}
    found = AnalysisResults(results, tuple(chosen), sites, x.shape[1], x.shape[2])
    found = with_phases(found, seed) if PHASES in chosen else found
    results = found.conditions
    groups = None
    if labelled is not None and given_by_group(found.main):
        groups = Groups(on_cpu(by_group(collected["original"], found, labelled, how)))
    return Found(
        "original",
        results["original"],
        {name: Stream(name, r) for name, r in results.items() if name != "original"},
        [*findings(found), *shape_rows(found)],
        [*x.notes, *in_words(found, several_tokens=n != len(x)), *shape_in_words(found), *why_not],
        x,
        settings,
        groups,
    )


def _labelled(x: Trajectories, keep: int | None) -> tuple[Labelled | None, list[str]]:
    """The groups of the sequences, each by itself; None, and why, where there are not at least two."""
    labels = KeptStream(x).sequences.labels
    if labels is None:
        return None, []
    n = len(labels)
    labelled = Labelled(labels.names, torch.from_numpy(labels.code), torch.arange(n), "sequences")
    try:
        labels.check("groups")
        check_groups(labelled, n if keep is None else min(n, keep))
    except UserError as error:
        return None, [f"Nothing is given by group. {str(error)[0].upper()}{str(error)[1:]}"]
    return labelled, []


def _same_rows(control: Trajectories, x: Trajectories) -> Trajectories:
    """Of a control's trajectories those of the sequences that ``x`` has, where it is a part of what was recorded."""
    wanted = set(x.sequence.tolist())
    rows = torch.tensor([s in wanted for s in control.sequence.tolist()])
    return control[rows]
