"""Streams as TransformerLens and nnsight record them, on tiny models, kept as files that CI compares ours with.

    python tests/peer_streams.py            # rewrites tests/data/peer_streams/; needs transformer-lens and nnsight

They are not installed with the tests, since they bring a great many packages: in an environment of their own,
``pip install transformer-lens nnsight`` beside rsdyn. ``tests/lm/test_peers.py`` reads the files, and runs the
libraries themselves where they are installed. A file holds the model's config and weights too, so that nothing depends
on the random numbers of another torch.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

import torch
from family_zoo import config_of
from safetensors.torch import load_file, safe_open, save_file
from tiny_models import tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

FOLDER = Path(__file__).parent / "data" / "peer_streams"
# name -> the module whose input is the state between attention and MLP, for nnsight; None with parallel attention
FAMILIES = {
    "llama": "post_attention_layernorm",
    "llama-llama3-rope": "post_attention_layernorm",
    "qwen2": "post_attention_layernorm",
    "qwen3": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",
    "gpt2": "ln_2",
    "neox-serial": "post_attention_layernorm",
    "neox-parallel": None,
}
N_TOKENS = 13


def make(name: str):
    """The tiny model of a family, of two layers."""
    config = config_of(name)
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    if name.startswith("neox"):  # it has no grouped heads, and TransformerLens believes the number if it is there
        for key in ("num_key_value_heads", "head_dim"):
            config.__dict__.pop(key, None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens() -> Tensor:
    return torch.randint(3, 290, (N_TOKENS,), generator=torch.Generator().manual_seed(1))


def transformer_lens(model, ids: Tensor) -> Tensor:
    """``(T, S, D)``: ``hook_resid_pre`` and ``hook_resid_mid`` of each block, at every token."""
    from transformer_lens.model_bridge import TransformerBridge

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer = tiny_tokenizer(folder)
        # a copy: the bridge puts modules of its own into the model
        bridge = TransformerBridge.boot_transformers(folder, hf_model=copy.deepcopy(model), tokenizer=tokenizer)
        _, cache = bridge.run_with_cache(ids[None])
    states = []
    for layer in range(model.config.num_hidden_layers):
        for site in ("pre", "mid"):
            key = f"blocks.{layer}.hook_resid_{site}"
            if key in cache:
                states.append(cache[key][0])
    return torch.stack(states, 1)


def nnsight(model, ids: Tensor, mid: str | None) -> Tensor:
    """The same from nnsight, which reads the input of whatever module it is told."""
    import nnsight as library

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tiny_tokenizer(folder)
    traced = library.LanguageModel(copy.deepcopy(model), tokenizer=tokenizer)
    base = getattr(traced, model.base_model_prefix)
    layers = base.h if hasattr(model.base_model, "h") else base.layers
    with torch.no_grad(), traced.trace(ids[None]):
        states = library.save([])
        for layer in layers:
            states.append(layer.input)
            if mid is not None:
                states.append(getattr(layer, mid).input)
    return torch.stack([state[0] for state in states], 1)


def read(name: str):
    """A family's model as it was, the tokens, and the streams of each library ``(T, S, D)``."""
    path = FOLDER / f"{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    tensors = load_file(path)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    weights = {key[2:]: value for key, value in tensors.items() if key.startswith("w/")}
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    assert {k for k, _ in model.named_parameters()} <= {*weights}
    return model, tensors["tokens"], {key[2:]: value for key, value in tensors.items() if key.startswith("s/")}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    ids = tokens()
    for name, mid in FAMILIES.items():
        model = make(name)
        weights = {f"w/{k}": v.detach().clone().contiguous() for k, v in model.named_parameters()}
        streams = {"s/transformer_lens": transformer_lens(model, ids), "s/nnsight": nnsight(model, ids, mid)}
        data = weights | {k: v.detach().clone().contiguous() for k, v in streams.items()} | {"tokens": ids}
        save_file(data, FOLDER / f"{name}.safetensors", metadata={"config": json.dumps(model.config.to_dict())})
        difference = (streams["s/transformer_lens"] - streams["s/nnsight"]).abs().max() if mid else float("nan")
        print(f"{name:<20} {tuple(streams['s/nnsight'].shape)}  TransformerLens - nnsight: {difference:.1e}")


if __name__ == "__main__":
    main()
