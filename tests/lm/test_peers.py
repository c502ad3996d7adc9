"""Our streams against TransformerLens' and nnsight's on the same weights: stored ones always, live where installed."""

import peer_streams
import pytest
import torch

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
