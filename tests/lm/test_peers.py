"""Our streams against TransformerLens' and nnsight's on the same weights: stored ones always, live where installed.

So with Jacobian lenses: TransformerLens opens ours, reads what we read, and fits the same.
"""

import copy

import numpy as np
import peer_streams
import pytest
import torch
from tiny_models import tiny_tokenizer

from rsdyn.lm.lens import JacobianLens, LensFit, text_jacobian
from rsdyn.lm.model import LanguageModel


def ours(model, tokens):
    """``(T, S, D)``: the last token of every beginning of the sequence, which is each token: nobody looks ahead."""
    lm = LanguageModel(model.base_model)
    return lm.record([tokens[: n + 1].numpy() for n in range(len(tokens))], batch_tokens=40)


def assert_same(got, expected):
    assert got.shape == expected.shape
    error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error.max()) < 1e-5


@pytest.mark.parametrize("library", ["transformer_lens", "nnsight"])
@pytest.mark.parametrize("name", peer_streams.FAMILIES)
def test_the_stored_streams_are_ours(name, library):
    model, tokens, streams = peer_streams.read(name)
    stream = streams[library]
    sites = 1 if peer_streams.FAMILIES[name] is None else 2
    assert stream.shape == (peer_streams.N_TOKENS, 2 * sites, model.config.hidden_size)
    steps = (stream[:, 1:] - stream[:, :-1]).norm(dim=-1) / stream[:, :-1].norm(dim=-1)
    assert float(steps.min()) > 0.05  # every block moves it: a stream that stood still would pass for any site
    assert_same(ours(model, tokens), stream)


@pytest.mark.parametrize("name", peer_streams.FAMILIES)
def test_the_libraries_themselves_where_installed(name):
    pytest.importorskip("transformer_lens")
    pytest.importorskip("nnsight")
    model, tokens, _ = peer_streams.read(name)
    stream = ours(model, tokens)
    with torch.no_grad():
        assert_same(stream, peer_streams.transformer_lens(model, tokens))
        assert_same(stream, peer_streams.nnsight(model, tokens, peer_streams.FAMILIES[name]))


@pytest.fixture
def bridge(tmp_path):
    """A model as TransformerLens opens it, beside ours of the same weights, and its tokenizer."""
    pytest.importorskip("transformer_lens", reason="needs TransformerLens: pip install -e '.[peers]'")
    from transformer_lens.model_bridge import TransformerBridge

    model, _, _ = peer_streams.read("llama")
    model.save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer(tmp_path, vocab_size=300)
    # a copy: the bridge puts modules of its own into the model
    opened = TransformerBridge.boot_transformers(str(tmp_path), hf_model=copy.deepcopy(model), tokenizer=tokenizer)
    return opened, LanguageModel(model.base_model, causal=model)


def test_transformer_lens_opens_our_jacobian_lens_and_reads_what_we_read(bridge, tmp_path):
    from transformer_lens.tools.analysis import JacobianLens as Theirs

    opened, lm = bridge
    ids = np.random.default_rng(0).integers(3, 290, size=24)
    fit = LensFit.begin(lm)
    fit.add(text_jacobian(lm, ids, skip=4))
    fit.lens().save(tmp_path / "lens.pt")
    ours, theirs = JacobianLens.load(tmp_path / "lens.pt"), Theirs.load(str(tmp_path / "lens.pt"))
    assert theirs.validate_model(opened).source_layers == ours.source_layers == list(range(lm.n_layers - 1))
    assert (theirs.n_prompts, theirs.d_model) == (1, lm.n_units)
    read = theirs.readout(opened, torch.from_numpy(ids)[None], return_full_logits=True)
    stream = lm.record([ids], positions=[np.arange(len(ids))])
    for layer in ours.source_layers:
        states = stream[:, (layer + 1) * len(lm.sites.names)]
        expected = lm.log_probs(ours.transport(layer, states))
        torch.testing.assert_close(read.lens_logits[layer].log_softmax(-1), expected, rtol=1e-4, atol=1e-4)
    theirs.save(str(tmp_path / "theirs.pt"))  # with a note of where it is from, or none
    again = JacobianLens.load(tmp_path / "theirs.pt")
    assert all(torch.equal(again.j[layer], ours.j[layer]) for layer in ours.source_layers)


def test_transformer_lens_fits_the_same_jacobian_lens(bridge):
    from transformer_lens.tools.analysis import JacobianLens as Theirs

    opened, lm = bridge
    texts = ["The boats put out to sea, and the wind had changed.", "She read it once and put it in the drawer again."]
    theirs = Theirs.fit(opened, texts, corpus="two sentences", skip_first_positions=3, show_progress=False)
    fit = LensFit.begin(lm)
    for text in texts:
        fit.add(text_jacobian(lm, opened.to_tokens(text)[0].numpy(), skip=3))
    ours = fit.lens()
    assert theirs.n_prompts == ours.n_prompts == 2
    for layer in ours.source_layers:
        difference = (theirs.jacobians[layer] - ours.j[layer]).norm() / ours.j[layer].norm()
        assert float(difference) < 1e-5
