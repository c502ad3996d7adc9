"""The one way a run ends: figures, numbers, findings, page, Weights & Biases; a terminal gets the answer first."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from rsdyn.figures import static
from rsdyn.figures.analysis import figure_1
from rsdyn.files import RESULTS, SUMMARY, write_results, write_text
from rsdyn.report import write_report
from rsdyn.run.run import Run
from rsdyn.stream.kept import KeptStream
from rsdyn.tracking.show import Shared

if TYPE_CHECKING:
    from rsdyn.figures.panel import Panel
    from rsdyn.stream.trajectories import TrajectoryStream

FINDINGS, BEST = "findings.md", "checkpoints/best.ckpt"
MOST_SENTENCES = 6


@dataclass(frozen=True)
class Recorded:
    """The streams of a run, and how many sequences of each it recorded, in all its processes."""

    streams: Sequence[TrajectoryStream] = ()
    counts: Sequence[int] = ()

    def words(self) -> str:
        """What the language model had to do."""
        n = sum(self.counts)
        if n or not all(isinstance(stream, KeptStream) for stream in self.streams):
            return f"{n} sequences recorded" if n else "no sequence recorded, all were cached"
        return "not needed: the stream was recorded elsewhere"


@dataclass(frozen=True)
class Ending:
    """What a run leaves behind.

    Attributes:
        answer: what was found, in at most six sentences, each with its numbers.
        tables: lines for a terminal.
        notes: what a reader must know beside the tables, each a sentence or more.
        foot: what the run did, as lines by their labels; time and files are added.
        summary: of ``summary.json``; ``answer``, ``in_words`` and ``seconds`` are added.
        arrays: of ``results.npz``.
        findings: of ``findings.md``, below its title, the answer and the notes: its tables, and what stands beneath
            them. None writes no such file.
        send: hands the results to W&B.
        panels: what is shown, on the page, in pictures and in W&B.
        recorded: what the run recorded.
        seconds: of parts of the run, beside the whole.
    """

    answer: Sequence[str]
    tables: Sequence[str]
    summary: Mapping[str, Any]
    arrays: Mapping[str, Any]
    send: Callable[[Shared, Mapping[str, Any]], None]
    panels: Sequence[Panel]
    notes: Sequence[str] = ()
    recorded: Recorded = field(default_factory=Recorded)
    foot: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[str, str] | None = None
    seconds: Mapping[str, Any] = field(default_factory=dict)


def draw(run: Run, panels: Sequence[Panel], trainer: L.Trainer | None = None) -> None:
    """Save panels, shared out over the processes of the first node, which surely have one disk; Fig. 1 also as one."""
    folder = run.folder / "figures"
    rank, n = (0, 1) if trainer is None else (trainer.local_rank, trainer.num_devices)
    if trainer is None or trainer.node_rank == 0:
        for panel in panels[rank::n]:
            static.save(panel, folder)
        if rank == 0 and (parts := figure_1(panels)):
            static.save(static.assembled(parts), folder, "fig1")
    if trainer is not None:
        trainer.strategy.barrier()


def finish(run: Run, end: Ending) -> None:
    """Write what a run leaves behind, send it to W&B, and print it: on the first process."""
    assert len(end.answer) <= MOST_SENTENCES, "an answer is short"
    seconds = {"total": time.time() - run.started, **end.seconds}
    summary = {**end.summary, "answer": [*end.answer], "in_words": [*end.notes], "seconds": seconds}
    write_results(run.folder, end.arrays, summary)
    files = ["report.html", SUMMARY, RESULTS, "figures/"]
    if end.findings is not None:
        write_text(run.folder / FINDINGS, _as_markdown(end, *end.findings, run))
        files.insert(1, FINDINGS)
    if (run.folder / BEST).exists():
        files.append(BEST)
    write_report(run.folder)
    artifacts = run.config.tracking.artifacts
    shared = Shared(run.logger, run.folder, end.recorded.streams, end.recorded.counts, end.panels, artifacts)
    end.send(shared, summary)
    for part in (end.answer, end.tables, *([note] for note in end.notes)):
        if part:
            run.say()
            for line in part:
                run.say(line)
    run.say()
    for label, text in end.foot.items():
        run.note(label, text)
    run.note("Time", f"{seconds['total']:.0f} s in all")
    run.note("Run folder", str(run.folder))
    run.note("", ", ".join(files))


def _as_markdown(end: Ending, title: str, tables: str, run: Run) -> str:
    """The file of findings: the answer, the tables, what a reader must know, and where it all comes from."""
    foot = {**end.foot, "Run folder": str(run.folder)}
    parts = [f"# {title}", " ".join(end.answer), tables.strip(), *end.notes]
    parts.append("\n".join(f"- {label}: {text}" for label, text in foot.items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def leave(trainer: L.Trainer) -> None:
    """Wait for the other processes, and end what connects them."""
    trainer.strategy.barrier()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def in_all_processes(trainer: L.Trainer, n: int) -> int:
    """The sum of a number over the processes of a run."""
    return int(trainer.strategy.reduce(torch.tensor(n, device=trainer.strategy.root_device), reduce_op="sum"))
