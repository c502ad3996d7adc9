"""What the benchmarks run on: a Llama of any size with random weights, and sequences as long as real ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from rsdyn.embedded import TEXT
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.source import find_lm


def random_llama(
    width: int, layers: int, *, vocabulary: int = 4096, head: bool = False, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """A Llama in the 8B's ratios (four query heads a key-value head, an MLP of 3.5 times the width), random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    size = min(64, width // 4)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=width // size,
        num_key_value_heads=max(1, width // size // 4),
        vocab_size=vocabulary,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(config, dtype=dtype)
    name = f"Llama, L{layers} D{width}, random"
    return LanguageModel(causal.base_model, name=name, causal=causal if head else None)


def thin_llama(folder: Path, width: int, layers: int) -> Path:
    """Write the embedded model's tokenizer and a Llama as wide as asked whose blocks have next to no weights.

    For streams that are made up: a model that is opened, keyed and never run.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = find_lm().tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def lengths(n: int) -> np.ndarray:
    """Tokens of each of ``n`` sequences: those of the embedded text's rows of 101 to 499 characters, over and over."""
    with open(TEXT, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    kept = [text for text in texts if 100 < len(text) < 500][:1000]
    return np.resize([len(ids) for ids in find_lm().tokenizer()(kept)["input_ids"]], n)


def sequences(n: int, vocabulary: int = 4096, seed: int = 0) -> list[np.ndarray]:
    """``n`` sequences of random tokens, as long as real ones."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocabulary, size=int(length)) for length in lengths(n)]
