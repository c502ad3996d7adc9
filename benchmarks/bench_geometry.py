"""Readout over depth, similarity of sublayers and intrinsic dimensions, against the usual ways and their limits.

python benchmarks/bench_geometry.py --lm smollm2                 all targets: a real head of 49,152 tokens
python benchmarks/bench_geometry.py --readout 64 --few 8 --sequences 100 --sublayers 8 --units 64   a look, embedded

Readout: S states of 1000 sequences through the final norm and head. The limit is the head's matrix product alone, in
the same blocks. The usual way takes the logits of all sublayers of a sequence at once and compares distributions
(`rsdyn.dynamics.readout`); TransformerLens' logit lens, where it is installed, is its
`run_with_cache` and `accumulated_resid` with the bridge's own norm and head, forward included, beside ours with its
forward. These two are timed on a few sequences and scaled to all. The memory is what reading adds to a process that has
the model and the states. States are those of a few sequences, repeated: what is read does not change how long it takes.

Similarity: the map of S x S of made-up states, one Gram matrix per sublayer, against `cka` pair by pair on some pairs,
scaled to all. Intrinsic dimension: of each sublayer and without each of ten groups, against scikit-dimension called for
each. All in one thread, each alternative in turn, the least CPU time. What was aimed at stands at the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from peers import bridge
from timing import least, peak_memory, table
from torch import Tensor

from rsdyn.dynamics.dimension import intrinsic_dimension, mle, twonn
from rsdyn.dynamics.readout import readout
from rsdyn.dynamics.similarity import cka, cka_map
from rsdyn.lm.allocator import keep_pages
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.readout import BLOCK_BYTES, LogitLens, stream_readout
from rsdyn.lm.source import find_lm

OURS, LIMIT, USUAL = "ours", "the head's products", "a sequence's logits at once"


class Target(NamedTuple):
    """What was aimed at, and what came of it; ``met`` is None where nothing was asked."""

    what: str
    aim: str
    found: float
    met: bool | None


def usual(lm: LanguageModel, states: Tensor, final: Tensor) -> None:
    """A sequence at a time, all of its sublayers' distributions at once."""
    with torch.inference_mode():
        for one, end in zip(states, final, strict=True):
            readout(lm.log_probs(end[None]), lm.log_probs(one)[None])


def products(lm: LanguageModel, n: int, n_sublayers: int) -> None:
    """The head's products alone, in blocks of as many rows as ours has."""
    assert lm.head is not None
    weight: Tensor = lm.head.weight  # type: ignore[assignment]
    rows = max(1, BLOCK_BYTES // (4 * lm.config.vocab_size))
    with torch.inference_mode():
        for start in range(0, n, rows):
            x = torch.ones(min(rows, n - start), lm.n_units)
            for _ in range(n_sublayers + 1):
                torch.nn.functional.linear(x, weight)


def transformer_lens(lm: LanguageModel, sequences: list[np.ndarray]) -> Callable[[], object]:
    """The logit lens as TransformerLens' users write it: cache, residual stack behind the norm, head."""
    model = bridge(lm)

    def run() -> None:
        with torch.inference_mode():
            for ids in sequences:
                logits, cache = model.run_with_cache(torch.from_numpy(ids)[None])
                stack = cache.accumulated_resid(incl_mid=True, apply_ln=True, pos_slice=-1)
                here = model.unembed(stack).log_softmax(-1).transpose(0, 1)
                readout(logits[:, -1].log_softmax(-1), here)

    return run


def bench_readout(lm: LanguageModel, n: int, few: int, tokens: int, repeats: int) -> list[Target]:
    """Seconds, memory and share of the limit of reading ``n`` sequences, of which ``few`` are recorded."""
    draw = np.random.default_rng(0)
    sequences = [draw.integers(3, lm.config.vocab_size, size=tokens) for _ in range(few)]
    whole = lm.record(sequences, final=True)
    states, final = (x.repeat(-(-n // few), *(1,) * (x.ndim - 1))[:n] for x in (whole[:, :-1], whole[:, -1]))

    def with_forward() -> None:
        again = lm.record(sequences, final=True)
        stream_readout(lm, again[:, :-1], again[:, -1], LogitLens())

    works: dict[str, Callable[[], object]] = {
        OURS: lambda: stream_readout(lm, states, final, LogitLens()),
        LIMIT: lambda: products(lm, n, lm.n_sublayers),
    }
    scaled: dict[str, Callable[[], object]] = {
        USUAL: lambda: usual(lm, states[:few], final[:few]),
        "ours, with the forward": with_forward,
    }
    if find_spec("transformer_lens") is not None:
        scaled["TransformerLens, with its forward"] = transformer_lens(lm, sequences)
    else:
        print("transformer_lens: not installed, skipped.\n")
    with peak_memory() as memory:  # before anything else has left pages behind that would be used again
        works[OURS]()
    seconds = least(repeats, works) | {k: t * n / few for k, t in least(repeats, scaled).items()}
    flops = 2 * n * (lm.n_sublayers + 1) * lm.n_units * lm.config.vocab_size
    print(f"Readout of {n} x {lm.n_sublayers} states, {lm.config.vocab_size:,} tokens: {flops / 1e9:.3g} GFLOP; ")
    print(f"memory above model and states: {memory['added_mib']:.0f} MiB\n")
    limit = seconds[LIMIT]
    rows = [[k, f"{t:.3g}", f"{t / seconds[OURS]:.2f} ×", f"{limit / t:.2f}"] for k, t in seconds.items()]
    print(table(["way", "CPU s", "of ours", "of the products' limit"], rows) + "\n")
    found = [
        Target("readout: share of the products' limit", ">= 0.7", limit / seconds[OURS], limit >= 0.7 * seconds[OURS]),
        Target("readout: MiB above the model", "< 300", memory["added_mib"], memory["added_mib"] < 300),
        Target("readout: a sequence's logits at once, over ours", "none", seconds[USUAL] / seconds[OURS], None),
    ]
    if (theirs := seconds.get("TransformerLens, with its forward")) is not None:
        ratio = theirs / seconds["ours, with the forward"]
        found.append(Target("readout: TransformerLens over ours, both with the forward", "none", ratio, None))
    return found


def bench_similarity(n: int, s: int, d: int, pairs: int) -> list[Target]:
    """The map against `cka` pair by pair."""
    x = torch.randn(n, s, d, generator=torch.Generator().manual_seed(0)).cumsum(1)
    chosen = [(i % s, (7 * i + 3) % s) for i in range(pairs)]
    works: dict[str, Callable[[], object]] = {
        "one Gram matrix per sublayer": lambda: cka_map(x),
        "pair by pair": lambda: [cka(x[:, a], x[:, b]) for a, b in chosen],
    }
    seconds = least(1, works)
    seconds["pair by pair"] *= s * (s + 1) / 2 / pairs
    rows = [[k, f"{t:.3g}", f"{t / seconds['one Gram matrix per sublayer']:.1f} ×"] for k, t in seconds.items()]
    print(f"CKA of {s} x {s} sublayers, {n} sequences, {d} units ({pairs} pairs timed, scaled to all)\n")
    print(table(["way", "CPU s", "of ours"], rows) + "\n")
    ratio = seconds["pair by pair"] / seconds["one Gram matrix per sublayer"]
    return [Target("CKA map: pair by pair over ours", ">= 20", ratio, ratio >= 20)]


def bench_dimension(n: int, s: int, d: int) -> list[Target]:
    """Both intrinsic dimensions of some sublayers and without each of ten groups, against the library's own calls."""
    x = torch.randn(n, s, d, generator=torch.Generator().manual_seed(0))
    group = torch.arange(n) % 10
    choices = [torch.ones(n, dtype=torch.bool), *(group != g for g in range(10))]
    works: dict[str, Callable[[], object]] = {
        "one table of distances": lambda: [intrinsic_dimension(x[:, k], group) for k in range(s)],
        "the library, each time": lambda: [(twonn(x[rows, k]), mle(x[rows, k])) for k in range(s) for rows in choices],
    }
    seconds = least(1, works)
    rows = [[k, f"{t / s:.3g}", f"{t / seconds['one table of distances']:.1f} ×"] for k, t in seconds.items()]
    print(f"TwoNN and maximum likelihood with the jackknife of ten groups, {n} states of {d} units\n")
    print(table(["way", "CPU s per sublayer", "of ours"], rows) + "\n")
    ratio = seconds["the library, each time"] / seconds["one table of distances"]
    return [Target("TwoNN and maximum likelihood: the library over ours", "none", ratio, None)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lm", default="embedded")
    parser.add_argument("--readout", type=int, default=1000, help="sequences that are read")
    parser.add_argument("--few", type=int, default=32, help="sequences that are recorded, and read in the usual ways")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--sequences", type=int, default=1000, help="of the similarity and the dimensions")
    parser.add_argument("--sublayers", type=int, default=60, help="of the similarity; dimensions take two")
    parser.add_argument("--units", type=int, default=576)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_pages()
    lm = find_lm(args.lm).load(head=True)
    print(f"{lm.name}, one thread, float32.\n")
    targets = [
        *bench_readout(lm, args.readout, args.few, args.tokens, args.repeats),
        *bench_similarity(args.sequences, args.sublayers, args.units, args.pairs),
        *bench_dimension(args.sequences, 2, args.units),
    ]
    told = {True: "met", False: "missed", None: ""}
    print(table(["what", "aim", "measured", ""], [[t.what, t.aim, f"{t.found:.3g}", told[t.met]] for t in targets]))


if __name__ == "__main__":
    main()
