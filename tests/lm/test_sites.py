"""Where the stream is, traced from a config: against the names that stand in each family's modelling code."""

import json

import pytest
from family_zoo import FAMILIES, LAYERS, PARALLEL, REFUSED, ZOO, config_of, make, names_of
from transformers import AutoConfig, AutoModel, LlamaConfig, PreTrainedConfig

from rsdyn.errors import UserError
from rsdyn.lm import sites
from rsdyn.lm.sites import SITES, Family, find_sites, site_names, sublayer_index
from rsdyn.lm.tracing import model_without_weights


@pytest.mark.parametrize("name", FAMILIES)
def test_traced_sites_are_those_of_the_modelling_code(name):
    base, names = ZOO[name]().base_model, names_of(name)
    found = find_sites(base)
    assert site_names(config_of(name)) == found.names
    assert found.names == (("resid_pre",) if name in PARALLEL else ("resid_pre", "resid_mid"))
    layers = list(base.get_submodule(names.layers))
    assert list(found.layers) == layers and len(layers) == LAYERS
    mids = [] if names.mid is None else [layer.get_submodule(names.mid) for layer in layers]
    modules = layers if names.mid is None else [m for pair in zip(layers, mids, strict=True) for m in pair]
    assert list(found.modules) == modules
    assert list(found.attention) == [layer.get_submodule(names.attention) for layer in layers]
    assert list(found.mlp) == [layer.get_submodule(names.mlp) for layer in layers]
    assert found.final_norm is base.get_submodule(names.final_norm)
    adds = [layer.get_submodule(name) for layer in layers for name in names.adds]
    assert {a.module for terms in found.adds for a in terms} == set(adds) and len(found.adds) == len(modules)
    if names.mid is not None:
        assert [a.module for terms in found.adds for a in terms] == adds
    assert {a.scale for terms in found.adds for a in terms} == {names.scale}


def test_layers_of_different_kinds():
    """Dense and experts in turn: each layer has its own blocks."""
    kinds = [type(mlp).__name__ for mlp in find_sites(ZOO["qwen3-moe"]().base_model).mlp]
    assert kinds == ["Qwen3MoeMLP", "Qwen3MoeSparseMoeBlock", "Qwen3MoeMLP"]


def test_a_large_model_costs_no_memory():
    """16 GB of weights are neither made nor read: Llama 3.1 8B's shape."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    before = config.to_json_string()
    assert site_names(config) == ("resid_pre", "resid_mid")
    assert config.to_json_string() == before


@pytest.mark.parametrize("name", REFUSED)
def test_norms_behind_the_sums_are_refused(name):
    with pytest.raises(UserError, match=r"name.*not supported.*post-norm.*SITES of rsdyn/lm/sites\.py"):
        site_names(config_of(name))
    with pytest.raises(UserError, match="post-norm"):
        find_sites(make(name).base_model)


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("vit", "does not run without weights"),
    ],
)
def test_other_models_are_refused(model_type, why):
    config = AutoConfig.for_model(model_type, num_hidden_layers=2)
    with pytest.raises(UserError, match=f"name: .*{model_type}.*not supported.*{why}"):
        site_names(config)


def test_a_config_that_no_model_is_known_for():
    class Strange(PreTrainedConfig):
        model_type = "strange"

    with pytest.raises(UserError, match="'strange' is not opened: it cannot be built from its config"):
        site_names(Strange())


_CODE = """
from transformers import LlamaConfig, LlamaModel

class Config(LlamaConfig):
    model_type = "its-own"

class Model(LlamaModel):
    config_class = Config
"""


def test_a_model_with_code_of_its_own(tmp_path, monkeypatch):
    """Where the user trusts it, its code is followed like any other."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    settings = config_of("llama").to_dict() | {"model_type": "its-own"}
    settings["auto_map"] = {"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "modeling.py").write_text(_CODE)
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert site_names(config, trust_remote_code=True) == ("resid_pre", "resid_mid")
    base = AutoModel.from_config(config, trust_remote_code=True)
    assert type(base).__name__ == "Model" and len(find_sites(base).modules) == 2 * LAYERS


_TABLE = {
    "llama": Family("layers", "post_attention_layernorm", "self_attn", "mlp", "norm"),
    "cohere": Family("layers", None, "self_attn", "mlp", "norm"),
    "gemma2": Family(
        *("layers", "pre_feedforward_layernorm", "self_attn", "mlp", "norm"),
        attention_adds="post_attention_layernorm",
        mlp_adds="post_feedforward_layernorm",
    ),
    "granite": Family(*("layers", "post_attention_layernorm", "self_attn", "mlp", "norm"), scale="residual_multiplier"),
}


@pytest.mark.parametrize("name", _TABLE)
def test_a_line_of_the_table_says_the_same_as_tracing(name, monkeypatch):
    base = ZOO[name]().base_model
    traced = find_sites(base)
    monkeypatch.setitem(SITES, name, _TABLE[name])
    monkeypatch.setattr(sites, "trace", lambda _: pytest.fail("the table comes first"))
    sites._traced.cache_clear()
    named = find_sites(base)
    assert site_names(base.config) == named.names == traced.names
    assert named == traced


def test_a_wrong_line_of_the_table_names_the_module(monkeypatch):
    monkeypatch.setitem(SITES, "llama", _TABLE["llama"]._replace(mid="ln_2"))
    with pytest.raises(UserError, match=r"SITES names a module.*ln_2"):
        find_sites(ZOO["llama"]().base_model)


def test_another_shape_is_traced_again():
    """Two models of one class whose settings make other sites."""
    assert site_names(config_of("neox-parallel")) == ("resid_pre",)
    assert site_names(config_of("neox-serial")) == ("resid_pre", "resid_mid")
    assert len(find_sites(model_without_weights(config_of("llama", layers=2))).layers) == 2
    assert len(find_sites(ZOO["llama"]().base_model).layers) == LAYERS


def test_sublayer_of_a_layers_site():
    both, one = ("resid_pre", "resid_mid"), ("resid_pre",)
    assert [sublayer_index(both, 3, layer, site) for layer in range(3) for site in both] == list(range(6))
    assert [sublayer_index(one, 3, layer) for layer in range(3)] == [0, 1, 2]
    for names, layer, site, why in [
        (both, 3, "resid_pre", "from 0 to 2"),
        (both, -1, "resid_pre", "from 0 to 2"),
        (both, True, "resid_pre", "whole number"),
        (one, 0, "resid_mid", "parallel attention"),
        (both, 0, "resid_post", "allowed: resid_pre, resid_mid"),
    ]:
        with pytest.raises(UserError, match=why):
            sublayer_index(names, 3, layer, site)
