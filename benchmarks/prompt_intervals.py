"""How often the intervals over 20 prompts of a perturbation cover what they say, on the embedded model.

python benchmarks/prompt_intervals.py [--prompts 500] [--out build/prompt-values.npz]

First every measure of many prompts drawn from the embedded text (teleports and points that stay put, at the default's
five layers), kept in a file and resumed from there; then 2,000 samples of 20 of them, and how many of the intervals
hold the number of all of them: the mean of shares and differences, the median of sizes, and beside it the mean of sizes
with Student's t, which is not used.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from rsdyn.dynamics.controls import stays_put
from rsdyn.dynamics.projection import PCA
from rsdyn.dynamics.recovery import kl, mean_over_prompts, median_over_prompts, recovery, summary
from rsdyn.lm.continuing.continuation import continue_all, run_reference
from rsdyn.lm.source import find_lm
from rsdyn.perturbation.prompts import layers_of
from rsdyn.perturbation.states import grid_ranges, grid_states
from rsdyn.stream.text.corpus import load_rows
from rsdyn.stream.text.tokens import tokenise

NAMES = ("nearer", "contraction", "relative", "cosine", "plane_mse")
SAMPLES, SIZE = 2000, 20


def values(out: Path, n_prompts: int) -> dict[str, np.ndarray]:
    """``{layer/condition/measure: (prompts,)}``, measured where the file does not have them yet."""
    found: dict[str, list[float]] = {}
    if out.exists():
        with np.load(out) as file:
            found = {name: file[name].tolist() for name in file.files}
    done = len(next(iter(found.values()), []))
    if done >= n_prompts:
        return {name: np.array(v[:n_prompts]) for name, v in found.items()}
    source = find_lm()
    lm, tokenizer = source.load(head=True), source.tokenizer()
    sequences = tokenise(
        load_rows(),
        tokenizer,
        l_min=100,
        l_max=500,
        max_tokens=source.max_tokens,
        vocab_size=source.vocab_size,
    )
    order = np.random.default_rng(5).permutation(len(sequences))
    pca = PCA.fit(lm.record([sequences[int(i)] for i in order[-1000:]]).flatten(0, 1), 2)
    ranges = grid_ranges(pca.encode(lm.record([sequences[int(i)] for i in order[-1000:]])))
    sublayers = {layer: lm.sublayer(layer) for layer in layers_of(None, lm.n_layers)}
    for number in range(done, n_prompts):
        reference = run_reference(lm, sequences[int(order[number])])
        points = {
            layer: grid_states(pca, reference.stream[s], ranges, 10, "drop", s).states.float()
            for layer, s in sublayers.items()
        }
        moved = continue_all(lm, reference, [(s, points[layer]) for layer, s in sublayers.items()], log_probs=True)
        for (layer, s), result in zip(sublayers.items(), moved, strict=True):
            still = stays_put(points[layer], len(reference.stream) - s)
            for condition, stream in (("teleport", result.stream), ("stays put", still)):
                table = summary(recovery(reference.stream[s:], stream, pca, s))
                for name in NAMES:
                    found.setdefault(f"{layer}/{condition}/{name}", []).append(float(getattr(table, name)))
            divergence = kl(reference.log_probs, result.log_probs).mean()
            found.setdefault(f"{layer}/teleport/kl", []).append(float(divergence))
        if number % 25 == 24 or number == n_prompts - 1:
            out.parent.mkdir(parents=True, exist_ok=True)
            np.savez(out, **{name: np.array(v) for name, v in found.items()})
            print(f"{number + 1} prompts", flush=True)
    return {name: np.array(v) for name, v in found.items()}


def coverage(x: np.ndarray, kind: str) -> float:
    """How many per cent of the intervals of 20 hold the mean, or the median, of all prompts."""
    over, truth = (median_over_prompts, np.median(x)) if kind == "median" else (mean_over_prompts, x.mean())
    rows = np.random.default_rng(0).integers(0, len(x), (SIZE, SAMPLES))
    found = over(torch.from_numpy(x[rows]))
    slack = 1e-12 * max(1.0, abs(truth))  # of a sum in another order
    held = (found.low.numpy() - slack <= truth) & (truth <= found.high.numpy() + slack)
    return 100 * float(held.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("build/prompt-values.npz"))
    given = parser.parse_args()
    of = values(given.out, given.prompts)
    layers = sorted({int(name.split("/")[0]) for name in of})
    print(f"{'':<38}" + "".join(f"{f'layer {layer}':>10}" for layer in layers))

    def row(label: str, kind: str, make: object) -> None:
        cells = [coverage(make(layer), kind) for layer in layers]  # type: ignore[operator]
        print(f"{label:<38}" + "".join(f"{cell:>10.1f}" for cell in cells))

    for name in ("nearer", "contraction"):
        row(
            f"{name}, less stays put: mean",
            "mean",
            lambda layer, name=name: of[f"{layer}/teleport/{name}"] - of[f"{layer}/stays put/{name}"],
        )
    row(
        "plane_mse, over stays put: mean",
        "mean",
        lambda layer: of[f"{layer}/teleport/plane_mse"] / of[f"{layer}/stays put/plane_mse"],
    )
    row("nearer: mean", "mean", lambda layer: of[f"{layer}/teleport/nearer"])
    for name in ("contraction", "relative", "cosine", "plane_mse", "kl"):
        row(f"{name}: median", "median", lambda layer, name=name: of[f"{layer}/teleport/{name}"])
        row(f"{name}: its mean (not used)", "mean", lambda layer, name=name: of[f"{layer}/teleport/{name}"])


if __name__ == "__main__":
    main()
