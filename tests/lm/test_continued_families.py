"""What records also continues, or is refused before anything is recorded: models that see, and layers with a memory."""

import json

import numpy as np
import pytest
import torch
from family_zoo import CARRYING, SEEING, config_of, make
from tiny_models import tiny_tokenizer

from rsdyn.commands import perturb
from rsdyn.errors import UserError
from rsdyn.lm.certificate import certify
from rsdyn.lm.continuing.continuation import continue_from, run_reference
from rsdyn.lm.continuing.layer_calls import check_memories
from rsdyn.lm.head import base_of, class_with_head
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.source import find_lm

IDS = np.random.default_rng(5).integers(3, 290, size=11)


def saved(folder, name, **options):
    """A tiny model of a family in a folder, with a tokenizer of no more tokens than it has."""
    tiny_tokenizer(folder, vocab_size=290)
    model = make(name, **options)
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("name", SEEING)
def test_a_model_that_sees_is_continued_in_its_own_words(tmp_path, name):
    """Opened from its folder with and without the head; points go where a whole forward takes them."""
    folder, model = saved(tmp_path / "lm", name)
    source = find_lm(str(folder))
    lm, bare = source.load(head=True), source.load()
    torch.testing.assert_close(lm.record([IDS]), bare.record([IDS]), rtol=1e-5, atol=1e-5)
    assert source.n_parameters(head=True) >= source.n_parameters()
    certify(lm, [IDS, IDS[:5]])
    with torch.no_grad():
        expected = model(input_ids=torch.as_tensor(IDS)[None]).logits[0, -1].float().log_softmax(-1)
    reference = run_reference(lm, IDS)
    torch.testing.assert_close(reference.log_probs, expected, rtol=1e-4, atol=1e-4)
    states = reference.stream[2] + torch.randn(2, lm.n_units, generator=torch.Generator().manual_seed(0))
    found = continue_from(lm, reference, 2, states, log_probs=True)
    layers = lm.sites.layers
    for point, state in enumerate(states):

        def replace(module, args, kwargs, state=state):
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            hidden[:, -1] = state
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        handle = layers[1 if len(lm.sites.names) == 2 else 2].register_forward_pre_hook(replace, with_kwargs=True)
        with torch.no_grad():
            whole = lm.causal(input_ids=torch.as_tensor(IDS)[None]).logits[0, -1].float().log_softmax(-1)
        handle.remove()
        torch.testing.assert_close(found.log_probs[point], whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CARRYING)
def test_layers_that_carry_a_state_are_known_from_the_config(name):
    config = config_of(name)
    with pytest.raises(UserError, match=rf"name: {name} cannot be continued.*a state from token to token"):
        check_memories(config, name)
    causal = make(name)
    lm = LanguageModel(base_of(causal)[1], name=name, causal=causal)
    assert lm.record([IDS]).isfinite().all()  # recorded it is
    with torch.no_grad():
        logits = causal(input_ids=torch.as_tensor(IDS)[None]).logits[0, -1].log_softmax(-1)
    final = []
    handle = lm.sites.layers[-1].register_forward_hook(lambda m, args, out: final.append(out))
    with torch.no_grad():
        lm.base(input_ids=torch.as_tensor(IDS)[None], use_cache=False)
    handle.remove()
    last = (final[0][0] if isinstance(final[0], tuple) else final[0])[0, -1]
    torch.testing.assert_close(lm.log_probs(last), logits, rtol=1e-4, atol=1e-4)  # Falcon-H1 scales its logits
    with pytest.raises(UserError, match="a state from token to token"):
        run_reference(lm, IDS)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral-sliding", "qwen3", "neox-parallel", "gemma3-image"])
def test_others_carry_none(name):
    check_memories(config_of(name), name)


def test_a_model_without_a_head_is_one_line():
    from transformers import AutoConfig

    with pytest.raises(UserError, match=r"name: transformers opens a model of type 'siglip_vision_model' without"):
        class_with_head(AutoConfig.for_model("siglip_vision_model"))


# -- perturb.py --------------------------------------------------------------------------------------------------------


def words(folder, tmp_path, *more):
    cache = tmp_path / "cache"
    small = ["perturb.grid.n=2", "perturb.samples=20", "data.limit=20", "data.truncate=true", "perturb.from_text=1"]
    where = [f"lm.name={folder}", f"cache.dir={cache}", f"run.dir={tmp_path / 'run'}"]
    return [*where, "tracking.mode=disabled", *small, *more]


def test_what_cannot_be_continued_is_refused_before_anything_is_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RSDYN_RUN_DIR", "")
    folder, _ = saved(tmp_path / "lm", "falcon-h1")
    assert perturb.main(words(folder, tmp_path)) == 2
    error = capsys.readouterr().err
    assert "a state from token to token" in error and "Give another model" in error and "Traceback" not in error
    assert not [*(tmp_path / "cache").rglob("shard-*.safetensors")]


def test_layers_that_look_elsewhere_are_refused_before_anything_is_recorded(tmp_path, tiny_llama, monkeypatch, capsys):
    """Only a run of a prompt tells: it comes ahead of the recording."""
    from transformers.models.llama import modeling_llama

    monkeypatch.setenv("RSDYN_RUN_DIR", "")
    original = modeling_llama.LlamaDecoderLayer.forward

    def wrong(self, hidden_states, **kwargs):
        out = original(self, hidden_states, **kwargs)
        return out + 0.3 * hidden_states.cumsum(1) if kwargs.get("past_key_values") is None else out

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", wrong)
    assert perturb.main(words(tiny_llama, tmp_path)) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not [*(tmp_path / "cache").rglob("shard-*.safetensors")]


@pytest.mark.parametrize(
    ("name", "options", "more"),
    [
        ("llava", {}, ["perturb.layers=[0,2]"]),
        ("neox-parallel", {}, []),
        ("gptj", {"layers": 1}, []),
        ("llama", {"layers": 1}, []),
        ("llama", {"layers": 1}, ["perturb.kind=noise", "perturb.points=1"]),
        ("llama", {"layers": 1}, ["perturb.kind=skip"]),
    ],
    ids=str,
)
def test_parallel_models_one_layer_and_models_that_see(tmp_path, monkeypatch, capsys, name, options, more):
    monkeypatch.setenv("RSDYN_RUN_DIR", "")
    folder, _ = saved(tmp_path / "lm", name, **options)
    idle = {"perturb.kind=noise": ("perturb.grid",), "perturb.kind=skip": ("perturb.grid", "perturb.samples", "cache.")}
    unused = idle.get(next(iter(more), ""), ("-",))
    given = [word for word in words(folder, tmp_path, *more) if not word.startswith(unused)]
    assert perturb.main(given) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "report.html").stat().st_size > 0
    json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("kind", ["teleport", "swap"])
def test_every_tiny_size_ends_or_says_what_is_too_small(tmp_path, tiny_llama, monkeypatch, capsys, limit, kind):
    monkeypatch.setenv("RSDYN_RUN_DIR", "")
    small = {"teleport": "perturb.grid.n=2", "swap": "perturb.points=3"}[kind]
    argv = [f"lm.name={tiny_llama}", f"cache.dir={tmp_path / 'cache'}", "tracking.mode=disabled", "perturb.samples=3"]
    argv += ["data.truncate=true"]
    argv += [f"data.limit={limit}", f"perturb.kind={kind}", small, f"run.dir={tmp_path / 'run'}", "perturb.layers=[1]"]
    code, said = perturb.main(argv), capsys.readouterr()
    assert "Traceback" not in said.err
    assert code == 0 or (code == 2 and ("other sequences" in said.err or "Give more text" in said.err))
    assert code == 0 or kind == "swap"
