"""Opening language models: what is known before the weights are read, and every way that it can go wrong."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_hub import Repo, commit_of, serve
from tiny_models import PROSE, tiny_lm, write_hub_cache
from transformers import AutoModel, AutoModelForCausalLM

from rsdyn.errors import UserError
from rsdyn.lm import source as module
from rsdyn.lm import weights
from rsdyn.lm.certificate import certify
from rsdyn.lm.continuing.continuation import continue_all, run_reference
from rsdyn.lm.source import find_lm, unused_weights

ROOT = Path(__file__).parents[2]


def random_sequences(n, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 300, size=int(k)) for k in rng.integers(5, longest, size=n)]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The tiny Llama of conftest in several safetensors files, with an index: the Hub's layout for large models."""
    return tiny_lm(tmp_path_factory.mktemp("sharded"), max_shard_size="20KB")


@pytest.fixture
def folder(tiny_llama, tmp_path):
    """A copy of the tiny Llama, to be damaged."""
    return shutil.copytree(tiny_llama, tmp_path / "lm")


def message(name, *, load=False, **options):
    if load:
        found = find_lm(str(name), **options)
        with pytest.raises(UserError) as caught:
            found.load()
    else:
        with pytest.raises(UserError) as caught:
            find_lm(str(name), **options)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(("name", "tokenizer", "revision", "device_map")), text
    return text


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- what is known --------------------------------------------------------------------------------------------------


def test_source_knows_the_model_without_its_weights(folder, tiny_llama, monkeypatch):
    for kind in (AutoModel, AutoModelForCausalLM):
        monkeypatch.setattr(kind, "from_pretrained", lambda *a, **k: pytest.fail("the weights were read"))
    source = find_lm(str(folder))
    assert (source.n_layers, source.n_sublayers, source.n_units, source.max_tokens) == (3, 6, 32, 256)
    assert source.identity() == find_lm(str(tiny_llama)).identity()
    assert source.stored_dtype() == "float32" and source.folder == folder


def test_parameters_are_those_of_the_model(tiny_llama):
    source = find_lm(str(tiny_llama))
    for kind, head in ((AutoModel, False), (AutoModelForCausalLM, True)):
        built = kind.from_pretrained(tiny_llama)
        assert source.n_parameters(head=head) == sum(p.numel() for p in built.parameters())


def test_identity_follows_the_bytes(folder, tiny_llama):
    before = find_lm(str(folder)).identity()
    assert before == find_lm(str(tiny_llama)).identity()
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert find_lm(str(folder)).identity() != before


def test_a_model_in_several_files_is_the_same_model(sharded, tiny_llama):
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert (sharded / "model.safetensors.index.json").exists()
    sequences = random_sequences(4)
    assert torch.equal(
        find_lm(str(sharded)).load().record(sequences), find_lm(str(tiny_llama)).load().record(sequences)
    )


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


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/nowhere/at/all", ["name=/nowhere/at/all", "no such folder", "embedded"]),
        ("./missing", ["no such folder"]),
        ("https://huggingface.co/openai-community/gpt2", ["no such folder", "a name on the Hugging Face Hub"]),
    ],
)
def test_missing_folder(name, words):
    assert all(word in message(name) for word in words)


def test_folder_mistakes(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no config.json" in message(tmp_path / "empty")
    assert "revision=v1 is for a model on the Hub" in message(folder, revision="v1")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "no *.safetensors file, and other formats can run code" in message(folder)
    (folder / "pytorch_model.bin").rename(folder / "part-1.safetensors")
    assert "neither model.safetensors nor model.safetensors.index.json" in message(folder)
    (folder / "config.json").write_text("{")
    assert "not valid JSON" in message(folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-100], "model.safetensors is damaged or cut short"),
        (lambda data: (10**9).to_bytes(8, "little") + data[8:], "model.safetensors is damaged or cut short"),
        (lambda data: data + b"more", "model.safetensors is damaged or cut short"),
        (lambda data: b"", "model.safetensors is damaged or cut short"),
    ],
)
def test_files_that_lie_or_end_early_are_named_before_they_are_read(folder, damage, words):
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert words in message(folder)


def test_an_index_that_does_not_fit_its_files(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "lm")
    index, shard = folder / "model.safetensors.index.json", sorted(folder.glob("model-*"))[1]
    text = index.read_text()
    tensor, _ = next((k, v) for k, v in json.loads(text)["weight_map"].items() if v == shard.name)
    for wrong, words in (
        (text.replace(tensor, "model.other.weight"), f"{shard.name} lacks model.other.weight"),
        (text.replace(shard.name, f"../{shard.name}"), "which is no safetensors file of this folder"),
        (text.replace(shard.name, "weights.bin"), "which is no safetensors file of this folder"),
        ("{", "is not an index of weights"),
        ("[]", "is not an index of weights"),
        ('{"weight_map": {}}', "names no weights"),
    ):
        index.write_text(wrong)
        assert words in message(folder), words
    index.write_text(text)
    shard.unlink()
    assert f"names {shard.name}, which is not in the folder" in message(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 5}, "asks for layers.3.input_layernorm.weight and 17 others, which its weights lack"),
        ({"intermediate_size": 48}, "other shapes than its config.json asks for"),
    ],
)
def test_a_config_that_is_another_models(folder, changes, words):
    """transformers would draw the missing weights at random, and only warn."""
    change_config(folder, **changes)
    assert words in message(folder, load=True)


@pytest.mark.parametrize(
    ("model_type", "word"),
    [("bert", "bert"), ("t5", "t5"), ("its-own", "does not know"), (None, "does not know"), ("vit", "vit")],
)
def test_kinds_of_model_that_have_no_stream_to_record(folder, model_type, word):
    change_config(folder, model_type=model_type, architectures=None)
    assert word in message(folder)


def test_remote_code_is_not_run_unless_asked(folder, tmp_path):
    auto = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    change_config(folder, model_type="its-own", auto_map=auto)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "trust_remote_code=true" in message(folder)
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_a_tokenizer_and_one_named_in_its_place(folder, tiny_llama, tmp_path):
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match=r"name=.*no tokenizer can be opened there.*`tokenizer`\.$") as caught:
        find_lm(str(folder)).tokenizer()
    assert "\n" not in str(caught.value) and "instantiate the backend tokenizer" in str(caught.value)
    own, named = (find_lm(str(lm), tokenizer=t) for lm, t in ((tiny_llama, None), (folder, str(tiny_llama))))
    assert own.tokenizer()("some words")["input_ids"] == named.tokenizer()("some words")["input_ids"]
    (tmp_path / "empty").mkdir()
    for name, words in (
        (str(tmp_path / "empty"), "no tokenizer can be opened there"),
        (str(tmp_path / "absent"), "no such folder"),
        ("nobody/nothing", "network is out of reach"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            find_lm(str(folder), tokenizer=name).tokenizer()
        assert str(caught.value).startswith(f"tokenizer={name}: ")


# --- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"intermediate_size": 352.0}, "'intermediate_size' expected int, got float"),
        ({"max_position_embeddings": None}, "'max_position_embeddings' expected int, got NoneType"),
        ({"hidden_size": "48"}, "'hidden_size' expected int, got str"),
        ({"rope_scaling": "linear"}, "config.json holds a value"),
        ({"hidden_act": "nothing"}, "correct that value in its config.json"),
    ],
)
def test_a_value_of_config_json_that_cannot_be(folder, changes, words):
    change_config(folder, **changes)
    assert words in message(folder)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_an_attention_kernel_of_gpus_gives_way_to_the_one_that_computes_the_same_everywhere(
    folder, tiny_llama, key, kernel
):
    change_config(folder, **{key: kernel})
    source, sequences = find_lm(str(folder)), random_sequences(3)
    assert kernel in source.notes[0] and "computes the same" in source.notes[0]
    assert torch.equal(source.load().record(sequences), find_lm(str(tiny_llama)).load().record(sequences))
    assert find_lm(str(tiny_llama)).notes == ()


# --- weights that would not be used ---------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [False, True])
def test_weights_that_the_config_has_no_layers_for_are_named(folder, caplog, head):
    change_config(folder, num_hidden_layers=2)
    lm = find_lm(str(folder)).load(head=head)
    words = "weights of layers 2 to 2, which its config.json does not have, are in its files and not used: "
    assert lm.unused == words + "layers.2.input_layernorm.weight and 8 more"
    assert lm.unused in caplog.text
    certificate = certify(lm, random_sequences(2))
    assert certificate.lines()[-1].endswith(f"Note: {lm.unused}.") and certificate.to_dict()["unused"] == lm.unused


def test_a_head_that_is_not_asked_for_is_no_weight_that_is_missed(tiny_llama, tmp_path):
    assert find_lm(str(tiny_llama)).load().unused is None
    names = ["lm_head.weight", "score.weight", "rotary_emb.inv_freq", "layers.0.self_attn.rotary_emb.inv_freq"]
    base = find_lm(str(tiny_llama)).load().base
    assert unused_weights(names, base) is None
    lora = "model.layers.0.self_attn.q_proj.lora_A.weight"
    assert unused_weights([*names, lora], base) == (
        f"weights are in its files and not used: {lora.removeprefix('model.')}"
    )


def test_an_adapter_says_that_it_is_one_and_how_it_is_merged(folder):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.2-1B"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    beside = message(folder)
    assert "beside its weights the folder has a PEFT adapter (LORA weights" in beside and "merge_and_unload" in beside
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    alone = message(folder)
    for words in ("a PEFT adapter", "meta-llama/Llama-3.2-1B", "pip install peft", "name=merged tokenizer=meta"):
        assert words in alone
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{")
    assert "a PEFT adapter" in message(folder)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_weights_that_do_not_fit_are_refused_before_they_are_read(tiny_llama, monkeypatch):
    source = find_lm(str(tiny_llama))
    n = source.n_parameters()
    monkeypatch.setattr(weights, "_MARGIN", 0)
    monkeypatch.setattr(weights, "available_memory", lambda device: 4 * n)
    source.load()
    source.check_memory(dtype="float32", processes=2)  # mapped from the same file by both
    monkeypatch.setattr(weights, "available_memory", lambda device: 4 * n - 1)
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *a, **k: pytest.fail("the weights were read"))
    with pytest.raises(UserError) as caught:
        source.load()
    for word in (f"name={tiny_llama}", "float32", "dtype=bfloat16", "device_map=auto", "smaller model"):
        assert word in str(caught.value)
    with pytest.raises(UserError, match=r"for each of 3 processes.* devices=1;.*smaller model"):
        source.check_memory(dtype="bfloat16", processes=3)
    with pytest.raises(UserError) as caught:
        source.without_training(0).check_memory(dtype="float32")
    assert "device_map" not in str(caught.value)  # which cannot help there
    dataclasses.replace(source, device_map="auto").check_memory(dtype="float32")


def test_available_memory_is_what_the_system_says(tmp_path, monkeypatch):
    words = Path("/proc/meminfo").read_text().split()
    total = 1024 * int(words[words.index("MemTotal:") + 1])
    assert 2**26 < weights.available_memory() <= total
    # a container's or a job's own bound, with what it uses beside file cache taken off
    for version, names in (
        (2, ("memory.max", "memory.current", "")),
        (1, ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")),
    ):
        group = tmp_path / str(version) / ("memory" if version == 1 else "") / "job"
        group.mkdir(parents=True)
        (group / names[0]).write_text("3000000\n")
        (group / names[1]).write_text("1000000\n")
        (group / "memory.stat").write_text(f"{names[2]}inactive_file 200000\n")
        monkeypatch.setattr(weights, "_CGROUPS", tmp_path / str(version))
        line = "0::/job" if version == 2 else "4:memory:/job"
        (tmp_path / "cgroup").write_text(f"9:cpu:/else\n{line}\n")
        monkeypatch.setattr(weights, "_OWN_CGROUPS", tmp_path / "cgroup")
        assert weights.available_memory() == 2_200_000
        (group / names[0]).write_text("max\n")
        assert weights.available_memory() > 2**26


# --- several devices ------------------------------------------------------------------------------------------------

ON_DISK = {"embed_tokens": "disk", "layers.0": "cpu", "layers.1": "disk", "layers.2": "disk", "norm": "disk"}


def test_layers_on_disk_give_the_same_stream(tiny_llama, caplog):
    """Which of accelerate's devices a layer lies on changes nothing; weights on disk are read as they are needed."""
    pytest.importorskip("accelerate")
    source, sequences = find_lm(str(tiny_llama)), random_sequences(20)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plain = source.load()
        spread = dataclasses.replace(source, device_map=ON_DISK | {"rotary_emb": "cpu"}).load()
        assert {p.device.type for p in spread.base.parameters()} == {"cpu", "meta"}
        assert spread.is_spread and spread.device == torch.device("cpu")
        recorded = spread.record(sequences, batch_tokens=60)
        assert torch.equal(recorded, plain.record(sequences, batch_tokens=60))
        assert torch.equal(recorded, spread.record(sequences, batch_tokens=60))
    finally:
        torch.set_num_threads(before)
    assert "4 of 6 parts" in caplog.text and "read from disk in every forward" in caplog.text


def test_layers_on_disk_continue_alike(tiny_llama):
    pytest.importorskip("accelerate")
    source, prompt = find_lm(str(tiny_llama)), random_sequences(1)[0]
    places = {f"model.{k}": v for k, v in (ON_DISK | {"rotary_emb": "cpu"}).items()} | {"lm_head": "disk"}
    found = []
    for lm in (source.load(head=True), dataclasses.replace(source, device_map=places).load(head=True)):
        reference = run_reference(lm, prompt)
        states = torch.randn(5, lm.n_units, generator=torch.Generator().manual_seed(0))
        points = [(0, states), (3, states), (4, states)]
        found.append([reference.stream, reference.log_probs])
        found[-1] += [c.log_probs for c in continue_all(lm, reference, points, log_probs=True)]
    for plain, spread in zip(*found, strict=True):
        torch.testing.assert_close(spread, plain, rtol=1e-5, atol=1e-5)


def test_auto_where_all_fits_on_one_device_is_the_plain_model(tiny_llama):
    pytest.importorskip("accelerate")
    sequences = random_sequences(5)
    lm = find_lm(str(tiny_llama), device_map="auto").load()
    assert torch.equal(lm.record(sequences), find_lm(str(tiny_llama)).load().record(sequences)) or not lm.is_spread


def test_device_map_says_what_it_needs(tiny_llama, monkeypatch):
    source = find_lm(str(tiny_llama), device_map="auto")
    with pytest.raises(UserError, match=r"device_map=auto.*conditions=\[original,token_shuffled\]"):
        source.without_training(0)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"device_map=auto needs the package accelerate: pip install"):
        source.load()


# --- the Hub --------------------------------------------------------------------------------------------------------

CASES = """
import json, sys, time
from rsdyn.errors import UserError
from rsdyn.lm.source import find_lm
answers = []
for name, revision in json.loads(sys.argv[1]):
    began = time.monotonic()
    try:
        source = find_lm(name, revision=revision)
        lm = source.load()
        answer = [source.commit, source.identity(), source.stored_dtype(), len(source.tokenizer()), lm.n_sublayers]
    except UserError as error:
        answer = str(error)
    answers.append([answer, time.monotonic() - began])
print(json.dumps(answers))
"""


def ask(home, cases, **env):
    env = {"PATH": os.environ["PATH"], "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"} | env
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", CASES, json.dumps(cases)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def online(tiny_llama, sharded, tmp_path_factory):
    """What a fresh process gets of a Hub of our own, over HTTP, and the folder of its cache afterwards."""
    pickled = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("pickled") / "lm")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    repos = {
        "o/one": Repo({"main": tiny_llama, "v1": sharded}),
        "o/gated": Repo({"main": tiny_llama}, gated=True),
        "o/pickled": Repo({"main": pickled}),
    }
    cases = [("o/one", None), ("o/one", "v1"), ("o/one", "v9"), ("o/gated", None), ("o/pickled", None), ("o/no", None)]
    home = tmp_path_factory.mktemp("hf")
    with serve(repos) as address:
        answers = dict(zip(cases, ask(home, cases, HF_ENDPOINT=address), strict=True))
    return answers, home


def test_a_model_of_the_hub_at_two_revisions(online, tiny_llama, sharded):
    answers, _ = online
    for revision, folder in ((None, tiny_llama), ("v1", sharded)):
        answer, _ = answers["o/one", revision]
        commit = commit_of(folder)
        assert answer == [commit, f"commit {commit}", "float32", len(find_lm(str(folder)).tokenizer()), 6]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (("o/one", "v9"), ["revision=v9", "no such branch"]),
        (("o/gated", None), ["name=o/gated", "gated", "huggingface.co/o/gated", "HF_TOKEN"]),
        (("o/pickled", None), ["name=o/pickled", "no safetensors", "revision"]),
        (("o/no", None), ["name=o/no", "no such model", "spelling"]),
    ],
)
def test_what_the_hub_refuses(online, case, words):
    answer, seconds = online[0][case]
    assert all(word in answer for word in words), answer
    assert "\n" not in answer and seconds < 10


def test_offline_from_the_cache_that_was_filled_online(online):
    """The same models again, without the network: by branch, by commit, and what was never fetched."""
    answers, home = online
    commit = answers["o/one", "v1"][0][0]
    cases = [("o/one", None), ("o/one", "v1"), ("o/one", commit), ("o/one", "v9"), ("o/other", None)]
    found = [answer for answer, _ in ask(home, cases, HF_HUB_OFFLINE="1")]
    assert found[0] == answers["o/one", None][0]
    assert found[1] == found[2] == answers["o/one", "v1"][0]
    for answer, word in zip(found[3:], ("revision v9", "o/other"), strict=True):
        assert "network is out of reach" in answer and word in answer


def test_hub_name_without_network(monkeypatch):
    monkeypatch.setattr(module, "hub_reachable", lambda: False)
    began = time.monotonic()
    text = message("nobody/no-such-model")
    assert "nobody/no-such-model" in text and "network is out of reach" in text
    assert time.monotonic() - began < 5


def test_train_from_a_populated_hub_cache(sharded, tmp_path):
    """``train.py lm.name=owner/name data.name=owner/text`` with HF_HUB_OFFLINE=1: model, tokenizer and parquet text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    hub, text = tmp_path / "hf" / "hub", tmp_path / "text"
    for config in ("wikitext-103-raw-v1", "wikitext-2-raw-v1"):
        (text / config).mkdir(parents=True)
        for split, n in (("train", 30), ("test", 9)):
            rows = [f"{config} {split} {i}. {PROSE[i % len(PROSE)]} {PROSE[(i + 1) % len(PROSE)]}" for i in range(n)]
            pq.write_table(pa.table({"text": rows}), text / config / f"{split}-00000-of-00001.parquet")
    other = tiny_lm(tmp_path / "other", layers=2)
    write_hub_cache(hub, "models", "owner/name", {"main": other, "v1": sharded})
    write_hub_cache(hub, "datasets", "owner/text", {"main": text})
    command = [
        *(sys.executable, "train.py", "lm.name=owner/name", "lm.revision=v1", "data.name=owner/text"),
        *("data.config=wikitext-2-raw-v1", "trainer.max_epochs=1", "cache.shard_sequences=8", "tracking.mode=disabled"),
        *(f"run.dir={tmp_path / 'run'}", f"cache.dir={tmp_path / 'cache'}"),
    ]
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert sum(summary["n_sequences"].values()) == summary["sequences_recorded"] == 30
    assert summary["n_sublayers"] == 6
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["lm"]["commit"] == commit_of(sharded)


def test_two_folders_of_one_name_are_told_apart_and_a_label_is_taken(tiny_llama, tmp_path):
    for run in ("first", "second"):
        shutil.copytree(tiny_llama, tmp_path / run / "checkpoint-500")
    labels = [find_lm(str(tmp_path / run / "checkpoint-500")).label for run in ("first", "second")]
    assert labels == ["first/checkpoint-500", "second/checkpoint-500"]
    mine = find_lm(str(tmp_path / "first" / "checkpoint-500"), label="mine")
    assert mine.label == "mine" and mine.without_training(0).label == "mine-untrained"
    assert mine.identity() == find_lm(str(tmp_path / "first" / "checkpoint-500")).identity()
