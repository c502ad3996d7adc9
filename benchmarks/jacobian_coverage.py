"""How often the 95 % intervals of the Jacobians' claims hold what they should, row by row.

    python benchmarks/jacobian_coverage.py coverage.npz [--texts 200] [--samples 200] [--sizes 20 100]

The population is what the trained embedded model's Jacobians say of ``--texts`` sequences of the embedded text. They
are measured once, and kept in the file as they come, so that what was stopped resumes. A sample draws documents with
replacement, until it has ``size`` texts or a few more, each drawn document as one of its own: its claims, in full
context and one token alone, and whether the sink owns the gain, are compared with those of the population. The table is
printed in Markdown.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from rsdyn.analysis.finding import Value
from rsdyn.analysis.jacobians import JacobianResult, claims, measure_text
from rsdyn.analysis.sink import measure_sink
from rsdyn.embedded import DOCUMENT_COLUMN
from rsdyn.files import publish
from rsdyn.lm.source import find_lm
from rsdyn.stream.text.corpus import load_rows
from rsdyn.stream.text.documents import document_of
from rsdyn.stream.text.tokens import tokenise

EVERY = 20  # texts between two writes


def rows_of(result: JacobianResult) -> dict[str, Value]:
    """All numbers that have an interval over texts, by name."""
    rows = {f"{claim.key}/{s}": value for claim in claims(result) for s, value in claim.values.items()}
    sink = result.sink_finding()
    if sink is not None:
        rows |= {f"sink/{row.key}": row.log_gain for row in sink.rows}
        rows |= {"sink/without_first": sink.without_first, **{f"sink/share_{k}": v for k, v in sink.shares.items()}}
    return rows


def part(result: JacobianResult, index: np.ndarray, documents: np.ndarray) -> JacobianResult:
    """The result of some of the texts, with these documents."""
    curves, sink = (
        {s: {name: v[index] for name, v in of.items()} for s, of in found.items()}
        for found in (result.curves, result.sink)
    )
    return JacobianResult(result.n_layers, result.n_units, result.sites, curves=curves, documents=documents, sink=sink)


def drawn(documents: np.ndarray, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Texts of whole documents drawn with replacement, at least ``size``, and a number for each draw."""
    names = np.unique(documents)
    index, owner = list[int](), list[int]()
    n = 0
    while len(index) < size:
        here = np.flatnonzero(documents == rng.choice(names))
        index += here.tolist()
        owner += [n] * len(here)
        n += 1
    return np.array(index), np.array(owner)


def coverage(result: JacobianResult, size: int, samples: int) -> dict[str, dict[str, float]]:
    """Of each row: coverage in per cent, and half the mean width over 1.96 SD of the samples' values."""
    assert result.documents is not None
    truth = rows_of(result)
    found: dict[str, list[Value]] = {name: [] for name in truth}
    for k in range(samples):
        index, owner = drawn(result.documents, size, np.random.default_rng([k, size]))
        for name, value in rows_of(part(result, index, owner)).items():
            found[name].append(value)
    return {name: summary(values, truth[name].value) for name, values in found.items()}


def summary(values: Sequence[Value], truth: float) -> dict[str, float]:
    """Coverage and width of some samples' intervals; those without an interval do not count, and are told."""
    told = [v for v in values if v.defined and v.low is not None and v.high is not None]
    low, high, value = (np.array([getattr(v, end) for v in told], dtype=float) for end in ("low", "high", "value"))
    covered = (low <= truth + 1e-12) & (truth - 1e-12 <= high)
    spread = value.std(ddof=1) if len(told) > 1 else np.nan
    return {
        "coverage": 100 * float(covered.mean()) if len(told) else float("nan"),
        "width": float((high - low).mean() / 2 / (1.96 * spread)) if spread > 0 else float("nan"),
        "told": len(told) / len(values),
        "truth": truth,
    }


def population(path: Path, n_texts: int) -> JacobianResult:
    """Measure ``n_texts`` texts of the embedded text, but for those that the file has."""
    source, rows = find_lm("embedded"), load_rows(document_column=DOCUMENT_COLUMN)
    sequences = tokenise(
        rows,
        source.tokenizer(),
        documents=document_of(rows, document_column=DOCUMENT_COLUMN),
        limit=n_texts,
        max_tokens=source.max_tokens,
        vocab_size=source.vocab_size,
    )
    assert sequences.documents is not None
    lm = source.load(dtype="float32")
    result = JacobianResult(lm.n_layers, lm.n_units, len(lm.sites.names), documents=sequences.documents[:n_texts])
    read(result, path)
    begun = len(result.curves["full"]["growth"]) if result.curves else 0
    for i in range(begun, n_texts):
        tokens = np.asarray(sequences[i])
        result.add(measure_text(lm, tokens, "trained"))
        result.add_sink(measure_sink(lm, tokens, torch.zeros(lm.n_units, dtype=torch.bool)))
        if i % EVERY == EVERY - 1 or i == n_texts - 1:
            write(result, path)
            print(f"{i + 1} of {n_texts} texts", flush=True)
    return result


def read(result: JacobianResult, path: Path) -> None:
    if path.is_file():
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                of, series, curve = name.split("/")
                getattr(result, of).setdefault(series, {})[curve] = file[name]


def write(result: JacobianResult, path: Path) -> None:
    file = io.BytesIO()
    arrays = {
        f"{of}/{s}/{n}": v for of in ("curves", "sink") for s, c in getattr(result, of).items() for n, v in c.items()
    }
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    publish(path, [file.getvalue()])


def table(found: Mapping[int, Mapping[str, Mapping[str, float]]]) -> str:
    sizes = list(found)
    lines = ["| row | population | " + " | ".join(f"{n} texts | width | defined" for n in sizes) + " |"]
    lines.append("| --- | ---: |" + " ---: | ---: | ---: |" * len(sizes))
    for name in found[sizes[0]]:
        here = [found[n][name] for n in sizes]
        cells = [f"{row['coverage']:.1f} | {row['width']:.2f} | {100 * row['told']:.0f} %" for row in here]
        lines.append(f"| {name} | {here[0]['truth']:.3g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 100])
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = population(args.file, args.texts)
    documents = len(np.unique(result.documents))
    print(f"{args.texts} texts of {documents} documents; {args.samples} samples of each size")
    print(table({size: coverage(result, size, args.samples) for size in args.sizes}))


if __name__ == "__main__":
    main()
