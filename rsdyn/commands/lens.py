"""Fit a Jacobian lens: ``rsdyn lens MODEL --texts 100``, or ``python -m rsdyn lens MODEL``.

It resumes: run the same command again. The output says how much each text still moved the lens, how alike the lenses of
two halves of the texts are, and whether it reads better than the model's own head does (logit lens).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from tqdm.auto import tqdm

from rsdyn.commands.check import quiet_transformers
from rsdyn.errors import UserError
from rsdyn.lm.lens import SKIPPED, JacobianLens, LensFit, text_jacobian
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.source import find_lm
from rsdyn.stream.text.corpus import load_rows
from rsdyn.stream.text.tokens import Sequences, tokenise

HELD_OUT = 20  # texts that the lens is compared with the logit lens on


def main(argv: Sequence[str] | None = None) -> int:
    """Fit, say how sure it is, write the file, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="rsdyn lens", description="Fit a Jacobian lens and write it as published ones."
    )
    parser.add_argument("model", metavar="MODEL", help="a name on the Hub, a folder, a GGUF file, embedded or smollm2")
    parser.add_argument("--texts", type=int, default=100, help="how many texts of the corpus (100)")
    parser.add_argument("--tokens", type=int, default=128, help="at most so many tokens of each (128)")
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
    return 0


def _check(given: argparse.Namespace) -> None:
    for name, least in (("texts", 1), ("skip", 0), ("tokens", given.skip + 2), ("seed", 0)):
        if getattr(given, name) < least:
            raise UserError(f"--{name} {getattr(given, name)}: give at least {least}.")


def fit(given: argparse.Namespace) -> list[str]:
    """Fit the lens that the command line asks for, write it, and return what to say of it."""
    source = find_lm(given.model)
    out = Path(given.out or f"{source.label.replace('/', '-')}.jlens.pt").expanduser()
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: name a file in a folder that is there.")
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
    first = xxhash.xxh3_128_hexdigest(used[0].tobytes())  # more texts go on from fewer
    made_from = repr([source.identity(), given.skip, given.tokens, given.seed, first])
    partial = out.with_name(out.name + ".partial")
    state = LensFit.load(partial, made_from) if partial.is_file() else LensFit.begin(lm)
    for place in tqdm(range(state.n, len(used)), initial=state.n, total=len(used), desc="texts", dynamic_ncols=True):
        state.add(text_jacobian(lm, used[place], skip=given.skip))
        if place % 5 == 4:
            state.save(partial, made_from)
    lens = state.lens()
    lens.save(out)
    state.save(partial, made_from)
    size = out.stat().st_size / 2**20
    lines = [f"{out}: {len(lens.j)} layers of {lens.d_model} units, {lens.n_prompts} texts, {size:.1f} MiB in float16"]
    return [*lines, *convergence(state), *compare(lm, lens, held_out, given.skip)]


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


@torch.no_grad()
def compare(lm: LanguageModel, lens: JacobianLens, texts: Sequence[np.ndarray], skip: int) -> list[str]:
    """The lens against the logit lens on texts that it was not fitted on: agreement with the model's own next token.

    At every token from ``skip`` on: the share whose top token is the model's, and KL(model || lens), mean in nats.
    """
    n_sites, layers = len(lm.sites.names), lens.source_layers
    agree, away = torch.zeros(2, len(layers), dtype=torch.float64), torch.zeros(2, len(layers), dtype=torch.float64)
    count = 0
    for tokens in texts:
        at = np.arange(skip, len(tokens))
        stream = lm.record([tokens], positions=[at], dtype=lm.dtype)
        ends = _ends(lm, tokens)[at]
        wanted = lm.log_probs(ends)
        for k, layer in enumerate(layers):
            states = stream[:, (layer + 1) * n_sites].to(lm.device)
            for i, read in enumerate((states, lens.transport(layer, states).to(lm.dtype))):
                here = lm.log_probs(read)
                agree[i, k] += float((here.argmax(-1) == wanted.argmax(-1)).sum())
                away[i, k] += float((wanted.exp() * (wanted - here)).sum())
        count += len(at)
    agree, away = agree / count, away / count
    chosen = sorted({round(f * (len(layers) - 1)) for f in (0, 0.25, 0.5, 0.75, 1)})
    rows = [f"Against the logit lens, {len(texts)} texts held out, {count} tokens:"]
    rows.append(
        f"  {'behind layer':<14}{'top token: logit lens':>23}{'J-lens':>8}{'KL, nats: logit lens':>24}{'J-lens':>8}"
    )
    for k in chosen:
        cells = f"{100 * agree[0, k]:>21.1f} %{100 * agree[1, k]:>6.1f} %{away[0, k]:>24.2f}{away[1, k]:>8.2f}"
        rows.append(f"  {layers[k]:<14}{cells}")
    better = int((away[1] < away[0]).sum())
    rows.append(f"Nearer to the model's own distribution than the logit lens in {better} of {len(layers)} layers.")
    return rows


def _ends(lm: LanguageModel, tokens: np.ndarray) -> Any:
    """The states behind the last layer, ``(T, D)``."""
    from rsdyn.lm.tracing import output_of

    found: list[torch.Tensor] = []
    handle = lm.sites.layers[-1].register_forward_hook(lambda m, a, output: found.append(output_of(output)))
    try:
        lm.base(input_ids=torch.from_numpy(tokens)[None].to(lm.device), use_cache=False)
    finally:
        handle.remove()
    return found[0].view(len(tokens), -1)
