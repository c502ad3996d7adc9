"""The autoencoder: its widths, its structure, its standardisation, whether it learns, and reading it back."""

import contextlib
import os
import pickle

import numpy as np
import pytest
import torch
from systems import closed_curve
from torch import nn

from rsdyn.autoencoder.model import CompressingAutoencoder, read_checkpoint
from rsdyn.autoencoder.widths import MARGIN, default_layers, geometric_widths, is_starved, paper_layers
from rsdyn.dynamics.moments import moments
from rsdyn.dynamics.projection import PCA, Projection
from rsdyn.errors import UserError

S, D = 4, 24


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# -- widths ------------------------------------------------------------------------------------------------------------

PAPER = [4096, 1756, 753, 323, 138, 59, 25, 11, 5, 2]


def test_the_papers_widths():
    assert geometric_widths(4096, 2, 10) == PAPER
    with torch.device("meta"):
        model = CompressingAutoencoder(4096, 2, 10)
    assert model.widths == PAPER
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 17.6


def test_count_maps_is_one_width_more():
    assert geometric_widths(4096, 2, 9, "maps") == PAPER
    assert len(geometric_widths(4096, 2, 10, "maps")) == 11
    linear = [m for m in CompressingAutoencoder(D, 2, 3, count="maps").encoder if isinstance(m, nn.Linear)]
    assert len(linear) == 3


@pytest.mark.parametrize("k", [2, 3, 10, 17])
@pytest.mark.parametrize("d_bottle", [1, 2, 3, 7])
def test_ends_are_exact_and_nothing_is_narrower_than_the_bottleneck(k, d_bottle):
    for d_in in [*range(d_bottle + 1, 400), *range(400, 17_000, 61)]:
        widths = geometric_widths(d_in, d_bottle, k)
        assert len(widths) == k and widths[0] == d_in and widths[-1] == d_bottle
        assert widths == sorted(widths, reverse=True)
        assert all(isinstance(w, int) for w in widths)
        exact = np.geomspace(d_in, d_bottle, k)
        assert np.abs(np.array(widths) - exact).max() <= 0.5 + 1e-9 * d_in


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((64, 2, 1), "layers=1"),
        ((64, 2, 0), "layers=0"),
        ((64, 2, 0, "maps"), "layers=0"),
        ((64, 64, 10), "bottleneck=64"),
        ((64, 65, 10), "bottleneck=65"),
        ((64, 0, 10), "bottleneck=0"),
        ((1, 1, 10), "bottleneck=1"),
    ],
)
def test_impossible_widths(arguments, says):
    with pytest.raises(UserError, match=f"^{says}:"):
        geometric_widths(*arguments)


def test_one_map_is_allowed():
    assert geometric_widths(64, 2, 1, "maps") == geometric_widths(64, 2, 2) == [64, 2]


@pytest.mark.parametrize("argument", [{"count": "map"}, {"standardise": "units"}])
def test_a_mistyped_choice(argument):
    ((name, value),) = argument.items()
    with pytest.raises(ValueError, match=f"{name}='{value}'"):
        CompressingAutoencoder(D, 2, 3, **argument)


# -- structure ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [2, 3, 6])
def test_each_step_is_linear_norm_relu_and_the_last_linear_alone(layers):
    model = CompressingAutoencoder(D, 2, layers)
    step = [nn.Linear, nn.LayerNorm, nn.ReLU]
    for half, widths in ((model.encoder, model.widths), (model.decoder, model.widths[::-1])):
        assert [type(m) for m in half] == step * (layers - 2) + [nn.Linear]
        linear = [m for m in half if isinstance(m, nn.Linear)]
        assert [linear[0].in_features, *(m.out_features for m in linear)] == widths
        assert all(m.bias is not None for m in linear)
        assert [m.normalized_shape for m in half if isinstance(m, nn.LayerNorm)] == [(w,) for w in widths[1:-1]]


@pytest.mark.parametrize("lead", [(), (7,), (3, S), (0,)])
@pytest.mark.parametrize("standardise", ["none", "unit", "unit_sublayer"])
def test_shapes(lead, standardise):
    model = CompressingAutoencoder(D, 3, 4, standardise=standardise, n_sublayers=S)
    assert isinstance(model, Projection)
    x, sublayer = torch.randn(*lead, D), torch.zeros(lead, dtype=torch.long)
    z = model.encode(x, sublayer)
    assert z.shape == (*lead, 3)
    assert model.decode(z, sublayer).shape == model.reconstruct(x, sublayer).shape == x.shape
    assert [t.shape for t in model(x)] == [z.shape, x.shape]


# -- standardisation ---------------------------------------------------------------------------------------------------


@pytest.fixture
def data():
    """Units of very different means and spreads, at each sublayer other ones, one unit constant and one huge."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, S, D)) * rng.uniform(0.01, 30, (S, D)) + rng.normal(size=(S, D)) * 20
    x[..., 5] = 0.1
    x[..., 6] += 3000
    return torch.from_numpy(x).float()


SUBLAYER = torch.arange(S).expand(200, S)


@pytest.mark.parametrize(("standardise", "constant"), [("none", 0), ("unit", 1), ("unit_sublayer", S)])
def test_standardised_space(data, standardise, constant):
    model = CompressingAutoencoder(D, 2, 3, standardise=standardise, n_sublayers=S)
    assert model.set_statistics(moments(data)) == constant
    x = model.standardise(data, SUBLAYER)
    assert torch.allclose(model.unstandardise(x, SUBLAYER), data, rtol=1e-5, atol=1e-4)
    if standardise == "none":
        assert x is data
        return
    axes = (0, 1) if standardise == "unit" else 0
    mean, std = x.double().mean(axes), x.double().std(axes, correction=0)
    expected = torch.ones_like(std)
    expected[..., 5] = 0  # constant: left at scale 1
    assert mean.abs().max() < 2e-3  # the unit at 3000: float32 of the data's mean
    torch.testing.assert_close(std, expected, rtol=1e-4, atol=1e-6)
    assert torch.isfinite(model.reconstruct(data, SUBLAYER)).all()


def test_sublayers_are_standardised_each_by_its_own(data):
    model = CompressingAutoencoder(D, 2, 3, standardise="unit_sublayer", n_sublayers=S)
    model.set_statistics(moments(data))
    one = model.standardise(data[:, 2], torch.full((200,), 2))
    assert torch.equal(one, model.standardise(data, SUBLAYER)[:, 2])
    assert torch.equal(model.encode(data[:, 2], torch.full((200,), 2)), model.encoder(one))


def test_unit_sublayer_needs_sublayers():
    with pytest.raises(ValueError, match="n_sublayers=None"):
        CompressingAutoencoder(D, 2, 3, standardise="unit_sublayer")
    model = CompressingAutoencoder(D, 2, 3, standardise="unit_sublayer", n_sublayers=S)
    for call in (model.standardise, model.unstandardise, model.encode, model.reconstruct):
        with pytest.raises(ValueError, match="sublayer=None"):
            call(torch.zeros(1, D))


def test_statistics_are_stored_and_not_trained(data):
    model = CompressingAutoencoder(D, 2, 3, standardise="unit")
    model.set_statistics(moments(data))
    assert {"mean", "scale"} <= model.state_dict().keys()
    assert not {"mean", "scale"} & dict(model.named_parameters()).keys()


@pytest.mark.parametrize("standardise", ["none", "unit", "unit_sublayer"])
def test_bias_starts_at_the_data_mean(data, standardise):
    model = CompressingAutoencoder(D, 2, 3, standardise=standardise, n_sublayers=S)
    model.set_statistics(moments(data))
    model.start_bias_at(moments(data))
    with torch.no_grad():
        model.decoder[-1].weight.zero_()  # what is left is the bias
    found = model.reconstruct(data, SUBLAYER).detach()
    mean = data.double().mean(0) if standardise == "unit_sublayer" else data.double().mean((0, 1))
    torch.testing.assert_close(found.double(), mean.expand(200, S, D), rtol=1e-5, atol=1e-4)
    assert model.decoder[-1].bias.requires_grad


# -- learning ----------------------------------------------------------------------------------------------------------


def test_learns_a_curve_that_pca_cannot():
    """One dimension bent through six equal ones: two principal components explain a third, exactly."""
    x = closed_curve(512, 16, harmonics=3).float() * 2
    total = (x - x.mean(0)).square().sum()
    pca = 1 - (PCA.fit(x, 2).reconstruct(x) - x).square().sum() / total
    assert float(pca) == pytest.approx(1 / 3, abs=1e-3)

    model = CompressingAutoencoder(16, 2, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        for batch in x[torch.randperm(512)].split(64):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(batch)[1], batch).backward()
            optimizer.step()
    explained = 1 - (model.reconstruct(x) - x).square().sum() / total
    assert float(explained.detach()) > 0.5  # four seeds gave 0.57 to 0.84


# -- checkpoints -------------------------------------------------------------------------------------------------------

HYPER = {
    "d_in": D,
    "bottleneck": 2,
    "layers": 4,
    "count": "maps",
    "standardise": "unit_sublayer",
    "n_sublayers": S,
}


def content(model, **hyper):
    state = {f"autoencoder.{k}": v for k, v in model.state_dict().items()} | {"val_loss.value": torch.zeros(1)}
    return {
        "hyper_parameters": {"autoencoder": HYPER | hyper, "lr": 1e-3},
        "state_dict": state,
        "pytorch-lightning_version": "2.6.6",
    }


@pytest.fixture
def model(data):
    model = CompressingAutoencoder(**HYPER)
    model.set_statistics(moments(data))
    return model


def test_round_trip_is_bit_equal(model, data, tmp_path):
    torch.save(content(model), tmp_path / "best.ckpt")
    for path in (tmp_path / "best.ckpt", str(tmp_path / "best.ckpt")):
        found = CompressingAutoencoder.from_checkpoint(path)
        assert not found.training and found.widths == model.widths
        assert torch.equal(found.reconstruct(data, SUBLAYER), model.reconstruct(data, SUBLAYER))
        assert torch.equal(found.encode(data, SUBLAYER), model.encode(data, SUBLAYER))


class Malicious:
    """Makes a folder when it is unpickled by something that executes what it reads."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def refused(path, *says):
    with pytest.raises(UserError) as caught:
        CompressingAutoencoder.from_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"checkpoint={path}: ") and "best.ckpt" in message and "\n" not in message
    assert all(say in message for say in says), message


def test_missing_file_and_folder(tmp_path):
    refused(tmp_path / "none.ckpt", "no such file")
    refused(tmp_path, "no such file")


@pytest.mark.parametrize("text", ["", "not a checkpoint\n" * 50, "seed: 0\n", "\x80\x02"])
def test_some_other_file(tmp_path, text):
    path = tmp_path / "x.ckpt"
    path.write_text(text)
    refused(path, "cannot be read")


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_and_damaged(model, tmp_path, zipped):
    path = tmp_path / "x.ckpt"
    torch.save(content(model), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in [1, 2, 100, len(whole) // 2, len(whole) - 100, len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(path, "cannot be read")
    rng = np.random.default_rng(0)
    for _ in range(100):  # any byte at all: read or refused, never another error
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            CompressingAutoencoder.from_checkpoint(path)


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle", "beside the weights"])
def test_code_in_a_file_is_not_executed(model, tmp_path, how):
    path, ran = tmp_path / "x.ckpt", tmp_path / "ran"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Malicious(ran), protocol=2))
    elif how == "beside the weights":
        torch.save(content(model) | {"callbacks": Malicious(ran)}, path)
    else:
        torch.save({"hyper_parameters": Malicious(ran)}, path, _use_new_zipfile_serialization=how == "torch")
    refused(path, "does not load")
    assert not ran.exists()
    if how != "pickle":  # the trap is a trap
        torch.load(path, weights_only=False)
        assert ran.is_dir()


@pytest.mark.parametrize("value", ["1", "true", "YES", "y"])
def test_the_variable_that_turns_the_guard_off_is_refused(model, tmp_path, monkeypatch, value):
    torch.save(content(model), tmp_path / "x.ckpt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", value)
    with pytest.raises(UserError, match=f"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD={value}: .*Unset"):
        read_checkpoint(tmp_path / "x.ckpt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")
    read_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    "foreign",
    [
        {"state_dict": {"encoder.weight": torch.zeros(2, 2)}, "hyper_parameters": {"lr": 1e-3}, "epoch": 3},
        {"state_dict": {"encoder.weight": torch.zeros(2, 2)}, "hyper_parameters": None},
        {"state_dict": {}, "hyper_parameters": {"autoencoder": 7}},
        {"state_dict": [1], "hyper_parameters": {"autoencoder": HYPER}},
        {"hyper_parameters": {"autoencoder": HYPER}},
        {"encoder.weight": torch.zeros(2, 2)},
        [torch.zeros(2)],
        torch.zeros(2),
    ],
)
def test_a_foreign_checkpoint(tmp_path, foreign):
    torch.save(foreign, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", "not made by rsdyn")


@pytest.mark.parametrize(
    "hyper",
    [
        {"d_in": D + 1},
        {"layers": 3},
        {"count": "widths"},
        {"n_sublayers": None},
        {"no_such_argument": 1},
        {"layers": "4"},
    ],
)
def test_weights_that_do_not_fit(model, tmp_path, hyper):
    torch.save(content(model, **hyper), tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", "do not fit", "d_in=")


@pytest.mark.parametrize("wrong", ["missing", "too many", "not a tensor"])
def test_wrong_weights(model, tmp_path, wrong):
    broken = content(model)
    if wrong == "missing":
        del broken["state_dict"]["autoencoder.mean"]
    else:
        key = "autoencoder.extra" if wrong == "too many" else "autoencoder.mean"
        broken["state_dict"][key] = torch.zeros(1) if wrong == "too many" else "text"
    torch.save(broken, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", "do not fit")


# --- how many layers ---


def test_the_papers_ratio_decides_the_papers_k():
    assert paper_layers(4096, 2) == 10
    assert CompressingAutoencoder(128, 2, "paper").widths == [128, 56, 24, 11, 5, 2]  # the paper's last three widths
    assert CompressingAutoencoder(64, 2, "paper").widths[-2:] == [5, 2]
    assert paper_layers(3, 2) == 2
    for d_in in (16, 128, 768, 2048, 8192):
        widths = geometric_widths(d_in, 2, paper_layers(d_in, 2))
        assert 0.35 < (2 / d_in) ** (1 / (len(widths) - 1)) < 0.52
        assert is_starved(widths) == (widths[-2] < 6) == (d_in > 16)
    with pytest.raises(ValueError, match="layers='papers'"):
        CompressingAutoencoder(64, 2, "papers")


D_IN = (64, 80, 96, 128, 256, 320, 512, 576, 640, 768, 1024, 1152, 1600, 2048, 2304, 3072, 4096, 5120, 6144, 7168, 8192)


@pytest.mark.parametrize("count", ["widths", "maps"])
@pytest.mark.parametrize("d_bottle", [1, 2, 3, 4, 5, 8, 10, 16, 32, 50, 60, 63])
def test_the_default_is_the_deepest_up_to_the_papers_that_starves_no_latent(d_bottle, count):
    for d_in in D_IN:
        k = default_layers(d_in, d_bottle, count)
        widths = geometric_widths(d_in, d_bottle, k, count)
        assert all(width >= d_bottle + 4 for width in widths[1:-1])
        assert k <= paper_layers(d_in, d_bottle)
        for deeper in range(k + 1, paper_layers(d_in, d_bottle) + 1):
            assert min(geometric_widths(d_in, d_bottle, deeper, count)[1:-1]) < d_bottle + 4
        assert CompressingAutoencoder(d_in, d_bottle, count=count).widths == widths
        if d_bottle <= 3:
            assert len(widths) > 2  # not linear


def test_the_default_where_it_was_measured_and_for_the_papers_model():
    for d_in, inner in (
        (128, [45, 16, 6]), (576, [186, 60, 19, 6]), (640, [202, 64, 20, 6]), (4096, [1378, 464, 156, 53, 18, 6]),
    ):  # fmt: skip
        assert geometric_widths(d_in, 2, default_layers(d_in, 2)) == [d_in, *inner, 2]
    # counted as maps it is the same network
    assert CompressingAutoencoder(576, 2, count="maps").widths == CompressingAutoencoder(576, 2).widths


@pytest.mark.parametrize(("d_in", "d_bottle"), [(2, 1), (3, 2), (5, 2), (8, 2), (12, 4), (64, 63), (4096, 4095)])
def test_where_no_inner_layer_is_wide_enough_the_autoencoder_is_linear(d_in, d_bottle):
    assert geometric_widths(d_in, d_bottle, default_layers(d_in, d_bottle)) == [d_in, d_bottle]
    assert geometric_widths(d_in, d_bottle, default_layers(d_in, d_bottle, "maps"), "maps") == [d_in, d_bottle]


@pytest.mark.parametrize(("d_in", "d_bottle"), [(64, 64), (64, 65), (64, 0), (1, 1)])
@pytest.mark.parametrize("layers", [None, "paper"])
def test_a_rule_says_what_is_wrong_with_the_widths(d_in, d_bottle, layers):
    with pytest.raises(UserError, match=f"^bottleneck={d_bottle}:"):
        CompressingAutoencoder(d_in, d_bottle, layers)


def test_a_checkpoint_whose_layers_a_rule_decided_is_read_by_its_weights(tmp_path):
    """Another version may have another rule: until 0.1 ``None`` was the paper's ratio."""
    for count in ("widths", "maps"):
        old = CompressingAutoencoder(128, 2, paper_layers(128, 2), count=count)
        saved = content(old)
        saved["hyper_parameters"]["autoencoder"] = {"d_in": 128, "bottleneck": 2, "layers": None, "count": count}
        torch.save(saved, tmp_path / "old.ckpt")
        found = CompressingAutoencoder.from_checkpoint(tmp_path / "old.ckpt")
        assert found.widths == old.widths != CompressingAutoencoder(128, 2, count=count).widths
        x = torch.randn(5, 128)
        assert torch.equal(found.encode(x), old.eval().encode(x))


def test_a_narrow_layer_norm_loses_dimensions():
    """What a layer of three passes on is a curve: the singular values of the latents' Jacobian tell its dimension."""
    assert is_starved([128, 5, 3, 2])
    assert is_starved([128, 2 + MARGIN - 1, 2])
    assert not is_starved([128, 2 + MARGIN, 2])
    assert not is_starved([128, 2])
    assert is_starved([128, 4, 1]) and not is_starved([128, 5, 1])

    def rank(widths):
        torch.manual_seed(0)
        model = CompressingAutoencoder(widths[0], widths[-1], len(widths)).double()
        assert model.widths == widths
        ranks = []
        for x in torch.randn(20, widths[0], dtype=torch.float64):
            values = torch.linalg.svdvals(torch.autograd.functional.jacobian(model.encode, x))
            ranks.append(int((values > 1e-4 * values[0]).sum()))  # LayerNorm's epsilon leaks a little
        return max(ranks)

    assert rank(geometric_widths(128, 2, 6)) == 2
    assert rank(geometric_widths(128, 2, 10)) == 1  # ... 5, 3, 2
