"""Fit a Jacobian lens: ``rsdyn lens MODEL --texts 100``, or ``python -m rsdyn lens MODEL``.

It resumes: run the same command again. The output says how much each text still moved the lens, how alike the lenses of
two halves of the texts are, and whether it reads better than the model's own head does (logit lens).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np
import xxhash
from tqdm.auto import tqdm

from rsdyn.commands.check import quiet_transformers
from rsdyn.errors import UserError
from rsdyn.files import output_file, writing
from rsdyn.lm.lens import ESTIMATOR, SKIPPED, LensFit, text_jacobian
from rsdyn.lm.lens_reading import JACOBIAN, LOGIT, LensComparison, compare_lenses
from rsdyn.lm.source import find_lm
from rsdyn.stream.text.corpus import load_rows
from rsdyn.stream.text.tokens import Sequences, tokenise

SAVE_EVERY = 30  # seconds between two writes of the fit under way: its sums may be large, and a text may take minutes
HELD_OUT = 20  # texts that the lens is compared with the logit lens on


def main(argv: Sequence[str] | None = None) -> int:
    """Fit, say how sure it is, write the file, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="rsdyn lens", description="Fit a Jacobian lens and write it as published ones."
    )
    parser.add_argument("model", metavar="MODEL", help="a name on the Hub, a folder, a GGUF file, embedded or smollm2")
    parser.add_argument("--texts", type=int, default=100, help="how many texts of the corpus (100)")
    parser.add_argument("--tokens", type=int, default=128, help="at most this many tokens of each (128)")
    parser.add_argument("--skip", type=int, default=SKIPPED, help=f"first tokens of each that are skipped ({SKIPPED})")
    parser.add_argument("--data", metavar="FILE", help="text, jsonl or parquet file (the embedded text)")
    parser.add_argument("--seed", type=int, default=0, help="which texts are drawn (0)")
    parser.add_argument("-o", "--out", metavar="FILE", help="where to write it (<model>.jlens.pt)")
    given = parser.parse_args(argv)
    quiet_transformers()
    try:
        _check(given)
        for line in fit(given):
            print(line)
    except UserError as error:
        print(f"rsdyn lens: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nrsdyn lens: stopped; run the same command again to resume", file=sys.stderr)
        return 130
    return 0


def _check(given: argparse.Namespace) -> None:
    for name, least in (("texts", 1), ("skip", 0), ("tokens", given.skip + 2), ("seed", 0)):
        if getattr(given, name) < least:
            raise UserError(f"--{name} {getattr(given, name)}: give at least {least}.")


def fit(given: argparse.Namespace) -> list[str]:
    """Fit the lens that the command line asks for, write it, and return what to say of it."""
    source = find_lm(given.model)
    out = output_file(given.out or f"{source.label.replace('/', '-')}.jlens.pt", "--out")
    shortest = (given.skip + 2) * 6  # characters, so that most texts have a token that counts
    sequences = tokenise(
        load_rows(path=given.data),
        source.tokenizer(),
        l_min=shortest,
        l_max=100_000,
        limit=2 * (given.texts + HELD_OUT),
        seed=given.seed,
        max_tokens=min(given.tokens, source.max_tokens),
        truncate=True,
        vocab_size=source.vocab_size,
    )
    texts = _long_enough(sequences, given.skip, given.texts + HELD_OUT)
    if len(texts) < given.texts + 1:
        raise UserError(
            f"--texts {given.texts}: the text has {len(texts)} long enough, and one is held out. Ask for fewer."
        )
    used, held_out = texts[: given.texts], texts[given.texts :]
    lm = source.load(head=True)
    first = xxhash.xxh3_128_hexdigest(used[0].tobytes())  # a fit of more texts resumes from one of fewer
    made_from = repr([ESTIMATOR, source.identity(), given.skip, given.tokens, given.seed, first])
    partial = out.with_name(out.name + ".partial")
    state = LensFit.load(partial, made_from) if partial.is_file() else LensFit.begin(lm)
    if state.n > len(used):
        raise UserError(
            f"--texts {given.texts}: the fit in {partial} has {state.n} texts already, and a text cannot be taken out. "
            "Ask for as many, or remove it."
        )
    saved = time.monotonic()
    for place in tqdm(range(state.n, len(used)), initial=state.n, total=len(used), desc="texts", dynamic_ncols=True):
        state.add(text_jacobian(lm, used[place], skip=given.skip))
        if time.monotonic() - saved > SAVE_EVERY:
            with writing(f"--out {out}"):
                state.save(partial, made_from)
            saved = time.monotonic()
    lens = state.lens()
    with writing(f"--out {out}"):
        lens.save(out)
        state.save(partial, made_from)
    size = out.stat().st_size / 2**20
    lines = [f"{out}: {len(lens.j)} layers of {lens.d_model} units, {lens.n_prompts} texts, {size:.1f} MiB in float16"]
    compared = compare_lenses(lm, lens, held_out, skip=given.skip)
    return [*lines, *convergence(state), *comparison(compared)]


def _long_enough(sequences: Sequences, skip: int, n: int) -> list[np.ndarray]:
    texts = (np.asarray(sequences[i]) for i in range(len(sequences)))
    return [tokens for tokens in texts if len(tokens) > skip + 1][:n]


def convergence(state: LensFit) -> list[str]:
    """How much the last texts moved the lens, and how alike those of two halves are."""
    lines = []
    at = [n for n in (2, 5, 10, 20, 50, 100, 200, 500, 1000) if n <= state.n]
    if at:
        told = ", ".join(f"{state.changes[n - 2]:.3f} by text {n}" for n in at)
        lines.append(f"Relative change of the mean: {told}")
    cosine = state.refit_cosine()
    if cosine is not None:
        first, middle, last = (float(cosine[i]) for i in (0, len(cosine) // 2, -1))
        lines.append(f"Refit cosine of two halves: first layer {first:.3f}, middle {middle:.3f}, last {last:.3f}")
    return lines


def comparison(found: LensComparison) -> list[str]:
    """Whether the lens reads better than the logit lens, behind some layers and in words."""
    agreement, kl = found.mean(found.agreement), found.mean(found.kl)
    lines = [
        f"Against the logit lens, {len(found.tokens)} texts held out, {int(found.tokens.sum())} tokens: how often the "
        "top token is the model's own,",
        "and KL from the model's own distribution in nats.",
        f"  {'behind layer':<14}{'top token: logit lens':>23}{'J-lens':>9}{'KL: logit lens':>18}{'J-lens':>9}",
    ]
    chosen = sorted({round(f * (len(found.layers) - 1)) for f in (0, 0.25, 0.5, 0.75, 1)})
    for k in chosen:
        shares = f"{100 * agreement[LOGIT, k]:>21.1f} %{100 * agreement[JACOBIAN, k]:>7.1f} %"
        lines.append(f"  {found.layers[k]:<14}{shares}{kl[LOGIT, k]:>18.2f}{kl[JACOBIAN, k]:>9.2f}")
    if len(found.tokens) < 2:
        return [
            *lines,
            "One text held out says nothing of others: ask for fewer texts to fit on, or give a longer file.",
        ]
    said = [
        f"{what} {_layers(layers)}" for what, layers in zip(_SAID, found.verdicts().values(), strict=True) if layers
    ]
    more = int((agreement[JACOBIAN] > agreement[LOGIT]).sum())
    return [
        *lines,
        f"By the 95 % interval of the difference in KL over texts, it reads {'; '.join(said)}.",
        f"It names the model's own top token more often behind {more} of {len(found.layers)} layers.",
    ]


_SAID = ("better than the logit lens", "worse", "not told apart from it")


def _layers(layers: Sequence[int]) -> str:
    """``layers 0, 3-5``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    told = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"behind layer{'s' * (len(layers) > 1)} {told}"
