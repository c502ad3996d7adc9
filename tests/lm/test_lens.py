"""The Jacobian lens: against autograd over plain transformers, its file, a fit that resumes, the command."""

import copy

import numpy as np
import pytest
import torch
from family_zoo import ZOO

from rsdyn.commands import lens as command
from rsdyn.errors import UserError
from rsdyn.lm.lens import JacobianLens, LensFit, text_jacobian
from rsdyn.lm.lens_reading import LensComparison, compare_lenses
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
        expected = whole[skip:-1, :, skip:-1].sum(0).mean(1)
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
    assert "2 layers of 32 units, 4 texts" in shown and "Refit cosine" in shown
    assert "Against the logit lens, 20 texts held out" in shown and "it reads " in shown
    lens = JacobianLens.load(out)
    assert lens.source_layers == [0, 1] and lens.n_prompts == 4
    words[2] = "6"  # two more
    assert command.main(words) == 0
    assert JacobianLens.load(out).n_prompts == 6
    words[2] = "5"  # one of the six would be held out, and be fitted on
    assert command.main(words) == 2
    assert "--texts 5: the fit in" in capsys.readouterr().err


def test_the_command_resumes_where_it_was_stopped(tiny_llama, tmp_path, monkeypatch, capsys):
    """Stopped in its fourth text, and run again: no text twice, and the lens of a run that was not stopped."""
    words = [str(tiny_llama), "--texts", "5", "--tokens", "30", "--skip", "4", "-o"]
    assert command.main([*words, str(tmp_path / "whole.pt")]) == 0
    done, of_text = [], command.text_jacobian

    def stopping(lm, tokens, *, skip):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(tokens)
        return of_text(lm, tokens, skip=skip)

    monkeypatch.setattr(command, "SAVE_EVERY", 0)
    monkeypatch.setattr(command, "text_jacobian", stopping)
    assert command.main([*words, str(tmp_path / "lens.pt")]) == 130
    assert "run the same command again to resume" in capsys.readouterr().err
    assert not (tmp_path / "lens.pt").exists()
    rest = []
    monkeypatch.setattr(
        command, "text_jacobian", lambda lm, tokens, *, skip: (rest.append(tokens), of_text(lm, tokens, skip=skip))[1]
    )
    assert command.main([*words, str(tmp_path / "lens.pt")]) == 0
    assert len(rest) == 2
    whole, resumed = (JacobianLens.load(tmp_path / name) for name in ("whole.pt", "lens.pt"))
    for layer in whole.source_layers:
        torch.testing.assert_close(resumed.j[layer], whole.j[layer], rtol=0, atol=0)


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
    with pytest.raises(UserError, match="of which the first 16 and the last are skipped"):
        text_jacobian(open_lm("llama"), IDS)


# -- does it read better? ----------------------------------------------------------------------------------------------


TEXTS = [np.random.default_rng(i).integers(3, 300, size=9 + i) for i in range(3)]  # 9 tokens each behind the skipped


def states_of(lm, tokens, layer):
    """Behind a block, and behind the last one, ``(T, D)`` each."""
    at = np.arange(len(tokens))
    here = lm.record([tokens], positions=[at])[:, (layer + 1) * len(lm.sites.names)]
    ends = []
    handle = lm.sites.layers[-1].register_forward_hook(
        lambda m, a, out: ends.append(out[0] if isinstance(out, tuple) else out)
    )
    lm.base(input_ids=torch.from_numpy(tokens)[None], use_cache=False)
    handle.remove()
    return here, ends[0].detach().view(len(tokens), -1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_comparison_is_that_of_plain_torch(name):
    """Final norm, head and what follows them by transformers on the states, softmax and sums by torch."""
    lm = open_lm(name)
    generator = torch.Generator().manual_seed(0)
    j = {0: torch.eye(lm.n_units) + 0.3 * torch.randn(lm.n_units, lm.n_units, generator=generator)}
    skip = 4
    found = compare_lenses(lm, JacobianLens(j, 1), TEXTS, skip=skip)
    assert found.layers == [0] and found.tokens.tolist() == [len(t) - skip for t in TEXTS]
    for k, tokens in enumerate(TEXTS):
        here, ends = (x[skip:] for x in states_of(lm, tokens, 0))
        final = lm.log_probs(ends).double()
        for i, states in enumerate((here, here @ j[0].double().T)):
            read = lm.log_probs(states).double()
            kl = torch.nn.functional.kl_div(read, final, log_target=True, reduction="none").sum(-1).mean()
            assert float(found.kl[i, 0, k]) == pytest.approx(float(kl), rel=1e-4)
            assert float(found.agreement[i, 0, k]) == float((read.argmax(-1) == final.argmax(-1)).double().mean())
    counts = found.tokens.double()
    expected = (found.kl * counts).sum(-1) / counts.sum()
    torch.testing.assert_close(found.mean(found.kl), expected)


def test_a_lens_that_knows_the_end_reads_better_and_one_that_turns_states_round_worse():
    lm = open_lm("llama")
    skip = 2
    pairs = [[x[skip:] for x in states_of(lm, tokens, 1)] for tokens in TEXTS]
    here, ends = (torch.cat([pair[i] for pair in pairs]) for i in range(2))
    exact = torch.linalg.lstsq(here, ends).solution.T.float()  # as many equations as unknowns, or fewer
    assert len(here) <= lm.n_units
    good = compare_lenses(lm, JacobianLens({1: exact}, 1), TEXTS, skip=skip)
    assert float(good.kl[1].max()) < 1e-3 and float(good.agreement[1].min()) == 1
    assert good.verdicts() == {"better": [1], "worse": [], "alike": []}
    bad = compare_lenses(lm, JacobianLens({1: -torch.eye(lm.n_units)}, 1), TEXTS, skip=skip)
    assert bad.verdicts()["worse"] == [1]
    same = compare_lenses(lm, JacobianLens({1: torch.eye(lm.n_units)}, 1), TEXTS, skip=skip)
    torch.testing.assert_close(same.kl[0], same.kl[1], rtol=1e-4, atol=1e-6)


def test_the_difference_is_jackknifed_over_texts():
    """Texts of equal length: Student's interval of the mean difference."""
    rng = np.random.default_rng(0)
    kl = torch.from_numpy(rng.normal(size=(2, 3, 12)))
    found = LensComparison([0, 1, 2], torch.full((12,), 7), kl, kl)
    value, low, high = found.difference(kl)
    apart = (kl[1] - kl[0]).numpy()
    np.testing.assert_allclose(value, apart.mean(1))
    np.testing.assert_allclose((high - low) / 2, 2.201 * apart.std(1, ddof=1) / 12**0.5, rtol=1e-3)
    one = LensComparison([0, 1, 2], torch.tensor([7]), kl[..., :1], kl[..., :1])
    assert one.verdicts() == {"better": [], "worse": [], "alike": [0, 1, 2]}
    assert "One text held out says nothing of others" in command.comparison(one)[-1]


def test_layers_in_words():
    assert command._layers([3]) == "behind layer 3"
    assert command._layers([0, 2, 3, 4, 7]) == "behind layers 0, 2-4, 7"


def test_a_lens_of_another_model_is_refused():
    lm = open_lm("llama")
    for lens in (JacobianLens({0: torch.eye(5)}, 1), JacobianLens({2: torch.eye(32)}, 1)):
        with pytest.raises(UserError, match="Take a lens of this model"):
            compare_lenses(lm, lens, TEXTS)
    with pytest.raises(UserError, match="more than the 16 tokens"):
        compare_lenses(lm, JacobianLens({0: torch.eye(32)}, 1), TEXTS)
