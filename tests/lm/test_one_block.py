"""Models of one block a layer (Mamba, Nemotron-H), and others whose layers or names differ from what is usual.

Streams are compared with one forward in which plain hooks read the inputs of the layers, and with transformers' own
hidden states by the certificate.
"""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from rsdyn.errors import UserError
from rsdyn.lm.certificate import certify
from rsdyn.lm.head import base_of
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.packing_trial import choose_layout
from rsdyn.lm.sites import site_names
from rsdyn.lm.source import find_lm
from rsdyn.run.estimates import forward_cost

UNITS = 32
_SSM = {"vocab_size": 300, "hidden_size": UNITS, "state_size": 4, "expand": 2}
_HEADS = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}
CONFIGS = {
    "mamba": {**_SSM, "num_hidden_layers": 3},
    "falcon_mamba": {**_SSM, "num_hidden_layers": 3},
    "mamba2": {**_SSM, **_HEADS, "num_hidden_layers": 3},
    "nemotron_h": {
        **_ATTENTION,
        **{"vocab_size": 300, "hidden_size": UNITS, "layers_block_type": ["mamba", "mlp", "mamba", "attention"]},
        **{"ssm_state_size": 4, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 16},
    },
    "zamba2": {
        **{"vocab_size": 300, "hidden_size": UNITS, "num_hidden_layers": 4, "hybrid_layer_ids": [1, 3]},
        **{"layer_types": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_d_state": 4, "mamba_headdim": 8},
        **{"n_mamba_heads": 8, "mamba_ngroups": 1, "num_attention_heads": 4, "num_key_value_heads": 4},
        **{"intermediate_size": 64, "num_mem_blocks": 1, "chunk_size": 16, "use_mem_eff_path": False},
    },
    "xlstm": {"vocab_size": 300, "hidden_size": UNITS, "num_hidden_layers": 3, "num_heads": 4, "chunk_size": 16},
    "llama4_text": {
        **_ATTENTION,
        **{"vocab_size": 300, "hidden_size": UNITS, "num_hidden_layers": 4, "intermediate_size_mlp": 64},
        **{"num_local_experts": 2, "num_experts_per_tok": 1, "attention_chunk_size": 16, "pad_token_id": 0},
    },
}
ONE_BLOCK = ("mamba", "falcon_mamba", "mamba2", "nemotron_h")
SEQUENCES = [np.arange(1, 12), np.arange(5, 27)]


def make(name, head=False, spread=1.0):
    config = AutoConfig.for_model(name, **CONFIGS[name])
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in causal.parameters():
            parameter.mul_(spread)
    base = base_of(causal)[1]
    return LanguageModel(base, causal=causal) if head else LanguageModel(base)


def inputs_of_layers(lm, ids):
    seen = []
    handles = [
        layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(args[0][0, -1].clone()), with_kwargs=True)
        for layer in lm.sites.layers
    ]
    with torch.inference_mode():
        lm.base(input_ids=torch.from_numpy(ids)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


@pytest.mark.parametrize("name", ONE_BLOCK)
def test_one_block_a_layer_is_recorded_at_resid_pre(name):
    lm = make(name, head=True)
    assert site_names(lm.base.config) == lm.sites.names == ("resid_pre",)
    assert lm.n_sublayers == lm.n_layers == len(lm.sites.layers)
    certificate = certify(lm, SEQUENCES)
    assert certificate.block < 1e-6 and certificate.parallel is None and certificate.attention is None
    assert certificate.hidden_states < 1e-6 and certificate.log_probs < 1e-5
    assert "of one block" in certificate.lines()[0]
    recorded = lm.record(SEQUENCES)
    for i, ids in enumerate(SEQUENCES):
        torch.testing.assert_close(recorded[i], inputs_of_layers(lm, ids), rtol=1e-5, atol=1e-6)
    assert choose_layout(lm, SEQUENCES).name == "sorted"
    with pytest.raises(UserError, match=r"one block a layer.*site=resid_pre"):
        lm.sublayer(0, "resid_mid")


def test_zamba_reads_the_embeddings_beside_the_stream_and_is_refused_with_that_reason():
    with pytest.raises(UserError, match="something besides the stream, as Zamba's read the embeddings"):
        certify(make("zamba2", spread=3.0), SEQUENCES)


def test_what_mixes_tokens_without_attention_stands_where_attention_does():
    lm = make("xlstm", head=True)
    certificate = certify(lm, SEQUENCES)
    assert lm.sites.names == ("resid_pre", "resid_mid") and certificate.attention < 1e-6 and certificate.mlp < 1e-6


def test_llama_4_whose_prefix_is_that_of_a_larger_model(tmp_path):
    lm = make("llama4_text", head=True)
    assert type(lm.base).__name__ == "Llama4TextModel"
    assert certify(lm, SEQUENCES).log_probs < 1e-5
    lm.causal.save_pretrained(tmp_path)
    loaded = find_lm(str(tmp_path)).load(head=True)
    assert torch.equal(loaded.record(SEQUENCES), lm.record(SEQUENCES))
    assert torch.equal(find_lm(str(tmp_path)).load().record(SEQUENCES), lm.record(SEQUENCES))


def test_a_state_space_model_from_a_folder_and_its_plan(tmp_path):
    lm = make("mamba", head=True)
    lm.causal.save_pretrained(tmp_path)
    source = find_lm(str(tmp_path))
    assert (source.n_layers, source.n_sublayers, source.n_units) == (3, 3, UNITS)
    torch.testing.assert_close(source.load().record(SEQUENCES), lm.record(SEQUENCES), rtol=0, atol=1e-6)
    cost = forward_cost(source)
    assert cost.linear > 0 and cost.attention == 0
    assert isinstance(AutoModel.from_pretrained(tmp_path), type(lm.base))
