"""Packed rows: against each sequence alone in transformers' own attention, and everything else left as it was."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from family_zoo import FAMILIES, WINDOW, ZOO, config_of, make
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rsdyn.errors import NonFiniteError, UserError
from rsdyn.lm import packing
from rsdyn.lm import packing_trial as layout_module
from rsdyn.lm.model import LanguageModel, Layout
from rsdyn.lm.packing import NotPackedError, one_row, packed_attention
from rsdyn.lm.packing_trial import choose_layout
from rsdyn.lm.source import find_lm
from rsdyn.perturbation.states import replace_stream
from rsdyn.stream.drift import compare, tolerance
from rsdyn.stream.trajectories import TrajectoryStream

PACKED = Layout("packed")
# their code has an attention of its own, which asks transformers for no function
SORTED = {"falcon", "falcon-new", "falcon-alibi", "falcon-serial", "gptj", "gpt-neo", "codegen", "bloom", "mpt"}
# experts multiply the tokens that chose them, of all sequences together: other shapes, other roundings
EXPERTS = {"granitemoe", "mixtral", "qwen3-moe", "olmoe", "gpt-oss", "deepseek-v3"}


def texts(seed=0):
    """Shorter and longer than the windows of sliding attention."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 300, size=n) for n in (WINDOW - 3, 23, 4, 31, WINDOW, WINDOW + 1)]


def every(sequences):
    return [np.arange(len(s)) for s in sequences]


def alone(lm, sequences):
    assert lm.layout.name == "sorted"
    return torch.cat([lm.record([s], positions=every([s])) for s in sequences])


def distance(a, b):
    a, b = a.double(), b.double()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_packed_as_alone_or_says_why_not(name):
    lm, sequences = LanguageModel(ZOO[name]().base_model), texts()
    found = choose_layout(lm, sequences)
    assert found.name == ("sorted" if name in SORTED else "packed") and (found.reason is None) == (name not in SORTED)
    if name in SORTED:
        assert "fails in such a row" in found.reason and "\n" not in found.reason
        return
    expected = alone(lm, sequences)
    lm.layout = found
    for batch_tokens in (40, 10_000):
        packed = lm.record(sequences, positions=every(sequences), batch_tokens=batch_tokens)
        assert distance(packed, expected) < 1e-6 if name in EXPERTS else torch.equal(packed, expected)
    # up to three tokens alone are multiplied by other instructions, which round differently
    short = [sequences[1], *(sequences[3][:n] for n in (1, 2, 3)), sequences[3]]
    lm.layout = Layout("sorted")
    expected, lm.layout = alone(lm, short), found
    assert distance(lm.record(short, positions=every(short)), expected) < 1e-6


_FEW = ["llama", "gemma2", "gpt2", "mixtral"]


@pytest.mark.parametrize("name", [*_FEW, *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES if n not in _FEW)])
def test_half_precision(name):
    lm, sequences = LanguageModel(make(name).to(torch.bfloat16).base_model), texts()
    expected, lm.layout = alone(lm, sequences), choose_layout(lm, sequences)
    assert (lm.layout.name == "sorted") == (name in SORTED)
    assert distance(lm.record(sequences, positions=every(sequences)), expected) < 3e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "olmo2", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deep_models_pass(name, dtype):
    for seed in range(4):
        lm = LanguageModel(make(name, layers=32, seed=seed).to(dtype).base_model)
        assert choose_layout(lm, texts(seed)) == PACKED


@pytest.mark.parametrize("wanted", ["last", "some"])
def test_other_positions_are_rows_of_all(wanted, tiny_llama):
    lm = find_lm(str(tiny_llama)).load()
    lm.layout = PACKED
    sequences = texts()
    whole = lm.record(sequences, positions=every(sequences), batch_tokens=40)
    at = [np.array(sorted({len(s) // 2, len(s) - 1} if wanted == "some" else {len(s) - 1})) for s in sequences]
    starts = np.cumsum([0, *map(len, sequences)])
    rows = np.concatenate([start + tokens for start, tokens in zip(starts[:-1], at, strict=True)])
    positions = at if wanted == "some" else None
    assert torch.equal(lm.record(sequences, positions=positions, batch_tokens=40), whole[rows])


def test_the_number_of_threads_changes_not_a_bit(tiny_llama):
    lm = find_lm(str(tiny_llama)).load()
    lm.layout = PACKED
    rng = np.random.default_rng(0)
    sequences = [rng.integers(3, 300, size=int(n)) for n in rng.integers(5, 120, size=30)]
    before = torch.get_num_threads()
    try:
        recorded = []
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            recorded.append(lm.record(sequences, batch_tokens=300))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(recorded[0], recorded[1]) and torch.equal(recorded[0], recorded[2])


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_coarse_products_reach_every_thread_and_pass_the_canary(precision, tiny_llama):
    """Worker threads take the process's setting: their bits are those of one thread."""
    lm = find_lm(str(tiny_llama)).load()
    lm.layout = PACKED
    exact = lm.record(texts(), batch_tokens=40)
    threads, before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        recorded = []
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            recorded.append(lm.record(texts(), batch_tokens=40))
        assert choose_layout(lm, texts()) == PACKED
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(before)
    assert torch.equal(recorded[0], recorded[1])
    allowed = tolerance(lm_dtype="float32", matmul_precision=precision, stored=torch.float32)
    assert compare(recorded[0], exact).difference < allowed


def test_longrope_keeps_long_sequences_from_short_ones():
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 20}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 8.0, 16.0]}
    config = config_of("phi3")
    config.rope_parameters, config.original_max_position_embeddings = rope, 20
    torch.manual_seed(0)
    lm, sequences = LanguageModel(AutoModel.from_config(config)), texts()
    assert min(map(len, sequences)) < 20 < max(map(len, sequences))
    expected, lm.layout = alone(lm, sequences), choose_layout(lm, sequences)
    assert lm.layout == PACKED
    assert distance(lm.record(sequences, positions=every(sequences)), expected) < 1e-6


# -- nothing else is changed -------------------------------------------------------------------------------------------


def test_other_forwards_keep_their_attention():
    """While a model is packed: its own plain forwards, in this thread and in others, and another model's."""
    first, second = (LanguageModel(make("llama", seed=seed).base_model) for seed in (0, 1))
    second.base.config._attn_implementation = "eager"
    ids = torch.from_numpy(texts()[3])[None]
    forward = torch.inference_mode()(lambda lm: lm.base(ids, use_cache=False).last_hidden_state)
    expected = [forward(first), forward(second)]
    with packed_attention(first.base), one_row([ids.shape[1] - 4, 4]):
        inside = forward(first)
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(forward, first).result(), expected[0])  # it has no row
        assert torch.equal(forward(second), expected[1])
    assert not torch.equal(inside, expected[0])  # the second sequence did not see the first
    assert torch.equal(forward(first), expected[0])


def test_the_config_is_put_back_after_an_error():
    lm = LanguageModel(make("gemma2").base_model)
    lm.layout = PACKED
    with pytest.raises(IndexError):
        lm.record([np.array([10_000_000])])
    assert lm.base.config._attn_implementation == "eager"
    with packed_attention(lm.base):
        assert lm.base.config._attn_implementation not in ("eager", "sdpa")
    assert lm.base.config._attn_implementation == "eager"


def test_two_models_are_recorded_at_once():
    models = [LanguageModel(make(name).base_model) for name in ("llama", "gemma2")]
    expected = [alone(lm, texts()) for lm in models]
    for lm in models:
        lm.layout = PACKED
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            work = [pool.submit(lm.record, texts(), positions=every(texts()), batch_tokens=40) for lm in models]
            assert all(torch.equal(job.result(), whole) for job, whole in zip(work, expected, strict=True))


def test_an_intervention_edits_sequences_that_are_not_packed(tiny_llama):
    lm = find_lm(str(tiny_llama)).load()
    lm.layout = PACKED
    ids = texts()[1]
    state = torch.ones(lm.n_units)
    with replace_stream(lm, 2, state):
        both = lm.record([ids, ids])
        with pytest.raises(ValueError, match="last column"):
            lm.record(texts())
    assert torch.equal(both[0, 2], state) and torch.equal(both[1, 2], state)


# -- the self-test -----------------------------------------------------------------------------------------------------


def test_attention_to_the_neighbours_is_found(monkeypatch):
    """A row that is one sequence: what a kernel makes of it that knows nothing of the bounds."""

    def whole_row(kernel, module, query, key, value, mask, **options):
        packing._row.get().calls += 1
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=options["scaling"])
        return out.transpose(1, 2), None

    monkeypatch.setattr(packing, "_attend", whole_row)
    found = choose_layout(LanguageModel(make("llama").base_model, name="leaky"), texts())
    assert found.name == "sorted" and "of their norm away from those of the sequences alone" in found.reason


def test_positions_that_go_on_are_found(monkeypatch):
    lm = LanguageModel(make("gpt2").base_model, name="counting")
    forward = lm.base.forward
    monkeypatch.setattr(lm.base, "forward", lambda position_ids=None, **options: forward(**options))
    assert "of their norm away" in choose_layout(lm, texts()).reason


def test_attention_that_is_not_asked_for_is_found(monkeypatch):
    lm = LanguageModel(make("llama").base_model, name="own")
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", lambda name, default: own)
    assert choose_layout(lm, texts()).reason == "0 of 3 layers called the attention function that it was given"


def test_attention_of_somebody_else_is_left_alone(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", ALL_ATTENTION_FUNCTIONS["sdpa"])
    causal = make("llama")
    causal.config._attn_implementation = "mine"
    found = choose_layout(LanguageModel(causal.base_model), texts())
    assert found == Layout("sorted", "its attention is mine, and only sdpa and eager are known")


@pytest.mark.parametrize(
    ("options", "mask", "n_tokens", "reason"),
    [
        ({"position_bias": torch.zeros(1, 2, 5, 5)}, None, 5, "a bias for each place"),
        ({}, torch.ones(1, 1, 5, 5, dtype=torch.bool), 5, "masks of its own"),
        ({}, None, 4, "other tokens"),
    ],
)
def test_what_a_row_cannot_do_raises(options, mask, n_tokens, reason):
    states = torch.zeros(1, 2, n_tokens, 4)
    with one_row([3, 2]), pytest.raises(NotPackedError, match=reason) as caught:
        packing._attend("sdpa", torch.nn.Identity(), states, states, states, mask, **options)
    assert "layout=sorted" in str(caught.value)


def test_packed_must_be_possible_where_it_is_asked_for():
    lm = LanguageModel(ZOO["bloom"]().base_model, name="bloom")
    with pytest.raises(UserError, match=r"layout=packed: bloom cannot.*fails in such a row.*=auto or sorted"):
        choose_layout(lm, texts(), "packed")
    assert choose_layout(lm, texts(), "sorted") == Layout("sorted") == lm.layout


@pytest.mark.parametrize("lengths", [(1,), (2,), (1, 1), (400, 400)])
def test_few_or_short_sequences(lengths, tiny_llama):
    sequences = [np.arange(3, 3 + n) % 290 for n in lengths]
    assert choose_layout(find_lm(str(tiny_llama)).load(), sequences) == PACKED


def test_faults_of_the_model_or_the_machine_are_not_taken_for_the_layouts(monkeypatch):
    lm = LanguageModel(make("llama").base_model)
    record = lm.record
    for error in (MemoryError, torch.OutOfMemoryError):

        def full(sequences, error=error, **options):
            if lm.layout == PACKED:
                raise error
            return record(sequences, **options)

        monkeypatch.setattr(lm, "record", full)
        with pytest.raises(error):
            choose_layout(lm, texts())
        assert lm.layout.name == "sorted"
    monkeypatch.setattr(lm, "record", record)
    lm.base.layers[1].self_attn.o_proj.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="resid_mid of layer 1"):
        choose_layout(lm, texts())


def test_experts_at_a_tie_get_another_attempt(monkeypatch):
    """The first attempt is off by a rounding that sent a token to another expert; the second is not."""
    lm = LanguageModel(make("llama").base_model)
    states, packed = layout_module._states, []

    def first_off(lm, sequences, layout):
        found = states(lm, sequences, layout)
        if layout == "sorted":
            return found
        packed.append(len(sequences[1]))
        return found * 1.5 if len(packed) == 1 else found

    monkeypatch.setattr(layout_module, "_states", first_off)
    assert choose_layout(lm, texts()) == PACKED and len(packed) == 2 and packed[1] < packed[0]


# -- in a stream -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["auto", "packed", "sorted"])
def test_a_stream_records_in_the_layout_and_says_so(wanted, tiny_llama, make_sequences, tmp_path, caplog):
    source, sequences = find_lm(str(tiny_llama)), make_sequences(12)
    stream = TrajectoryStream(source, sequences, cache_dir=tmp_path, shard_sequences=8, layout=wanted, dtype="float32")
    stream.open()
    found = stream.shard(0).activations
    kept = stream.cache.manifest()["certificate"]
    assert kept["layout"] == ("sorted" if wanted == "sorted" else "packed") and kept["layout_reason"] is None
    lm = source.load()
    lm.layout = Layout(kept["layout"])
    assert torch.equal(found, lm.record([sequences[i] for i in range(8)], batch_tokens=stream.batch_tokens))
    # the canary of a later run finds the same bits
    again = TrajectoryStream(source, sequences, cache_dir=tmp_path, shard_sequences=8, layout=wanted, dtype="float32")
    again.open()
    again.shard(1)
    assert again.cache.key == stream.cache.key and again.lm_loaded and "rounding" not in caplog.text


def test_a_stream_that_cannot_be_packed_says_why(tmp_path, make_sequences):
    make("bloom").save_pretrained(tmp_path / "bloom")
    source, sequences = find_lm(str(tmp_path / "bloom")), make_sequences(12)
    said = []
    stream = TrajectoryStream(
        source,
        sequences,
        cache_dir=tmp_path / "cache",
        shard_sequences=8,
        on_certificate=lambda c: said.extend(c.lines()),
    )
    stream.open()
    stream.shard(0)
    kept = stream.cache.manifest()["certificate"]
    assert kept["layout"] == "sorted" and "fails in such a row" in kept["layout_reason"]
    assert said[1].strip() == f"recorded in padded batches, not in packed rows: {kept['layout_reason']}"
    refused = TrajectoryStream(source, sequences, cache_dir=tmp_path / "cache", shard_sequences=8, layout="packed")
    refused.open()
    with pytest.raises(UserError, match=r"layout=packed"):
        refused.shard(0)
    assert refused.missing() == [0, 1]
