"""The shapes of the presets' models, for a plan where neither the Hub nor its local cache can be asked.

What decides the shape of each model, from the ``config.json`` of the revision named beside it. Their test counts the
parameters and compares them with those that the Hub says of the safetensors files.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Shape(NamedTuple):
    """What is known of a model on the Hub without asking it.

    Attributes:
        revision: the commit that it is of.
        parameters: of its safetensors files, tied ones once, by the Hub's own count.
        dtype: what these are stored in.
        config: fields of its config.json, ``model_type`` among them.
    """

    revision: str
    parameters: int
    dtype: str
    config: dict[str, Any]


def _llama3(layers: int, units: int, inner: int, heads: int, *, tied: bool, factor: float) -> dict[str, Any]:
    rope = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {
        **_decoder("llama", layers, units, inner, heads, 8, 128256, tied=tied),
        **{"rope_theta": 500000.0, "rope_scaling": rope, "max_position_embeddings": 131072},
    }


def _decoder(
    kind: str, layers: int, units: int, inner: int, heads: int, keys: int, vocabulary: int, *, tied: bool, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "num_hidden_layers": layers,
        "hidden_size": units,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        **more,
    }


SHAPES: dict[str, Shape] = {
    "meta-llama/Llama-3.1-8B": Shape(
        "d04e592bb4f6aa9cfee91e2e20afa771667e1d4b",
        8_030_261_248,
        "bfloat16",
        _llama3(32, 4096, 14336, 32, tied=False, factor=8.0),
    ),
    "meta-llama/Llama-3.2-1B": Shape(
        "4e20de362430cd3b72f300e6b0f18e50e7166e08",
        1_235_814_400,
        "bfloat16",
        _llama3(16, 2048, 8192, 32, tied=True, factor=32.0),
    ),
    "mistralai/Mistral-7B-v0.3": Shape(
        "caa1feb0e54d415e2df31207e5f4e273e33509b1",
        7_248_023_552,
        "bfloat16",
        _decoder(
            "mistral", 32, 4096, 14336, 32, 8, 32768, tied=False, max_position_embeddings=32768, sliding_window=None
        ),
    ),
    "google/gemma-2-2b": Shape(
        "c5ebcd40d208330abc697524c919956e692655cf",
        2_614_341_888,
        "float32",
        _decoder("gemma2", 26, 2304, 9216, 8, 4, 256000, tied=True, head_dim=256, max_position_embeddings=8192),
    ),
    "google/gemma-3-1b-pt": Shape(
        "fcf18a2a879aab110ca39f8bffbccd5d49d8eb29",
        999_885_952,
        "bfloat16",
        _decoder("gemma3_text", 26, 1152, 6912, 4, 1, 262144, tied=True, head_dim=256, max_position_embeddings=32768),
    ),
    "openai-community/gpt2": Shape(
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        124_439_808,
        "float32",
        {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
    ),
    "facebook/opt-125m": Shape(
        "27dcfa74d334bc871f3234de431e71c6eeba5dd6",
        125_239_296,
        "float16",
        {
            **{"model_type": "opt", "num_hidden_layers": 12, "hidden_size": 768, "ffn_dim": 3072},
            **{"num_attention_heads": 12, "word_embed_proj_dim": 768, "vocab_size": 50272},
            **{"max_position_embeddings": 2048, "do_layer_norm_before": True},
        },
    ),
    "EleutherAI/pythia-160m": Shape(
        "50f5173d932e8e61f858120bcb800b97af589f46",
        162_322_944,
        "float16",
        {
            **{"model_type": "gpt_neox", "num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072},
            **{"num_attention_heads": 12, "vocab_size": 50304, "max_position_embeddings": 2048, "rotary_pct": 0.25},
            **{"use_parallel_residual": True, "tie_word_embeddings": False},
        },
    ),
    "allenai/OLMo-2-0425-1B": Shape(
        "a1847dff35000b4271fa70afc5db10fd29fedbdf",
        1_484_916_736,
        "float32",
        _decoder("olmo2", 16, 2048, 8192, 16, 16, 100352, tied=False, max_position_embeddings=4096),
    ),
    "microsoft/Phi-3-mini-4k-instruct": Shape(
        "f39ac1d28e925b323eae81227eaba4464caced4e",
        3_821_079_552,
        "bfloat16",
        _decoder("phi3", 32, 3072, 8192, 32, 32, 32064, tied=False, max_position_embeddings=4096, pad_token_id=32000),
    ),
    "Qwen/Qwen2.5-1.5B": Shape(
        "8faed761d45a263340a0528343f099c05c9a4323",
        1_543_714_304,
        "bfloat16",
        _decoder("qwen2", 28, 1536, 8960, 12, 2, 151936, tied=True, max_position_embeddings=131072),
    ),
    "Qwen/Qwen3-1.7B-Base": Shape(
        "ea980cb0a6c2ae4b936e82123acc929f1cec04c1",
        1_720_574_976,
        "bfloat16",
        _decoder("qwen3", 28, 2048, 6144, 16, 8, 151936, tied=True, head_dim=128, max_position_embeddings=32768),
    ),
    "HuggingFaceTB/SmolLM2-135M": Shape(
        "93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
        134_515_008,
        "bfloat16",
        _decoder("llama", 30, 576, 1536, 9, 3, 49152, tied=True, max_position_embeddings=8192, rope_theta=100000.0),
    ),
}
