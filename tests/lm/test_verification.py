"""``rsdyn check``: models of every family hold, and what is wrong with one is named, with the exit code."""

import json
import shutil

import pytest
import torch
from family_zoo import FAMILIES, ZOO, make
from safetensors.torch import load_file, save_file
from tiny_models import tiny_lm

from rsdyn.__main__ import main as rsdyn
from rsdyn.errors import UnfitModelError
from rsdyn.lm import prefix
from rsdyn.lm.sites import SITES, Family
from rsdyn.lm.verification import verify


def named(found, name):
    return next(check for check in found.checks if check.name == name)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox-parallel", "gemma2", "gpt-oss", "bloom", "granite"])
def test_families_hold(name):
    found = verify(ZOO[name]())
    assert found.failure is None, found.failure.line()
    names = ["sums", "recorded", "hidden states", "log-probs", "padded right", "padded left", "replay", "continuation"]
    assert all(named(found, check).holds for check in names)
    assert named(found, "replay").numbers["sublayers"] == 3 * (1 if name == "neox-parallel" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_holds(name):
    found = verify(ZOO[name]())
    assert found.failure is None, found.failure.line()


def test_left_padding_by_the_mask_alone_is_told_where_it_is_wrong():
    gpt2, llama = verify(ZOO["gpt2"]()), verify(ZOO["llama"]())
    assert named(gpt2, "padded left").numbers["mask_alone"] > 0.05  # learned positions count the padding
    assert "with the mask alone it is" in named(gpt2, "padded left").words
    assert named(llama, "padded left").numbers["mask_alone"] < 1e-4  # rotary ones are relative


def test_a_model_object_comes_back_as_it_was():
    model = make("llama").train().requires_grad_(True)
    model.model.norm.weight.requires_grad_(False)
    model.lm_head.eval()
    verify(model)
    assert model.training and not model.lm_head.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# -- what does not hold ------------------------------------------------------------------------------------------------


def test_wrong_sites_fail_at_the_sums(monkeypatch):
    wrong = Family("layers", "post_attention_layernorm", "self_attn", "mlp", "norm", mlp_adds="mlp.gate_proj")
    monkeypatch.setitem(SITES, "llama", wrong._replace(mlp_adds="self_attn"))
    found = verify(make("llama"))
    assert found.failure.name == "sums" and "at sublayer 1" in found.failure.words


def test_a_padded_batch_that_differs_is_named():
    model = make("llama")
    # every token is told the mean of its row, as in an encoder: the sums hold, and a neighbour's padding is read
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: out + out.mean(1, keepdim=True))
    found = verify(model)
    assert named(found, "sums").holds and found.failure.name == "padded right"
    assert found.to_dict()["first_failure"] == "padded right" and not found.to_dict()["holds"]
    assert found.lines()[-1] == "Does not hold: padded right."


def test_a_head_that_should_be_tied_and_is_another():
    model = make("gemma")
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight), requires_grad=False)
    assert verify(model).failure.name == "LM head"


def test_a_state_beyond_float16_is_told():
    model = make("llama")
    model.model.embed_tokens.weight[:, 3] = 7e4
    found = named(verify(model), "float16")
    assert (found.holds, found.numbers["unit"], found.numbers["fits_float16"]) == (None, 3, False)
    assert "more than float16 holds (65,504): compute in bfloat16 or float32" in found.words


def test_post_norm_models_are_refused():
    with pytest.raises(UnfitModelError, match="post-norm"):
        verify(make("opt-post-norm"))


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_lm(tmp_path_factory.mktemp("checked") / "tiny")


def edited(folder, target, *, config=None, weights=None, tokenizer=None):
    """A copy of the model with changes to its files."""
    shutil.copytree(folder, target)
    for name, change in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        if change is not None:
            (target / name).write_text(json.dumps(json.loads((target / name).read_text()) | change))
    if weights is not None:
        kept = {k: v for k, v in load_file(target / "model.safetensors").items() if weights not in k}
        save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_check_says_line_by_line_what_holds(folder, capsys):
    assert rsdyn(["check", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny (llama): 3 layers of 32 units, 6 sublayers, float32"
    for name in ("weights", "LM head", "sums", "hidden states", "padded left", "packed", "replay", "continuation"):
        assert any(line.startswith(f"ok    {name} ") for line in lines), name
    assert any(line.startswith("note  BOS             <s> before each text, as its tokenizer does") for line in lines)
    assert lines[-1] == "All 11 checks hold."


def test_json_is_one_object_and_nothing_else(folder, capsys):
    assert rsdyn(["check", str(folder), "--json", "--dtype", "bfloat16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["holds"] and found["first_failure"] is None and "bfloat16" in found["model"]
    assert {"name", "holds", "words", "numbers"} == set(found["checks"][0])


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        ({"weights": "layers.2."}, "weights", "which its weights lack"),
        ({"config": {"num_hidden_layers": 2}}, "weights", "which its config.json does not have"),
        ({"tokenizer": {"chat_template": "<s><s>{{ messages[0]['content'] }}"}}, "chat template", "2 BOS in a row"),
    ],
)
def test_what_does_not_hold_is_3_with_its_name(change, name, words, folder, tmp_path, capsys):
    assert rsdyn(["check", str(edited(folder, tmp_path / "wrong", **change)), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["first_failure"] == name
    assert words in next(check["words"] for check in found["checks"] if check["name"] == name)


def test_a_post_norm_folder_is_3(tmp_path, capsys):
    make("opt-post-norm").save_pretrained(tmp_path / "opt")
    assert rsdyn(["check", str(tmp_path / "opt")]) == 3
    assert "FAIL  running sum     name: a model of type 'opt' is not supported" in capsys.readouterr().out


def test_mistakes_in_the_command_are_2(capsys):
    assert rsdyn(["check", "/no/such/folder"]) == 2
    assert "rsdyn check: error: name=/no/such/folder: no such folder" in capsys.readouterr().err
    assert rsdyn(["chek", "x"]) == 2
    assert "chek: no such program. Did you mean check?" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["report", "cache", "workspace"])
def test_other_programs_join_the_front_door(program, capsys):
    with pytest.raises(SystemExit) as stopped:
        rsdyn([program, "--help"])
    assert stopped.value.code == 0 and "usage:" in capsys.readouterr().out


# -- BOS and chat templates --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_the_frame_of_a_template(tokenizer):
    turn = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }} {% endfor %}[answer]"
    tokenizer.chat_template = turn
    frame = prefix.chat_frame(tokenizer)
    assert frame == ("[user] ", " [answer]", 0, True)
    assert frame.around("  Hello. \n") == "[user] Hello. [answer]"
    tokenizer.chat_template = "<s>" + turn
    assert prefix.chat_frame(tokenizer).opens_with == 1
    tokenizer.chat_template = None
    assert prefix.chat_frame(tokenizer) is None


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "does not take one user turn alone .*roles must alternate"),
        ("{{ messages[0]['content'] | upper }}", "fixed frame"),
        ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", "fixed frame"),
    ],
)
def test_templates_that_cannot_be_used(template, words, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(Exception, match=words):
        prefix.chat_frame(tokenizer)
    tokenizer.chat_template = None


def test_a_language_model_that_was_opened_is_taken_too(folder):
    from rsdyn.lm.source import find_lm

    found = verify(find_lm(str(folder)).load())  # without its head and tokenizer
    assert found.failure is None and named(found, "LM head").holds is None
