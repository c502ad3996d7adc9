"""How often the 95 % intervals of the findings hold what they should, row by row.

    python benchmarks/interval_coverage.py coverage.jsonl [--samples 200] [--designs ...] [--parts ...] [--cache DIR]

The population is the embedded model's stream of the embedded text, recorded once: 4,029 sequences of 138 documents. A
sample goes through the probe and the measures of analyze.py, and each row of its findings is compared with the row of
the population; or, where an estimate depends on how many samples it is made of, with the mean of all samples' (an
interval is for the expectation at this N). Four designs:

- random: 200 sequences drawn at random, intervals over sequences (analysis.resample=sequences);
- random-documents: the same, intervals over documents, which are for *other* documents and so wider than this needs;
- few: 64 sequences at random, as many as readout takes, intervals over sequences (only where it is asked for);
- runs: 600 sequences in runs of up to 30 of one document, as a text has them, intervals over documents.

Five parts of the measures, in turn: the paper's without the next one and the last, mutual information, the shape of
trajectories, their readout, and components. Each sample of a part is a line of the file, so that what was stopped
resumes. The table is printed in Markdown at the end.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsdyn.analysis.collected import Collected
from rsdyn.analysis.finding import Finding
from rsdyn.analysis.findings import findings
from rsdyn.analysis.measure import How
from rsdyn.analysis.probe import ResidualStreamProbe
from rsdyn.analysis.readout import read_sequences, readout_results
from rsdyn.analysis.results import AnalysisResults, ConditionResults
from rsdyn.analysis.settings import MEASURES, READOUT, SHAPE, AnalysisConfig
from rsdyn.analysis.shape_rows import shape_rows
from rsdyn.analysis.streams import measure_stream
from rsdyn.dynamics.readout import Readout
from rsdyn.dynamics.resampling import group_of
from rsdyn.dynamics.similarity import cka
from rsdyn.embedded import DOCUMENT_COLUMN
from rsdyn.lm.readout import LogitLens
from rsdyn.lm.source import find_lm
from rsdyn.stream.text.corpus import load_rows
from rsdyn.stream.text.documents import document_of
from rsdyn.stream.text.groups import SequenceGroups
from rsdyn.stream.text.tokens import Sequences, tokenise
from rsdyn.stream.trajectories import TrajectoryStream
from rsdyn.stream.trajectory_datamodule import TrajectoryBatch

RUN = 30
# rows whose estimate depends on N, by how their keys begin; debiased CKA is without bias for independent sequences, and
# in runs pairs of one document, which are alike, weigh more the fewer documents there are
AT_THIS_N = ("information", "dimension", "components", "explained", "similarity")
PARTS = (
    [m for m in MEASURES if m not in ("mutual_information", "pca")],
    ["mutual_information"],
    [m for m in SHAPE if m != "dsa"],  # which has no intervals
    [READOUT],
    ["pca"],
)
Draw = Callable[[np.random.Generator, np.ndarray], np.ndarray]
Row = Mapping[str, Any]


def whole_text() -> Sequences:
    """The embedded text in its own order."""
    lm, rows = find_lm("embedded"), load_rows(document_column=DOCUMENT_COLUMN)
    return tokenise(
        rows,
        lm.tokenizer(),
        order="corpus",
        documents=document_of(rows, document_column=DOCUMENT_COLUMN),
        max_tokens=lm.max_tokens,
        vocab_size=lm.vocab_size,
    )


def whole_readout(sequences: Sequences) -> Readout:
    """What the embedded model's stream of every sequence says, through the logit lens."""
    lm = find_lm("embedded").load(head=True)
    return read_sequences(lm, [np.asarray(sequences[i]) for i in range(len(sequences))], LogitLens())


def at_random(n: int) -> Draw:
    """``n`` sequences, each as likely as any other."""
    return lambda rng, document: rng.choice(len(document), n, replace=False)


def in_runs(n: int, length: int = RUN) -> Draw:
    """``n`` sequences in runs of up to ``length`` of one document; each sequence is as likely as any other.

    Every document is cut into runs, the last one shorter, and runs are drawn.
    """

    def draw(rng: np.random.Generator, document: np.ndarray) -> np.ndarray:
        places = [np.flatnonzero(document == d) for d in np.unique(document)]
        runs = [place[i : i + length] for place in places for i in range(0, len(place), length)]
        return np.concatenate([runs[k] for k in rng.permutation(len(runs))])[:n]

    return draw


RANDOM, RUNS = at_random(200), in_runs(600)
DESIGNS: dict[str, tuple[Draw, bool]] = {
    "random": (RANDOM, False),
    "runs": (RUNS, True),
    "random-documents": (RANDOM, True),
    "few": (at_random(64), False),
}


def groups_of(document: np.ndarray, over_documents: bool) -> SequenceGroups:
    """What :func:`rsdyn.stream.text.groups.sequence_groups` makes of sequences of these documents."""
    cluster = torch.from_numpy(document) if over_documents else torch.arange(len(document))
    kind = "documents" if over_documents else "sequences"
    return SequenceGroups(group_of(cluster), len(cluster.unique()), kind)  # type: ignore[arg-type]


def rows_of(
    x: Tensor, groups: SequenceGroups, measures: Sequence[str] = MEASURES, *, keep: int | None = None, sites: int = 2
) -> dict[str, dict[str, float]]:
    """The rows of the findings of ``x`` ``(n, S, D)`` that have an interval: value, low and high by key.

    ``keep`` sequences go into what takes every sample; None takes all.
    """
    shape = {"n_sublayers": x.shape[1], "n_units": x.shape[2]}
    collected = Collected(**shape, measures=measures, keep=keep, groups=groups)
    probe = ResidualStreamProbe(collected)
    batch = TrajectoryBatch(x, torch.arange(len(x)))
    for dataloader in range(collected.n_passes):
        probe.test_step(batch, 0, dataloader)
    probe.on_test_epoch_end()
    results = measure_stream(collected, How(AnalysisConfig(measures=[*measures]), sites, nulls=False), x.dtype)
    found = AnalysisResults({"here": results}, tuple(measures), sites, x.shape[1], x.shape[2])
    return _with_intervals([*findings(found), *shape_rows(found)])


def readout_rows(read: Readout, groups: SequenceGroups) -> dict[str, dict[str, float]]:
    """The rows of the findings of what ``n`` sequences say."""
    shape = {"n_sublayers": read.kl.shape[1], "n_units": 1}
    nothing = measure_stream(
        Collected(**shape, measures=[READOUT], groups=groups), How(AnalysisConfig()), torch.float32
    )
    said = readout_results(read, groups.group, LogitLens())
    results = ConditionResults(nothing.counts, nothing.flags, readout=said)
    return _with_intervals(shape_rows(AnalysisResults({"here": results}, (READOUT,), 2, **shape)))


def _with_intervals(table: Sequence[Finding]) -> dict[str, dict[str, float]]:
    found = {row.key: row.values["here"] for row in table}
    return {
        key: {"value": cell.value, "low": cell.low, "high": cell.high}
        for key, cell in found.items()
        if cell.low is not None and cell.high is not None
    }


def of_population(x: Tensor, groups: SequenceGroups, measures: Sequence[str]) -> dict[str, dict[str, float]]:
    """The rows of all sequences; of measures that take every sample, of the first 1000.

    Curvature and dimensions take all, and so does similarity, of which single pairs are enough: a mean over depth.
    """
    if "similarity" not in measures:
        return rows_of(x, groups, measures, keep=1000)
    rows = rows_of(x, groups, [m for m in measures if m != "similarity"])
    adjacent = [cka(x[:, s].to(torch.float64), x[:, s + 1].to(torch.float64)) for s in range(x.shape[1] - 1)]
    return rows | {"similarity_adjacent": {"value": float(torch.stack(adjacent).nanmean())}}


def drawn(document: np.ndarray, design: str, k: int) -> tuple[Tensor, SequenceGroups]:
    """The sequences of sample ``k`` of a design, and their groups: a function of (k, how it is drawn) alone."""
    draw, over_documents = DESIGNS[design]
    index = draw(np.random.default_rng([k, draw is RUNS]), document)
    return torch.from_numpy(index), groups_of(document[index], over_documents)


def summary(found: Sequence[Mapping[str, Row]], truth: Mapping[str, Row]) -> dict[str, dict[str, float]]:
    """Of each row: coverage in per cent, half the mean width over 1.96 standard deviations of the samples' values, and
    how far their mean is from the population, in standard deviations.
    """
    out = {}
    for key in found[0]:
        value, low, high = (np.array([rows[key][name] for rows in found]) for name in ("value", "low", "high"))
        aim = value.mean() if key.startswith(AT_THIS_N) else truth[key]["value"]
        covered = (low <= aim + 1e-12) & (aim - 1e-12 <= high)
        spread = (value.std(ddof=1) or np.nan) if len(value) > 1 else np.nan  # a trend may be 1 in every sample
        out[key] = {
            "coverage": 100 * covered.mean(),
            "width": (high - low).mean() / 2 / (1.96 * spread),
            "bias": (value.mean() - truth[key]["value"]) / spread,
        }
    return out


def table(lines: Sequence[Mapping[str, Any]], designs: Sequence[str]) -> str:
    """The summaries of all designs side by side, in Markdown; behind each the number of its samples."""
    out = ["| row | population | " + " | ".join(f"{design} | width | bias | N" for design in designs) + " |"]
    out.append("| --- | ---: |" + " ---: | ---: | ---: | ---: |" * len(designs))
    for part in range(len(PARTS)):
        here = [line for line in lines if line["part"] == part]
        truth = next((line["rows"] for line in here if line["design"] == "population"), {})
        of = {d: [line["rows"] for line in here if line["design"] == d] for d in designs}
        found = {d: summary(rows, truth) for d, rows in of.items() if rows}
        for key in truth:
            cells = []
            for d in designs:
                row = found.get(d, {}).get(key)
                numbers = (
                    "| | |" if row is None else f"{row['coverage']:.1f} | {row['width']:.2f} | {row['bias']:+.2f} | "
                )
                cells.append(numbers + (str(len(of[d])) if row else ""))
            out.append(f"| `{key}` | {truth[key]['value']:.4f} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--designs", nargs="+", choices=list(DESIGNS), default=list(DESIGNS)[:3])
    parser.add_argument("--parts", nargs="+", type=int, choices=range(len(PARTS)), default=list(range(len(PARTS))))
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--table", action="store_true", help="only print the table of what the file holds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [json.loads(line) for line in options.file.open()] if options.file.exists() else []
    done = {(line["design"], line["part"], line["k"]) for line in lines}
    if not options.table:
        text = whole_text()
        document, x = text.documents, torch.empty(0)
        assert document is not None
        if any(READOUT not in PARTS[part] for part in options.parts):
            x = TrajectoryStream(find_lm("embedded"), text, cache_dir=options.cache).read()[0]
        with options.file.open("a") as file:

            def keep(design: str, part: int, k: int, rows: Mapping[str, Row]) -> None:
                lines.append({"design": design, "part": part, "k": k, "rows": rows})
                file.write(json.dumps(lines[-1]) + "\n")
                file.flush()

            every = groups_of(document, True)
            for part in options.parts:
                measures = PARTS[part]
                wanted = {(design, part, k) for design in options.designs for k in range(options.samples)}
                if wanted | {("population", part, 0)} <= done:
                    continue
                read = whole_readout(text) if READOUT in measures else None
                if ("population", part, 0) not in done:
                    rows = of_population(x, every, measures) if read is None else readout_rows(read, every)
                    keep("population", part, 0, rows)
                for k in range(options.samples):  # the designs in turn: a part of the file is a smaller benchmark
                    for design in options.designs:
                        if (design, part, k) in done:
                            continue
                        index, groups = drawn(document, design, k)
                        if read is None:
                            rows = rows_of(x[index], groups, measures)
                        else:
                            rows = readout_rows(Readout(*(values[index] for values in read)), groups)
                        keep(design, part, k, rows)
    print(table(lines, options.designs))


if __name__ == "__main__":
    main()
