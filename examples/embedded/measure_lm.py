"""Measure the shipped language model on the shipped text, against a unigram and a bigram model of the same tokens.

    python -m examples.embedded.measure_lm DATA WORK       # the folders of train_lm.py; writes report.json

Every figure is a mean over the paragraph's own tokens, each predicted from those before it and from BOS; BOS itself is
given, never predicted. Paragraphs longer than the model's context are left out, and counted.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from examples.embedded.make_text import read_jsonl
from rsdyn.embedded import MODEL, TEXT


@torch.inference_mode()
def model_losses(model: PreTrainedModel, ids: list[list[int]], tokens_per_batch: int = 4096) -> np.ndarray:
    """Return each sequence's summed cross-entropy in nats, first token given, `[n]`."""
    losses = np.zeros(len(ids))
    # Sorted, so that a batch pads little; padding on the right cannot reach the tokens before it.
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    while order:
        size = max(1, tokens_per_batch // len(ids[order[-1]]))
        rows, order = order[-size:], order[:-size]
        inputs = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids[row]) for row in rows], batch_first=True)
        logits = model(inputs[:, :-1], use_cache=False).logits.float()
        # Flattened: with the classes in the middle, `[n, V, T]`, this line took most of the time.
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs[:, 1:].flatten(), reduction="none")
        for row, values in zip(rows, nats.double().view(len(rows), -1), strict=True):
            losses[row] = float(values[: len(ids[row]) - 1].sum())
    return losses


class CountModels:
    """A unigram model (one count added to every token) and a bigram model (Witten-Bell), both of the training tokens.

    The bigram interpolates with the unigram, by the number of distinct tokens N(a) that were seen to follow a:
    p(b | a) = (count(a, b) + N(a) p(b)) / (count(a) + N(a)). It has no free parameter.
    """

    def __init__(self, ids: list[list[int]], vocabulary: int) -> None:
        self.pairs = np.zeros((vocabulary, vocabulary), dtype=np.int32)
        for sequence in ids:
            np.add.at(self.pairs, (sequence[:-1], sequence[1:]), 1)
        counts = 1.0 + self.pairs.sum(0)
        self.unigram = counts / counts.sum()
        self.total = self.pairs.sum(1)
        self.followers = (self.pairs > 0).sum(1)

    def losses(self, ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Return each sequence's summed loss in nats, first token given, under the unigram and the bigram model."""
        unigram, bigram = np.zeros(len(ids)), np.zeros(len(ids))
        for row, sequence in enumerate(ids):
            before, after = np.array(sequence[:-1]), np.array(sequence[1:])
            chance = self.unigram[after]
            unigram[row] = -np.log(chance).sum()
            total, followers = self.total[before], self.followers[before]
            seen = total > 0  # a token never seen in training has no followers, and leaves the unigram alone
            chance[seen] = (self.pairs[before, after] + followers * chance)[seen] / (total + followers)[seen]
            bigram[row] = -np.log(chance).sum()
        return unigram, bigram


@torch.inference_mode()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, temperature: float, seed: int
) -> str:
    """Sample tokens from BOS on; where the model itself opens a new paragraph, a blank line stands."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[tokenizer.bos_token_id]])
    for _ in range(length):
        chances = (model(ids, use_cache=False).logits[0, -1].float() / temperature).softmax(0)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)[None]], dim=1)
    return str(tokenizer.decode(ids[0, 1:].tolist())).replace(tokenizer.bos_token, "\n\n")


def report(data: Path, work: Path, model_folder: Path, text: Path) -> dict:
    """Return every figure of `report.json`."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(model_folder, local_files_only=True, dtype=torch.float32).eval()
    context = model.config.max_position_embeddings
    shipped = read_jsonl(text)
    encoded = tokenizer([row["text"] for row in shipped])["input_ids"]
    rows = [row for row, sequence in zip(shipped, encoded, strict=True) if len(sequence) <= context]
    ids = [sequence for sequence in encoded if len(sequence) <= context]
    counts = CountModels(
        tokenizer([row["text"] for row in read_jsonl(data / "train.jsonl")])["input_ids"], len(tokenizer)
    )
    losses = {"model": model_losses(model, ids), **dict(zip(("unigram", "bigram"), counts.losses(ids), strict=True))}
    tokens = np.array([len(sequence) - 1 for sequence in ids])
    characters = np.array([len(row["text"]) for row in rows])

    def figures(chosen: list[int], models: Sequence[str] = tuple(losses)) -> dict[str, float | int]:
        n, m = int(tokens[chosen].sum()), int(characters[chosen].sum())
        result: dict[str, float | int] = {"rows": len(chosen), "tokens": n}
        for name in models:
            result[f"{name}_nats_per_token"] = round(float(losses[name][chosen].sum()) / n, 4)
            result[f"{name}_nats_per_character"] = round(float(losses[name][chosen].sum()) / m, 4)
        return result

    sources = defaultdict(list)
    for index, row in enumerate(rows):
        sources[row["source"]].append(index)
    log = read_jsonl(work / "log.jsonl")
    curve = [log[index] for index in np.unique(np.linspace(0, len(log) - 1, min(12, len(log))).round().astype(int))]
    return {
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "characters_per_token": round(float(characters.sum() / tokens.sum()), 3),
        "training": {
            "corpus_tokens": int(counts.pairs.sum()),
            "tokens_seen": log[-1]["tokens"],
            "minutes": log[-1]["minutes"],
            "valid_loss": [{key: entry[key] for key in ("minutes", "tokens", "train", "valid")} for entry in curve],
        },
        "baselines": "unigram: add-one; bigram: Witten-Bell interpolated with it; both of the training tokens",
        "rows_longer_than_context": len(shipped) - len(rows),
        "held_out": figures(list(range(len(rows)))),
        "first_200": figures(list(range(min(200, len(rows)))), ["model"]),
        "by_source": {source: figures(chosen) for source, chosen in sorted(sources.items())},
        "sample": {"seed": 0, "temperature": 0.8, "tokens": 100, "text": sample(model, tokenizer, 100, 0.8, 0)},
    }


def main(argv: list[str] | None = None) -> None:
    """Measure the model and write the report."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("data", type=Path, help="folder with train.jsonl, whose tokens the baselines count")
    parser.add_argument("work", type=Path, help="folder with the training's log.jsonl")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--out", type=Path, default=MODEL.parent / "report.json")
    options = parser.parse_args(argv)
    result = report(options.data, options.work, options.model, options.text)
    options.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", "utf-8")
    print(json.dumps(result["held_out"], indent=2), result["sample"]["text"], sep="\n")


if __name__ == "__main__":
    main()
