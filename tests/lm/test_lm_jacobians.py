"""Derivatives over a sublayer: against central differences and against jacrev over plain transformers, per family."""

import copy

import numpy as np
import pytest
import torch
from family_zoo import PARALLEL, ZOO
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel

from rsdyn.dynamics.jacobian import lyapunov, products_to_the_end, spectrum
from rsdyn.errors import NonFiniteError, UserError
from rsdyn.lm import jacobians
from rsdyn.lm.continuing.continuation import continue_from
from rsdyn.lm.jacobians import double_layers, leading_exponents, linear_prediction, reference_run, sublayer_jacobians
from rsdyn.lm.model import LanguageModel

IDS = np.random.default_rng(5).integers(3, 300, size=11)
# whose layers stay in float64 by themselves, so that plain transformers is a reference to ten digits
DOUBLE = ("gpt2", "gpt-bigcode", "neox-parallel", "neox-serial", "opt", "phi", "falcon", "falcon-serial", "stablelm")
DOUBLE = (*DOUBLE, "stablelm-parallel", "starcoder2")


def open_lm(name, dtype=torch.float32):
    causal = ZOO[name]()
    return LanguageModel((causal if dtype == torch.float32 else copy.deepcopy(causal).to(dtype)).base_model, name=name)


def central(lm, reference, s):
    """The derivative over a sublayer by central differences of runs on from it."""
    step = 1e-5 * reference.stream[s].norm()
    moved = []
    for sign in (1, -1):
        points = reference.stream[s] + sign * step * torch.eye(lm.n_units, dtype=lm.dtype)
        got = continue_from(lm, reference, s, points)
        moved.append(got.stream[:, 1] if s + 1 < lm.n_sublayers else got.final)
    return ((moved[0] - moved[1]) / (2 * step)).T


def layer_by_jacrev(lm, layer):
    """d (the last token behind a layer) / d (the last token before it), of a plain forward of the whole sequence."""
    module = lm.sites.layers[layer]

    def behind(state):
        found = []

        def enter(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden = torch.cat([hidden[:, :-1], state[None, None]], 1)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        def leave(module, args, output):
            found.append((output[0] if isinstance(output, tuple) else output)[0, -1])

        handles = [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
        lm.base(input_ids=torch.as_tensor(IDS)[None], use_cache=False)
        for handle in handles:
            handle.remove()
        return found[0]

    state = reference_run(lm, IDS).stream[layer * len(lm.sites.names)]
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jacrev(behind)(state)


def hooks_of(lm):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.base.modules())


# -- every family that continues ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ZOO))
def test_equal_to_central_differences(name):
    lm = open_lm(name, torch.float64)
    before = hooks_of(lm)  # the zoo's models are shared, and transformers leaves hooks in what it was asked states of
    found, reference = sublayer_jacobians(lm, IDS), reference_run(lm, IDS)
    assert found.shape == (lm.n_sublayers, lm.n_units, lm.n_units) and found.dtype == torch.float64
    assert not found.requires_grad and hooks_of(lm) == before
    with double_layers(lm):
        for s, j in enumerate(found):
            assert float((j - central(lm, reference, s)).norm() / j.norm()) < 1e-6
    # the model in its own format, and that format alone, gives the same to its rounding
    plain = sublayer_jacobians(open_lm(name), IDS)
    assert plain.dtype == torch.float32
    assert float((plain - found).norm() / found.norm()) < 1e-5


@pytest.mark.parametrize("name", DOUBLE)
def test_a_layer_is_jacrev_over_plain_transformers(name):
    lm = open_lm(name, torch.float64)
    found = sublayer_jacobians(lm, IDS)
    for layer in range(lm.n_layers):
        product = found[layer] if name in PARALLEL else found[2 * layer + 1] @ found[2 * layer]
        expected = layer_by_jacrev(lm, layer)
        assert float((product - expected).norm() / expected.norm()) < 1e-10


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "mixtral", "mpt", "gpt-neo"])
def test_layers_that_pass_through_float32(name):
    """Norms or softmax of these round to float32 whatever the model's format is: equal to that rounding."""
    lm = open_lm(name, torch.float64)
    found = sublayer_jacobians(lm, IDS)
    product = found[3] @ found[2]
    lm.base.set_experts_implementation("eager")
    expected = layer_by_jacrev(lm, 1)
    assert float((product - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_one_token_alone_is_a_sequence_of_one(name):
    """Without context, a layer's derivative is that of the layer on one token, which no position moves (rotary)."""
    lm = open_lm(name, torch.float64)
    state = reference_run(lm, IDS).stream[2 if name == "llama" else 1]
    found = sublayer_jacobians(lm, IDS, context="none")
    product = found[3] @ found[2] if name == "llama" else found[1]
    recorded = {}

    def keep(module, args, kwargs):
        recorded.update(kwargs)
        recorded["args"] = args

    handle = lm.sites.layers[1].register_forward_pre_hook(keep, with_kwargs=True)
    lm.base(input_ids=torch.as_tensor(IDS)[None, :1], use_cache=False)
    handle.remove()
    rest = recorded.pop("args")[1:]
    recorded.pop("hidden_states", None)

    def behind(x):
        output = lm.sites.layers[1](x[None, None], *rest, **recorded)
        return (output[0] if isinstance(output, tuple) else output)[0, 0]

    with double_layers(lm), sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jacrev(behind)(state)
    torch.testing.assert_close(product, expected, rtol=1e-8, atol=1e-9)
    assert float((product - sublayer_jacobians(lm, IDS)[2 if name == "llama" else 1]).norm()) > 0.1


@pytest.mark.parametrize("context", ["first", "rest"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bloom", "gptj"])
def test_part_of_the_context_is_a_layer_on_those_tokens_alone(name, context):
    """autograd row by row over the plain layer, called with these tokens' states, positions, mask and biases alone."""
    lm, layer, sites = open_lm(name, torch.float64), 1, 1 if name in PARALLEL else 2
    before = hooks_of(lm)
    found = sublayer_jacobians(lm, IDS, context=context)
    product = found[layer] if sites == 1 else found[2 * layer + 1] @ found[2 * layer]
    assert hooks_of(lm) == before
    n = len(IDS)
    kept = torch.tensor([0, n - 1] if context == "first" else range(1, n))

    def part(value):
        if isinstance(value, tuple):
            return tuple(part(v) for v in value)
        if not isinstance(value, torch.Tensor):
            return value
        for dim in range(value.ndim):
            value = value.index_select(dim, kept) if value.shape[dim] == n else value
        return value

    recorded = {}

    def keep(module, args, kwargs):
        recorded["hidden"] = (args[0] if args else kwargs.pop("hidden_states")).detach()
        recorded["args"], recorded["kwargs"] = args[1:], dict(kwargs)

    handle = lm.sites.layers[layer].register_forward_pre_hook(keep, with_kwargs=True)
    with double_layers(lm):
        lm.base(input_ids=torch.as_tensor(IDS)[None], use_cache=False)
    handle.remove()
    hidden = recorded["hidden"][:, kept[:-1]]
    args, kwargs = part(recorded["args"]), {k: part(v) for k, v in recorded["kwargs"].items()}

    def behind(x):
        output = lm.sites.layers[layer](torch.cat([hidden, x[None, None]], 1), *args, **kwargs)
        return (output[0] if isinstance(output, tuple) else output)[0, -1]

    with double_layers(lm):
        expected = torch.autograd.functional.jacobian(behind, recorded["hidden"][0, -1])
    assert float((product - expected).norm() / expected.norm()) < 1e-9


def test_of_two_tokens_the_first_is_all_the_context():
    lm = open_lm("llama", torch.float64)
    first, full = (sublayer_jacobians(lm, IDS[:2], context=c) for c in ("first", "full"))
    torch.testing.assert_close(first, full, rtol=1e-9, atol=1e-10)
    rest, none = (sublayer_jacobians(lm, IDS[:2], context=c) for c in ("rest", "none"))
    torch.testing.assert_close(rest, none, rtol=1e-9, atol=1e-10)
    alone = [sublayer_jacobians(lm, IDS[:1], context=c) for c in ("full", "none", "first", "rest")]
    for other in alone[1:]:
        torch.testing.assert_close(other, alone[0], rtol=1e-9, atol=1e-10)


def test_products_are_the_whole_derivative():
    lm = open_lm("qwen2", torch.float64)
    found, reference = sublayer_jacobians(lm, IDS), reference_run(lm, IDS)
    product = torch.linalg.multi_dot([*found[2:].flip(0)])
    direction = torch.randn(lm.n_units, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with double_layers(lm):
        moved = [
            continue_from(lm, reference, 2, (reference.stream[2] + e * direction)[None]).final[0] for e in (1e-5, -1e-5)
        ]
    torch.testing.assert_close((moved[0] - moved[1]) / 2e-5, product @ direction, rtol=1e-6, atol=1e-8)


def test_linear_prediction():
    lm = open_lm("llama", torch.float64)
    found = sublayer_jacobians(lm, IDS)
    given = torch.randn(5, lm.n_units, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = linear_prediction(lm, IDS, 3, given)
    assert got.shape == (5, 4, lm.n_units) and torch.equal(got[:, 0], given)
    torch.testing.assert_close(got[:, 1], given @ found[3].T)
    torch.testing.assert_close(got[:, 3], given @ (found[5] @ found[4] @ found[3]).T)
    with pytest.raises(ValueError, match="sublayers: 6 is not one"):
        linear_prediction(lm, IDS, 6, given)


def test_what_a_rotation_of_the_stream_leaves():
    """A Llama whose stream is turned by an orthogonal matrix is the same model in another basis (norms of weight 1).

    What single units have to do with it moves: the stream's own basis is a choice of whoever trained the model.
    """
    lm = open_lm("llama", torch.float64)
    causal = copy.deepcopy(ZOO["llama"]()).to(torch.float64)
    q = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    plain = copy.deepcopy(causal.base_model)
    for model, turn in ((plain, torch.eye(32, dtype=torch.float64)), (causal.base_model, q)):
        model.embed_tokens.weight.copy_(model.embed_tokens.weight @ turn.T)
        for layer in model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.fill_(1.0)
            for reading in (
                *(getattr(layer.self_attn, f"{n}_proj") for n in "qkv"),
                layer.mlp.gate_proj,
                layer.mlp.up_proj,
            ):
                reading.weight.copy_(reading.weight @ turn.T)
            for writing in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writing.weight.copy_(turn @ writing.weight)
    here, there = (LanguageModel(model, name=lm.name) for model in (plain, causal.base_model))
    for context in ("full", "none", "first", "rest"):
        before, after = (sublayer_jacobians(x, IDS, context=context) for x in (here, there))
        torch.testing.assert_close(after, q @ before @ q.T, rtol=1e-8, atol=1e-9)
    a, b = spectrum(before), spectrum(after)
    for name in a._fields:
        if name != "eigenvalues":  # which come in no order
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        a.eigenvalues.abs().sort().values, b.eigenvalues.abs().sort().values, rtol=1e-6, atol=1e-8
    )
    torch.testing.assert_close(lyapunov(after), lyapunov(before), rtol=1e-8, atol=1e-9)
    for x, y in zip(products_to_the_end(before), products_to_the_end(after), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-9)
    kept = torch.arange(1, 32)  # without unit 0, which is another direction now
    held = [products_to_the_end(j[:, kept][:, :, kept]).gain[0] for j in (before, after)]
    assert abs(float(held[0] / held[1]) - 1) > 1e-3


# -- options -----------------------------------------------------------------------------------------------------------


def test_some_sublayers_and_small_blocks(monkeypatch):
    lm = open_lm("llama")
    every = sublayer_jacobians(lm, IDS)
    some = sublayer_jacobians(lm, IDS, [4, 1])
    torch.testing.assert_close(some, every[[4, 1]])
    monkeypatch.setattr(jacobians, "BLOCK_BYTES", 1)  # the rows of a derivative in blocks of the least size
    monkeypatch.setattr(jacobians, "BLOCK", 5)
    torch.testing.assert_close(sublayer_jacobians(lm, IDS), every, rtol=1e-4, atol=1e-5)
    reference = reference_run(lm, IDS)
    torch.testing.assert_close(sublayer_jacobians(lm, IDS, reference=reference), every, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    lm = open_lm("llama", dtype)
    found = sublayer_jacobians(lm, IDS)
    assert found.dtype == torch.float32 and lm.dtype == dtype and next(lm.base.parameters()).dtype == dtype
    wide = LanguageModel(copy.deepcopy(lm.base).float())
    torch.testing.assert_close(found, sublayer_jacobians(wide, IDS), rtol=1e-3, atol=1e-4)


def test_another_format_leaves_the_model_alone():
    lm = open_lm("mixtral")
    before = lm.base.get_experts_implementation()
    found = sublayer_jacobians(lm, IDS, dtype=torch.float64)
    assert found.dtype == torch.float64 and lm.dtype == torch.float32
    assert lm.base.get_experts_implementation() == before
    assert not any(p.requires_grad for p in lm.base.parameters())


@pytest.mark.parametrize(
    ("name", "context"),
    [(n, c) for n in ("llama", "gptj", "gpt2") for c in ("full", "none")] + [("llama", "first"), ("llama", "rest")],
)
def test_leading_exponents(name, context):
    lm = open_lm(name, torch.float64)
    before = hooks_of(lm)
    every = lyapunov(sublayer_jacobians(lm, IDS, context=context)) * len(lm.sites.names)
    found = leading_exponents(lm, IDS, 4, context=context)
    assert (found.diff() <= 0).all()
    torch.testing.assert_close(found, every[:4], rtol=0, atol=1e-2 / lm.n_layers)
    torch.testing.assert_close(leading_exponents(lm, IDS, 32, context=context), every, rtol=1e-8, atol=1e-8)
    assert hooks_of(lm) == before


class _Sizes(TorchDispatchMode):
    """The largest piece of memory, in bytes, that any operation hands out."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for found in tree_leaves(out):
            if isinstance(found, torch.Tensor) and found.untyped_storage().data_ptr() not in self.weights:
                self.largest = max(self.largest, found.untyped_storage().nbytes())
        return out


def test_leading_exponents_never_hold_a_matrix_of_all_units():
    """No operation of the whole call makes as much memory as D x D numbers take; all of the rows do."""
    config = AutoConfig.for_model(
        "llama", hidden_size=512, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    lm = LanguageModel(AutoModel.from_config(config).eval().requires_grad_(False))
    ids, whole = IDS % 64, 512 * 512 * 4
    sizes = {}
    for name, work in {
        "leading": lambda: leading_exponents(lm, ids, 4),
        "all": lambda: sublayer_jacobians(lm, ids, [0]),
    }.items():
        with _Sizes() as seen:
            seen.weights = {p.untyped_storage().data_ptr() for p in lm.base.parameters()}
            work()
        sizes[name] = seen.largest
    assert sizes["leading"] < whole / 4 and sizes["all"] >= whole


def test_leading_exponents_that_do_not_come_to_rest(monkeypatch):
    monkeypatch.setattr(jacobians, "ROUNDS", 1)
    with pytest.raises(ValueError, match="k=4: the leading exponents of llama still move after 1 rounds"):
        leading_exponents(open_lm("llama"), IDS, 4)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function", [sublayer_jacobians, lambda lm, ids, **more: leading_exponents(lm, ids, 2, **more)]
)
def test_what_is_refused(function):
    lm = open_lm("llama")
    before = hooks_of(lm)
    for more, words in [
        ({"context": "some"}, "context='some'.*full, none, first, rest"),
        ({"dtype": torch.bfloat16}, "float32 or float64"),
    ]:
        with pytest.raises(ValueError, match=words):
            function(lm, IDS, **more)
    with pytest.raises(UserError, match="empty"):
        function(lm, [])
    with pytest.raises(UserError, match="token ids"):
        function(lm, [1, 300])
    assert hooks_of(lm) == before


def test_sublayers_and_numbers_that_are_not_there():
    lm = open_lm("llama")
    for s in (-1, 6, True, 1.0):
        with pytest.raises(ValueError, match=rf"sublayers: {s} is not one of llama, which has 6"):
            sublayer_jacobians(lm, IDS, [s])
    for k in (0, 33):
        with pytest.raises(ValueError, match=rf"k={k}: .*1 to 32"):
            leading_exponents(lm, IDS, k)


def test_a_model_that_does_not_continue_is_refused_with_the_reason(monkeypatch):
    lm = open_lm("llama")
    monkeypatch.setattr(lm.config, "_attn_implementation_internal", "flex_attention")
    with pytest.raises(UserError, match=r"flex_attention.*eager or sdpa"):
        sublayer_jacobians(lm, IDS)


def test_a_stream_that_is_not_finite():
    causal = copy.deepcopy(ZOO["llama"]())
    causal.base_model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        sublayer_jacobians(LanguageModel(causal.base_model), IDS)


def test_a_derivative_that_is_not_finite(monkeypatch):
    """A finite stream whose derivative is NaN, as behind a root of zero."""
    rows = jacobians._Sublayers.rows
    monkeypatch.setattr(
        jacobians._Sublayers, "rows", lambda self, s, dims: rows(self, s, dims) * (torch.nan if s == 2 else 1)
    )
    with pytest.raises(NonFiniteError, match="derivative of llama over sublayer 2 is not finite"):
        sublayer_jacobians(open_lm("llama"), IDS)
