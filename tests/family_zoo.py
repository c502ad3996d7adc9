"""Tiny causal LMs of many families, from transformers' own config classes, with random weights: nothing is downloaded.

``ZOO[name]()`` gives a CausalLM in eval mode, made once per session: leave its weights as they are. ``make(name)``
gives one of your own, and ``config_of(name)`` its config alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

VOCABULARY, UNITS, LAYERS, CONTEXT = 300, 32, 3, 128
WINDOW = 8  # of sliding attention: shorter than a test's sequences

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}

# name -> (model_type, what differs from `config_of`'s defaults)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-llama3-rope": ("llama", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-sliding": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _SLIDING}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": WINDOW,
            "layer_types": _SLIDING,
            "query_pre_attn_scalar": 8,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": WINDOW, "layer_types": _SLIDING, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    ),
    "phi3": ("phi3", {}),
    "phi3-sliding": ("phi3", {"sliding_window": WINDOW}),
    "gpt2": ("gpt2", {}),
    "neox-parallel": ("gpt_neox", {"use_parallel_residual": True}),
    "neox-serial": ("gpt_neox", {"use_parallel_residual": False}),
    "gptj": ("gptj", {"rotary_dim": 4}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": UNITS}),
    "falcon": ("falcon", {"new_decoder_architecture": False, "parallel_attn": True, "multi_query": True}),
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False}),
    "falcon-alibi": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": True}),
    "falcon-serial": ("falcon", {"parallel_attn": False, "multi_query": False}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": WINDOW, "layer_types": _SLIDING}),
    "granite": (
        "granite",
        {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 8.0, "attention_multiplier": 0.3},
    ),
    "granitemoe": ("granitemoe", {"residual_multiplier": 0.3, "num_local_experts": 4, "logits_scaling": 4.0}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3-moe": ("qwen3_moe", {**_MOE, "num_experts": 4, "decoder_sparse_step": 2}),  # dense and experts in turn
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    "deepseek-v3": (
        "deepseek_v3",
        {
            **_MOE,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "head_dim": 4,
        },
    ),
    "gpt-neo": (
        "gpt_neo",
        {"attention_types": [[["global", "local", "global"], 1]], "num_layers": LAYERS, "window_size": WINDOW},
    ),
    "phi": ("phi", {}),
    "bloom": ("bloom", {}),
    "mpt": ("mpt", {"logit_scale": 0.5}),
    "stablelm": ("stablelm", {}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "starcoder2": ("starcoder2", {"sliding_window": WINDOW}),
    "gpt-bigcode": ("gpt_bigcode", {}),
    "codegen": ("codegen", {"rotary_dim": 4}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", {"sliding_window": WINDOW, "layer_types": _SLIDING, "logit_scale": 0.25}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "smollm3": ("smollm3", {}),
    "nemotron": ("nemotron", {}),
    "ministral": ("ministral", {"sliding_window": WINDOW, "layer_types": _SLIDING}),
}

# refused: the norm stands behind the residual add, so that no module reads the sum itself
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "opt-post-norm": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": UNITS, "do_layer_norm_before": False}),
    "bert": ("bert", {"is_decoder": True}),
    "roberta": ("roberta", {"is_decoder": True, "pad_token_id": 0}),
}


_ROPE_IN_THREE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
_PATCHES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_PATCHES |= {"image_size": 16, "patch_size": 8}
_SIGLIP = {**_PATCHES, "model_type": "siglip_vision_model", "vision_use_head": False}
_QWEN_EYE = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": UNITS}

# models that see, whose language model is a part: name -> (model_type, text_config, vision_config, the rest)
SEEING: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "qwen2-vl": (
        "qwen2_vl",
        {"rope_parameters": _ROPE_IN_THREE},
        {"depth": 1, "embed_dim": 16, "hidden_size": UNITS, "num_heads": 2, "patch_size": 8},
        {},
    ),
    "qwen2.5-vl": ("qwen2_5_vl", {"rope_parameters": _ROPE_IN_THREE}, _QWEN_EYE, {}),
    "qwen3-vl": (
        "qwen3_vl",
        {"rope_parameters": _ROPE_IN_THREE},
        {**_QWEN_EYE, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        {},
    ),
    "llava": (
        "llava",
        {"model_type": "llama"},
        {**_PATCHES, "model_type": "clip_vision_model"},
        {"image_token_index": VOCABULARY - 1},
    ),
    "paligemma2": (
        "paligemma",
        {"model_type": "gemma2", "query_pre_attn_scalar": 8, "sliding_window": WINDOW},
        _SIGLIP,
        {"image_token_index": VOCABULARY - 1, "projection_dim": UNITS},
    ),
    "internvl": (
        "internvl",
        {"model_type": "qwen2"},
        {**_PATCHES, "image_size": [16, 16], "patch_size": [8, 8]},
        {"image_token_id": VOCABULARY - 1},
    ),
    "mistral3": (
        "mistral3",
        {"model_type": "mistral", "sliding_window": None},
        {**_PATCHES, "model_type": "pixtral", "head_dim": 8},
        {"image_token_index": VOCABULARY - 1},
    ),
    "gemma3-image": (
        "gemma3",
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 8},
        _SIGLIP,
        {"mm_tokens_per_image": 4, "image_token_index": VOCABULARY - 1},
    ),
}

_MAMBA = {"mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_chunk_size": 8, "mamba_d_head": 8}
# layers that carry a state from token to token beside keys and values: recorded, and not continued
CARRYING: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-h1": ("falcon_h1", {**_MAMBA, "mamba_d_ssm": UNITS, "mamba_n_heads": 4}),
    "bamba": ("bamba", {**_MAMBA, "attn_layer_indices": [1], "mamba_n_heads": 8}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}),
}


class Names(NamedTuple):
    """Names of modules, read by hand from the modelling code: of the base model, or of a layer.

    ``mid`` is the module whose input is resid_mid, None for parallel attention; ``adds`` are those whose outputs are
    added to the stream, attention's and the MLP's.
    """

    layers: str
    mid: str | None
    attention: str
    mlp: str
    final_norm: str
    adds: tuple[str, str]
    scale: float = 1.0


_LLAMA = Names("layers", "post_attention_layernorm", "self_attn", "mlp", "norm", ("self_attn", "mlp"))
_PARALLEL = _LLAMA._replace(mid=None)
_GPT2 = Names("h", "ln_2", "attn", "mlp", "ln_f", ("attn", "mlp"))
_GEMMA2 = _LLAMA._replace(
    mid="pre_feedforward_layernorm", adds=("post_attention_layernorm", "post_feedforward_layernorm")
)
_NEOX = Names("layers", "post_attention_layernorm", "attention", "mlp", "final_layer_norm", ("attention", "mlp"))
_FALCON = Names("h", None, "self_attention", "mlp", "ln_f", ("self_attention", "mlp"))

# what the modelling code says of each family; those that are not here are Llama's
_NAMES: dict[str, Names] = {
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA2,
    "olmo2": _GEMMA2._replace(mid="mlp"),  # no norm ahead of the blocks
    "olmo3": _GEMMA2._replace(mid="mlp"),
    "glm4": _LLAMA._replace(adds=("post_self_attn_layernorm", "post_mlp_layernorm")),
    "granite": _LLAMA._replace(scale=0.22),
    "granitemoe": _LLAMA._replace(mlp="block_sparse_moe", adds=("self_attn", "block_sparse_moe"), scale=0.3),
    "gpt2": _GPT2,
    "gpt-neo": _GPT2,
    "gpt-bigcode": _GPT2,
    "gptj": _GPT2._replace(mid=None),
    "codegen": _GPT2._replace(mid=None),
    "neox-parallel": _NEOX._replace(mid=None),
    "neox-serial": _NEOX,
    "opt": Names(
        "decoder.layers", "final_layer_norm", "self_attn", "fc2", "decoder.final_layer_norm", ("self_attn", "fc2")
    ),
    "falcon": _FALCON,
    "falcon-new": _FALCON,
    "falcon-alibi": _FALCON,
    "falcon-serial": _FALCON._replace(mid="post_attention_layernorm"),
    "phi": _PARALLEL._replace(final_norm="final_layernorm"),
    "cohere": _PARALLEL,
    "cohere2": _PARALLEL,
    "stablelm-parallel": _PARALLEL,
    # these two add the stream inside their blocks, to what the last projection gives
    "bloom": _FALCON._replace(mid="post_attention_layernorm", adds=("self_attention.dense", "mlp.dense_4h_to_h")),
    "mpt": Names("blocks", "norm_2", "attn", "ffn", "norm_f", ("attn", "ffn.down_proj")),
}


def names_of(name: str) -> Names:
    """The modules of a family, as its modelling code has them."""
    return _NAMES.get(name, _LLAMA)


PARALLEL = {name for name in FAMILIES if names_of(name).mid is None}


def _common(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": UNITS,
        "intermediate_size": 2 * UNITS,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": UNITS // 4,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
    }


def config_of(name: str, *, layers: int = LAYERS) -> PreTrainedConfig:
    """The tiny config of a family of ``FAMILIES``, ``CARRYING``, ``SEEING`` or ``REFUSED``."""
    if name in SEEING:
        model_type, text, vision, rest = SEEING[name]
        return AutoConfig.for_model(
            model_type, text_config={**_common(layers), "pad_token_id": 0, **text}, vision_config=vision, **rest
        )
    model_type, changes = (FAMILIES | CARRYING | REFUSED)[name]
    common = _common(layers)
    if model_type in ("gptj", "codegen"):  # their hidden size goes by another name in the constructor
        common |= {"n_embd": UNITS, "n_layer": layers, "n_head": 4, "n_positions": CONTEXT}
    if model_type in ("bloom", "mpt", "falcon", "gpt2", "gpt_neo", "gpt_bigcode", "codegen", "gptj"):
        common = {k: v for k, v in common.items() if k not in ("num_key_value_heads", "head_dim", "intermediate_size")}
    if model_type == "bloom":  # alibi: nothing limits its context
        del common["max_position_embeddings"]
    if layers != LAYERS:
        changes = {k: v for k, v in changes.items() if k not in ("layer_types", "attention_types", "num_layers")}
    return AutoConfig.for_model(model_type, **(common | changes))


def make(name: str, *, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A CausalLM of a family in eval mode, float32.

    Every block moves the stream by about its own size, as in trained models, and no norm weight is 1 and no bias 0, so
    that a mistake about either shows.
    """
    torch.manual_seed(seed)
    kind = AutoModelForMultimodalLM if name in SEEING else AutoModelForCausalLM
    model = kind.from_config(config_of(name, **options), dtype=torch.float32).eval()
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim <= 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.std() < 0.1 or parameter.std() > 1:
                nn.init.normal_(parameter, std=0.15)
    return model.requires_grad_(False)


ZOO: dict[str, Callable[[], PreTrainedModel]] = {name: cache(partial(make, name)) for name in FAMILIES}
