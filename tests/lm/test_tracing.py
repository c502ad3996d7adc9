"""Tracing a forward without weights, on toy decoders that write down their sums in every way we could think of."""

import pytest
import torch
from torch import nn

from rsdyn.lm.tracing import Term, UntraceableError, trace

D = 8


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(D, D)

    def forward(self, x, attention_mask=None):
        return self.out(x), None


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Layer(nn.Module):
    """One way of adding two blocks' outputs to the stream, given as a function of the layer and its input."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.norm_1, self.norm_2, self.norm_3 = nn.LayerNorm(D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention, self.mlp, self.dropout = Attention(), MLP(), nn.Dropout(0.1)

    def forward(self, x):
        return self.way(self, x)

    def attend(self, x):
        return self.attention(self.norm_1(x))[0]


class Decoder(nn.Module):
    def __init__(self, *ways, between=lambda x: x):
        super().__init__()
        self.embed, self.layers, self.norm = nn.Embedding(10, D), nn.ModuleList(map(Layer, ways)), nn.LayerNorm(D)
        self.between = between

    def forward(self, input_ids, use_cache):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = self.between(layer(x))
        return self.norm(x)


def trace_of(*ways, **options):
    with torch.device("meta"):
        return trace(Decoder(*ways, **options).eval())


def serial(layer, x):
    x = x + layer.attend(x)
    return x + layer.mlp(layer.norm_2(x))


def other_side(layer, x):
    x = layer.dropout(layer.attend(x)) + x
    return layer.dropout(layer.mlp(layer.norm_2(x))) + x


def in_place(layer, x):
    a = layer.attend(x)
    a += x
    m = layer.mlp(layer.norm_2(a))
    m += a
    return m


def casts_and_views(layer, x):
    x = x + layer.attend(x).to(x.dtype)
    flat = x.reshape(-1, D)
    return (flat + layer.mlp(layer.norm_2(flat))).view(x.shape).double().float()


def scaled(layer, x):
    x = x + layer.attend(x) * 0.5
    return torch.add(x, 2 * layer.mlp(layer.norm_2(x)) * 0.125)


def norms_behind_the_blocks(layer, x):
    x = x + layer.norm_1(layer.attention(x)[0])
    return x + layer.norm_2(layer.mlp(x))


@pytest.mark.parametrize(
    ("way", "mid", "adds"),
    [
        (serial, "norm_2", (("attention", 1.0), ("mlp", 1.0))),
        (other_side, "norm_2", (("attention", 1.0), ("mlp", 1.0))),
        (in_place, "norm_2", (("attention", 1.0), ("mlp", 1.0))),
        (casts_and_views, "norm_2", (("attention", 1.0), ("mlp", 1.0))),
        (scaled, "norm_2", (("attention", 0.5), ("mlp", 0.25))),
        (norms_behind_the_blocks, "mlp", (("norm_1", 1.0), ("norm_2", 1.0))),
    ],
)
def test_two_sums(way, mid, adds):
    found = trace_of(serial, way, serial)
    layer = found.layers[1]
    assert (layer.layer, layer.mid) == ("layers.1", f"layers.1.{mid}")
    assert (layer.attention, layer.mlp) == ("layers.1.attention", "layers.1.mlp")
    # a tuple's first tensor is the output, and attention's is its projection's; the outermost module gives the name
    assert layer.adds == tuple((Term(f"layers.1.{name}", scale),) for name, scale in adds)
    assert found.final_norm == "norm" and len(found.layers) == 3


@pytest.mark.parametrize(
    "way",
    [
        lambda layer, x: x + layer.attend(x) + layer.mlp(layer.norm_1(x)),
        lambda layer, x: x + (layer.attend(x) + layer.mlp(layer.norm_1(x))),
        lambda layer, x: layer.mlp(layer.norm_2(x)) + layer.attend(x) + x,
        lambda layer, x: (layer.attend(x).add_(layer.mlp(layer.norm_2(x)))).add_(x),
    ],
)
def test_one_sum_for_both_blocks(way):
    layer = trace_of(way, way).layers[1]
    assert layer.mid is None
    assert {term.module for term in layer.adds[0]} == {"layers.1.attention", "layers.1.mlp"} and len(layer.adds) == 1


def third_block(layer, x):
    x = serial(layer, x)
    return x + layer.norm_3(x)


def inline_norm(layer, x):
    x = x + layer.attend(x)
    return x + layer.mlp.down.weight.mean() * nn.functional.layer_norm(x, (D,))


@pytest.mark.parametrize(
    ("way", "why"),
    [
        (lambda layer, x: layer.norm_2(serial(layer, x)), "post-norm"),
        (lambda layer, x: serial(layer, x) * 0.5, "factor"),
        (lambda layer, x: layer.mlp(layer.attend(x)), "not its input plus"),
        (third_block, "adds to the stream 3 times"),
        (inline_norm, "no module of layers.0 reads the stream between"),
        (lambda layer, x: x + layer.attend(x).relu() + layer.mlp(layer.norm_1(x)), "not a module's output"),
        (lambda layer, x: layer.nothing(x), "does not run without weights"),
    ],
)
def test_what_cannot_be_recorded_is_refused(way, why):
    with pytest.raises(UntraceableError, match=why):
        trace_of(way, way)


@pytest.mark.parametrize(
    ("block", "name"),
    [(lambda layer, x: layer.attend(x), "attention"), (lambda layer, x: layer.mlp(layer.norm_1(x)), "mlp")],
)
def test_one_block_a_layer_is_attention_and_mlp_at_once(block, name):
    def one(layer, x):
        return x + block(layer, x)

    found, name = trace_of(one, one).layers[1], f"layers.1.{name}"
    assert (found.mid, found.attention, found.mlp, found.adds) == (None, name, name, ((Term(name),),))


def test_layers_that_do_not_follow_each_other():
    with pytest.raises(UntraceableError, match="no stack of layers"):
        trace_of(serial, serial, between=lambda x: x * 2)


def test_no_hook_is_left_and_no_number_is_needed():
    with torch.device("meta"):
        model = Decoder(serial, serial)
    trace(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    numbers = lambda layer, x: serial(layer, x) if (x.sum() > 0).item() or x.nonzero().shape[0] else x  # noqa: E731
    assert trace_of(numbers, numbers).layers[0].mid == "layers.0.norm_2"
