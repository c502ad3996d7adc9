"""Recording a language model: against transformers' own forward and its own blocks, never against ourselves."""

import numpy as np
import pytest
import torch
from family_zoo import CONTEXT, FAMILIES, LAYERS, UNITS, VOCABULARY, ZOO, config_of, names_of
from transformers import AutoConfig, AutoModel

from rsdyn.errors import NonFiniteError, UserError
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.source import find_lm


def random_sequences(n, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 300, size=int(k)) for k in rng.integers(5, longest, size=n)]


def outputs_of(causal, modules, ids):
    """What each of the modules gave for the last token in one forward of transformers' own, and its output.

    Copies: Falcon adds attention's output to the MLP's in place.
    """
    given, handles = {}, []

    def take(module, args, output):
        states = output[0] if isinstance(output, tuple) else output
        given[module] = states.view(-1, UNITS)[-1].clone()

    for module in modules:
        handles.append(module.register_forward_hook(take))
    output = causal(torch.from_numpy(ids)[None], output_hidden_states=True, use_cache=False)
    for handle in handles:
        handle.remove()
    return given, output


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_identities(name):
    """The stream is the running sum: attention's and the MLP's contributions, computed by the blocks themselves."""
    causal, names = ZOO[name](), names_of(name)
    lm = LanguageModel(causal.base_model, causal=causal)
    ids = random_sequences(1)[0]
    stream = lm.record([ids])[0]
    layers = causal.base_model.get_submodule(names.layers)
    blocks = [layer.get_submodule(block) for layer in layers for block in names.adds]
    given, output = outputs_of(causal, blocks, ids)
    adds = [given[block] * names.scale for block in blocks]
    if names.mid is None:
        adds = [attention + mlp for attention, mlp in zip(adds[::2], adds[1::2], strict=True)]
    assert len(adds) == len(stream)
    for s in range(len(stream) - 1):  # resid_mid = resid_pre + attention, resid_pre[l + 1] = resid_mid[l] + MLP
        torch.testing.assert_close(stream[s + 1], stream[s] + adds[s], rtol=1e-5, atol=1e-5)
    # transformers' hidden states are resid_pre, but for the last, which is behind the final norm
    n_sites = len(stream) // len(layers)
    assert len(output.hidden_states) == len(layers) + 1
    for layer, hidden in enumerate(output.hidden_states[:-1]):
        torch.testing.assert_close(stream[n_sites * layer], hidden[0, -1], rtol=1e-5, atol=1e-5)
    # behind the LM head some families cap or scale their logits
    expected = output.logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(lm.log_probs(stream[-1] + adds[-1]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_and_batching_change_nothing(name):
    """Right padding without a mask, next to longer sequences, beyond the window of sliding attention."""
    lm = LanguageModel(ZOO[name]().base_model)
    sequences = random_sequences(9, seed=1)
    alone = torch.cat([lm.record([s]) for s in sequences])
    for batch_tokens in (64, 10_000):
        difference = (lm.record(sequences, batch_tokens=batch_tokens) - alone).norm(dim=-1)
        assert (difference / alone.norm(dim=-1)).max() < 3e-6


def test_log_probs_of_any_shape_and_without_a_head():
    causal = ZOO["gemma2"]()
    lm = LanguageModel(causal.base_model, causal=causal)
    states = torch.randn(2, 3, UNITS)
    found = lm.log_probs(states)
    assert found.shape == (2, 3, VOCABULARY) and lm.log_probs(states[0, 0]).shape == (VOCABULARY,)
    torch.testing.assert_close(found[1, 2], lm.log_probs(states[1, 2]))
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2, 3))
    assert lm.head is causal.lm_head and causal.base_model is lm.base  # the model itself is as it was
    with pytest.raises(ValueError, match=r"load\(head=True\)"):
        LanguageModel(causal.base_model).log_probs(states)


def test_sizes_go_by_many_names():
    for name in ("llama", "gpt2", "mpt", "gpt-neo"):
        lm = LanguageModel(ZOO[name]().base_model)
        assert (lm.n_units, lm.n_layers, lm.n_sublayers, lm.max_tokens) == (UNITS, LAYERS, 2 * LAYERS, CONTEXT)
    assert LanguageModel(ZOO["bloom"]().base_model).max_tokens is None


def test_longrope_keeps_long_sequences_from_short_ones():
    """One long row turns the angles of all rows of a forward; ours never go together, on whatever threads."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 4.0, 8.0, 16.0],
        "original_max_position_embeddings": 20,
    }
    config = config_of("phi3")
    config.rope_parameters, config.original_max_position_embeddings = rope, 20
    torch.manual_seed(0)
    lm = LanguageModel(AutoModel.from_config(config))
    sequences = [s for s in random_sequences(12, seed=3) if len(s) != 20] + random_sequences(1, longest=6)
    sequences.append(np.concatenate(random_sequences(2, seed=4))[:20])  # the longest of the short ones
    assert min(map(len, sequences)) < 20 < max(map(len, sequences))
    alone = torch.cat([lm.record([s]) for s in sequences])
    short = min(range(len(sequences)), key=lambda i: len(sequences[i]))
    long = max(sequences, key=len)
    ids = torch.zeros(2, len(long), dtype=torch.int64)
    ids[0, : len(sequences[short])], ids[1] = torch.from_numpy(sequences[short]), torch.from_numpy(long)
    mixed = lm.base(ids, use_cache=False, output_hidden_states=True).hidden_states[2][0, len(sequences[short]) - 1]
    assert (mixed - alone[short, 4]).norm() / mixed.norm() > 1e-3  # the trap is there
    before = torch.get_num_threads()
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            together = lm.record(sequences, batch_tokens=80)
            assert ((together - alone).norm(dim=-1) / alone.norm(dim=-1)).max() < 3e-6
    finally:
        torch.set_num_threads(before)


def test_dynamic_positions_are_refused_beyond_the_context():
    config = config_of("llama")
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    config.max_position_embeddings = 16
    lm = LanguageModel(AutoModel.from_config(config))
    within, beyond = np.arange(3, 19), np.arange(3, 20)
    assert lm.record([within, within[:5]]).isfinite().all()
    with pytest.raises(UserError, match=r"sequence 8 has 17 tokens.*dynamically beyond 16.*Truncate"):
        lm.record([within, beyond], numbers=[7, 8])


def test_a_language_model_that_also_sees():
    """The text part of a larger config says the sizes, and its layers are found deeper in the model."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=config_of("gemma3").to_dict(), vision_config=vision)
    torch.manual_seed(0)
    lm = LanguageModel(AutoModel.from_config(config).eval())
    assert (lm.n_units, lm.n_sublayers) == (UNITS, 2 * LAYERS)
    assert lm.sites.layers[0] is lm.base.language_model.layers[0]
    ids = random_sequences(1)[0]
    hidden = lm.base.language_model(torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states
    torch.testing.assert_close(lm.record([ids])[0, ::2], torch.stack([h[0, -1] for h in hidden[:-1]]))


def test_the_number_of_threads_changes_not_a_bit(tiny_llama):
    """A process of several has other threads than one alone, and a shard made again must have the same bytes."""
    lm = find_lm(str(tiny_llama)).load()
    sequences = random_sequences(40, seed=2, longest=200)
    before = torch.get_num_threads()
    try:
        recorded = []
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            recorded.append(lm.record(sequences, batch_tokens=500))
            assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(recorded[0], recorded[1])
    assert torch.equal(recorded[0], recorded[2])


def test_record_is_detached_from_the_model(tiny_llama):
    lm = find_lm(str(tiny_llama)).load()
    hooks = lambda: sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in lm.base.modules())  # noqa: E731
    before = hooks()
    out = lm.record(random_sequences(3))
    assert hooks() == before
    assert not out.is_inference()  # such a tensor would fail in backward
    assert out.untyped_storage().nbytes() == out.nbytes  # nothing larger is kept alive
    with pytest.raises(IndexError):
        lm.record([np.array([10_000_000])])
    assert hooks() == before  # also after an exception


def test_forward_stops_behind_the_last_site(tiny_llama):
    lm = find_lm(str(tiny_llama)).load()
    ran = []
    lm.base.layers[-1].mlp.register_forward_hook(lambda *a: ran.append("mlp"))
    lm.base.norm.register_forward_hook(lambda *a: ran.append("norm"))
    lm.record(random_sequences(2))
    assert ran == []


def test_on_batch_counts_every_sequence(tiny_llama):
    seen = []
    find_lm(str(tiny_llama)).load().record(random_sequences(17), batch_tokens=100, on_batch=seen.append)
    assert sum(seen) == 17
    assert len(seen) > 1


def test_low_precision_is_close_to_float32(tiny_llama):
    source, sequences = find_lm(str(tiny_llama)), random_sequences(8)
    exact = source.load().record(sequences)
    for dtype in ("bfloat16", "float16"):
        rough = source.load(dtype=dtype).record(sequences).float()
        assert 0 < (rough - exact).norm() / exact.norm() < 3e-2
    stored = source.load().record(sequences, dtype=torch.bfloat16)
    assert torch.equal(stored, exact.to(torch.bfloat16))


def test_not_finite_stream_names_sequence_and_sublayer(tiny_llama):
    lm = find_lm(str(tiny_llama)).load()
    with torch.no_grad():
        lm.base.layers[1].self_attn.o_proj.weight.fill_(
            float("nan")
        )  # so sublayer 3, resid_mid of layer 1, is the first
    with pytest.raises(NonFiniteError, match=r"sequence 107, sublayer 3 \(resid_mid of layer 1\)") as caught:
        lm.record(random_sequences(5), numbers=range(107, 112))
    assert caught.value.exit_code == 3


def test_overflow_on_the_way_to_storage_is_found(tiny_llama):
    model = AutoModel.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(1e6)
    with pytest.raises(NonFiniteError, match="float16"):
        LanguageModel(model).record(random_sequences(2), dtype=torch.float16)


# -- other positions than the last -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "neox-parallel", "gemma2"])
@torch.no_grad()
def test_every_token_is_the_last_of_its_prefix_and_transformers_hidden_state(name):
    """Causality, in a padded batch: what is recorded at a token is what a model that saw no further has there."""
    causal = ZOO[name]()
    lm = LanguageModel(causal.base_model)
    sequences = random_sequences(3, seed=5, longest=14)
    at = [np.arange(len(s)) for s in sequences]
    found = lm.record(sequences, positions=at, batch_tokens=200)
    prefixes = torch.cat([lm.record([s[: n + 1]]) for s in sequences for n in range(len(s))])
    assert found.shape == prefixes.shape
    assert ((found - prefixes).norm(dim=-1) / prefixes.norm(dim=-1)).max() < 1e-5
    hidden = [
        torch.stack(lm.base(torch.from_numpy(s)[None], output_hidden_states=True).hidden_states[:-1], 2)[0]
        for s in sequences
    ]
    torch.testing.assert_close(found[:, :: len(lm.sites.names)], torch.cat(hidden), rtol=1e-4, atol=1e-5)


def test_some_tokens_are_those_rows_of_all_and_nothing_else_is_kept(tiny_llama):
    lm = find_lm(str(tiny_llama)).load()
    sequences = random_sequences(7, seed=2)
    every = lm.record(sequences, positions=[np.arange(len(s)) for s in sequences], batch_tokens=100)
    wanted = [np.array(sorted({0, len(s) // 2, len(s) - 1})) for s in sequences]
    starts = np.cumsum([0, *map(len, sequences)])
    rows = np.concatenate([start + tokens for start, tokens in zip(starts[:-1], wanted, strict=True)])
    seen = []
    some = lm.record(sequences, positions=wanted, batch_tokens=100, dtype=torch.bfloat16, on_batch=seen.append)
    assert torch.equal(some, every[rows].bfloat16()) and sum(seen) == 7
    assert some.untyped_storage().nbytes() == len(rows) * lm.n_sublayers * lm.n_units * 2
    last = [np.array([len(s) - 1]) for s in sequences]
    assert torch.equal(lm.record(sequences, positions=last, batch_tokens=100), lm.record(sequences, batch_tokens=100))


def test_what_is_not_finite_is_named_with_its_token(tiny_llama):
    lm = find_lm(str(tiny_llama)).load()
    sequences = random_sequences(4, seed=3)
    with torch.no_grad():
        lm.base.get_input_embeddings().weight[999 % 400] = torch.nan
    sequences[2][4] = 999 % 400
    with pytest.raises(NonFiniteError, match=r"at sequence 102, token 4, sublayer 0 \(resid_pre of layer 0\)"):
        lm.record(sequences, positions=[np.arange(len(s)) for s in sequences], numbers=range(100, 100 + len(sequences)))
