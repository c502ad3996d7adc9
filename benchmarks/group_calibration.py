"""Do the p-values and intervals of differences between groups hold, where labels mean nothing?

python benchmarks/group_calibration.py --sets 100

Two parts. On the embedded model's stream of its own text: labels drawn at random, for whole documents or for sequences
in them, in equal parts or one of five; how often each level of a curve is rejected at .05, and how often its 95 %
interval holds 0. On simulated means of documents: groups whose documents are of very different size, where whole
documents are not quite exchangeable.
"""

from __future__ import annotations

import argparse
import time

import torch

from rsdyn.analysis import by_label
from rsdyn.analysis.by_label import by_group
from rsdyn.analysis.collected import Collected
from rsdyn.analysis.group_design import Labelled
from rsdyn.analysis.measure import How
from rsdyn.analysis.results import AnalysisResults
from rsdyn.analysis.settings import AnalysisConfig
from rsdyn.analysis.streams import measure_stream
from rsdyn.dynamics.label_permutation import permutation_p, permuted_labels
from rsdyn.embedded import DOCUMENT_COLUMN
from rsdyn.lm.source import find_lm
from rsdyn.stream.cache import default_cache_dir
from rsdyn.stream.text.corpus import load_rows
from rsdyn.stream.text.documents import document_of
from rsdyn.stream.text.tokens import tokenise
from rsdyn.stream.trajectories import TrajectoryStream
from rsdyn.stream.trajectory_datamodule import TrajectoryBatch

MEASURES = ["activations", "correlation", "cosine", "velocity", "norm"]
ROWS = ("norm_level", "speed_level", "relative_speed_level", "cosine_level", "correlation_mean", "density_level",
        "cosine_trend", "correlation_trend")  # fmt: skip


def embedded(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Trajectories ``(n, S, D)`` of the embedded text, and the document of each."""
    rows = load_rows(document_column=DOCUMENT_COLUMN)
    lm = find_lm("embedded")
    documents = document_of(rows, document_column=DOCUMENT_COLUMN)
    sequences = tokenise(rows, lm.tokenizer(), limit=n, documents=documents)
    stream = TrajectoryStream(lm, sequences, cache_dir=default_cache_dir())
    stream.open()
    assert sequences.documents is not None
    return stream.read(n)[0].float(), torch.from_numpy(sequences.documents)


def collected_of(x: torch.Tensor) -> Collected:
    found = Collected(n_sublayers=x.shape[1], n_units=x.shape[2], measures=MEASURES, keep=None, keeps=True)
    batch = TrajectoryBatch(x, torch.arange(len(x)))
    found.first_pass(batch)
    found.between_passes()
    found.second_pass(batch)
    found.finish()
    return found


def labels_of(by: str, share: float, documents: torch.Tensor, seed: int) -> torch.Tensor:
    """Labels 0 and 1 that mean nothing: of whole documents, or of sequences."""
    generator = torch.Generator().manual_seed(seed)
    unit = documents.unique(return_inverse=True)[1] if by == "documents" else torch.arange(len(documents))
    n = int(unit.max()) + 1
    return (torch.randperm(n, generator=generator) >= round(share * n)).long()[unit]


def on_the_stream(sets: int, n: int) -> None:
    x, documents = embedded(n)
    how, collected = How(AnalysisConfig(measures=MEASURES), 2, 0), collected_of(x)
    found = AnalysisResults({"original": measure_stream(collected, how, x.dtype)}, tuple(MEASURES), 2, *x.shape[1:])
    print(f"{n} sequences of {len(documents.unique())} documents, {sets} labellings of each kind")
    print(f"{'':28}" + "".join(f"{row:>24}" for row in ROWS))
    for by in ("documents", "sequences"):
        for share in (0.5, 0.2):
            rejected, held, started = dict.fromkeys(ROWS, 0), dict.fromkeys(ROWS, 0), time.time()
            for i in range(sets):
                labels = labels_of(by, share, documents, i)
                g = by_group(collected, found, Labelled(("a", "b"), labels, documents, "documents"), how)
                for row in ROWS:
                    low, high = g.rows[row].difference_interval[:, 0]
                    rejected[row] += float(g.rows[row].p[0]) <= 0.05
                    held[row] += bool(low <= 0 <= high)
            name = f"by {by}, {round(100 * share)} % in a"
            cells = "".join(f"{f'{100 * rejected[r] / sets:.0f} %, {100 * held[r] / sets:.0f} %':>24}" for r in ROWS)
            print(f"{name:28}{cells}   ({time.time() - started:.0f} s)", flush=True)


def unequal_documents(sets: int) -> None:
    """Rejection at .05 of a mean's difference, where documents of one group are larger: 8 of 30, and 40 of 4."""
    sizes = torch.tensor([30] * 8 + [4] * 40)
    document = torch.arange(48).repeat_interleave(sizes)
    for large in (True, False):
        for between in (0.0, 0.3, 1.0):
            rejected = 0
            for i in range(sets):
                generator = torch.Generator().manual_seed(i)
                chosen = (torch.arange(48) < 8) if large else torch.randperm(48, generator=generator) < 8
                label = chosen.long()[document]
                x = between * torch.randn(48, generator=generator)[document]
                x = x + torch.randn(len(document), generator=generator)
                drawn = torch.cat([label[None], permuted_labels(label, document, 399, seed=i)]).float()
                t = (drawn @ x) / drawn.sum(1) - ((1 - drawn) @ x) / (1 - drawn).sum(1)
                rejected += float(permutation_p(t[0], t[1:])) <= 0.05
            which = "the 8 large documents" if large else "8 documents at random"
            print(
                f"group a: {which}; documents' SD {between} of a sequence's: {100 * rejected / sets:.1f} %", flush=True
            )


if __name__ == "__main__":
    given = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    given.add_argument("--sets", type=int, default=100)
    given.add_argument("--sequences", type=int, default=400)
    options = given.parse_args()
    by_label.FEWEST_PERMUTATIONS = by_label.MOST_PERMUTATIONS = 199
    unequal_documents(10 * options.sets)
    on_the_stream(options.sets, options.sequences)
