"""Recording a language model: against transformers' own forward and its own blocks, never against ourselves."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny_models import tiny_lm
from transformers import AutoModel, AutoModelForCausalLM

from rsdyn.errors import NonFiniteError, UserError
from rsdyn.stream.lm import LanguageModel, length_sorted_batches
from rsdyn.stream.sites import SITES
from rsdyn.stream.source import find_lm


@pytest.fixture(scope="module", params=sorted(SITES))
def family(request, tmp_path_factory):
    """Each supported family: its folder and its causal LM as transformers opens it."""
    folder = tiny_lm(tmp_path_factory.mktemp(request.param), model_type=request.param)
    return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def random_sequences(n, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 300, size=int(k)) for k in rng.integers(5, longest, size=n)]


@torch.no_grad()
def test_identities(family):
    """The stream is the running sum: attention's and the MLP's contributions, computed by the blocks themselves."""
    folder, causal = family
    ids = random_sequences(1)[0]
    stream = find_lm(str(folder)).load().record([ids])[0]
    contributions = []
    handles = []
    for layer in causal.model.layers:
        for block in (layer.self_attn, layer.mlp):
            take = lambda m, args, out: contributions.append((out[0] if isinstance(out, tuple) else out)[0, -1])  # noqa: E731
            handles.append(block.register_forward_hook(take))
    output = causal(torch.from_numpy(ids)[None], output_hidden_states=True, use_cache=False)
    for handle in handles:
        handle.remove()
    assert len(contributions) == len(stream) == 2 * len(causal.model.layers)
    for s in range(len(stream) - 1):  # resid_mid = resid_pre + attention, resid_pre[l + 1] = resid_mid[l] + MLP
        torch.testing.assert_close(stream[s + 1], stream[s] + contributions[s], rtol=1e-5, atol=1e-5)
    # transformers' hidden states are resid_pre, but for the last, which is behind the final norm
    for layer, hidden in enumerate(output.hidden_states[:-1]):
        torch.testing.assert_close(stream[2 * layer], hidden[0, -1], rtol=1e-5, atol=1e-5)
    logits = causal.lm_head(causal.model.norm(stream[-1] + contributions[-1]))
    torch.testing.assert_close(logits, output.logits[0, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_replay_from_a_recorded_state(family):
    """The recorded state at a layer, put in its place, reproduces the rest of the run."""
    folder, causal = family
    ids = random_sequences(1, seed=3)[0]
    stream = find_lm(str(folder)).load().record([ids])[0]
    tokens = torch.from_numpy(ids)[None]
    logits = causal(tokens).logits[0, -1]

    def put_back(module, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        hidden[0, -1] = stream[2]
        return (hidden, *args[1:]), kwargs

    handle = causal.model.layers[1].register_forward_pre_hook(put_back, with_kwargs=True)
    torch.testing.assert_close(causal(tokens).logits[0, -1], logits, rtol=1e-5, atol=1e-5)
    handle.remove()


def test_padding_and_batching_change_nothing(family):
    folder, _ = family
    lm = find_lm(str(folder)).load()
    sequences = random_sequences(23, seed=1)
    alone = torch.cat([lm.record([s]) for s in sequences])
    for batch_tokens in (1, 64, 300, 10_000):
        together = lm.record(sequences, batch_tokens=batch_tokens)
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


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


def test_source_knows_the_model_without_its_weights(tiny_llama, tmp_path):
    """A folder whose weights cannot be read tells all the same what the cache and the autoencoder need."""
    folder = shutil.copytree(tiny_llama, tmp_path / "lm")
    (folder / "model.safetensors").write_bytes(b"not weights")
    source = find_lm(str(folder))
    assert (source.n_layers, source.n_sublayers, source.n_units, source.max_tokens) == (3, 6, 32, 256)
    assert source.identity() != find_lm(str(tiny_llama)).identity()
    with pytest.raises(UserError, match=r"lm\.name"):
        source.load()


def test_identity_follows_the_bytes(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "lm")
    before = find_lm(str(folder)).identity()
    assert before == find_lm(str(tiny_llama)).identity()
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert find_lm(str(folder)).identity() != before


def test_a_model_in_several_files_is_the_same_model(tiny_llama, tmp_path):
    """The Hub's layout for large models: several safetensors files and an index."""
    folder = tiny_lm(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert (folder / "model.safetensors.index.json").exists()
    sequences = random_sequences(4)
    assert torch.equal(find_lm(str(folder)).load().record(sequences), find_lm(str(tiny_llama)).load().record(sequences))


def test_not_finite_stream_names_sequence_and_sublayer(tiny_llama):
    lm = find_lm(str(tiny_llama)).load()
    with torch.no_grad():
        lm.base.layers[1].self_attn.o_proj.weight.fill_(
            float("nan")
        )  # so sublayer 3, resid_mid of layer 1, is the first
    with pytest.raises(NonFiniteError, match=r"sequence 107, sublayer 3 \(resid_mid of layer 1\)") as caught:
        lm.record(random_sequences(5), first_index=107)
    assert caught.value.exit_code == 3


def test_overflow_on_the_way_to_storage_is_found(tiny_llama):
    model = AutoModel.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(1e6)
    with pytest.raises(NonFiniteError, match="float16"):
        LanguageModel(model).record(random_sequences(2), dtype=torch.float16)


def test_length_sorted_batches():
    lengths = [7, 3, 9, 3, 50, 8]
    batches = length_sorted_batches(lengths, 18)
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 18
    assert batches == [[1, 3, 0] if 3 * 7 <= 18 else [1, 3], [0, 5], [2], [4]]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/nowhere/at/all", ["lm.name=/nowhere/at/all", "no such folder", "embedded"]),
        ("./missing", ["no such folder"]),
    ],
)
def test_missing_folder(name, words):
    with pytest.raises(UserError) as caught:
        find_lm(name)
    assert all(word in str(caught.value) for word in words)


def test_folder_mistakes(tiny_llama, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        find_lm(str(tmp_path))
    folder = shutil.copytree(tiny_llama, tmp_path / "lm")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        find_lm(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(UserError, match="'bert' is not supported"):
        find_lm(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        find_lm(str(folder))


def test_remote_code_is_not_run_unless_asked(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "lm")
    config = json.loads((folder / "config.json").read_text())
    remote = {"model_type": "its-own", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config | remote))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match=r"lm\.trust_remote_code=true"):
        find_lm(str(folder))
    assert not (tmp_path / "ran").exists()


def test_folder_without_tokenizer(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "lm")
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match=r"lm\.name"):
        find_lm(str(folder)).tokenizer()


def test_hub_name_without_network(monkeypatch):
    monkeypatch.setattr("rsdyn.stream.source.hub_reachable", lambda: False)
    with pytest.raises(UserError) as caught:
        find_lm("nobody/no-such-model")
    assert "lm.name" in str(caught.value)
    assert "nobody/no-such-model" in str(caught.value)


def test_an_untrained_model_has_the_shape_and_random_weights(tiny_llama):
    source = find_lm(str(tiny_llama))
    untrained = source.without_training(3)
    assert untrained.n_sublayers == source.n_sublayers and untrained.label.endswith("-untrained")
    assert len({source.identity(), untrained.identity(), source.without_training(4).identity()}) == 3
    assert untrained.identity() == find_lm(str(tiny_llama)).without_training(3).identity()
    state = torch.get_rng_state()
    a, b, other, trained = (
        s.load().base.state_dict() for s in (untrained, untrained, source.without_training(4), source)
    )
    assert torch.equal(torch.get_rng_state(), state)
    name = next(n for n in a if n.endswith("q_proj.weight"))
    assert torch.equal(a[name], b[name])
    assert not torch.equal(a[name], other[name]) and not torch.equal(a[name], trained[name])
    assert a[name].std().item() == pytest.approx(source.config.initializer_range, rel=0.1)
    assert source.without_training(3).load(dtype="bfloat16").dtype == torch.bfloat16
