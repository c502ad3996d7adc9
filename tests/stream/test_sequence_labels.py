"""Which group each sequence belongs to: read by a column, kept with what is recorded, no part of a cache's key."""

import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from tiny_models import PROSE, tiny_tokenizer

import rsdyn
from rsdyn.errors import UserError
from rsdyn.stream.kept import KeptStream
from rsdyn.stream.recorded import Trajectories
from rsdyn.stream.text.corpus import open_corpus
from rsdyn.stream.text.sequence_labels import labels_from, labels_of
from rsdyn.stream.text.tokens import tokenise


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), add_bos_by_template=True)


def as_rows(texts, **columns):
    return Dataset.from_dict({"text": list(texts), **columns})


def test_labels_are_the_values_of_a_column_and_empty_ones_are_none():
    found = labels_of(as_rows(PROSE, task=["b", None, "a", "", " b ", "  "]), "task")
    assert found.names == ("a", "b") and found.code.tolist() == [1, -1, 0, -1, 1, -1]
    assert found.counts == {"a": 1, "b": 2} and found.n_missing == 3 and found.words() == "a (1), b (2)"
    assert found.members("b", "prompt_group").tolist() == [True, False, False, False, True, False]
    part = found.taken(np.array([0, 4, 1]))
    assert part.names == ("b",) and part.code.tolist() == [0, 0, -1]
    assert labels_of(as_rows(PROSE, right=[True, False] * 3), "right").names == ("False", "True")
    assert labels_of(as_rows(PROSE, x=[0.5, float("nan"), 0.5, 2.0, None, 2.0]), "x").code.tolist() == [
        0,
        -1,
        0,
        1,
        -1,
        1,
    ]
    features = Features({"text": Value("string"), "y": ClassLabel(names=["neg", "pos"])})
    classes = Dataset.from_dict({"text": PROSE[:3], "y": [1, 0, -1]}, features=features)
    assert labels_of(classes, "y").names == ("neg", "pos") and labels_of(classes, "y").code.tolist() == [1, 0, -1]


def test_a_column_that_makes_no_groups_is_refused():
    with pytest.raises(UserError, match=r"group_column=tusk is not among the columns of the text: text, task"):
        labels_of(as_rows(PROSE, task=["a"] * 6), "tusk")
    with pytest.raises(UserError, match=r"group_column=task holds lists"):
        labels_of(as_rows(PROSE, task=[["a"]] * 6), "task")
    with pytest.raises(UserError, match=r"score: 40 different values in 40 sequences \(0, 1, 10, 11, ...\).* most 30"):
        labels_from(range(40)).check("score")
    with pytest.raises(UserError, match=r"score: none of the 3 sequences has a label"):
        labels_from([None, "", " "]).check("score")
    with pytest.raises(UserError, match=r"swap_group=c: no sequence .* There is a \(1\), b \(1\)\."):
        labels_from(["a", "b"]).members("c", "swap_group")


@pytest.mark.parametrize("name", ["text.jsonl", "text.csv", "text.parquet"])
def test_a_file_brings_its_column(tmp_path, tokenizer, name):
    rows = [{"text": PROSE[i], "task": None if i == 2 else "even" if i % 2 == 0 else "odd"} for i in range(6)]
    path, table = tmp_path / name, Dataset.from_list(rows)
    {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[path.suffix[1:]](str(path))
    corpus = open_corpus(path=path, group_column="task")
    assert corpus.rows.column_names == ["text", "task"]
    found = tokenise(corpus.rows, tokenizer, l_min=10, seed=3, labels=labels_of(corpus.rows, "task"))
    wanted = [None if row == 2 else row % 2 for row in found.rows.tolist()]
    assert [None if code < 0 else code for code in found.labels.code.tolist()] == wanted
    assert found.rows.tolist() != list(range(6))
    assert tokenise(corpus.rows, tokenizer, l_min=10, seed=3).digest == found.digest
    assert found.shuffled(1).labels is found.labels
    with pytest.raises(UserError, match=r"data.group_column=tusk is not in path=.*Columns there: text, task"):
        open_corpus(path=path, group_column="tusk")
    assert open_corpus(path=path, document_column="task", group_column="task").rows.column_names == ["text", "task"]


def test_recorded_trajectories_keep_theirs(tiny_llama, tmp_path):
    x = rsdyn.record(str(tiny_llama), PROSE, groups=["a", None, "b", "a", "", "b"])
    assert x.groups == ("a", None, "b", "a", None, "b")
    assert "groups a (2), b (2)" in repr(x)
    assert [len(part) for part in x.to_dsa()] == [2, 2]
    for name in ("x.npz", "x.safetensors"):
        assert Trajectories.load(x.save(tmp_path / name)).groups == x.groups
    assert x.to_xarray().group.values.tolist() == ["a", "", "b", "a", "", "b"]
    assert rsdyn.load(x.to_xarray()).groups == x.groups
    some = KeptStream(x[[1, 3, 5]]).sequences.labels
    assert some.names == ("a", "b") and some.code.tolist() == [-1, 0, 1]
    plain = rsdyn.record(str(tiny_llama), PROSE)
    assert plain.groups is None and KeptStream(plain).sequences.labels is None
    assert plain.digest() == x.digest()
    (tmp_path / "s.npz").unlink(missing_ok=True)
    np.save(tmp_path / "s.npy", x.tensor.numpy())
    about = {"axes": ["trajectory", "sublayer", "unit"], "sites": ["resid_pre", "resid_mid"]}
    (tmp_path / "s.json").write_text(json.dumps(about | {"groups": ["a", None, "b", "a", None, "b"]}))
    assert rsdyn.load(tmp_path / "s.npy").groups == x.groups
