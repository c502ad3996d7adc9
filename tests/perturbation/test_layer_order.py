"""Layers left out and exchanged: against transformers' own models with a hook, or with other layers in their list."""

import copy

import numpy as np
import pytest
import torch
from family_zoo import ZOO

from rsdyn.dynamics.prediction import mean_per_token, next_token_losses
from rsdyn.dynamics.resampling import jackknife
from rsdyn.errors import NonFiniteError, UserError
from rsdyn.lm.continuing.layer_order import run_in_order, run_whole
from rsdyn.lm.head import base_of
from rsdyn.lm.model import LanguageModel
from rsdyn.perturbation.layers import changed_layers, measure_layers, order_of
from rsdyn.perturbation.prompts import Prompt
from rsdyn.perturbation.words import effects_table, effects_words

IDS = np.random.default_rng(5).integers(3, 300, size=11)


def open_lm(name, causal):
    return LanguageModel(base_of(causal)[1], name=name, causal=causal)


@torch.no_grad()
def logits(causal, ids=IDS):
    return causal(torch.as_tensor(ids)[None], use_cache=False).logits[0].float().log_softmax(-1)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ZOO)
def test_a_skip_is_that_of_a_hook_on_the_model_s_own_layer(name):
    """The hook gives the layer's input in place of its output; the model runs as it always does."""
    causal = ZOO[name]()
    lm = open_lm(name, causal)
    run = run_whole(lm, IDS)
    close(lm.log_probs(run.final), logits(causal))
    for layer, module in enumerate(lm.sites.layers):
        given = []
        before = module.register_forward_pre_hook(
            lambda m, args, kwargs, given=given: given.append((args[0] if args else kwargs["hidden_states"]).clone()),
            with_kwargs=True,
        )
        after = module.register_forward_hook(
            lambda m, args, out, given=given: (given[-1], *out[1:]) if isinstance(out, tuple) else given[-1]
        )
        expected = logits(causal)
        before.remove()
        after.remove()
        found = lm.log_probs(run_in_order(lm, run, order_of("skip", layer, lm.n_layers)))
        close(found, expected)
        assert (found - lm.log_probs(run.final)).abs().max() > 1e-3  # the layer did something


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox-parallel", "granite", "bloom"])
@pytest.mark.parametrize("kind", ["skip", "swap_layers"])
def test_equal_to_a_model_with_other_layers_in_its_list(name, kind):
    lm = open_lm(name, ZOO[name]())
    run = run_whole(lm, IDS)
    for layer in changed_layers(kind, None, lm.n_layers):
        order = order_of(kind, layer, lm.n_layers)
        causal = copy.deepcopy(lm.causal)
        holder = next(m for m in causal.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == lm.n_layers)
        own = [*holder]
        for _ in own:
            del holder[0]
        holder.extend(own[i] for i in order)
        causal.config.num_hidden_layers = base_of(causal)[1].config.num_hidden_layers = len(order)
        close(lm.log_probs(run_in_order(lm, run, order)), logits(causal))


def test_orders():
    assert order_of("skip", 1, 4) == [0, 2, 3] and order_of("swap_layers", 1, 4) == [0, 2, 1, 3]
    assert changed_layers("skip", None, 3) == [0, 1, 2] and changed_layers("swap_layers", None, 3) == [0, 1]
    assert changed_layers("swap_layers", [1], 3) == [1] and changed_layers("skip", None, 1) == [0]
    with pytest.raises(UserError, match=r"layer 2 would be exchanged with the one behind it.*from 0 to 1"):
        changed_layers("swap_layers", [2], 3)
    with pytest.raises(UserError, match="has one layer"):
        changed_layers("swap_layers", None, 1)


def test_only_what_lies_behind_the_change_runs_and_nothing_is_left_behind():
    lm = open_lm("llama", ZOO["llama"]())
    run = run_whole(lm, IDS)
    before = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in lm.base.modules()]
    ran = []
    handles = [m.register_forward_hook(lambda *a, i=i: ran.append(i)) for i, m in enumerate(lm.sites.layers)]
    try:
        run_in_order(lm, run, [0, 2])
        assert ran == [2]
        ran.clear()
        assert torch.equal(run_in_order(lm, run, [0, 1, 2]), run.final) and ran == []
        run_in_order(lm, run, [0, 1])
        assert ran == []  # the last one left out: all is known
    finally:
        for handle in handles:
            handle.remove()
    assert [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in lm.base.modules()] == before
    with pytest.raises(ValueError, match=r"order=\[3\]: llama has 3 layers"):
        run_in_order(lm, run, [3])
    lm.n_edits = 1
    with pytest.raises(ValueError, match="1 interventions are open"):
        run_whole(lm, IDS)


def test_layers_that_give_something_else_the_second_time_are_refused(monkeypatch):
    lm = open_lm("llama", copy.deepcopy(ZOO["llama"]()))
    layer, calls = lm.sites.layers[1], []
    original = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *a, **k: original(*a, **k) * (1 + len(calls) + bool(calls.append(1))))
    with pytest.raises(UserError, match=r"cannot be run in another order.*Perturb another model"):
        run_whole(lm, IDS)


# -- what it does to predictions ---------------------------------------------------------------------------------------


def texts(n, seed=0, drawn=True):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, 300, size=size) for size in rng.integers(5, 14, size=n)]
    return [Prompt(tokens, i if drawn else None) for i, tokens in enumerate(rows)]


def test_the_plain_loss_is_transformers_own_and_the_effects_are_by_hand():
    causal = ZOO["llama"]()
    lm, given = open_lm("llama", causal), texts(7)
    found = measure_layers(lm, given, [0, 2], "skip")
    plain, losses, kls = [], [], []
    for text in given:
        ids = torch.as_tensor(text.tokens)
        with torch.no_grad():
            plain.append(float(causal(ids[None], labels=ids[None]).loss) * (len(ids) - 1))
        before = logits(causal, text.tokens).double()
        run = run_whole(lm, text.tokens)
        after = [lm.log_probs(run_in_order(lm, run, order)).double() for order in ([1, 2], [0, 1])]
        losses.append([float(-a[torch.arange(len(ids) - 1), ids[1:]].sum()) for a in after])
        kls.append([float((before.exp() * (before - a)).sum(-1)[:-1].sum()) for a in after])
    n = np.array([len(text.tokens) - 1 for text in given])
    np.testing.assert_allclose(found.plain, plain, rtol=1e-5)
    np.testing.assert_allclose(found.loss, losses, rtol=1e-4)
    np.testing.assert_allclose(found.kl, kls, rtol=1e-4)
    assert float(found.perplexity.value) == pytest.approx(np.exp(np.sum(plain) / n.sum()), rel=1e-5)
    for i, effect in enumerate(found.effects):
        assert effect.layer == (0, 2)[i]
        assert float(effect.kl.value) == pytest.approx(np.array(kls)[:, i].sum() / n.sum(), rel=1e-4)
        ratio = np.exp((np.array(losses)[:, i].sum() - np.sum(plain)) / n.sum())
        assert float(effect.perplexity.value) == pytest.approx(100 * (ratio - 1), rel=1e-3)
        assert effect.kl.low < effect.kl.value < effect.kl.high
        assert float(effect.perplexity.low) == pytest.approx(100 * float(effect.loss.low.expm1()))


def test_the_prompt_is_no_part_of_the_sample():
    lm = open_lm("llama", ZOO["llama"]())
    prompt, drawn = texts(1, seed=9, drawn=False), texts(5)
    found, without = (measure_layers(lm, given, [0, 1, 2], "skip") for given in ([*prompt, *drawn], drawn))
    assert found.drawn == (1, 2, 3, 4, 5) and without.drawn == (0, 1, 2, 3, 4)
    for one, other in zip(found.effects, without.effects, strict=True):
        assert one.kl == other.kl and one.perplexity == other.perplexity
    alone = measure_layers(lm, prompt, [0, 1, 2], "skip")
    torch.testing.assert_close(found.of_text(0)[0], torch.stack([e.kl.value for e in alone.effects]))
    assert all(e.kl.low.isnan() for e in alone.effects)
    assert "One text says nothing of others." in effects_words(alone)
    assert [line.split()[0] for line in effects_table(found)[1:]] == ["0", "1", "2"]
    assert any("no layer is left out" in line or "is left out" in line for line in effects_words(found))


def test_a_change_that_overflows_names_the_layer():
    causal = copy.deepcopy(ZOO["llama"]())
    lm = open_lm("llama", causal)
    run = run_whole(lm, IDS)
    lm.sites.mlp[2].down_proj.weight[0, 0] = torch.inf
    assert not run_in_order(lm, run, [0, 2]).isfinite().all()
    with pytest.raises(NonFiniteError, match="not finite on this text"):
        measure_layers(lm, texts(1), [0], "skip")


def test_losses_and_means_per_token():
    log_probs = torch.randn(6, 9, dtype=torch.float64).log_softmax(-1)
    tokens = torch.tensor([0, 3, 8, 1, 1, 2])
    expected = torch.nn.functional.cross_entropy(log_probs[:-1], tokens[1:], reduction="none")
    torch.testing.assert_close(next_token_losses(log_probs, tokens), expected)
    rng = np.random.default_rng(0)
    n = torch.from_numpy(rng.integers(3, 40, size=20))
    sums = torch.from_numpy(rng.normal(2, 1, size=(20, 3))) * n[:, None]
    found = mean_per_token(sums, n)
    without = torch.stack([(sums.sum(0) - sums[i]) / (n.sum() - n[i]) for i in range(20)])
    expected = jackknife(sums.sum(0) / n.sum(), without)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    for bad in ((log_probs, tokens[1:]), (log_probs[0], tokens), (log_probs, tokens.float())):
        with pytest.raises(ValueError, match="log_probs of shape"):
            next_token_losses(*bad)
    with pytest.raises(ValueError, match=r"n_tokens of shape \(3,\)"):
        mean_per_token(sums, n[:3])


def test_the_interval_over_texts_covers_what_it_says():
    """20 texts of unequal length: the loss per token of a text varies, and so does the number of its tokens."""
    rng, covered = np.random.default_rng(0), 0
    population = rng.lognormal(0, 0.3, size=4000), rng.integers(20, 120, size=4000)
    truth = (population[0] * population[1]).sum() / population[1].sum()
    for _ in range(1000):
        rows = rng.integers(0, 4000, size=20)
        n = torch.from_numpy(population[1][rows])
        found = mean_per_token(torch.from_numpy(population[0][rows]) * n, n)
        covered += bool(found.low <= truth <= found.high)
    assert covered / 1000 == pytest.approx(0.945, abs=0.02)
