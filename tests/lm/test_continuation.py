"""Continuing from a sublayer: against one forward of plain transformers a point, with hooks of the test's own."""

import copy
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from family_zoo import PARALLEL, WINDOW, ZOO
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rsdyn.errors import NonFiniteError, UserError
from rsdyn.lm.continuing import layer_calls, self_check
from rsdyn.lm.continuing.continuation import continue_all, continue_from, run_reference
from rsdyn.lm.continuing.layer_calls import BLOCK, LayerCall
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.sites import sublayer_index
from rsdyn.lm.source import find_lm

# Where a family's modules are not as Llama's: what reads the sum behind attention, what adds attention's part to it.
MID = {
    "gemma2": "pre_feedforward_layernorm",
    "gemma3": "pre_feedforward_layernorm",
    "olmo2": "mlp",
    "olmo3": "mlp",
    "gpt2": "ln_2",
    "gpt-neo": "ln_2",
    "gpt-bigcode": "ln_2",
    "mpt": "norm_2",
    "opt": "final_layer_norm",
}
ADDS = dict.fromkeys(("gemma2", "gemma3", "olmo2", "olmo3"), "post_attention_layernorm") | {
    "glm4": "post_self_attn_layernorm"
}
MULTIPLIER = {"granite": 0.22, "granitemoe": 0.3}
GIVES_SUM = {"bloom"}  # its attention adds the stream itself
ONE_BY_ONE = {"bloom", "mpt", "falcon-alibi", "gpt-neo"}  # alibi; a mask by place in the sequence
SINKS = {"gpt-oss"}


def named(module, *names):
    """The first of ``names`` that the module has; dots lead into modules."""
    return next(m for m in (dict(module.named_modules()).get(name) for name in names) if m is not None)


class Plain:
    """A causal LM of transformers, and a forward of it that replaces the stream; no code of rsdyn is used."""

    def __init__(self, name, causal):
        self.causal, self.name = causal, name
        self.layers = list(named(causal.base_model, "layers", "h", "blocks", "decoder.layers"))

    @torch.no_grad()
    def run(self, ids, sublayer=None, state=None, position="last", frozen=None):
        """Of the last token: ``stream (S, D)``, ``final (D,)``, ``log_probs (V,)``, ``attention (L, D)``.

        ``state`` takes the stream's place at ``sublayer``; ``frozen`` gives what attention adds to the last token. At
        resid_mid what is *added* to the stream is set to what makes the sum the wanted state.
        """
        name, n_sites = self.name, 1 if self.name in PARALLEL else 2
        stream, final, given, residual, handles = [], [], [], {}, []
        where = slice(None) if position == "all" else slice(-1, None)

        def layer_in(i):
            def hook(module, args, kwargs):
                hidden = (args[0] if args else kwargs["hidden_states"]).clone()
                if sublayer == n_sites * i:
                    hidden[:, where] = state
                residual[i] = hidden
                stream.append(hidden[0, -1])
                return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

            return hook

        def changed(output, change):
            out = (output[0] if isinstance(output, tuple) else output).clone()
            change(out)
            return (out, *output[1:]) if isinstance(output, tuple) else out

        def attention_out(i):
            def change(out):
                own = residual[i][0, -1] if name in GIVES_SUM else 0
                if frozen is not None:
                    out[0, -1] = frozen[i] + own
                given.append(out[0, -1] - own)

            return lambda module, args, output: changed(output, change)

        def added(i):
            def change(out):
                if sublayer == n_sites * i + 1:
                    own = 0 if name in GIVES_SUM else residual[i][:, where]
                    out[:, where] = (state - own) / MULTIPLIER.get(name, 1)

            return lambda module, args, output: changed(output, change)

        def mid_in(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            stream.append(hidden.reshape(-1, hidden.shape[-1])[-1].clone())

        for i, layer in enumerate(self.layers):
            attention = named(layer, "self_attn", "attn", "attention", "self_attention")
            handles.append(layer.register_forward_pre_hook(layer_in(i), with_kwargs=True))
            handles.append(attention.register_forward_hook(attention_out(i)))
            if n_sites == 2:
                adds = named(layer, ADDS[name]) if name in ADDS else attention
                mid = named(layer, MID.get(name, "post_attention_layernorm"))
                handles.append(adds.register_forward_hook(added(i)))
                handles.append(mid.register_forward_pre_hook(mid_in, with_kwargs=True))
        last = lambda m, args, output: final.append((output[0] if isinstance(output, tuple) else output)[0, -1])  # noqa: E731
        handles.append(self.layers[-1].register_forward_hook(last))
        logits = self.causal(torch.as_tensor(ids)[None], use_cache=False).logits[0, -1]
        for handle in handles:
            handle.remove()
        return SimpleNamespace(
            stream=torch.stack(stream),
            final=final[0],
            log_probs=logits.float().log_softmax(-1),
            attention=torch.stack(given),
        )


def open_lm(name, causal):
    return LanguageModel(causal.base_model, name=name, causal=causal)


@pytest.fixture(scope="module", params=list(ZOO))
def pair(request):
    """Our model with its head, the plain one, and a prompt of eleven tokens, more than a sliding window holds."""
    causal = ZOO[request.param]()
    ids = np.random.default_rng(5).integers(3, 300, size=11)
    return open_lm(request.param, causal), Plain(request.param, causal), ids


def few(*names):
    return pytest.mark.parametrize("pair", names, indirect=True)


def states_near(stream, n=2, seed=0):
    noise = torch.randn(n, stream.shape[-1], generator=torch.Generator().manual_seed(seed))
    return stream + (noise * stream.float().std()).to(stream)


def close(ours, plain, tolerance=1e-5):
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance * max(1.0, float(plain.abs().max())))


# -- every family ------------------------------------------------------------------------------------------------------


def test_reference_is_the_plain_run(pair):
    lm, plain, ids = pair
    reference = run_reference(lm, ids)
    expected = plain.run(ids)
    for name in ("stream", "final", "log_probs"):
        close(getattr(reference, name), getattr(expected, name))
        assert not getattr(reference, name).is_inference()
    assert reference.blocks == (plain.name not in ONE_BY_ONE)
    assert [call.gives_sum for call in reference.calls] == [plain.name in GIVES_SUM] * lm.n_layers


@pytest.mark.parametrize("position", ["last", "all"])
def test_equal_to_a_whole_forward_a_point(pair, position):
    """Every layer of injection and every site, both points in one block."""
    lm, plain, ids = pair
    reference = run_reference(lm, ids)
    if position == "all" and plain.name in SINKS:
        with pytest.raises(UserError, match=r"position=all: in gpt-oss .*Use position=last"):
            continue_from(lm, reference, 0, reference.stream[:1], position="all")
        return
    for s in range(lm.n_sublayers):
        states = states_near(reference.stream[s], seed=s)
        got = continue_from(lm, reference, s, states, position=position, log_probs=True)
        assert got.stream.shape == (2, lm.n_sublayers - s, lm.n_units)
        assert torch.equal(got.stream[:, 0], states)  # the injected state itself comes first
        assert not any(t.is_inference() for t in (got.stream, got.final, got.log_probs))
        for p, state in enumerate(states):
            expected = plain.run(ids, s, state, position)
            close(got.stream[p], expected.stream[s:])
            close(got.final[p], expected.final)
            close(got.log_probs[p], expected.log_probs)


def test_attention_frozen_at_the_reference(pair):
    lm, plain, ids = pair
    reference = run_reference(lm, ids)
    attention = plain.run(ids).attention
    for s in {0, 1, lm.n_sublayers - 2}:
        states = states_near(reference.stream[s])
        got = continue_from(lm, reference, s, states, freeze_attention=True)
        for p, state in enumerate(states):
            expected = plain.run(ids, s, state, frozen=attention)
            close(got.stream[p], expected.stream[s:])
            close(got.final[p], expected.final)
        again = continue_from(lm, reference, s, states, freeze_attention=True, position="all")
        assert torch.equal(again.final, got.final)
    unmoved = continue_from(lm, reference, 0, reference.stream[:1], freeze_attention=True)
    close(unmoved.stream[0], reference.stream)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gptj", "opt", "olmo2", "bloom", "mixtral", "gpt-neo"])
def test_low_precision(name, dtype):
    """Against whole forwards in the same precision; gpt-neo's blocks are told from roundings there too."""
    causal = copy.deepcopy(ZOO[name]()).to(dtype)
    lm, plain = open_lm(name, causal), Plain(name, causal)
    ids = np.random.default_rng(2).integers(3, 300, size=17)
    reference = run_reference(lm, ids)
    assert reference.stream.dtype == dtype and reference.blocks == (name not in ONE_BY_ONE)
    for s in range(lm.n_sublayers):
        state = states_near(reference.stream[s], 1, s)
        got = continue_from(lm, reference, s, state.double())
        expected = plain.run(ids, s, state[0])
        assert got.final.dtype == dtype
        assert (got.final[0] - expected.final).float().norm() / expected.final.float().norm() < 3e-2


# -- prompts, batches, threads -----------------------------------------------------------------------------------------


@few("llama", "gpt2")
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
    close(run_reference(lm, ids.tolist()).stream, reference.stream)  # a list, or a tensor, as well
    close(run_reference(lm, torch.from_numpy(ids)).stream, reference.stream)


@few("llama", "mistral-sliding", "gemma3", "gptj", "opt", "bloom", "gpt-neo")
@pytest.mark.parametrize("length", [1, WINDOW, WINDOW + 1, 33])
def test_length_of_the_prompt_and_number_of_points(pair, length):
    """One token (no context at all), the window's edge, and blocks of points that are not full."""
    lm, plain, _ = pair
    ids = np.random.default_rng(length).integers(3, 300, size=length)
    reference = run_reference(lm, ids)
    states = states_near(reference.stream[1], n=2 * BLOCK + 3)
    got = continue_from(lm, reference, 1, states)
    for p in (0, BLOCK, len(states) - 1):
        close(got.final[p], plain.run(ids, 1, states[p]).final)


def test_the_whole_context(tiny_llama):
    """Blocks have more keys than the model has positions, and no point stands beyond the last."""
    lm = find_lm(str(tiny_llama)).load(head=True)
    ids = np.random.default_rng(0).integers(3, 300, size=lm.max_tokens)
    reference = run_reference(lm, ids)
    states = states_near(reference.stream[2], n=BLOCK + 1)
    close(continue_from(lm, reference, 2, states).final[-1], Plain("llama", lm.causal).run(ids, 2, states[-1]).final)


@few("llama", "opt", "gemma2", "falcon", "mpt")
def test_batches_and_merged_injections_change_nothing(pair):
    lm, _, ids = pair
    reference = run_reference(lm, ids)
    where = ((2, 7), (0, 5), (1, 40), (0, 2), (lm.n_sublayers - 1, 3))
    injections = [(s, states_near(reference.stream[s], n, s)) for s, n in where]
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
    """Hooks, and forwards that stand in for a module's own."""
    modules = list(lm.base.modules())
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) + ("forward" in vars(m)) for m in modules)


def test_only_what_lies_behind_the_injection_runs(tiny_llama):
    lm = find_lm(str(tiny_llama)).load()
    reference = run_reference(lm, [1, 2, 3])
    ran = []

    def note(kind, i):
        return lambda m, args, out: ran.append((kind, i, (out[0] if isinstance(out, tuple) else out).numel()))

    for i in range(lm.n_layers):
        lm.sites.attention[i].register_forward_hook(note("attention", i))
        lm.sites.mlp[i].register_forward_hook(note("mlp", i))
    for s in range(lm.n_sublayers):
        ran.clear()
        continue_from(lm, reference, s, states_near(reference.stream[s], n=8))
        assert [r[:2] for r in ran] == [(k, i) for i in range(s // 2, 3) for k in ("attention", "mlp")]
        assert all(r[2] == 8 * lm.n_units for r in ran)  # one row per point, and none for the prompt
        ran.clear()
        continue_from(lm, reference, s, states_near(reference.stream[s], n=8), freeze_attention=True)
        mlps = [r for r in ran if r[0] == "mlp"]
        assert [r[1] for r in mlps] == list(range(s // 2, 3)) and all(r[2] == 8 * lm.n_units for r in mlps)


@pytest.mark.parametrize("freeze", [False, True])
def test_nothing_is_left_behind(tiny_llama, monkeypatch, freeze):
    lm = find_lm(str(tiny_llama)).load()
    reference = run_reference(lm, [1, 2, 3])
    states = states_near(reference.stream[1], n=3)
    before = continue_from(lm, reference, 1, states, freeze_attention=freeze).final
    assert count_hooks(lm) == 0
    with monkeypatch.context() as patch:
        patch.setattr(type(lm.sites.mlp[2]), "forward", lambda self, x: x / (1 // 0))
        with pytest.raises(ZeroDivisionError):
            continue_from(lm, reference, 1, states, freeze_attention=freeze)
    assert count_hooks(lm) == 0
    wrapped = []  # as accelerate wraps the layers of a model that is spread over devices
    original = lm.sites.attention[1].forward
    lm.sites.attention[1].forward = lambda *a, **k: (wrapped.append(1), original(*a, **k))[1]
    assert torch.equal(continue_from(lm, reference, 1, states, freeze_attention=freeze).final, before)
    assert len(wrapped) == (not freeze)
    run_reference(lm, [1, 2])
    assert len(wrapped) > 1 and count_hooks(lm) == 1  # it is back


# -- a run checks itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_points_that_see_each_other_are_noticed(tiny_llama, monkeypatch, dtype):
    """And go one by one from then on, with the right numbers."""
    lm = find_lm(str(tiny_llama)).load(dtype=dtype)
    reference = run_reference(lm, list(range(1, 30)))
    states = states_near(reference.stream[0], 40)
    expected = continue_from(lm, reference, 0, states).final

    def everything(self, size, dtype, masks):
        return torch.zeros(1, 1, size, self.n_tokens - 1 + size, dtype=dtype)

    def the_earlier(self, size, dtype, masks):
        seen = torch.ones(size, size, dtype=torch.bool).tril()
        mask = torch.zeros(size, size, dtype=dtype).masked_fill(~seen, -torch.inf)
        return torch.cat([torch.zeros(size, self.n_tokens - 1, dtype=dtype), mask], -1)[None, None]

    for wrong in (everything, the_earlier):
        with monkeypatch.context() as patch:
            patch.setattr(LayerCall, "mask", wrong)
            again = run_reference(lm, reference.tokens)
            assert reference.blocks and not again.blocks
            close(continue_from(lm, again, 0, states).final, expected, 1e-5 if dtype == "float32" else 3e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("look", "words"),
    [
        (lambda out: out + 0.3 * out.mean(1, keepdim=True), "away from whole forwards"),
        (lambda out: out[:, torch.arange(29)], r"do not run for one token alone \(IndexError"),
    ],
)
def test_layers_that_look_at_more_are_refused(tiny_llama, monkeypatch, dtype, look, words):
    """At the other tokens, without asking for their keys; at the length of the sequence."""
    lm = find_lm(str(tiny_llama)).load(dtype=dtype)
    layer = lm.sites.layers[1]
    original = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x, **kwargs: look(original(x, **kwargs)))
    with pytest.raises(UserError, match=f"cannot be continued from a sublayer.*{words}"):
        run_reference(lm, list(range(1, 30)))


def test_other_memories_than_keys_and_values_are_refused():
    """Every other layer of this one has a state that it carries from token to token."""
    size = {"hidden_size": 32, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    linear = {f"linear_{k}": 4 for k in ("num_value_heads", "num_key_heads", "key_head_dim", "value_head_dim")}
    experts = {"num_experts": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    kinds = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
    config = AutoConfig.for_model("qwen3_next", **size, **linear, **experts, **kinds, num_experts_per_tok=1)
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UserError, match=r"name: odd cannot be continued.*a state from token to token"):
        run_reference(open_lm("odd", causal), [1, 2, 3])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_arguments_are_refused(tiny_llama, monkeypatch, dtype):
    """The first token's angles in place of the last's, and a prefix without its first token."""
    lm = find_lm(str(tiny_llama)).load(dtype=dtype)
    ids = list(range(1, 30))
    with monkeypatch.context() as patch:
        first = lambda value, n: tuple(v[:, :1] for v in value) if isinstance(value, tuple) else value  # noqa: E731
        patch.setattr(layer_calls, "_last", first)
        with pytest.raises(UserError, match="away from whole forwards"):
            run_reference(lm, ids)
    prefix = LayerCall.prefix
    with monkeypatch.context() as patch:

        def shifted(self, filling):
            given = prefix(self, filling)
            given.values = given.values.roll(1, 2)
            return given

        patch.setattr(LayerCall, "prefix", shifted)
        with pytest.raises(UserError, match="away from whole forwards"):
            run_reference(lm, ids)


@few("llama")
def test_low_digits_of_matrix_products_are_no_other_formula(pair, monkeypatch):
    """TF32 on a GPU: float32 with the digits of half precision."""
    lm, _, ids = pair
    monkeypatch.setattr(self_check, "_distance", lambda *args: 9e-3)
    with pytest.raises(UserError, match=r"9\.0e-03 of the state's norm"):
        run_reference(lm, ids)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert run_reference(lm, ids).blocks
    finally:
        torch.set_float32_matmul_precision(before)


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
    bare = find_lm(str(tmp_path))
    bare.load()
    for ask in (lambda: bare.load(head=True), bare.check_head):
        with pytest.raises(UserError, match=r"lm_head\.weight.* saved with its LM head"):
            ask()
    assert bare.without_training(0).check_head()


def test_a_head_is_known_by_its_name_and_one_of_another_name_by_loading_alone(tiny_llama, tmp_path):
    assert find_lm(str(tiny_llama)).check_head() and find_lm().check_head()  # the second is the embedding
    shutil.copytree(tiny_llama, tmp_path / "other")
    weights = load_file(tiny_llama / "model.safetensors")
    weights["unembed.weight"] = weights.pop("lm_head.weight")
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    other = find_lm(str(tmp_path / "other"))
    assert not other.check_head()
    with pytest.raises(UserError, match="saved with its LM head"):
        other.load(head=True)


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
    lm.sites.mlp[0].down_proj.weight.mul_(500)  # its rows reach about 1e4, and the state is at float16's end
    with pytest.raises(NonFiniteError, match=r"point 2, injected at sublayer 1, is not finite [1-6] sublayers later"):
        continue_from(lm, reference, 1, states)


def test_models_that_cannot_be_continued(tiny_llama, monkeypatch):
    lm = find_lm(str(tiny_llama)).load()
    reference = run_reference(lm, [1, 2, 3])
    monkeypatch.setattr(lm.config, "_attn_implementation_internal", "flex_attention")
    with pytest.raises(UserError, match=r"flex_attention.*eager or sdpa"):
        continue_from(lm, reference, 0, reference.stream[:1])
