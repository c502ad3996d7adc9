"""Every setting is either in the cache's key or changes nothing of what is recorded, and somebody has decided which."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import PROSE, tiny_lm

from rsdyn.config.command_line import load_config
from rsdyn.config.schema import options
from rsdyn.run import opening as experiment

# Settings that decide the recorded numbers, each with another value than the one below in `base`.
# "{x}" are files that the fixture makes.
IN_KEY = {
    "lm.name": "{other_lm}",
    "lm.revision": "step1000",
    "lm.bos": "</s>",
    "lm.tokenizer": "{lm}",  # by its name; what it makes of the text is in the key too
    "lm.dtype": "bfloat16",
    "lm.trust_remote_code": True,
    "lm.batch_tokens": 512,
    "lm.matmul_precision": "high",
    "lm.layout": "sorted",
    "data.path": "{other_text}",
    "data.name": "some/text",
    "data.config": "some-config",
    "data.split": "train[:50%]",
    "data.revision": "a-branch",
    "data.text_column": "other",
    "data.limit": 9,
    "data.order": "corpus",
    "data.order_seed": 5,
    "data.l_min": 60,
    "data.l_max": 95,
    "data.condition": "shuffled",
    "data.strip": True,
    "data.positions": "all",
    "cache.dtype": "float32",
}
# Settings that change nothing of what is recorded.
NOT_IN_KEY = {
    "data.document_column": "other",
    "data.group_column": "other",  # labels are no part of what is recorded
    "data.val_size": 0.2,
    "data.test_size": 2,
    "data.batch_by": "sequence",
    "data.batch_size": 7,
    "data.shuffle_shards": 9,
    "cache.shard_sequences": 5,  # what goes through the model together, which decides rounding alone
    "cache.dir": "{elsewhere}",
    "lm.device_map": "auto",  # where the layers are, which a GPU's name is not in the key for either: the canary looks
    "lm.label": "another name",
    "resume": "never",
    "seed": 5,  # of the original text in an order of its own seed; tested below for the rest
}
# Settings tested by themselves below.
APART = {"data.stream", "data.truncate", "data.chat_template", "cache.enabled"}
# Sections that neither the text, nor the LM, nor the cache may read.
OTHER_SECTIONS = {"run", "cae", "analysis", "perturb", "trainer", "tracking"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("key")
    for name, texts in (("text", PROSE * 3), ("other_text", PROSE[1:] * 3)):
        rows = [{"text": text, "other": text} for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "lm": str(tiny_lm(folder / "lm")),
        "other_lm": str(tiny_lm(folder / "other-lm", seed=1)),
        "text": str(folder / "text.jsonl"),
        "other_text": str(folder / "other_text.jsonl"),
        "elsewhere": str(folder / "elsewhere"),
    }


@pytest.fixture(scope="module")
def opened():
    """The real functions, each answer found once: they are asked thirty times."""
    return functools.cache(experiment.find_lm), functools.cache(experiment.open_corpus)


@pytest.fixture
def key_of(files, opened, tmp_path, monkeypatch):
    """The cache's key under changed settings, as a script gets it. What the Hub would give, local files give."""
    real_lm, real_rows = opened

    def find_lm(name, *, revision=None, **more):
        lm = real_lm(name, **more)
        return lm if revision is None else replace(lm, commit=revision)

    def open_corpus(*, path, name, config, split, revision, text_column, document_column, group_column):
        columns = {"text_column": text_column, "document_column": document_column, "group_column": group_column}
        return real_rows(path=files["text"] if name else path, split=split, **columns)

    monkeypatch.setattr(experiment, "find_lm", find_lm)
    monkeypatch.setattr(experiment, "open_corpus", open_corpus)
    base = {"lm.name": files["lm"], "data.path": files["text"], "data.l_min": 50, "cache.dir": str(tmp_path)}
    base["data.order_seed"] = "0"

    def key_of(condition=None, without=(), **changes):
        config = load_config([f"{k}={v}" for k, v in base.items()], "train")
        for key, value in changes.items():
            section, _, name = key.rpartition(".")
            value = value.format(**files) if isinstance(value, str) else value
            setattr(getattr(config, section) if section else config, name, value)
            if key == "data.name":
                config.data.path = None
        for section in without:
            setattr(config, section, None)
        run = SimpleNamespace(config=config, script="train", say=lambda line="": None)
        source = experiment.find_source(run)
        stream = experiment.make_stream(run, source, condition or config.data.condition)
        return stream.cache and stream.cache.key

    return key_of


def test_every_setting_is_classified():
    """A new setting fails here until somebody says, above, whether it decides the recorded numbers."""
    extraction = {key for key in options() if key.rpartition(".")[0].split(".")[0] not in OTHER_SECTIONS}
    classified = [*IN_KEY, *NOT_IN_KEY, *APART]
    assert len(classified) == len(set(classified))
    assert extraction == set(classified)
    assert {key.split(".")[0] for key in options() if "." in key} == {*OTHER_SECTIONS, "lm", "data", "cache"}
    assert all(options()[key].accepts(value) for key, value in {**IN_KEY, **NOT_IN_KEY}.items())


def test_each_that_decides_the_numbers_changes_the_key_and_no_other_does(key_of):
    keys = {"nothing": key_of(), **{name: key_of(**{name: value}) for name, value in IN_KEY.items()}}
    assert len(set(keys.values())) == len(keys)
    for name, value in NOT_IN_KEY.items():
        assert key_of(**{name: value}) == keys["nothing"], name


def test_the_other_sections_are_not_even_read(key_of):
    """But for those of what is refused before a text is opened: devices, the autoencoder, what is measured."""
    assert key_of(without=set(OTHER_SECTIONS) - {"trainer", "cae", "analysis"}) == key_of()


def test_the_seed_decides_the_controls_alone(key_of):
    for condition in ("shuffled", "untrained"):
        assert key_of(condition) != key_of(condition, seed=5)
        assert key_of(condition) != key_of()
    assert key_of("token_shuffled") == key_of("shuffled")  # one control, of train.py and of analyze.py
    assert key_of("shuffled", seed=5) != key_of("untrained", seed=5)


def test_the_seed_decides_the_order_of_the_text_unless_that_has_one_of_its_own(key_of):
    assert key_of(**{"data.order_seed": None}, seed=5) == key_of(**{"data.order_seed": 5})
    assert key_of(**{"data.order_seed": None}) == key_of()  # both are 0
    corpus = {"data.order": "corpus", "data.order_seed": None}
    assert key_of(**corpus, seed=5) == key_of(**corpus)


def test_truncation_counts_where_it_cuts(key_of, files, tmp_path):
    short = str(tiny_lm(tmp_path / "short", context=20))
    shorter = str(tiny_lm(tmp_path / "elsewhere" / "short", context=15))
    assert key_of(**{"data.truncate": True}) == key_of()  # nothing is cut
    cut = {key_of(**{"lm.name": name, "data.truncate": True}) for name in (short, shorter)}
    assert len(cut | {key_of()}) == 3


def test_the_seed_decides_which_tokens_are_drawn_and_nothing_of_all(key_of):
    def key(positions, **changes):
        return key_of(**{"data.positions": positions}, **changes)

    assert len({key("last"), key("all"), key({"sample": 1}), key({"sample": 2}), key({"sample": 2}, seed=5)}) == 5
    assert key("all", seed=5) == key("all") and key("last") == key_of()


def test_without_a_cache_there_is_no_key(key_of):
    assert key_of(**{"cache.enabled": False}) is None


def test_the_key_does_not_depend_on_where_the_model_and_the_text_are(key_of, files, tmp_path):
    """The weights and the tokens are known by their contents."""
    moved = tmp_path / "moved" / Path(files["lm"]).name
    shutil.copytree(files["lm"], moved)
    shutil.copy(files["text"], tmp_path / "moved")
    text = str(tmp_path / "moved" / Path(files["text"]).name)
    assert key_of(**{"lm.name": str(moved), "data.path": text}) == key_of()
