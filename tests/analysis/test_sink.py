"""Does the sink own the gain: a planted sink that does, one that is none, and massive units that carry it all."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2Model

from rsdyn.analysis import sink
from rsdyn.analysis.finding import Value
from rsdyn.analysis.sink import HELD, massive_of, measure_sink, products, sink_finding, sink_json, sink_words
from rsdyn.lm.jacobians import sublayer_jacobians
from rsdyn.lm.model import LanguageModel

D, LAYERS, STRENGTH = 32, 3, 3.0
NONE = torch.zeros(D, dtype=torch.bool)
TEXTS = [np.concatenate([[0], np.random.default_rng(i).integers(1, 50, size=9)]) for i in range(8)]


def planted(attention_to_the_first: float) -> LanguageModel:
    """Layers that add three times what they look at: the token 0, as far as its unit 0 draws them, else all tokens."""
    config = GPT2Config(
        n_embd=D, n_layer=LAYERS, n_head=1, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    config._attn_implementation = "sdpa"
    model = GPT2Model(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.zero_()
    model.wte.weight.normal_(generator=generator)
    model.wte.weight[0, 0] = 300.0
    for layer in model.h:
        for norm in (layer.ln_1, layer.ln_2):
            norm.weight.fill_(1.0)
        weight, bias = layer.attn.c_attn.weight, layer.attn.c_attn.bias
        bias[0] = attention_to_the_first  # the query, the same for all
        weight[0, D] = 1.0  # the key: unit 0, behind the norm
        weight[:, 2 * D :] = torch.eye(D)
        layer.attn.c_proj.weight.copy_(STRENGTH * torch.eye(D))
        layer.attn.c_proj.weight[:, 0] = 0  # or all tokens would become sinks
    return LanguageModel(model, name="planted")


def finding(lm):
    curves = {name: [] for name in ("full", "none", "rest", "first")}
    for tokens in TEXTS:
        measured = measure_sink(lm, tokens, NONE)
        measured |= {c: products(sublayer_jacobians(lm, tokens, context=c)) for c in ("full", "none")}
        for name, of_text in measured.items():
            curves[name].append(of_text)
    stacked = {n: {k: np.stack([c[k] for c in cs]) for k in sink.PRODUCTS} for n, cs in curves.items()}
    return sink_finding(stacked, [], [np.array([i]) for i in range(len(TEXTS))])


def test_a_sink_that_owns_the_gain():
    """All attention goes to the first token: nothing gains in context, and one token alone gains for lack of it."""
    found = finding(planted(60.0))
    rows = {row.key: row.log_gain.value for row in found.rows}
    assert abs(rows["full"]) < 0.01 and abs(rows["first"]) < 0.01 and rows["none"] > LAYERS * np.log(2)
    assert found.shares["alone"].value == pytest.approx(1, abs=0.01) and found.verdicts["alone"] == "owns it"
    assert found.without_first.value > 1  # another token takes all attention then: the last one in some texts
    words = " ".join(sink_words(found))
    assert "by its interval more than half" in words and "No unit is massive" in words
    assert [row["key"] for row in sink_json(found)["rows"]] == ["full", "rest", "first", "none"]


def test_attention_without_a_sink():
    """Equal attention to all tokens: of what a token sees 1 is itself alone, 1/2 beside another, 1/10 among ten."""
    lm = planted(0.0)
    found = finding(lm)
    assert found.verdicts["alone"] == "does not"
    assert abs(found.without_first.value) < 0.5
    # by hand: J = I + 3 w LN', the gain of each layer
    js = {c: sublayer_jacobians(lm, TEXTS[0], context=c)[::2] - torch.eye(D) for c in ("full", "first", "none")}
    for c, seen in (("full", 1 / 10), ("first", 1 / 2)):
        torch.testing.assert_close(js[c][0], seen * js["none"][0], rtol=1e-4, atol=1e-5)


def test_massive_units_that_carry_the_gain():
    """Unit 9 takes what unit 5 says to unit 12: held, nothing gains."""
    js = torch.eye(D, dtype=torch.float64).repeat(2, 1, 1)
    js[0, 9, 5] = js[1, 12, 9] = 20.0
    massive = NONE.clone()
    massive[9] = True
    kept = (~massive).nonzero()[:, 0]
    full, held = products(js), products(js[:, kept][:, :, kept])
    assert full["product_gain"][0] > 400 and held["product_gain"][0] == pytest.approx(1)
    same = {name: np.repeat(v[None], 5, 0) for name, v in full.items()}
    curves = dict.fromkeys(("full", "none", "rest", "first"), same)
    curves["massive"] = {name: np.repeat(v[None], 5, 0) for name, v in held.items()}
    found = sink_finding(curves, [9], [np.array([i]) for i in range(5)])
    assert found.shares["massive"].value == pytest.approx(1) and found.verdicts["massive"] == "owns it"
    assert not found.shares["alone"].defined and found.verdicts["alone"] == ""
    assert [row.key for row in found.rows] == list(HELD)
    words = " ".join(sink_words(found))
    assert "100.00 % [100.00, 100.00] (in nats) is gone" in words and "gains no more than in its context" in words


def test_the_units_and_what_is_struck_out():
    lm = planted(60.0)
    massive = massive_of(lm, TEXTS)
    assert massive.nonzero().flatten().tolist() == [0]
    found = measure_sink(lm, TEXTS[0], massive)
    js = sublayer_jacobians(lm, TEXTS[0])[:, 1:, 1:]
    product = torch.linalg.multi_dot([*js.double().flip(0)])
    assert float(found["massive"]["product_gain"][0]) == pytest.approx(
        float(torch.linalg.svdvals(product)[0]), rel=1e-4
    )


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.6, 0.9, "owns it"), (0.1, 0.4, "does not"), (0.4, 0.6, "not decided")]
)
def test_verdicts(low, high, verdict):
    assert sink._verdict(Value(0.5, low, high)) == verdict


def test_one_text_has_no_interval():
    one = {name: np.ones((1, 4)) * 2.0 for name in sink.PRODUCTS}
    more = {name: 3 * v for name, v in one.items()}
    found = sink_finding({"full": one, "none": more, "rest": one, "first": one}, [], [np.array([0])])
    assert found.rows[0].log_gain.low is None and found.texts == 1
    assert "100.00 % (in nats) is gone" in sink_words(found)[1] and "interval" not in " ".join(sink_words(found))
