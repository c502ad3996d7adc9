"""The schema, its checks, and the command line that fills it."""

import dataclasses
import re
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from rsdyn.autoencoder.settings import CaeConfig
from rsdyn.config.command_line import CONFIGS, help_text, load_config, nearest_keys, preset_names
from rsdyn.config.schema import (
    UNUSED,
    Config,
    check,
    options,
    sections,
    to_dict,
    to_yaml,
    unused_by,
)
from rsdyn.config.trainer_options import RESERVED
from rsdyn.errors import UserError

# One value a key that is not its default: (text, value).
OTHER = {
    "seed": ("7", 7),
    "resume": ("runs/a/checkpoints/last.ckpt", "runs/a/checkpoints/last.ckpt"),
    "run.dir": ("out/x", "out/x"),
    "run.name": ("mine", "mine"),
    "lm.bos": ("none", "none"),
    "data.chat_template": ("user", "user"),
    "lm.name": ("gpt2", "gpt2"),
    "lm.label": ("mine", "mine"),
    "lm.revision": ("main", "main"),
    "lm.tokenizer": ("gpt2", "gpt2"),
    "lm.dtype": ("bfloat16", "bfloat16"),
    "lm.trust_remote_code": ("true", True),
    "lm.device_map": ("auto", "auto"),
    "lm.batch_tokens": ("16_384", 16384),
    "lm.matmul_precision": ("high", "high"),
    "lm.layout": ("sorted", "sorted"),
    "data.path": ("a b.txt", "a b.txt"),
    "data.stream": ("a b.npz", "a b.npz"),
    "data.name": ("Salesforce/wikitext", "Salesforce/wikitext"),
    "data.config": ("wikitext-2-raw-v1", "wikitext-2-raw-v1"),
    "data.split": ("train[:10%]", "train[:10%]"),
    "data.revision": ("b08601e", "b08601e"),
    "data.text_column": ("body", "body"),
    "data.limit": ("1e3", 1000),
    "data.l_min": ("0", 0),
    "data.l_max": ("900", 900),
    "data.strip": ("true", True),
    "data.truncate": ("yes", True),
    "data.condition": ("shuffled", "shuffled"),
    "data.order": ("corpus", "corpus"),
    "data.order_seed": ("3", 3),
    "data.document_column": ("title", "title"),
    "data.group_column": ("language", "language"),
    "data.positions": ("{sample: 4}", {"sample": 4}),
    "data.val_size": ("0.2", 0.2),
    "data.test_size": ("15000", 15000.0),
    "data.batch_by": ("sequence", "sequence"),
    "data.batch_size": ("1", 1),
    "data.shuffle_shards": ("1", 1),
    "cache.dir": ("/tmp/c", "/tmp/c"),
    "cache.dtype": ("float32", "float32"),
    "cache.enabled": ("False", False),
    "cache.shard_sequences": ("2", 2),
    "cae.layers": ("012", 12),
    "cae.bottleneck": ("3", 3),
    "cae.count": ("maps", "maps"),
    "cae.lr": ("3e-4", 3e-4),
    "cae.standardise": ("none", "none"),
    "cae.bias_init": ("mean", "mean"),
    "cae.warmup_steps": ("5", 5),
    "cae.schedule": ("constant", "constant"),
    "cae.plateau_factor": ("0.3", 0.3),
    "cae.plateau_patience": ("0", 0),
    "analysis.measures": ("[pca, cosine]", ["pca", "cosine"]),
    "analysis.conditions": ("original,untrained", ["original", "untrained"]),
    "analysis.untrained_seeds": ("2", 2),
    "analysis.samples": ("null", None),
    "analysis.resample": ("sequences", "sequences"),
    "analysis.density_threshold": ("0.5", 0.5),
    "analysis.components": ("3", 3),
    "analysis.on_train": ("true", True),
    "analysis.mi.estimator": ("ksg", "ksg"),
    "analysis.keep": ("200", 200),
    "analysis.rotation.nulls": ("[iaaft]", ["iaaft"]),
    "analysis.rotation.surrogates": ("99", 99),
    "analysis.rotation.shared": ("true", True),
    "analysis.rotation.window": ("4", 4),
    "analysis.rotation.units": ("[7, 1e1]", [7, 10]),
    "analysis.readout.samples": ("50", 50),
    "analysis.readout.lens": ("a.jlens.pt", "a.jlens.pt"),
    "analysis.readout.examples": ("0", 0),
    "analysis.jacobian.texts": ("4", 4),
    "analysis.jacobian.seeds": ("2", 2),
    "analysis.jacobian.sublayers": ("[0,3]", [0, 3]),
    "perturb.kind": ("noise", "noise"),
    "perturb.layers": ("[0.0, 0.5]", [0.0, 0.5]),
    "perturb.site": ("resid_mid", "resid_mid"),
    "perturb.position": ("all", "all"),
    "perturb.space": ("cae", "cae"),
    "perturb.checkpoint": ("best.ckpt", "best.ckpt"),
    "perturb.through": ("projection", "projection"),
    "perturb.off_plane": ("keep", "keep"),
    "perturb.prompt": ("Good day", "Good day"),
    "perturb.prompts": ("prompts.txt", "prompts.txt"),
    "perturb.from_text": ("20", 20),
    "perturb.prompt_group": ("wrong", "wrong"),
    "perturb.swap_group": ("correct", "correct"),
    "perturb.points": ("50", 50),
    "perturb.samples": ("200", 200),
    "perturb.steps": ("6", 6),
    "perturb.grid.n": ("5", 5),
    "perturb.grid.range": ("[-1, 1, 0, 2.5]", [-1.0, 1.0, 0.0, 2.5]),
    "perturb.noise.sigma": ("0.1", 0.1),
    "trainer.max_epochs": ("3", 3),
    "trainer.patience": ("2", 2),
    "trainer.devices": ("0,1", "0,1"),
    "trainer.num_nodes": ("2", 2),
    "trainer.accelerator": ("cpu", "cpu"),
    "trainer.precision": ("bf16-mixed", "bf16-mixed"),
    "trainer.timeout": ("60", 60),
    "trainer.options": ("{a: 1, b: [x, null]}", {"a": 1, "b": ["x", None]}),
    "tracking.mode": ("disabled", "disabled"),
    "tracking.project": ("p", "p"),
    "tracking.entity": ("team", "team"),
    "tracking.artifacts": ("false", False),
}
NEEDS = {
    "data.config": ["data.name=x"],
    "data.revision": ["data.name=x"],
    "perturb.space": ["perturb.checkpoint=x"],
    "perturb.checkpoint": ["perturb.space=cae"],
    "perturb.prompt_group": ["data.group_column=kind"],
    "perturb.swap_group": ["data.group_column=kind"],
}


def load(*words: str, script: str = "any") -> Config:
    return load_config(list(words), script)  # a script that has no say in which keys it uses


def message(*words: str, script: str = "any") -> str:
    with pytest.raises(UserError) as caught:
        load(*words, script=script)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    return text


def get(config: Config, key: str):
    value = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "my.yaml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# --- schema ----------------------------------------------------------------------------------------------------------


def test_defaults_are_the_schema():
    config = load()
    assert config == Config()
    assert isinstance(config.cae, CaeConfig)
    check(config)


@pytest.mark.parametrize("key", options())
def test_every_key_has_help_and_accepts_its_default(key):
    option = options()[key]
    assert option.rules.help.endswith(".")
    assert option.accepts(option.default)
    assert key in OTHER or len(option.rules.choices) == 1


def test_sections_have_a_line_of_help():
    assert list(sections()) == [
        *("run", "lm", "data", "cache", "cae", "analysis", "analysis.mi", "analysis.rotation"),
        *("analysis.readout", "analysis.jacobian", "perturb", "perturb.grid", "perturb.noise", "trainer", "tracking"),
    ]
    assert all(text.endswith(".") and "\n" not in text for text in sections().values())


def test_other_names_point_at_one_key_each():
    names = [name for option in options().values() for name in option.rules.also]
    leaves = {key.rpartition(".")[2] for key in options()}
    assert len(set(names)) == len(names)
    assert not leaves & set(names)


@pytest.mark.parametrize("key", OTHER)
def test_every_key_can_be_set_on_the_command_line_and_in_yaml(key, write):
    text, value = OTHER[key]
    config = load(*NEEDS.get(key, []), f"{key}={text}")
    assert get(config, key) == value
    assert type(get(config, key)) is type(value)
    assert get(config, key) != options()[key].default
    nested = "\n".join("  " * i + part + ":" for i, part in enumerate(key.split("."))) + f" {text}\n"
    assert load("--config", write(nested), *NEEDS.get(key, [])) == config
    # Read back, the resolved file gives the same settings.
    assert load("--config", write(to_yaml(config), "resolved.yaml")) == config


def test_check_refuses_a_wrong_type_set_from_python():
    config = Config()
    config.cae.layers = True
    with pytest.raises(UserError, match=r"cae\.layers=true is not allowed: it must be a whole number"):
        check(config)


def test_to_dict_is_plain():
    settings = to_dict(load("trainer.options={a: [1]}"))
    assert type(settings["trainer"]["options"]) is dict
    assert type(settings["trainer"]["options"]["a"]) is list
    assert not any(dataclasses.is_dataclass(value) for value in settings.values())


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["yes", "1e5", "010", "a=b", "true", "1_000", "~", "x: y", "[a", "a # b", "ä β"])
def test_text_stays_as_typed(text, write):
    config = load(f"run.name={text}")
    assert config.run.name == text
    assert load("--config", write(to_yaml(config))) == config


@pytest.mark.parametrize("text", ["yes", "1e5", "010", "on", "2024-01-01", "1:30", "0x1F"])
def test_text_in_yaml_stays_as_typed(text, write):
    assert load("--config", write(f"run:\n  name: {text}\n")).run.name == text


@pytest.mark.parametrize("text", ["null", "none", "None", "NULL"])
def test_null_unsets_optional_keys_only(text, write):
    assert load("run.name=x", f"run.name={text}").run.name is None
    assert load("data.limit=5", f"data.limit={text}").data.limit is None
    assert load("--config", write(f"data: {{limit: {text}}}\n")).data.limit is None
    assert load(f"data.text_column={text}").data.text_column == text
    assert "it must be a whole number >= 1" in message(f"cae.bottleneck={text}")


@pytest.mark.parametrize(("text", "value"), [("1e3", 1000), ("1_000", 1000), ("+5", 5), ("2.0", 2), (" 3 ", 3)])
def test_whole_numbers(text, value):
    assert load(f"trainer.max_epochs={text}").trainer.max_epochs == value


@pytest.mark.parametrize(("text", "value"), [("yes", True), ("1", True), ("TRUE", True), ("no", False), ("0", False)])
def test_booleans(text, value):
    assert load(f"data.truncate={text}").data.truncate is value


@pytest.mark.parametrize(
    ("text", "value"), [("4", 4), ("auto", "auto"), ("0,1", "0,1"), ("1,", "1,"), ("1e1", 10), ("2.0", 2)]
)
def test_devices(text, value):
    devices = load(f"trainer.devices={text}").trainer.devices
    assert (devices, type(devices)) == (value, type(value))


def test_options_are_typed_like_yaml_and_merge(write):
    path = write("trainer: {options: {a: 1e-3, b: '1', c: [yes, true, null], deep: {x: 1, y: 2}}}\n")
    config = load("--config", path, "trainer.options.deep.y=3", "trainer.options.profiler=simple")
    assert config.trainer.options == {
        "a": 1e-3,
        "b": "1",
        "c": ["yes", True, None],
        "deep": {"x": 1, "y": 3},
        "profiler": "simple",
    }
    assert load("--config", write(to_yaml(config), "again.yaml")) == config


# --- merging ---------------------------------------------------------------------------------------------------------


def test_files_merge_left_to_right_and_words_come_last(write):
    one = write("cae: {lr: 0.1, bottleneck: 3}\nseed: 1\n", "one.yaml")
    two = write("cae:\n  lr: 0.2\ncae.layers: 4\nrun:\n  # all commented out\n", "two.yaml")
    config = load("seed=3", "--config", one, f"--config={two}", "cae.count=maps", "seed=2")
    assert (config.cae.lr, config.cae.bottleneck, config.cae.layers, config.cae.count) == (0.2, 3, 4, "maps")
    assert config.seed == 2
    assert load(f"--config={two}", "--config", one).cae.lr == 0.1


def test_an_empty_file_changes_nothing(write):
    assert load("--config", write("# nothing\n")) == Config()


def test_a_file_without_suffix_is_found(write, tmp_path, monkeypatch):
    write("seed: 4\n", "mine")
    monkeypatch.chdir(tmp_path)
    assert load("--config", "mine").seed == 4
    assert load("--config", "./mine").seed == 4


@pytest.mark.parametrize("path", [CONFIGS / f"{name}.yaml" for name in preset_names()], ids=lambda path: path.stem)
def test_presets_load_open_with_their_command_and_hold_differences_only(path):
    config = load("--config", path.stem)
    first = path.read_text().splitlines()[0]
    command = re.fullmatch(rf"# python (?:train|analyze)\.py (--config {re.escape(path.stem)}\b.*)", first)
    assert command, first
    load(*command[1].split())
    settings = OmegaConf.to_container(OmegaConf.load(path))
    for section, values in settings.items():
        for name, value in values.items():
            assert options()[f"{section}.{name}"].default != value == get(config, f"{section}.{name}")


PRESETS = {  # preset: the family of tests/family_zoo.py with the sites of its model
    "llama-3.2-1b": "llama-llama3-rope",
    "smollm2": "llama",
    "smollm2-135m": "llama",
    "gemma-2-2b": "gemma2",
    "gemma-3-1b": "gemma3",
    "qwen2.5": "qwen2",
    "qwen3": "qwen3",
    "mistral-7b": "mistral",
    "phi-3": "phi3-sliding",
    "gpt2": "gpt2",
    "pythia": "neox-parallel",
    "opt": "opt",
    "olmo2": "olmo2",
    "paper": "llama-llama3-rope",
}


def test_every_preset_of_a_model_is_of_a_family_whose_sites_are_known():
    from family_zoo import PARALLEL, config_of

    from rsdyn.lm.sites import site_names

    assert {*PRESETS, "embedded"} == {*preset_names()}
    for preset, family in PRESETS.items():
        name = load("--config", preset).lm.name
        assert name.count("/") == 1 or name == "smollm2"
        assert site_names(config_of(family)) == ("resid_pre", "resid_mid")[: 1 if family in PARALLEL else 2], preset


@pytest.mark.parametrize("preset", sorted({*PRESETS} - {"paper"}))
def test_presets_stack_on_the_papers(preset):
    config, alone = load("--config", "paper", "--config", preset), load("--config", preset)
    assert (config.lm.name, config.lm.revision) == (alone.lm.name, alone.lm.revision)
    assert (config.data.limit, config.cae.standardise) == (105_000, "none")


def test_one_device_by_its_number_goes_with_a_device_map():
    assert load("lm.device_map=auto", "trainer.devices=1,").lm.device_map == "auto"
    assert load("lm.device_map=null", "trainer.devices=2").lm.device_map is None


def test_plan_is_for_the_caller():
    assert load("--plan", "seed=3") == load("seed=3")


def test_paper_preset_is_the_papers_run():
    config = load("--config", "paper")
    assert (config.lm.name, config.lm.dtype) == ("meta-llama/Llama-3.1-8B", "bfloat16")
    assert config.data.limit - config.data.test_size - config.data.val_size == 85_000
    assert (config.data.batch_by, config.data.batch_size, config.cae.standardise) == ("sequence", 1, "none")
    assert (config.trainer.max_epochs, config.trainer.patience, config.cae.lr) == (100, 10, 1e-3)
    cae = config.cae
    assert (cae.bottleneck, cae.layers, cae.warmup_steps, cae.schedule) == (2, "paper", 0, "constant")


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        # a key that is not there
        ("cae.bottelneck=3", ["cae.bottelneck=3", "Did you mean cae.bottleneck?"]),
        ("lr=1e-3", ["no key lr", "Did you mean cae.lr?"]),
        ("trainer.lr=1", ["Did you mean cae.lr?"]),
        ("model.name=x", ["Did you mean lm.name"]),
        ("model=x", ["Did you mean lm.name?"]),
        ("learning_rate=1", ["Did you mean cae.lr?"]),
        ("data.batch-size=3", ["Did you mean data.batch_size?"]),
        ("CAE.LR=3", ["Did you mean cae.lr?"]),
        ("cae.lr.x=3", ["Did you mean cae.lr?"]),
        ("trainer.epochs=3", ["Did you mean trainer.max_epochs?"]),
        ("trainer.gradient_clip_val=1", ["Did you mean trainer.options.gradient_clip_val?"]),
        ("trainer.option.a=1", ["Did you mean trainer.options?"]),
        ("config=paper", ["Did you mean --config"]),
        ("tracking.log_model=true", ["no key tracking.log_model"]),
        ("xyzzy=5", ["no key xyzzy", "--help"]),
        ("=5", ["no key", "--help"]),
        # a word that is no setting
        ("cae=5", ["cae=5", "cae is a section", "cae.bottleneck", "cae.bottleneck=2"]),
        ("cae.lr 3e-4", ["cae.lr", "has no value", "Write cae.lr=3e-4"]),
        ("cae.lr = 3e-4", ["Write cae.lr=3e-4"]),
        ("cae", ["cae is a section"]),
        ("paper", ["Did you mean --config paper?"]),
        ("--lr 3e-4", ["--lr is not an option", "write cae.lr=3e-4."]),
        ("--cae.lr=3e-4", ["write cae.lr=3e-4."]),
        ("--batch-size 3", ["write data.batch_size=3."]),
        ("--confg paper", ["--confg", "Did you mean --config?"]),
        ("--config", ["--config needs a name or a file", "embedded, gemma-2-2b"]),
        ("--config --print-config", ["--config needs a name or a file"]),
        ("--config papr", ["papr", "embedded, gemma-2-2b", "Did you mean --config paper?"]),
        ("--config nowhere/x.yaml", ["nowhere/x.yaml", "no such file", "embedded, gemma-2-2b"]),
        # a wrong type
        ("cae.lr=fast", ["cae.lr=fast (command line)", "a number > 0", "default, 0.001"]),
        ("cae.layers=ten", ["cae.layers=ten", "a whole number"]),
        ("cae.layers=2.5", ["cae.layers=2.5", "a whole number"]),
        ("cae.layers=[1]", ["cae.layers=[1]", "a whole number"]),
        ("cae.layers=papers", ["cae.layers=papers", "or paper, or null"]),
        ("cae.schedule=plateu", ["cae.schedule=plateu", "Did you mean cae.schedule=plateau?"]),
        ("cae.plateau_factor=1", ["cae.plateau_factor=1", "above 0 and below 1"]),
        ("cae.plateau_factor=0", ["cae.plateau_factor=0", "above 0 and below 1"]),
        ("cae.plateau_patience=-1", ["cae.plateau_patience=-1", ">= 0"]),
        ("cache.enabled=maybe", ["cache.enabled=maybe", "true or false"]),
        ("trainer.options=5", ["trainer.options=5", "a mapping"]),
        ("trainer.options.a=[1", ["trainer.options.a=[1", "not valid YAML"]),
        ("trainer.options.a=.inf", ["trainer.options.a=.inf", "finite"]),
        # a value out of range
        ("cae.lr=", ["cae.lr=", "has no value", "a number > 0", "default, 0.001"]),
        ("run.name=", ["run.name=", "has no value", "null"]),
        ("trainer.options.a=", ["trainer.options.a=", "has no value"]),
        ("cae.lr=nan", ["cae.lr=nan", "a number > 0"]),
        ("cae.lr=inf", ["cae.lr=inf", "a number > 0"]),
        ("cae.lr=1e999", ["cae.lr=1e999", "a number > 0"]),
        ("cae.lr=0", ["cae.lr=0 ", "a number > 0"]),
        ("cae.lr=-1", ["cae.lr=-1 ", "a number > 0"]),
        ("seed=-1", ["seed=-1", ">= 0"]),
        ("seed=4294967296", ["seed=4294967296", "<= 4294967295"]),
        ("data.limit=0", ["data.limit=0", ">= 1, or null"]),
        ("trainer.devices=0", ["trainer.devices=0", "auto"]),
        ("trainer.devices=many", ["trainer.devices=many", "auto", "0,1"]),
        ("cae.standardise=units", ["cae.standardise=units", "none, unit or unit_sublayer", "cae.standardise=unit?"]),
        ("trainer.precision=bf16", ["trainer.precision=bf16-mixed or trainer.precision=bf16-true"]),
        ("data.positions=first", ["data.positions=first", "last, all or {sample: k}", "data.positions='{sample: 4}'"]),
        ("data.positions=[last]", ["data.positions=", "last, all or {sample: k}"]),
        ("data.positions=", ["data.positions=", "has no value"]),
        ("data.positions.sample=3", ["data.positions.sample=3", "Did you mean data.positions?"]),
        ("data.val_size=1.5", ["data.val_size=1.5", "a fraction between 0 and 1, or a whole number"]),
        ("data.test_size=0", ["data.test_size=0", "a fraction between 0 and 1, or a whole number"]),
        ("lm.name=${oc.env:HF_TOKEN}", ["lm.name=${oc.env:HF_TOKEN}", "plain values"]),
        ("trainer.options.a=['${seed}']", ["trainer.options.a=${seed}", "plain values"]),
        ("run.name=???", ["run.name=???", "plain values"]),
        ("run.name=${lm.name}", ["run.name=${lm.name}", "plain values"]),
        ("run.dir=${HOME}/runs", ["run.dir=${HOME}/runs", "plain values"]),
        # values that do not go together
        ("data.path=a data.name=b", ["data.path=a", "data.name=b", "data.name=null"]),
        ("data.config=x", ["data.config=x", "Set data.name"]),
        ("data.l_min=500", ["data.l_min=500", "data.l_max=500", "data.l_max=900"]),
        ("data.l_min=499", ["data.l_min=499", "data.l_max=500"]),
        ("data.val_size=0.9", ["data.val_size=0.9", "data.test_size=0.15", "less than 1"]),
        ("data.limit=100 data.test_size=100", ["data.test_size=100", "data.limit=100"]),
        ("cae.layers=1", ["cae.layers=1", ">= 2", "cae.count=maps"]),
        ("cae.layers=0 cae.count=maps", ["cae.layers=0", ">= 1"]),
        ("analysis.conditions=original analysis.rotation.nulls=untrained", ["untrained", "add", "analysis.conditions"]),
        ("analysis.conditions=untrained analysis.rotation.nulls=untrained", ["Add original to analysis.conditions"]),
        ("perturb.space=cae", ["perturb.space=cae", "best.ckpt"]),
        ("perturb.checkpoint=x", ["perturb.checkpoint=x", "perturb.space=cae"]),
        ("perturb.prompts=a perturb.from_text=3", ["perturb.prompts=a", "perturb.from_text=3", "one place"]),
        ("perturb.grid.n=1", ["perturb.grid.n=1", ">= 2"]),
        ("perturb.grid.range=[2,1,0,1]", ["perturb.grid.range=[2.0,1.0,0.0,1.0]", "min below its max"]),
        ("perturb.grid.range=[0,1]", ["four numbers"]),
        ("perturb.noise.sigma=0", ["perturb.noise.sigma=0", "> 0"]),
        ("perturb.kind=teleprt", ["Did you mean perturb.kind=teleport?"]),
        ("lm.device_map=gpu", ["lm.device_map=gpu", "auto"]),
        ("lm.device_map=auto trainer.devices=2", ["lm.device_map=auto", "trainer.devices=2", "trainer.devices=1"]),
        ("lm.device_map=auto trainer.devices=auto", ["lm.device_map=auto", "trainer.devices=auto"]),
        ("lm.device_map=auto trainer.devices=0,1", ["lm.device_map=auto", "trainer.devices=0,1"]),
        ("lm.device_map=auto lm.layout=packed", ["lm.layout=packed", "lm.device_map=auto", "lm.layout=auto"]),
        ("lm.device_map=auto trainer.num_nodes=2", ["lm.device_map=auto", "trainer.num_nodes=2"]),
        ("--pla", ["--pla is not an option", "--plan"]),
        # lists
        ("analysis.measures=[corelation,pca]", ["Did you mean analysis.measures=[correlation,pca]?"]),
        ("analysis.measures=entropy", ["each once", "correlation", "default, [activations,"]),
        ("analysis.measures=[]", ["analysis.measures=[]", "a list such as"]),
        ("analysis.measures=pca,pca", ["analysis.measures=[pca,pca]", "each once"]),
        ("analysis.measures=[[pca]]", ["a list such as"]),
        ("analysis.measures=null", ["a list such as"]),
        ("analysis.rotation.nulls=[layer_shufle]", ["Did you mean analysis.rotation.nulls=[layer_shuffle]?"]),
        ("analysis.rotation.units=[1,x]", ["analysis.rotation.units=[1,x]", "a list of whole numbers >= 0, or null"]),
        ("analysis.rotation.units=[-1]", ["a list of whole numbers >= 0, or null"]),
        ("analysis.rotation.units=[1.5]", ["analysis.rotation.units=[1.5]", "whole numbers"]),
        ("analysis.mi=5", ["analysis.mi is a section", "analysis.mi.estimator"]),
        ("analysis.mi.estimater=kde", ["Did you mean analysis.mi.estimator?"]),
    ],
)
def test_a_mistake_is_one_message_with_its_cure(words, parts):
    text = message(*words.split())
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    "given", ["{sample: 0}", "{samples: 3}", "{sample: x}", "{sample: 1.5}", "{sample: [1]}", "{}"]
)
def test_a_sample_of_positions_is_a_whole_number(given):
    text = message(f"data.positions={given}")
    assert text.startswith(f"data.positions={given} ") and "data.positions='{sample: 4}'" in text


def test_positions_are_a_word_or_a_mapping_and_the_later_one_counts(tmp_path):
    drawn, every = tmp_path / "drawn.yaml", tmp_path / "every.yaml"
    drawn.write_text("data:\n  positions: {sample: 2}\n")
    every.write_text("data:\n  positions: all\n")
    for words, expected in [
        ([], "last"),
        (["data.positions=all"], "all"),
        (["data.positions={sample: 4}"], {"sample": 4}),
        (["--config", str(drawn)], {"sample": 2}),
        (["--config", str(drawn), "--config", str(every)], "all"),
        (["--config", str(every), "--config", str(drawn)], {"sample": 2}),
        (["--config", str(drawn), "data.positions={sample: 7}"], {"sample": 7}),
    ]:
        config = load_config(words, "train")
        assert config.data.positions == expected
        again = tmp_path / "again.yaml"
        again.write_text(to_yaml(config))
        assert load_config(["--config", str(again)], "train") == config


# script, what was typed, what was meant
TYPOS = [
    *[("train", word, meant) for word, meant in {
        "cae.bottelneck=3": "cae.bottleneck", "cae.bottlneck=3": "cae.bottleneck", "cae.learning_rate=1": "cae.lr",
        "cae.Lr=1e-3": "cae.lr", "lr=1e-3": "cae.lr", "cae.standardize=unit": "cae.standardise",
        "cae.normalize=unit": "cae.standardise", "cae.layer=4": "cae.layers", "cae.k=10": "cae.layers",
        "cae.biasinit=mean": "cae.bias_init", "cae.warmup=5": "cae.warmup_steps", "data.batchsize=5": "data.batch_size",
        "batch_size=5": "data.batch_size", "data.batch-by=vector": "data.batch_by", "data.lmin=5": "data.l_min",
        "data.max_length=5": "data.l_max", "data.max_samples=5": "data.limit", "data.dataset=x": "data.name",
        "data.subset=x": "data.config", "data.val_sise=0.1": "data.val_size", "trainer.epochs=3": "trainer.max_epochs",
        "max_epochs=3": "trainer.max_epochs", "trainer.gpus=2": "trainer.devices", "trainer.device=cpu":
        "trainer.accelerator", "trainer.patiance=3": "trainer.patience", "trainer.gradient_clip_val=1":
        "trainer.options.gradient_clip_val", "model=gpt2": "lm.name", "lm.model=gpt2": "lm.name",
        "lm.torch_dtype=x": "lm.dtype", "lm.revison=main": "lm.revision", "run.output_dir=x": "run.dir",
        "out=x": "run.dir", "sed=1": "seed", "ckpt_path=x": "resume", "cache.path=x": "cache.dir",
        "cache.shard_sequence=8": "cache.shard_sequences", "tracking.wandb=offline": "tracking.mode",
        "--lr=1e-3": "cae.lr=1e-3", "cae.standardise=units": "cae.standardise=unit", "tracking.mode=ofline":
        "tracking.mode=offline", "lm.dtype=bfloat": "lm.dtype=bfloat16",
    }.items()],
    *[("analyze", word, meant) for word, meant in {
        "analysis.measure=pca": "analysis.measures", "analysis.measures=[corelation]": "[correlation]",
        "analysis.n_samples=5": "analysis.samples", "analysis.mi.estimater=kde": "analysis.mi.estimator",
        "analysis.rotation.surogates=5": "analysis.rotation.surrogates",
        "analysis.conditions=[untrainde]": "[untrained]",
    }.items()],
    *[("perturb", word, meant) for word, meant in {
        "perturb.promt=x": "perturb.prompt", "perturb.kind=telport": "perturb.kind=teleport",
        "perturb.sigma=0.1": "perturb.noise.sigma", "perturb.offplane=keep": "perturb.off_plane",
        "perturb.site=residpre": "perturb.site=resid_pre",
    }.items()],
]  # fmt: skip


def test_fifty_typos_are_one_line_each_and_the_right_key_is_suggested(capfd, monkeypatch, tmp_path):
    """Through the scripts' own entry, over the three of them: no traceback, exit code 2, no folder left behind."""
    from rsdyn.run.script import run_script

    def it_ran(run):
        pytest.fail("it ran")

    monkeypatch.chdir(tmp_path)
    wrong = []
    for script, word, meant in TYPOS:
        assert run_script(script, it_ran, [word]) == 2
        said = capfd.readouterr()
        assert said.out == ""
        (line,) = said.err.splitlines()
        assert line.startswith(f"{script}.py: error: ")
        if meant not in line.partition("Did you mean ")[2].split("?")[0] and f"write {meant}" not in line:
            wrong.append((word, meant, line))
    print(f"{len(TYPOS)} typos, {len(TYPOS) - len(wrong)} right suggestions; wrong: {wrong}")
    assert len(TYPOS) >= 50 and len(TYPOS) - len(wrong) >= 0.9 * len(TYPOS)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "words", "parts"),
    [
        ("analyze", "cae.lr=1", ["cae.lr=1", "would change nothing", "train.py alone"]),
        ("analyze", "data.condition=shuffled", ["data.condition", "analysis.conditions"]),
        ("analyze", "analysis.on_train=true", ["train.py alone"]),
        ("analyze", "perturb.kind=noise", ["perturb.py alone"]),
        ("train", "perturb.kind=noise", ["perturb.py alone"]),
        ("perturb", "trainer.devices=2", ["runs in one process"]),
        ("perturb", "trainer.max_epochs=3", ["runs in one process"]),
        ("perturb", "perturb.noise.sigma=0.3", ["perturb.kind=teleport", "perturb.kind=noise"]),
        ("perturb", "perturb.kind=swap perturb.grid.n=5", ["perturb.grid.n=5", "perturb.kind=teleport"]),
        ("perturb", "perturb.through=projection", ["perturb.kind=teleport", "noise or swap"]),
        ("perturb", "perturb.kind=noise perturb.off_plane=keep", ["whole state", "perturb.through=projection"]),
        ("perturb", "analysis.samples=7", ["analysis.samples=7", "analyze.py"]),
        ("train", "analysis.samples=5", ["analysis.samples=5", "would change nothing", "analysis.on_train=true"]),
        ("train", "analysis.on_train=true analysis.components=5", ["analysis.components=5", "analyze.py"]),
    ],
)
def test_a_setting_that_the_script_does_not_use_is_refused(script, words, parts, write):
    text = message(*words.split(), script=script)
    for part in parts:
        assert part in text
    key = words.split()[-1]
    load("--config", write(key.replace("=", ": ")), script=script)  # in a file it may stand: presets are shared


def test_a_setting_that_the_script_uses_is_taken():
    assert load("analysis.on_train=true", "analysis.samples=5", script="train").analysis.samples == 5
    assert load("analysis.samples=5", script="analyze").analysis.samples == 5
    assert load("trainer.accelerator=cpu", script="perturb").trainer.accelerator == "cpu"


def test_a_seed_for_an_order_that_draws_nothing_is_refused():
    assert "data.order=corpus, which draws nothing" in message("data.order=corpus", "data.order_seed=0")


def test_every_unused_key_exists():
    for groups in UNUSED.values():
        for keys in groups.values():
            for key in keys:
                assert key in options() or (key.endswith(".") and key[:-1] in {*sections(), *options()})


@pytest.mark.parametrize("prompt", ["Expand ${HOME} in bash", "${seed}", "${ open", "???", "a: ${x} # b", "\\${a}"])
def test_a_prompt_is_taken_as_it_is_written(prompt, tmp_path):
    config = load_config([f"perturb.prompt={prompt}"], "perturb")
    assert config.perturb.prompt == prompt
    (tmp_path / "a.yaml").write_text(to_yaml(config))
    assert load_config(["--config", str(tmp_path / "a.yaml")], "perturb") == config
    assert load_config(["run.name=${HOME}-x"], "train").run.name == "${HOME}-x"


@pytest.mark.parametrize(("name", "instead"), RESERVED.items())
def test_options_that_rsdyn_sets_itself_are_refused(name, instead):
    text = message(f"trainer.options.{name}=3")
    assert f"trainer.options.{name}=3" in text
    assert f"Use {instead} instead" in text
    assert instead in options()


def test_fractions_and_counts_mix():
    assert load("data.val_size=0.9", "data.test_size=2", "data.limit=100").data.val_size == 0.9
    assert load("cae.layers=1", "cae.count=maps").cae.layers == 1


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("cae:\n  lr: fast\n", ["cae.lr=fast", "my.yaml, line 2", "a number > 0"]),
        ("cae:\n  layers: true\n", ["cae.layers=true", "a whole number"]),
        ("cae:\n  lr: [1, 2]\n", ["cae.lr=[...]", "a number > 0"]),
        ("cae:\n  lr: .nan\n", ["cae.lr=.nan", "a number > 0"]),
        ("cae:\n  lr: -1\n", ["cae.lr=-1 ", "a number > 0"]),
        ("cae:\n  lr:\n", ["cae.lr=", "has no value"]),
        ("lm:\n  name: null\n", ["lm.name=null", "it must be text"]),
        ("lm:\n  name: ''\n", ["lm.name=", "has no value"]),
        ("lm:\n  name: ${oc.env:HF_TOKEN}\n", ["lm.name=${oc.env:HF_TOKEN}", "my.yaml, line 2"]),
        ("cae: 5\n", ["cae=5", "my.yaml, line 1", "cae is a section"]),
        ("cae: [5]\n", ["cae=[...]", "cae is a section"]),
        ("cae:\n  bottelneck: 3\n", ["cae.bottelneck=3", "my.yaml, line 2", "cae.bottleneck?"]),
        ("model:\n  name: x\n", ["my.yaml, line 1", "no key model", "lm.name"]),
        ("trainer:\n  options:\n    logger: false\n", ["trainer.options.logger=false", "tracking.mode"]),
        ("cae:\n  lr: 1\n  lr: 2\n", ["cae.lr", "line 3", "line 2", "twice"]),
        ("cae:\n  lr: 1\ncae.lr: 2\n", ["cae.lr", "line 3", "line 2", "twice"]),
        ("cae:\n  lr: [1\nx: 2\n", ["my.yaml, line 3", "not valid YAML"]),
        ("cae:\n\tlr: 1\n", ["my.yaml, line 2", "not valid YAML"]),
        ("seed: 1\n---\nseed: 2\n", ["my.yaml", "not valid YAML"]),
        ("trainer:\n  options: &a {x: *a}\n", ["my.yaml, line 2", "*a"]),
        ("- seed\n", ["my.yaml", "key: value"]),
        ("seed\n", ["my.yaml", "key: value"]),
        ("? [a, b]\n: 1\n", ["my.yaml, line 1", "plain word"]),
        ("run:\n  name: !!python/object/apply:os.system [true]\n", ["run.name=[...]", "it must be text"]),
        ("[" * 1000 + "]" * 1000, ["my.yaml", "nested too deeply"]),
    ],
)
def test_a_mistake_in_yaml_names_file_line_and_key(text, parts, write):
    said = message("--config", write(text))
    for part in parts:
        assert part in said


def test_unreadable_files(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in message("--config", str(tmp_path / "binary.yaml"))
    assert "cannot be read" in message("--config", str(tmp_path))


def test_nearest_keys_finds_every_key_with_two_letters_swapped():
    for key in options():
        if len(key.rpartition(".")[2]) > 3:
            assert key in nearest_keys(key[:-3] + key[-2] + key[-3] + key[-1])


# --- printing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["cae.bottelneck=3", "--help"]])
def test_help_prints_every_key_and_leaves(words, capsys):
    with pytest.raises(SystemExit) as caught:
        load(*words)
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 120 for line in lines)
    assert lines[0].startswith("usage: python any.py")
    starts = [line.split()[0] for line in lines if re.match(r"  \w", line)]
    assert [word for word in starts if word in options()] == list(options())


def test_help_says_default_choices_and_meaning():
    assert help_text("analyze.py").startswith("usage: python analyze.py")
    text = " ".join(help_text("any.py", columns=120).split())
    for option in options().values():
        assert option.rules.help in text
        assert " | ".join(option.rules.choices) in text
    assert "cae.lr float 0.001 Learning rate of Adam. [> 0]" in text
    assert "data.limit int or null null Keep only" in text


@pytest.mark.parametrize("columns", [80, 140])
@pytest.mark.parametrize("script", ["train", "analyze", "perturb"])
def test_help_has_the_scripts_own_keys_and_fits(script, columns):
    lines = help_text(script, columns=columns).splitlines()
    assert max(map(len, lines)) <= columns
    named = [line.split()[0] for line in lines if re.match(r"  \w", line)]
    shown = [name for name in named if name in options()]
    assert shown == [key for key in options() if unused_by(key, script) is None]
    assert ("cae.lr" in shown, "perturb.kind" in shown) == (script == "train", script == "perturb")


@pytest.mark.parametrize(
    ("topic", "there", "not_there"),
    [
        ("cae", "cae.lr", "lm.name"),
        ("analysis.mi", "analysis.mi.estimator", "analysis.keep"),
        ("cae.lr", "cae.lr", "cae.count"),
    ],
)
def test_help_of_one_section_or_key(topic, there, not_there, capsys):
    with pytest.raises(SystemExit) as caught:
        load("--help", topic)
    said = capsys.readouterr().out
    assert caught.value.code == 0 and there in said and f"  {not_there} " not in said and "usage" not in said


def test_help_of_what_there_is_not():
    assert "Did you mean --help cae?" in message("--help", "caes")
    assert "The sections are run, lm, data" in message("--help", "caes")


def test_print_config_prints_yaml_that_reads_back(write, capsys):
    with pytest.raises(SystemExit) as caught:
        load("--print-config", "cae.lr=3e-4", "run.name=yes", "data.text_column=null")
    assert caught.value.code == 0
    config = load("--config", write(capsys.readouterr().out))
    assert (config.cae.lr, config.run.name, config.data.text_column) == (3e-4, "yes", "null")
    with pytest.raises(UserError):
        load("--print-config", "cae.lr=0")


def test_import_is_light():
    heavy = "{'torch', 'lightning', 'transformers', 'datasets', 'numpy', 'wandb'}"
    code = f"import sys, rsdyn.config.command_line, rsdyn.config.schema; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
