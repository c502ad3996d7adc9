"""``rsdyn.record``: model objects, names and modules in; trajectories out; what is handed in comes back as it was."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import rsdyn
from rsdyn.embedded import MODEL
from rsdyn.errors import UserError
from rsdyn.stream.recorded import Trajectories
from rsdyn.stream.text.tokens import split

TEXTS = ["In the beginning God created the heaven and the earth.", "A page of a manual.", "And it was so."]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def tiny(vocab_size):
    return LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=vocab_size
    )


def states_of_transformers(model, tokenizer, text):
    """resid_pre of the last token by transformers' own hidden_states, ``(L, D)``."""
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
    with torch.inference_mode():
        states = model(ids, output_hidden_states=True).hidden_states
    return torch.stack(states[:-1])[:, 0, -1]


def test_a_model_object_is_recorded_and_comes_back_as_it_was(model, tokenizer):
    model.train()
    model.model.layers[3].eval()
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    x = rsdyn.record(model, TEXTS, tokenizer=tokenizer)
    assert isinstance(x, Trajectories)
    assert x.shape == (3, 32, 128) == x.tensor.shape
    assert x.sites[:4] == ("resid_pre", "resid_mid") * 2 and x.layers[:4] == (0, 0, 1, 1)
    assert x.texts == tuple(TEXTS)
    for row, text in zip(x.tensor, TEXTS, strict=True):
        wanted = states_of_transformers(copy.deepcopy(model).eval(), tokenizer, text)
        torch.testing.assert_close(row[::2], wanted, atol=2e-5, rtol=1e-5)
    assert model.training and not model.model.layers[3].training and model.model.layers[4].mlp.training
    assert not frozen.requires_grad and model.model.norm.weight.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(UserError):
        rsdyn.record(model, ["x " * 5000], tokenizer=tokenizer)
    assert model.training and model.model.norm.weight.requires_grad
    frozen.requires_grad_(True)
    model.eval()


def test_names_objects_and_base_models_agree(model, tokenizer):
    by_name = rsdyn.record("embedded", TEXTS)
    for given in (model, model.model, AutoModel.from_pretrained(MODEL, dtype=torch.float32), rsdyn.find_lm("embedded")):
        x = rsdyn.record(given, TEXTS, tokenizer=tokenizer)
        torch.testing.assert_close(x.tensor, by_name.tensor, atol=1e-5, rtol=1e-5)
    assert by_name.label == "embedded" and by_name.certificate["attention"] < 1e-4


def test_token_ids_and_datasets_are_taken(model, tokenizer):
    x = rsdyn.record(model, TEXTS, tokenizer=tokenizer)
    ids = [[tokenizer.bos_token_id, *tokenizer(t, add_special_tokens=False)["input_ids"]] for t in TEXTS]
    for given in (ids, [np.array(i) for i in ids], [torch.tensor(i) for i in ids]):
        torch.testing.assert_close(rsdyn.record(model, given).tensor, x.tensor)
    table = Dataset.from_dict({"body": TEXTS, "kind": ["bible", "manual", "bible"]})
    y = rsdyn.record(model, table, tokenizer=tokenizer, text_column="body", group_column="kind")
    torch.testing.assert_close(y.tensor, x.tensor)
    assert y.groups == ("bible", "manual", "bible")


def test_several_positions(model, tokenizer):
    every = rsdyn.record(model, TEXTS, tokenizer=tokenizer, positions="all")
    last = rsdyn.record(model, TEXTS, tokenizer=tokenizer)
    lengths = [1 + len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in TEXTS]
    assert len(every) == sum(lengths)
    assert every.position.tolist() == [p for n in lengths for p in range(n)]
    ends = np.cumsum(lengths) - 1
    torch.testing.assert_close(every.tensor[ends], last.tensor, atol=1e-5, rtol=1e-5)
    drawn = rsdyn.record(model, TEXTS, tokenizer=tokenizer, positions=2)
    assert drawn.sequence.tolist() == [0, 0, 1, 1, 2, 2]
    where = [int(np.cumsum([0, *lengths])[s]) + int(p) for s, p in zip(drawn.sequence, drawn.position, strict=True)]
    torch.testing.assert_close(drawn.tensor, every.tensor[where], atol=1e-5, rtol=1e-5)


def test_a_cache_is_found_again_and_tells_two_models_apart(model, tokenizer, tmp_path):
    counts = []
    for _ in range(2):
        x = rsdyn.record(model, TEXTS, tokenizer=tokenizer, cache=tmp_path, progress=counts.append)
    assert sum(counts) == 3, "the second call reads what the first one recorded"
    config = tiny(4096)
    torch.manual_seed(0)
    one, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    a = rsdyn.record(one, [[1, 2, 3]], cache=tmp_path)
    b = rsdyn.record(other, [[1, 2, 3]], cache=tmp_path)
    assert not torch.equal(a.tensor, b.tensor)
    assert torch.equal(rsdyn.record(one, [[1, 2, 3]], cache=tmp_path).tensor, a.tensor)
    assert x.shape == (3, 32, 128)


def test_trajectories_are_indexed_saved_and_described(model, tokenizer, tmp_path):
    x = rsdyn.record(model, TEXTS, tokenizer=tokenizer, groups=["a", "b", "a"])
    assert x[0].shape == (32, 128) and torch.equal(x[-1], x.tensor[2])
    for which in (slice(1, None), [1, 2], np.array([False, True, True]), torch.tensor([1, 2])):
        part = x[which]
        assert torch.equal(part.tensor, x.tensor[1:]) and part.sequence.tolist() == [1, 2]
        assert part.groups == x.groups
    assert repr(x) == (
        "Trajectories(3 × 32 × 128, float32: model, 16 layers × (resid_pre, resid_mid); 1 token of each of 3 "
        "sequences; groups a (2), b (1); certified as a running sum)"
    )
    again = Trajectories.load(x.save(tmp_path / "x.safetensors"))
    assert torch.equal(again.tensor, x.tensor) and again.texts == x.texts and again.groups == x.groups
    assert again.certificate == x.certificate and again.origin is None and repr(again) == repr(x)
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        x.save(tmp_path / "x.pt")
    (tmp_path / "other.safetensors").write_bytes(b"what is this")
    with pytest.raises(UserError, match="cannot be read as trajectories"):
        Trajectories.load(tmp_path / "other.safetensors")


def test_to_xarray_names_the_axes(model, tokenizer):
    xarray = pytest.importorskip("xarray")
    x = rsdyn.record(model, TEXTS, tokenizer=tokenizer, groups=["a", "b", "a"], stored="bfloat16")
    found = x.to_xarray()
    assert isinstance(found, xarray.DataArray) and found.dims == ("trajectory", "sublayer", "unit")
    assert (found.sel(trajectory=found.group == "a").sizes["trajectory"], found.dtype) == (2, np.float32)


# -- any module --------------------------------------------------------------------------------------------------------


def test_a_vision_transformer():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=32,
                       patch_size=8)  # fmt: skip
    model, images = ViTModel(config).train(), torch.randn(5, 3, 32, 32)
    x = rsdyn.record(model, images, sites=[f"layers.{i}" for i in range(3)], positions="all")
    assert x.shape == (5 * 17, 3, 32) and model.training
    with torch.no_grad():
        states = model.eval()(images, output_hidden_states=True).hidden_states
    for s in range(3):
        torch.testing.assert_close(x.tensor[:, s].view(5, 17, 32), states[s])
    assert x.certificate["sums"] < 1e-5 and all(len(parts) == 2 for parts in x.certificate["parts"])


class Residual(nn.Module):
    """A block of a pre-activation ResNet; with ``after`` a ReLU follows the sum, as in the first ResNet."""

    def __init__(self, width, after=False):
        super().__init__()
        self.norm, self.conv, self.after = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1), after

    def forward(self, x):
        x = x + self.conv(torch.relu(self.norm(x)))
        return torch.relu(x) if self.after else x


def test_a_stage_of_a_resnet():
    torch.manual_seed(0)
    stage, images = nn.Sequential(*(Residual(6) for _ in range(4))), torch.randn(2, 6, 5, 5)
    x = rsdyn.record(stage, images, sites=["0", "1", "2", "3"], positions="all")
    assert x.shape == (2 * 25, 4, 6) and stage.training
    stage.eval()
    with torch.no_grad():
        wanted = stage[1](stage[0](images))
    torch.testing.assert_close(x.tensor[:, 2].view(2, 25, 6), wanted.flatten(2).transpose(1, 2))
    assert x.certificate["parts"] == [["conv"]] * 4


@pytest.mark.parametrize(
    ("stage", "sites", "said"),
    [
        (nn.Sequential(Residual(6), Residual(6)), ["0", "7"], r"no module '7'; it has 0, 1"),
        (nn.Sequential(Residual(6), Residual(6)), ["0"], "at least two points"),
        (nn.Sequential(Residual(6), Residual(6)), ["1", "0"], "is not the output of 1"),
        (nn.Sequential(Residual(6, after=True), Residual(6)), ["0", "1"], "a norm or a ReLU after the sum"),
        (nn.Sequential(Residual(6), nn.ReLU(), Residual(6)), ["0", "2"], "is not the output of 0"),
        (nn.Sequential(nn.Conv2d(6, 6, 1), Residual(6)), ["0", "1"], "does more than add"),
    ],
)
def test_sites_that_are_no_running_sum_are_refused(stage, sites, said):
    with pytest.raises(UserError, match=said):
        rsdyn.record(stage, torch.randn(2, 6, 5, 5), sites=sites)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stage.modules())


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_a_wrong_kind_of_argument_is_one_sentence_that_names_what_is_taken(model, tokenizer):
    for given, error, said in (
        ((7, TEXTS), TypeError, "model: int is not taken; give a transformers model"),
        ((nn.Linear(2, 2), TEXTS), TypeError, r"name its blocks, in order, with sites="),
        ((model, "one text"), TypeError, "texts: one str is not taken; give a list of strings"),
        ((model, 7), TypeError, "texts: one int is not taken"),
        ((model, ["a text", [1, 2]]), TypeError, "strings and others are mixed"),
        ((model, [7]), TypeError, r"texts\[0\] is a int"),
        ((model, []), UserError, "there are none"),
        ((model, ["a text", " "]), UserError, r"texts\[1\] is empty"),
        ((model, [[]]), UserError, "at least one"),
        ((model, [[1, 99999]]), UserError, "the model's vocabulary ends at 4095"),
    ):
        with pytest.raises(error, match=said) as raised:
            rsdyn.record(*given, tokenizer=tokenizer)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="strings need one"):
        rsdyn.record(model, TEXTS)
    with pytest.raises(TypeError, match="tokenizer: str is not taken"):
        rsdyn.record(model, TEXTS, tokenizer="gpt2")
    with pytest.raises(UserError, match="2 labels for 3 texts"):
        rsdyn.record(model, TEXTS, tokenizer=tokenizer, groups=["a", "b"])
    with pytest.raises(UserError, match="groups: none of the 3 sequences has a label"):
        rsdyn.record(model, TEXTS, tokenizer=tokenizer, groups=[None, "", None])
    with pytest.raises(TypeError, match="groups: one str is not taken"):
        rsdyn.record(model, TEXTS, tokenizer=tokenizer, groups="abc")
    for wrong in (0, "first", True):
        with pytest.raises(UserError, match="positions="):
            rsdyn.record(model, TEXTS, tokenizer=tokenizer, positions=wrong)


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    config = tiny(64)
    with pytest.raises(UserError, match="do not belong together"):
        rsdyn.record(LlamaForCausalLM(config), TEXTS, tokenizer=tokenizer)


def test_what_is_too_long_is_cut_only_when_asked(model, tokenizer):
    long = "word " * 600
    with pytest.raises(UserError, match=r"texts\[1\] has \d+ tokens with BOS, more than the model's context of 512"):
        rsdyn.record(model, ["short", long], tokenizer=tokenizer)
    x = rsdyn.record(model, ["short", long], tokenizer=tokenizer, truncate=True)
    assert x.position.tolist()[1] == 511


def test_the_import_takes_neither_torch_nor_lightning():
    import subprocess
    import sys

    code = "import sys, rsdyn; assert 'record' in dir(rsdyn); assert not {'torch', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, rsdyn.dynamics.rotation; assert not {'lightning', 'wandb', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- the autoencoder ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    """A stream whose states lie near a curved sheet: two coordinates tell them, and no plane does."""
    generator = torch.Generator().manual_seed(0)
    z = 5 * torch.rand(120, 6, 2, generator=generator) - 2.5
    curved = torch.cat([z.cos(), z.sin(), (2 * z).cos(), (2 * z).sin()], -1)
    tensor = curved @ torch.randn(8, 24, generator=generator) + 0.01 * torch.randn(120, 6, 24, generator=generator)
    return Trajectories(
        tensor,
        ("resid_pre", "resid_mid") * 3,
        (0, 0, 1, 1, 2, 2),
        torch.arange(120),
        torch.zeros(120, dtype=torch.int64),
    )


@pytest.mark.filterwarnings("ignore")
def test_an_autoencoder_is_fitted_and_judged_beside_pca(planted, capsys):
    cae = rsdyn.fit_autoencoder(planted, max_epochs=150, patience=30, batch_size=32, lr=3e-3)
    assert cae.widths[0] == 24 and cae.widths[-1] == 2
    assert cae.explained_variance > cae.explained_variance_pca > 0
    assert cae.by_sublayer.shape == cae.by_sublayer_pca.shape == (6,) and cae.mean_latents.shape == (6, 2)
    z = cae.encode(planted.tensor)
    assert z.shape == (120, 6, 2) and cae.decode(z).shape == planted.shape
    assert len(cae.losses["val"]) >= 1 and cae.best_epoch is not None
    assert f"explained variance {cae.explained_variance:.3f}" in repr(cae)
    # what it reports is what its own reconstruction of the test sequences gives
    judged = planted.tensor[split(120, val_size=0.1, test_size=0.15, seed=0)["test"]].reshape(-1, 24).double()
    missed = judged - cae.decode(cae.encode(judged)).double()
    wanted = 1 - missed.square().sum() / (judged - judged.mean(0)).square().sum()
    assert cae.explained_variance_raw == pytest.approx(float(wanted), abs=1e-4)
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_fitted_is_named(planted):
    with pytest.raises(TypeError, match="Tensor is not taken; give Trajectories"):
        rsdyn.fit_autoencoder(planted.tensor)
    with pytest.raises(UserError, match="cannot fill train, val and test"):
        rsdyn.fit_autoencoder(planted[:2], max_epochs=1)
    with pytest.raises(UserError, match="bottleneck"):
        rsdyn.fit_autoencoder(planted, bottleneck=25, max_epochs=1)


# -- measures ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(model, tokenizer):
    rng = np.random.default_rng(0)
    words = [line.split() for line in TEXTS]
    texts = [" ".join(str(w) for w in rng.permutation(words[i % 3] + words[(i + 1) % 3])) + f" {i}" for i in range(24)]
    x = rsdyn.record(model, texts, tokenizer=tokenizer)
    return x, rsdyn.measure(x, surrogates=20)


@pytest.mark.filterwarnings("ignore")
def test_measures_are_those_of_the_trajectories(measured):
    from rsdyn.dynamics import geometry, rotation

    x, found = measured
    np.testing.assert_allclose(found.cosine.value, geometry.cosine(x.tensor.double()).mean(0), atol=1e-5)
    np.testing.assert_allclose(found.speed.value, geometry.speed(x.tensor.double()).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.rotation.turns, -rotation.rotations(x.tensor.double().mean(0)), atol=1e-3)
    low, high = found.cosine.low, found.cosine.high
    assert low is not None and (low <= found.cosine.value).all() and (found.cosine.value <= high).all()
    assert found.correlation.value.shape == (31,) and found.mutual_information.value.shape == (31,)
    assert set(found.rotation.nulls) >= {"layer_shuffle", "token_shuffled", "untrained"}


@pytest.mark.filterwarnings("ignore")
def test_groups_are_measured_beside_each_other(measured, tmp_path):
    """Every other sequence is made longer; one has no label."""
    x, _ = measured
    longer = x.tensor * (1 + torch.arange(24) % 2)[:, None, None]
    labels = tuple("long" if i % 2 else "short" for i in range(23))
    x = replace(x, tensor=longer, groups=(*labels, None), origin=None)
    found = rsdyn.measure(x, controls=[], measures=["cosine", "velocity"])
    groups = found.by_group
    assert groups.names == ("long", "short") and groups.results.sequences.tolist() == [11, 12]
    speed = (x.tensor[:, 1:] - x.tensor[:, :-1]).norm(dim=-1)
    curve, apart = groups.curve("speed", "long"), groups.difference("speed")
    torch.testing.assert_close(curve.value, speed[1:23:2].mean(0).double(), rtol=1e-5, atol=1e-5)
    assert (curve.low < curve.value).all() and (curve.value < curve.high).all()
    wanted = (speed[1:23:2].mean(0) - speed[0:23:2].mean(0)).double()
    torch.testing.assert_close(apart.value, wanted, rtol=1e-4, atol=1e-4)
    rows = groups.results.rows
    assert rows["speed_level"].p < 0.01 < rows["cosine_level"].p
    assert groups.results.over == "sequences" and groups.results.unlabelled == 1
    assert "By group: " in repr(found) and "long - short" in found._repr_html_()
    assert "1 sequence has no label" in repr(groups)
    for wrong, said in ((("speed", "wide"), "group='wide'"), (("sped", "long"), "name='sped': by group there is")):
        with pytest.raises(UserError, match=said):
            groups.curve(*wrong)
    assert "groups_speed" in {panel.key for panel in found.panels}
    assert "By group</h2>" in found.report(tmp_path / "page.html").read_text()
    again = rsdyn.measure(Trajectories.load(x.save(tmp_path / "x.npz")), controls=[], measures=["cosine"])
    torch.testing.assert_close(again.by_group.curve("cosine", "long").value, groups.curve("cosine", "long").value)
    one = rsdyn.measure(replace(x, groups=("same",) * 24), controls=[], measures=["cosine"])
    assert one.by_group is None and "Nothing is given by group." in " ".join(one.notes)


@pytest.mark.filterwarnings("ignore")
def test_controls_are_recorded_from_where_the_trajectories_came(measured):
    x, found = measured
    assert set(found.controls) == {"token_shuffled", "untrained"}
    shuffled = rsdyn.record(x.origin.lm, [x.origin.sequences.shuffled(0)[i].tolist() for i in range(len(x))])
    from rsdyn.dynamics import geometry

    np.testing.assert_allclose(
        found["shuffled"].cosine.value, geometry.cosine(shuffled.tensor.double()).mean(0), atol=1e-5
    )
    assert not torch.allclose(found["untrained"].cosine.value, found.cosine.value, atol=0.05)


@pytest.mark.filterwarnings("ignore")
def test_findings_figures_and_the_page(measured, tmp_path):
    _, found = measured
    assert found.finding("cosine_trend").values["original"].defined
    assert "cosine" in repr(found) and "<table>" in found._repr_html_()
    from matplotlib.figure import Figure

    for panel in ("1E", "2b", "4B"):
        assert isinstance(found.plot(panel), Figure)
    page = found.report(tmp_path / "page.html")
    assert page.stat().st_size > 100_000 and b"<html" in page.read_bytes()[:2000]
    for call, said in (
        (lambda: found.plot("9Z"), "panel='9Z'"),
        (lambda: found["other"], "'other' was not measured"),
        (lambda: found.finding("no"), "the findings here have"),
        (lambda: found.curve("no"), "this was not measured"),
    ):
        with pytest.raises(UserError, match=said):
            call()


@pytest.mark.filterwarnings("ignore")
def test_the_shape_of_trajectories_has_its_rows_words_and_panels(measured):
    from rsdyn.dynamics import geometry
    from rsdyn.dynamics.similarity import cka

    x, _ = measured
    found = rsdyn.measure(x, ["untrained"], measures=["curvature", "similarity", "norm", "massive"])
    angle = geometry.curvature(x.tensor.double()).mean()
    row = found.finding("curvature")
    assert row.values["original"].value == pytest.approx(float(angle), abs=1e-5)
    assert row.values["original"].low < float(angle) < row.values["original"].high
    assert set(row.values) == {"original", "untrained"} and "Curvature: mean angle" in " ".join(found.notes)
    assert found.finding("curvature_shuffled_steps").null == "shuffled_steps"
    alike = [float(cka(x.tensor[:, s].double(), x.tensor[:, s + 1].double())) for s in range(1, 31)]
    np.testing.assert_allclose(found.curve("similarity/adjacent").value[1:], alike, atol=1e-4)
    assert set(found.finding("similarity_with_main").values) == {"untrained"}
    assert {"curvature", "similarity_map"} <= {panel.key for panel in found.panels}
    assert "mean angle between successive steps" in repr(found)


@pytest.mark.filterwarnings("ignore")
def test_phases_and_every_token_of_a_few_texts(model, tokenizer):
    pytest.importorskip("ruptures")
    x = rsdyn.record(model, TEXTS, tokenizer=tokenizer, positions="all")
    found = rsdyn.measure(x, [], measures=["cosine", "curvature", "phases"])
    assert found.results.phases is not None and found.finding("phases").values["original"].defined
    assert found.results.cosine.by_position is not None and found.results.curvature.over_tokens is not None
    with pytest.raises(UserError, match="'readout' is not one of activations"):
        rsdyn.measure(x, [], measures=["readout"])


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_measured_is_named(measured, tmp_path):
    x, _ = measured
    again = Trajectories.load(x.save(tmp_path / "x.safetensors"))
    with pytest.raises(UserError, match=r"Give controls=\[\]"):
        rsdyn.measure(again)
    alone = rsdyn.measure(again, [], measures=["cosine"])
    assert alone.cosine.value.shape == (31,) and not alone.controls
    with pytest.raises(UserError, match="rotation was not measured"):
        _ = alone.rotation
    with pytest.raises(UserError, match="'speling' is not one of"):
        rsdyn.measure(x, measures=["speling"])
    with pytest.raises(UserError, match="'twin' is not known"):
        rsdyn.measure(x, ["twin"])
    with pytest.raises(TypeError, match="controls: give a list"):
        rsdyn.measure(x, "shuffled")
    with pytest.raises(TypeError, match="give Trajectories"):
        rsdyn.measure(x.tensor)
    with pytest.raises(UserError, match="too few"):
        rsdyn.measure(x[:2], [], measures=["correlation"])


# -- perturbations -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_a_prompt_is_perturbed_beside_its_controls(measured, model, tokenizer):
    from matplotlib.figure import Figure

    x, _ = measured
    model.train()
    back = rsdyn.perturb(model, "In the beginning.", tokenizer=tokenizer, around=x, at=[0, 0.5, 1.0], grid=2)
    assert model.training
    model.eval()
    assert sorted({row.layer for row in back.rows}) == [0, 8, 15]
    assert {row.condition for row in back.rows} >= {"teleport", "stays put", "random writes", "attention frozen"}
    assert "stays put" in repr(back) and any("stay put" in note for note in back.notes)
    assert isinstance(back.plot(), Figure)
    named = rsdyn.perturb("embedded", ["In the beginning."], around=x, at=[0, 0.5, 1.0], grid=2)
    for ours, theirs in zip(back.rows, named.rows, strict=True):
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-3, abs=1e-5, nan_ok=True)
    noise = rsdyn.perturb(model, "In the beginning.", tokenizer=tokenizer, around=x, at=[8], kind="noise", points=3)
    assert {row.layer for row in noise.rows} == {8}


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_perturbed_is_named(measured, planted, model, tokenizer):
    x, _ = measured
    for arguments, error, said in (
        ((model, "In the beginning.", {"around": x.tensor}), TypeError, "around: Tensor is not taken"),
        ((model, [], {"around": x}), TypeError, "prompts: give one text"),
        ((model, "In the beginning.", {"around": planted}), UserError, "record them from this model"),
        ((model, "In the beginning.", {"around": x, "kind": "push"}), UserError, "kind='push'"),
        ((model, "In the beginning.", {"around": x, "at": [99]}), UserError, "no layer 99"),
        ((model, "", {"around": x}), UserError, "is empty"),
        ((model.model, "In the beginning.", {"around": x}), UserError, "LM head"),
    ):
        given, prompts, more = arguments
        with pytest.raises(error, match=said):
            rsdyn.perturb(given, prompts, tokenizer=tokenizer, **more)
