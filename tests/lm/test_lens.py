"""The Jacobian lens: against autograd over plain transformers, its file, a fit that resumes, the command."""

import copy

import numpy as np
import pytest
import torch
from family_zoo import ZOO

from rsdyn.commands import lens as command
from rsdyn.errors import UserError
from rsdyn.lm.lens import JacobianLens, LensFit, text_jacobian
from rsdyn.lm.model import LanguageModel

IDS = np.random.default_rng(5).integers(3, 300, size=9)


def hooks_of(lm):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.base.modules())


def open_lm(name, dtype=torch.float64):
    causal = copy.deepcopy(ZOO[name]()).to(dtype)
    return LanguageModel(causal.base_model, name=name, causal=causal)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "opt", "llama"])
def test_is_the_mean_of_sums_over_later_tokens(name, monkeypatch):
    """autograd's whole (T, D) by (T, D) derivative of the layers behind each block, reduced by hand."""
    lm, skip = open_lm(name), 3
    before = hooks_of(lm)  # the zoo's models are shared, and transformers leaves hooks in what it was asked states of
    found = text_jacobian(lm, IDS, skip=skip)
    for layer in range(lm.n_layers - 1):

        def behind(x, layer=layer):
            ends = []

            def enter(module, args, kwargs):
                given = args[0] if args else kwargs["hidden_states"]
                assert given.shape == x.shape
                return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

            handles = [
                lm.sites.layers[layer + 1].register_forward_pre_hook(enter, with_kwargs=True),
                lm.sites.layers[-1].register_forward_hook(
                    lambda m, a, out: ends.append(out[0] if isinstance(out, tuple) else out)
                ),
            ]
            lm.base(input_ids=torch.from_numpy(IDS)[None], use_cache=False)
            for handle in handles:
                handle.remove()
            return ends[0]

        states = lm.record([IDS], positions=[np.arange(len(IDS))])[:, (layer + 1) * len(lm.sites.names)]
        whole = torch.autograd.functional.jacobian(behind, states[None])[0, :, :, 0]  # (T', D, T, D)
        expected = whole[skip:, :, skip:].sum(0).mean(1)
        tolerance = 1e-5 if name in ("llama", "gptj") else 1e-9  # these pass through float32
        assert float((found[layer] - expected).norm() / expected.norm()) < tolerance
    monkeypatch.setattr("rsdyn.lm.lens.BLOCK_BYTES", 7 * 50_000)  # fewer copies than units, the last block shorter
    torch.testing.assert_close(text_jacobian(lm, IDS, skip=skip), found, rtol=1e-6, atol=1e-8)
    assert not any(p.requires_grad for p in lm.base.parameters())
    assert hooks_of(lm) == before


def test_the_file_is_the_published_layout(tmp_path):
    lens = JacobianLens({0: torch.eye(4), 2: 0.5 * torch.eye(4)}, 7)
    lens.save(tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert set(content) == {"J", "n_prompts", "source_layers", "d_model"}
    assert content["J"][2].dtype == torch.float16 and content["J"][2].shape == (4, 4)
    assert (content["n_prompts"], content["source_layers"], content["d_model"]) == (7, [0, 2], 4)
    back = JacobianLens.load(tmp_path / "a.pt")
    assert back.n_prompts == 7 and back.source_layers == [0, 2] and back.j[0].dtype == torch.float32
    torch.testing.assert_close(back.transport(2, torch.ones(3, 4)), 0.5 * torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"layer=1: this lens has \[0, 2\]"):
        back.transport(1, torch.ones(4))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"J": {0: torch.eye(3)}, "n_prompts": 1, "d_model": 3}, "it lacks source_layers"),
        ({"J": {0: torch.eye(3)}, "n_prompts": 1, "source_layers": [0, 1], "d_model": 3}, r"layers \[0, 1\] at 3"),
        ({"J": {0: torch.eye(3)}, "n_prompts": 1, "source_layers": [0], "d_model": 4}, "at 4 units"),
        ({"J": {0: torch.full((3, 3), torch.nan)}, "n_prompts": 1, "source_layers": [0], "d_model": 3}, "NaN"),
        ({"J": {"a": 1}, "n_prompts": 1, "source_layers": [0], "d_model": 3}, "not a Jacobian lens"),
        ([1], "holds a list"),
        (np.float64, "cannot be read"),
    ],
)
def test_files_that_are_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=words):
        JacobianLens.load(tmp_path / "a.pt")
    with pytest.raises(UserError, match="no such file"):
        JacobianLens.load(tmp_path / "b.pt")


def test_a_fit_goes_on_where_it_was(tmp_path):
    lm = open_lm("llama")
    texts = [torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(5)]
    whole = LensFit.begin(lm)
    for text in texts:
        whole.add(text)
    part = LensFit.begin(lm)
    for text in texts[:3]:
        part.add(text)
    part.save(tmp_path / "x", "a")
    again = LensFit.load(tmp_path / "x", "a")
    for text in texts[3:]:
        again.add(text)
    assert again.changes == whole.changes and len(whole.changes) == 4
    for layer in range(2):
        torch.testing.assert_close(again.lens().j[layer], torch.stack(texts).mean(0)[layer].float())
    expected = torch.stack(texts[0::2]).mean(0), torch.stack(texts[1::2]).mean(0)
    cosine = torch.nn.functional.cosine_similarity(*(e.flatten(1) for e in expected))
    torch.testing.assert_close(again.refit_cosine(), cosine)
    with pytest.raises(UserError, match="another model"):
        LensFit.load(tmp_path / "x", "b")


def test_the_command(tiny_llama, tmp_path, capsys):
    out = tmp_path / "lens.pt"
    words = [str(tiny_llama), "--texts", "4", "--tokens", "30", "--skip", "4", "-o", str(out)]
    assert command.main(words) == 0
    shown = capsys.readouterr().out
    assert "2 layers of 32 units, 4 texts" in shown and "Refit cosine" in shown and "Against the logit lens" in shown
    lens = JacobianLens.load(out)
    assert lens.source_layers == [0, 1] and lens.n_prompts == 4
    words[2] = "6"  # two more
    assert command.main(words) == 0
    assert JacobianLens.load(out).n_prompts == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--texts", "0"], "--texts 0: give at least 1"),
        (["--tokens", "10"], "--tokens 10: give at least 18"),
        (["--out", "/nowhere/at/all/x.pt"], "--out /nowhere/at/all/x.pt"),
    ],
)
def test_what_the_command_refuses(words, message, tiny_llama, capsys):
    assert command.main([str(tiny_llama), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_short_text_is_refused():
    with pytest.raises(UserError, match="of which the first 16 are skipped"):
        text_jacobian(open_lm("llama"), IDS)
