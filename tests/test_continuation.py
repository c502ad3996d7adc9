"""Continuing from a sublayer: against one forward of plain transformers a point, with hooks of the test's own."""

import json

import numpy as np
import pytest
import torch
from tiny_models import tiny_lm
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from rsdyn.errors import NonFiniteError, UserError
from rsdyn.stream import continuation
from rsdyn.stream.continuation import continue_all, continue_from, run_reference
from rsdyn.stream.lm import LanguageModel
from rsdyn.stream.sites import SITES, Family, sublayer_index
from rsdyn.stream.source import find_lm

WINDOW = 6
KINDS = [*sorted(SITES), "mistral-window", "qwen2-mixed", "llama-eager", "gpt2"]
GPT2 = Family("h", "ln_1", "attn", "ln_2", "mlp", "ln_f")


class Plain:
    """Causal LM of transformers with the names of its layers' parts, and a forward that replaces the stream."""

    def __init__(self, causal, layers, mid, attention, final_norm):
        self.causal, self.layers, self.mid, self.attention, self.final_norm = causal, layers, mid, attention, final_norm

    @torch.no_grad()
    def run(self, ids, sublayer=None, state=None, position="last", frozen=None):
        """Stream ``(S, D)``, final ``(D,)``, log-probabilities ``(V,)`` and attention outputs ``(L, D)`` of the last
        token, with ``state`` in place at ``sublayer``; ``frozen`` gives attention outputs to put for the last token.

        At resid_mid the *attention's output* is set to what makes the sum the wanted state.
        """
        stream, final, outputs, residual, handles = [], [], [], {}, []
        where = slice(None) if position == "all" else slice(-1, None)

        def layer_in(i):
            def hook(module, args, kwargs):
                hidden = (args[0] if args else kwargs["hidden_states"]).clone()
                if sublayer == 2 * i:
                    hidden[:, where] = state
                residual[i] = hidden
                stream.append(hidden[0, -1])
                return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

            return hook

        def attention_out(i):
            def hook(module, args, output):
                out = output[0].clone()
                if frozen is not None:
                    out[:, -1] = frozen[i]
                if sublayer == 2 * i + 1:
                    out[:, where] = state - residual[i][:, where]
                outputs.append(out[0, -1])
                return (out, *output[1:])

            return hook

        for i, layer in enumerate(self.layers):
            handles.append(layer.register_forward_pre_hook(layer_in(i), with_kwargs=True))
            handles.append(getattr(layer, self.attention).register_forward_hook(attention_out(i)))
            mid = lambda m, args: stream.append(args[0][0, -1].clone())  # noqa: E731
            handles.append(getattr(layer, self.mid).register_forward_pre_hook(mid))
        handles.append(self.final_norm.register_forward_pre_hook(lambda m, args: final.append(args[0][0, -1])))
        logits = self.causal(torch.as_tensor(ids)[None], use_cache=False).logits[0, -1]
        for handle in handles:
            handle.remove()
        return torch.stack(stream), final[0], logits.log_softmax(-1), torch.stack(outputs)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """Our model with its head, the plain one, and a prompt of nine tokens."""
    kind = request.param
    ids = np.random.default_rng(5).integers(1, 300, size=9)
    if kind == "gpt2":  # learned positions: no supported family has them yet, but nothing stands against one
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=300, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.15)
        causal = GPT2LMHeadModel(config).eval()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(SITES, "gpt2", GPT2)
            lm = LanguageModel(causal.transformer, head=causal.lm_head)
        base = causal.transformer
        return lm, Plain(causal, base.h, "ln_2", "attn", base.ln_f), ids
    folder = tiny_lm(tmp_path_factory.mktemp(kind), model_type=kind.partition("-")[0])
    config = json.loads((folder / "config.json").read_text())
    if kind == "mistral-window":
        config["sliding_window"] = WINDOW
    if kind == "qwen2-mixed":
        config |= {"sliding_window": WINDOW, "use_sliding_window": True}
        config["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    (folder / "config.json").write_text(json.dumps(config))
    lm = find_lm(str(folder)).load(head=True)
    causal = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if kind == "llama-eager":
        lm.base.set_attn_implementation("eager")
        causal.set_attn_implementation("eager")
    return lm, Plain(causal, causal.model.layers, "post_attention_layernorm", "self_attn", causal.model.norm), ids


def states_near(stream, n=3, seed=0):
    noise = torch.randn(n, stream.shape[-1], generator=torch.Generator().manual_seed(seed))
    return stream + noise * stream.std()


def close(ours, plain, tolerance=1e-5):
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance * max(1.0, float(plain.abs().max())))


def test_reference_is_the_plain_run(pair):
    lm, plain, ids = pair
    reference = run_reference(lm, ids)
    stream, final, log_probs, _ = plain.run(ids)
    close(reference.stream, stream)
    close(reference.final, final)
    close(reference.log_probs, log_probs)
    assert not reference.stream.is_inference() and not reference.final.is_inference()
    close(run_reference(lm, ids.tolist()).stream, stream)  # a list, or a tensor, as well
    close(run_reference(lm, torch.from_numpy(ids)).stream, stream)


@pytest.mark.parametrize("position", ["last", "all"])
def test_equal_to_a_whole_forward_a_point(pair, position):
    """Every layer of injection and both sites."""
    lm, plain, ids = pair
    reference = run_reference(lm, ids)
    for s in range(lm.n_sublayers):
        states = states_near(reference.stream[s], seed=s)
        got = continue_from(lm, reference, s, states, position=position, log_probs=True)
        assert got.stream.shape == (3, lm.n_sublayers - s, lm.n_units)
        assert torch.equal(got.stream[:, 0], states)  # the injected state itself comes first
        assert not any(t.is_inference() for t in (got.stream, got.final, got.log_probs))
        for p, state in enumerate(states):
            stream, final, log_probs, _ = plain.run(ids, s, state, position)
            close(got.stream[p], stream[s:])
            close(got.final[p], final)
            close(got.log_probs[p], log_probs)


def test_the_context_and_the_position_matter(pair):
    """The oracle can tell the modes apart, so that agreeing with it says something."""
    lm, _, ids = pair
    reference = run_reference(lm, ids)
    states = states_near(reference.stream[0])
    last, everywhere = (continue_from(lm, reference, 0, states, position=p).final for p in ("last", "all"))
    frozen = continue_from(lm, reference, 0, states, freeze_attention=True).final
    assert min((a - b).norm() / b.norm() for a, b in ((last, everywhere), (last, frozen))) > 0.05
    other = run_reference(lm, ids[::-1].copy())
    assert (continue_from(lm, other, 0, states).final - last).norm() / last.norm() > 0.05
    close(continue_from(lm, other, 0, states, position="all").final, everywhere)  # no prompt left to depend on


def test_attention_frozen_at_the_reference(pair):
    lm, plain, ids = pair
    reference = run_reference(lm, ids)
    attention = plain.run(ids)[3]
    for s in (0, 1, 4):
        states = states_near(reference.stream[s])
        got = continue_from(lm, reference, s, states, freeze_attention=True)
        for p, state in enumerate(states):
            stream, final, *_ = plain.run(ids, s, state, frozen=attention)
            close(got.stream[p], stream[s:])
            close(got.final[p], final)
        again = continue_from(lm, reference, s, states, freeze_attention=True, position="all")
        assert torch.equal(again.final, got.final)
    unmoved = continue_from(lm, reference, 0, reference.stream[:1], freeze_attention=True)
    close(unmoved.stream[0], reference.stream)


@pytest.mark.parametrize("length", [1, WINDOW, WINDOW + 1, 33])
def test_length_of_the_prompt_and_number_of_points(pair, length):
    """One token (no context at all), the window's edge, and blocks of points that are not full."""
    lm, plain, _ = pair
    ids = np.random.default_rng(length).integers(1, 300, size=length)
    reference = run_reference(lm, ids)
    states = states_near(reference.stream[2], n=2 * continuation._BLOCK + 3)
    got = continue_from(lm, reference, 2, states)
    for p in (0, continuation._BLOCK, len(states) - 1):
        close(got.final[p], plain.run(ids, 2, states[p])[1])


def test_batches_and_merged_injections_change_nothing(pair):
    lm, _, ids = pair
    reference = run_reference(lm, ids)
    injections = [(s, states_near(reference.stream[s], n, s)) for s, n in ((4, 7), (0, 5), (1, 40), (0, 2))]
    alone = [continue_from(lm, reference, s, x, log_probs=True) for s, x in injections]
    for batch_points in (3, 11, 1024):
        together = continue_all(lm, reference, injections, log_probs=True, batch_points=batch_points)
        for one, other in zip(alone, together, strict=True):
            for name in ("stream", "final", "log_probs"):
                close(getattr(other, name), getattr(one, name))


def test_the_number_of_threads_changes_not_a_bit(tiny_llama):
    lm = find_lm(str(tiny_llama)).load()
    reference = run_reference(lm, list(range(1, 40)))
    states = states_near(reference.stream[1], 150)
    before = torch.get_num_threads()
    try:
        found = []
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            found.append(continue_from(lm, reference, 1, states, batch_points=40).final)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def count_hooks(lm):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in lm.base.modules())


def test_only_what_lies_behind_the_injection_runs(tiny_llama):
    lm = find_lm(str(tiny_llama)).load()
    reference = run_reference(lm, [1, 2, 3])
    assert count_hooks(lm) == 0
    ran = []
    for s, block in enumerate(lm.sites.blocks):
        block.register_forward_hook(lambda m, args, out, s=s: ran.append((s, (out[0] if s % 2 == 0 else out).shape)))
    for s in range(lm.n_sublayers):
        ran.clear()
        continue_from(lm, reference, s, states_near(reference.stream[s], n=8))
        assert [r[0] for r in ran] == list(range(s, lm.n_sublayers))  # at resid_mid without the layer's attention
        assert all(shape.numel() == 8 * lm.n_units for _, shape in ran)  # a row a point, and none for the prompt


def test_low_precision_is_close_to_float32(tiny_llama):
    source, ids = find_lm(str(tiny_llama)), [1, 5, 9, 200, 7]
    exact_lm = source.load()
    reference = run_reference(exact_lm, ids)
    states = states_near(reference.stream[1])
    exact = continue_from(exact_lm, reference, 1, states).final
    for dtype in ("bfloat16", "float16"):
        lm = source.load(dtype=dtype)
        rough = continue_from(lm, run_reference(lm, ids), 1, states.double())
        assert rough.final.dtype == rough.stream.dtype == lm.dtype
        assert 0 < (rough.final.float() - exact).norm() / exact.norm() < 3e-2


# -- the LM head -------------------------------------------------------------------------------------------------------


def test_head_is_read_only_when_asked(tiny_llama):
    source = find_lm(str(tiny_llama))
    bare, headed = source.load(), source.load(head=True)
    assert bare.head is None and headed.head is not None
    assert not any(p.requires_grad for p in headed.head.parameters())
    for name, weight in bare.base.state_dict().items():
        assert torch.equal(weight, headed.base.state_dict()[name])
    reference = run_reference(bare, [1, 2, 3])
    assert reference.log_probs is None
    with pytest.raises(ValueError, match=r"load\(head=True\)"):
        continue_from(bare, reference, 0, reference.stream[:1], log_probs=True)


def test_a_missing_head_is_not_made_up(tiny_llama, tmp_path):
    find_lm(str(tiny_llama)).load().base.save_pretrained(tmp_path)
    find_lm(str(tmp_path)).load()
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        find_lm(str(tmp_path)).load(head=True)


def test_tied_and_untrained_heads(tiny_llama, tmp_path):
    source = find_lm(str(tiny_llama)).without_training(3)
    bare, headed = source.load(), source.load(head=True)
    assert all(torch.equal(a, b) for a, b in zip(bare.base.parameters(), headed.base.parameters(), strict=True))
    assert not torch.equal(headed.head.weight, headed.base.get_input_embeddings().weight)
    source.config.tie_word_embeddings = True
    tied = source.load(head=True)
    assert tied.head.weight is tied.base.get_input_embeddings().weight
    embedded = find_lm().load(head=True)  # tied on disk
    assert embedded.head.weight.data_ptr() == embedded.base.get_input_embeddings().weight.data_ptr()


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ready(tiny_llama):
    lm = find_lm(str(tiny_llama)).load()
    return lm, run_reference(lm, [1, 2, 3, 4])


def test_layers_and_sites(ready):
    lm, _ = ready
    assert [lm.sublayer(0), lm.sublayer(2), lm.sublayer(2, "resid_mid")] == [0, 4, 5]
    for layer in (-1, 3, 1.0, True):
        with pytest.raises(UserError, match=r"layer=.*from 0 to 2"):
            lm.sublayer(layer)
    with pytest.raises(UserError, match=r"site='resid_post'.*resid_pre, resid_mid"):
        lm.sublayer(0, "resid_post")
    with pytest.raises(UserError, match=r"parallel attention.*Use site=resid_pre"):
        sublayer_index(("resid_pre",), 3, 0, "resid_mid")
    assert sublayer_index(("resid_pre",), 3, 2) == 2


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "empty"),
        (list(range(257)), "257 tokens.*at most 256"),
        ([1, 100_000], "token ids from 1 to 100000"),
        ([-1, 1], "token ids from -1"),
        ([[1, 2]], r"shape \(1, 2\)"),
        ([1.5], "float"),
    ],
)
def test_bad_prompts(ready, prompt, words):
    with pytest.raises(UserError, match=words):
        run_reference(ready[0], prompt)


def test_bad_states(ready):
    lm, reference = ready
    good = reference.stream[:2]
    for s in (-1, 6, 1.0, True):
        with pytest.raises(ValueError, match=r"sublayer=.*from 0 to 5"):
            continue_from(lm, reference, s, good)
    for shape in ((2, 31), (32,), (0, 32), (1, 2, 32)):
        with pytest.raises(ValueError, match=r"states: shape .*32"):
            continue_from(lm, reference, 0, torch.zeros(shape))
    with pytest.raises(NonFiniteError, match=r"1 of 2 hold NaN or Inf, the first is point 1"):
        continue_from(lm, reference, 0, torch.stack([good[0], good[1].clone().fill_(torch.inf)]))
    with pytest.raises(ValueError, match=r"position='first'.*last, all"):
        continue_from(lm, reference, 0, good, position="first")
    with pytest.raises(ValueError, match="batch_points=0"):
        continue_from(lm, reference, 0, good, batch_points=0)


def test_a_stream_that_overflows_names_the_point(tiny_llama):
    lm = find_lm(str(tiny_llama)).load(dtype="float16")
    reference = run_reference(lm, [1, 2, 3])
    states = reference.stream[:1].repeat(4, 1)
    states[2] = 65504.0
    states[2, ::2] *= -1
    lm.sites.blocks[1].down_proj.weight.mul_(500)  # its rows reach about 1e4, and the state is at float16's end
    with pytest.raises(NonFiniteError, match=r"point 2, injected at sublayer 1, is not finite [1-6] sublayers later"):
        continue_from(lm, reference, 1, states)


def test_models_that_cannot_be_continued(tiny_llama, monkeypatch):
    lm = find_lm(str(tiny_llama)).load()
    reference = run_reference(lm, [1, 2, 3])
    monkeypatch.setattr(lm.config, "_attn_implementation_internal", "flex_attention")
    with pytest.raises(UserError, match=r"flex_attention.*eager or sdpa"):
        continue_from(lm, reference, 0, reference.stream[:1])


def test_layers_of_another_shape_are_noticed(tiny_llama, monkeypatch):
    """Parallel attention, say: the run continued from its own first state does not reproduce itself."""
    lm = find_lm(str(tiny_llama)).load()
    for layer in lm.base.layers:
        original = layer.forward
        monkeypatch.setattr(layer, "forward", lambda x, original=original, **kwargs: 2 * original(x, **kwargs))
    with pytest.raises(RuntimeError, match="another shape"):
        run_reference(lm, [1, 2, 3])
