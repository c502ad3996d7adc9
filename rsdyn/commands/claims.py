"""What other papers claim of streams over depth, measured on a model: ``rsdyn claims MODEL``.

Curvature, convergence and bifurcation of five kinds of prompts (arXiv 2606.09287), growth of what linear transport
leaves (2410.01545), layers left out and exchanged (2406.19384), straightening over tokens (Hosseini & Fedorenko 2023):
each beside null models and the same architecture untrained, with an interval and a verdict.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from rsdyn.analysis.claims import N_WHOLE, Claim, Measurements, as_json, as_markdown, as_text, claims, measure, prompts
from rsdyn.commands.check import quiet_transformers
from rsdyn.embedded import DOCUMENT_COLUMN
from rsdyn.errors import UserError
from rsdyn.files import output_file, output_folder, write_json, write_text, writing
from rsdyn.lm.source import find_lm
from rsdyn.stream.cache import default_cache_dir
from rsdyn.stream.text.corpus import open_corpus
from rsdyn.stream.text.documents import document_of
from rsdyn.stream.text.groups import sequence_groups
from rsdyn.stream.text.tokens import tokenise, tokenise_texts
from rsdyn.stream.trajectories import TrajectoryStream

LEAST_TEXTS = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write it, and return the exit code."""
    parser = argparse.ArgumentParser(prog="rsdyn claims", description="Test what other papers claim, on a model.")
    parser.add_argument("model", metavar="MODEL", help="a name on the Hub, a folder, a GGUF file, embedded or smollm2")
    parser.add_argument("--texts", type=int, default=1200, help="sequences of the text (1200; 2 x units or more)")
    parser.add_argument("--data", metavar="FILE", help="text, jsonl or parquet file (the embedded text)")
    parser.add_argument("--seed", type=int, default=0, help="of texts, untrained weights and nulls (0)")
    parser.add_argument("--cache", metavar="DIR", help="where recorded texts are kept (the cache of trajectories)")
    parser.add_argument("-o", "--out", metavar="FILE", help="also write the table there: .md, or .json for machines")
    given = parser.parse_args(argv)
    quiet_transformers()
    try:
        out = _out(given.out)
        title, table = test(given)
        for line in [title, *as_text(table)]:
            print(line)
        if out is not None:
            with writing(f"--out {out}"):
                if out.suffix == ".json":
                    write_json(out, {"title": title, "claims": as_json(table)})
                else:
                    write_text(out, as_markdown(table, title))
    except UserError as error:
        print(f"rsdyn claims: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _out(name: str | None) -> Path | None:
    if name is None:
        return None
    if Path(name).suffix not in (".md", ".json"):
        raise UserError(f"--out {name}: name a file that ends in .md or .json.")
    return output_file(name, "--out")


def test(given: argparse.Namespace) -> tuple[str, list[Claim]]:
    """Record the model and its untrained twin, and test every claim: a title, and the claims.

    The texts' last tokens, which take longest, go through the cache of trajectories: what was stopped resumes.
    """
    for name, least in (("texts", LEAST_TEXTS), ("seed", 0)):
        if getattr(given, name) < least:
            raise UserError(f"--{name} {getattr(given, name)}: give at least {least}.")
    cache = given.cache or default_cache_dir()
    cache = output_folder(cache, f"--cache {cache}")
    source = find_lm(given.model)
    tokenizer = source.tokenizer()
    column = DOCUMENT_COLUMN if given.data is None else None
    corpus = open_corpus(path=given.data, document_column=column)
    sequences = tokenise(
        corpus.rows,
        tokenizer,
        limit=given.texts,
        seed=given.seed,
        documents=document_of(corpus.rows, text_column="text", document_column=column),
        max_tokens=source.max_tokens,
        truncate=True,
        vocab_size=source.vocab_size,
    )
    if len(sequences) < LEAST_TEXTS:
        raise UserError(f"--data {given.data}: too few sequences ({len(sequences)}); give at least {LEAST_TEXTS}.")
    texts = [np.asarray(sequences[i]) for i in range(len(sequences))]
    kinds = prompts()
    tokenised = {kind: tokenise_texts(of.texts, tokenizer) for kind, of in kinds.items()}
    tokens = {kind: [np.asarray(of[i]) for i in range(len(of))] for kind, of in tokenised.items()}
    found: dict[str, Measurements] = {}
    total = 2 * (len(texts) + 100 + min(N_WHOLE, len(texts)))
    with tqdm(total=total, desc="texts", dynamic_ncols=True) as bar:
        for series, lm_source in {"trained": source, "untrained": source.without_training(given.seed)}.items():
            lm = lm_source.load(head=series == "trained")
            stream = TrajectoryStream(lm_source, sequences, cache_dir=cache, dtype="float32")
            stream.record_with(lm)
            bar.update(len(texts) - stream.n_missing())
            last, _ = stream.read(on_record=bar.update)
            found[series] = measure(lm, tokens, texts, last, change=series == "trained", done=bar.update)
    documents = sequence_groups(sequences).group if len(sequences) else torch.zeros(0)
    title = f"{source.label}, {len(texts)} texts, 20 prompts of each kind: claims of other papers"
    return title, claims(found, documents, seed=given.seed)
