"""Jacobians of every sublayer at one text's last token, against the ways torch offers, and against matrix products.

python benchmarks/bench_jacobians.py                      the embedded model
python benchmarks/bench_jacobians.py --lm smollm2 --layers 4

Ours gives the two derivatives of each layer; the other ways give the layer's own: ``torch.func.jacrev`` over the plain
layer and the whole sequence (math attention, as vmap needs), one backward pass per row, and all rows in one
``is_grads_batched``. Timed on the first ``--layers`` layers, in turns, on one thread.

The floor is the matrix products alone: every linear map of a layer once forward and once backward for each of the D
rows, ``2 * 2 * weights * D`` operations, with attention's context shared. The spectra, and k leading exponents against
all of them, are timed on the same text.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timing import least, table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rsdyn.dynamics.jacobian import lyapunov, spectrum
from rsdyn.lm.allocator import keep_pages
from rsdyn.lm.jacobians import leading_exponents, reference_run, sublayer_jacobians
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.source import find_lm


def layer_inputs(lm: LanguageModel, ids: np.ndarray) -> list[tuple[Tensor, dict[str, Any]]]:
    """The states ``(1, T, D)`` and the keyword arguments that a plain forward gives each layer."""
    found: list[tuple[Tensor, dict[str, Any]]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(((args[0] if args else kwargs["hidden_states"]).clone(), kwargs))

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in lm.sites.layers]
    with torch.no_grad():
        lm.base(input_ids=torch.from_numpy(ids)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def behind(lm: LanguageModel, layer: int, given: tuple[Tensor, dict[str, Any]]) -> Callable[[Tensor], Tensor]:
    """The last token behind a layer as a function of the last token before it."""
    hidden, kwargs = given
    rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}

    def function(state: Tensor) -> Tensor:
        output = lm.sites.layers[layer](torch.cat([hidden[:, :-1], state[None, None]], 1), **rest)
        return (output[0] if isinstance(output, tuple) else output)[0, -1]

    return function


def row_by_row(function: Callable[[Tensor], Tensor], state: Tensor, rows: int) -> Tensor:
    x = state.clone().requires_grad_()
    y = function(x)
    return torch.stack([torch.autograd.grad(y[i], x, retain_graph=True)[0] for i in range(rows)])


def batched(function: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
    x = state.clone().requires_grad_()
    y = function(x)
    return torch.autograd.grad(y, x, torch.eye(len(y)), is_grads_batched=True)[0]


def products(weights: list[Tensor], rows: int) -> None:
    for weight in weights:
        torch.nn.functional.linear(torch.ones(rows, weight.shape[1]), weight)
        torch.ones(rows, weight.shape[0]) @ weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lm", default="embedded")
    parser.add_argument("--layers", type=int, default=4, help="the first N are timed")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rows", type=int, default=16, help="rows that one backward per row is timed on, scaled to D")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--k", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_pages()
    lm = find_lm(args.lm).load()
    ids = np.random.default_rng(0).integers(3, lm.config.vocab_size, size=args.tokens)
    reference = reference_run(lm, ids)
    given = layer_inputs(lm, ids)
    layers, n_sites, d = range(args.layers), len(lm.sites.names), lm.n_units
    functions = [behind(lm, i, given[i]) for i in layers]
    states = [given[i][0][0, -1] for i in layers]
    weights = [m.weight for i in layers for m in lm.sites.layers[i].modules() if isinstance(m, nn.Linear)]
    flops = sum(4 * d * w.numel() for w in weights)
    sublayers = list(range(n_sites * args.layers))

    def jacrev() -> list[Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            return [torch.func.jacrev(f)(x) for f, x in zip(functions, states, strict=True)]

    def in_one() -> list[Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            return [batched(f, x) for f, x in zip(functions, states, strict=True)]

    works: dict[str, Callable[[], object]] = {
        "ours": lambda: sublayer_jacobians(lm, ids, sublayers, reference=reference),
        "jacrev": jacrev,
        "is_grads_batched": in_one,
        "one backward per row": lambda: [row_by_row(f, x, args.rows) for f, x in zip(functions, states, strict=True)],
        "products": lambda: products(weights, d),
    }
    ours = sublayer_jacobians(lm, ids, sublayers, reference=reference)
    whole = [ours[n_sites * i + n_sites - 1] @ ours[n_sites * i] if n_sites == 2 else ours[i] for i in layers]
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(whole, jacrev(), strict=True))
    seconds = least(args.repeats, works)
    seconds["one backward per row"] *= d / args.rows
    print(f"{lm.name}: {args.layers} of {lm.n_layers} layers, {d} units, {args.tokens} tokens, one thread, float32.")
    print(f"Floor {flops / 1e9:.3g} GFLOP; ours and jacrev differ by {worst:.0e} of a layer's derivative.\n")
    rows = [
        [name, f"{t:.3g}", f"{t / seconds['ours']:.1f} ×", f"{seconds['products'] / t:.2f}"]
        for name, t in seconds.items()
    ]
    print(table(["way", "CPU s", "of ours", "of the products' limit"], rows))
    every = sublayer_jacobians(lm, ids, reference=reference)
    parts: dict[str, Callable[[], object]] = {
        "all Jacobians": lambda: sublayer_jacobians(lm, ids, reference=reference),
        "all spectra": lambda: [spectrum(j) for j in every],
        "all exponents (of the layers' products)": lambda: lyapunov(
            every[1::2].double() @ every[::2].double() if n_sites == 2 else every
        ),
        f"{args.k} leading exponents, Jacobians included": lambda: leading_exponents(
            lm, ids, args.k, reference=reference
        ),
    }
    found = least(1, parts)
    print("\n" + table(["one text, all layers", "CPU s"], [[name, f"{t:.3g}"] for name, t in found.items()]))


if __name__ == "__main__":
    main()
