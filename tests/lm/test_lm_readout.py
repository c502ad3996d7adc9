"""The readout of a real stream: the model's own probabilities at the end, lenses, and files that are none."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_lm

from rsdyn.dynamics.readout import readout
from rsdyn.errors import NonFiniteError, UserError
from rsdyn.lm.lens import JacobianLens
from rsdyn.lm.readout import AffineLens, LogitLens, open_lens, stream_readout, top_tokens
from rsdyn.lm.source import find_lm

SIZES = {"n_sublayers": 32, "n_units": 128, "sites_per_layer": 2}


@pytest.fixture(scope="module")
def lm():
    return find_lm("embedded").load(head=True)


@pytest.fixture(scope="module")
def sequences():
    return [np.array([1, *range(5 + n, 5 + 3 * n)]) for n in (7, 12, 9, 30)]


@pytest.fixture(scope="module")
def states(lm, sequences):
    return lm.record(sequences, final=True)


def test_the_end_of_the_depth_says_what_the_model_says(lm, sequences, states):
    """Against transformers' own logits of each sequence alone."""
    assert states.shape == (4, 33, 128)
    assert torch.equal(states[:, :-1], lm.record(sequences))
    for tokens, state in zip(sequences, states[:, -1], strict=True):
        own = lm.causal(torch.from_numpy(tokens)[None]).logits[0, -1].softmax(-1)
        torch.testing.assert_close(lm.log_probs(state).exp(), own, rtol=0, atol=1e-5)


def test_blocks_give_the_pure_readout(lm, states, monkeypatch):
    monkeypatch.setattr("rsdyn.lm.readout.BLOCK_BYTES", 4 * 3 * lm.config.vocab_size)  # three sequences, then one
    found = stream_readout(lm, states[:, :-1], states[:, -1], LogitLens())
    expected = readout(lm.log_probs(states[:, -1]), lm.log_probs(states[:, :-1]))
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(found, name).double(), value.double(), rtol=1e-4, atol=1e-5)


def test_the_state_at_the_end_agrees_with_itself(lm, states):
    found = stream_readout(lm, states[:, -1:], states[:, -1], LogitLens())
    assert float(found.kl.max()) < 1e-5 and found.agrees.all() and found.commit.tolist() == [0] * 4


@pytest.mark.parametrize("decides", [0, 2, 3])
def test_a_model_that_decides_at_a_known_layer(decides, tmp_path, sequences):
    """From a layer on no block writes anything, so that all it will say is said by then; before that it says others."""
    folder = tiny_lm(tmp_path, layers=4, seed=decides)
    weights = load_file(folder / "model.safetensors")
    for layer in range(decides, 4):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{layer}.{name}.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tiny = find_lm(str(folder)).load(head=True)
    states = tiny.record([tokens % 300 for tokens in sequences], final=True)
    found = stream_readout(tiny, states[:, :-1], states[:, -1], LogitLens())
    first = 2 * decides
    assert float(found.kl[:, first:].max()) < 1e-5 and found.agrees[:, first:].all()
    assert (found.commit <= first).all()
    if decides:
        late = ~found.agrees[:, first - 1]  # the last MLP that writes changes the top token
        assert late.any() and (found.commit[late] == first).all() and float(found.kl[:, :first].min()) > 1e-4


def test_an_affine_lens_that_does_nothing_is_the_logit_lens(lm, states, tmp_path):
    same = {"weight": torch.eye(128).expand(32, -1, -1).clone(), "bias": torch.zeros(32, 128)}
    save_file(same, tmp_path / "l.safetensors")
    lens = open_lens(str(tmp_path / "l.safetensors"), **SIZES)
    assert isinstance(lens, AffineLens)
    ours, plain = (stream_readout(lm, states[:, :-1], states[:, -1], each) for each in (lens, LogitLens()))
    torch.testing.assert_close(ours.kl, plain.kl, rtol=1e-4, atol=1e-5)


def test_an_affine_lens_that_knows_the_end_commits_at_once(lm, states, tmp_path):
    """Of one sequence: weight 0, and the end itself as bias."""
    weight, bias = torch.zeros(32, 128, 128), states[0, -1].expand(32, -1).clone()
    save_file({"weight": weight, "bias": bias}, tmp_path / "end.safetensors")
    found = stream_readout(lm, states[:1, :-1], states[:1, -1], open_lens(str(tmp_path / "end.safetensors"), **SIZES))
    assert found.commit.tolist() == [0] and float(found.kl.max()) < 1e-5


def test_a_jacobian_lens_reads_behind_whole_layers(lm, states, tmp_path):
    JacobianLens({layer: torch.eye(128) for layer in range(15)}, 3).save(tmp_path / "j.pt")
    lens = open_lens(str(tmp_path / "j.pt"), **SIZES)
    assert [s for s in range(32) if lens.reads(s)] == list(range(2, 32, 2))
    found = stream_readout(lm, states[:, :-1], states[:, -1], lens)
    plain = stream_readout(lm, states[:, :-1], states[:, -1], LogitLens())
    torch.testing.assert_close(found.kl[:, 2::2], plain.kl[:, 2::2], rtol=1e-4, atol=1e-5)
    assert found.kl[:, 1::2].isnan().all() and (found.rank[:, 0] == -1).all()
    assert ((found.commit % 2 == 0) & (found.commit >= 2)).all()
    table = top_tokens(lm, states[0, :-1], states[0, -1], lens, 3)
    assert table.tokens.shape == (33, 3) and (table.tokens[1] == -1).all() and table.probability[1].isnan().all()
    assert table.tokens[-1].tolist() == lm.log_probs(states[0, -1]).topk(3).indices.tolist()


def test_lenses_of_another_model_are_refused(tmp_path):
    JacobianLens({0: torch.eye(64)}, 1).save(tmp_path / "width.pt")
    JacobianLens({40: torch.eye(128)}, 1).save(tmp_path / "layers.pt")
    save_file({"weight": torch.zeros(30, 128, 128), "bias": torch.zeros(30, 128)}, tmp_path / "short.safetensors")
    save_file({"weight": torch.zeros(32, 128, 128)}, tmp_path / "half.safetensors")
    nan = {"weight": torch.full((32, 128, 128), torch.nan), "bias": torch.zeros(32, 128)}
    save_file(nan, tmp_path / "nan.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    for name, words in {
        "width.pt": "64 units, and this model has 128",
        "layers.pt": "layers up to 40, and this model has 16",
        "short.safetensors": "an affine map per sublayer",
        "half.safetensors": "it lacks bias",
        "nan.safetensors": "NaN or infinities",
        "text.safetensors": "not a safetensors file",
        "none.safetensors": "no such file",
        "none.pt": "no such file",
    }.items():
        with pytest.raises(UserError, match=words):
            open_lens(str(tmp_path / name), **SIZES)


def test_a_model_without_its_head_cannot_be_read(sequences):
    bare = find_lm("embedded").load()
    states = bare.record(sequences[:1], final=True)
    with pytest.raises(ValueError, match="loaded without its LM head"):
        stream_readout(bare, states[:, :-1], states[:, -1], LogitLens())


def test_what_is_beyond_the_number_format_is_not_read(lm, states, monkeypatch):
    """One sublayer whose logits overflow neither agrees nor commits; a model that ends in NaN says so."""
    plain = stream_readout(lm, states[:, :-1], states[:, -1], LogitLens())
    wild = {"weight": torch.eye(128).expand(32, -1, -1).clone(), "bias": torch.zeros(32, 128)}
    wild["bias"][4, 0] = torch.inf
    found = stream_readout(lm, states[:, :-1], states[:, -1], AffineLens(**wild))
    assert found.rank[:, 4].tolist() == [-1] * 4 and not found.agrees[:, 4].any()
    assert found.kl[:, 4].isnan().all() and found.probability[:, 4].isnan().all() and found.entropy[:, 4].isnan().all()
    assert torch.equal(found.kl[:, 5:], plain.kl[:, 5:])
    monkeypatch.setattr(lm, "log_probs", lambda x: torch.full((len(x), lm.config.vocab_size), torch.nan))
    with pytest.raises(NonFiniteError, match=r"distribution of embedded .*is NaN in torch\.float32"):
        stream_readout(lm, states[:, :-1], states[:, -1], LogitLens())
