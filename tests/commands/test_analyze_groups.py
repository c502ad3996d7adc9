"""analyze.py by group of sequences: from a text and from a stream, in one process and in two, and mistakes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import PROSE

import rsdyn
from rsdyn.analysis.stored import unflatten
from rsdyn.commands import analyze, train

ROOT = Path(__file__).parents[2]
N = 48
FEW = ["tracking.mode=disabled", "trainer.accelerator=cpu", "analysis.rotation.surrogates=19"]
MEASURES = "analysis.measures=[cosine,norm,correlation,mutual_information,rotation,pca]"


@pytest.fixture(scope="module")
def place(tiny_llama, tmp_path_factory):
    """Rows of twelve documents, of two languages by document, one task for each row, a score, and one value for all."""
    folder = tmp_path_factory.mktemp("groups")
    rows = [
        {"text": f"{PROSE[i % len(PROSE)]} {i}", "document": i // 4, "language": "ab"[i // 4 % 2],
         "task": None if i % 9 == 0 else "xyz"[i % 3], "score": i / 7, "one": "same"}
        for i in range(N)
    ]  # fmt: skip
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words_of(place, tiny_llama, **more):
    every = {"lm.name": tiny_llama, "data.path": place / "text.jsonl", "data.l_min": 20, "data.l_max": 400,
             "data.document_column": "document", "analysis.conditions": "[original]", "cache.dir": place / "cache",
             "cache.shard_sequences": 16, "analysis.components": 4}  # fmt: skip
    return [MEASURES, *FEW, *(f"{key}={value}" for key, value in (every | more).items())]


@pytest.fixture(scope="module")
def whole(place, tiny_llama):
    assert analyze.main(words_of(place, tiny_llama, **{"data.group_column": "language", "run.dir": place / "run"})) == 0
    return place / "run"


def results_of(folder):
    with np.load(folder / "results.npz", allow_pickle=False) as file:
        return unflatten({name: file[name] for name in file.files})


def test_every_output_has_the_groups(whole, place, tiny_llama):
    found = results_of(whole).by_group
    assert found.names == ("a", "b") and found.sequences.tolist() == [24, 24] and found.documents.tolist() == [6, 6]
    assert (found.over, found.exchange, found.unlabelled) == ("documents", "documents", 0)
    summary = json.loads((whole / "summary.json").read_text())
    table = summary["by_group"]
    assert [row["key"] for row in table["rows"]] == list(found.rows) and table["contrasts"] == ["a - b"]
    level = next(row for row in table["rows"] if row["key"] == "cosine_level")
    assert level["values"]["a"]["value"] == pytest.approx(float(found.curves["cosine"].value[0].mean()))
    assert 0 < level["differences"]["a - b"]["p"] <= level["differences"]["a - b"]["p_holm"] <= 1
    assert "NaN" not in (whole / "summary.json").read_text() and table["answer"] in summary["answer"]
    markdown = (whole / "findings.md").read_text()
    assert "## By group" in markdown and "| a (24 sequences) | b (24 sequences) | a - b | p | Holm |" in markdown
    page = (whole / "report.html").read_text()
    assert ">By group</h2>" in page and "groups_cosine_difference" in page
    names = {file.stem for file in (whole / "figures").glob("groups_*.png")}
    assert {"groups_cosine", "groups_cosine_difference", "groups_information", "groups_dimensions"} <= names
    # the mean over the groups, as large as each other, is the whole
    whole_curve = results_of(whole).main.cosine.mean.value
    torch.testing.assert_close(found.curves["cosine"].value.mean(0), whole_curve, rtol=1e-5, atol=1e-6)


def test_other_labels_take_nothing_through_the_model(whole, place, tiny_llama, tmp_path, capsys):
    more = {"data.group_column": "task", "run.dir": tmp_path / "run", "analysis.measures": "[cosine,norm]"}
    assert analyze.main(words_of(place, tiny_llama, **more)) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "complete" in out and "not loaded" in out
    assert re.search(r"groups: x \(\d+\), y \(\d+\), z \(\d+\); 6 without a label, in no group", out)
    found = results_of(tmp_path / "run").by_group
    assert found.second == ("the rest",) * 3 and found.unlabelled == 6 and found.exchange == "within"
    assert "6 sequences have no label: they are in the whole alone." in out


def test_two_processes_find_what_one_finds(whole, place, tiny_llama, tmp_path):
    more = {"data.group_column": "language", "run.dir": tmp_path / "two", "trainer.devices": 2}
    command = [sys.executable, str(ROOT / "analyze.py"), *words_of(place, tiny_llama, **more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    one, two = results_of(whole).by_group, results_of(tmp_path / "two").by_group
    assert list(one.rows) == list(two.rows) and one.notes == two.notes
    for key, row in one.rows.items():
        for name in ("value", "interval", "difference", "p", "p_holm"):
            mine, theirs = getattr(row, name), getattr(two.rows[key], name)
            close = 0.005 if name.startswith("p") else 1e-5  # a permutation that gives as much, but for rounding
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=close, equal_nan=True, msg=f"{key} {name}")


def test_a_stream_of_one_s_own_brings_its_groups(place, tiny_llama, tmp_path, capsys):
    texts = [f"{PROSE[i % len(PROSE)]} {i}" for i in range(N)]
    x = rsdyn.record(str(tiny_llama), texts, groups=["b" if i % 2 else "a" for i in range(N - 1)] + [None])
    x.save(tmp_path / "x.npz")
    few = ["analysis.measures=[cosine,norm]", *FEW, f"run.dir={tmp_path / 'run'}"]
    assert analyze.main([f"data.stream={tmp_path / 'x.npz'}", *few]) == 0
    assert "groups: a (24), b (23); 1 without a label, in no group" in capsys.readouterr().out
    found = results_of(tmp_path / "run").by_group
    assert found.sequences.tolist() == [24, 23] and found.over == "blocks" and found.exchange == "within"
    one = rsdyn.record(str(tiny_llama), texts, groups=["same"] * N)
    one.save(tmp_path / "one.npz")
    assert analyze.main([f"data.stream={tmp_path / 'one.npz'}", *few[:-1], f"run.dir={tmp_path / 'one'}"]) == 0
    assert "its groups are skipped: they have 1 different labels" in capsys.readouterr().out
    assert results_of(tmp_path / "one").by_group is None


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("tongue", "data.group_column=tongue is not in data.path="),
        ("score", "data.group_column=score: 48 different values in 48 sequences (0.0, "),
        ("one", "all 48 sequences that are compared are of one group, same"),
    ],
)
def test_a_mistake_is_one_line(place, tiny_llama, tmp_path, column, said, capsys):
    more = {"data.group_column": column, "run.dir": tmp_path / "run"}
    assert analyze.main(words_of(place, tiny_llama, **more)) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error, error


def test_train_has_no_groups(place, tiny_llama, capsys):
    assert train.main([f"lm.name={tiny_llama}", "data.group_column=language"]) == 2
    assert "data.group_column is used by analyze.py and perturb.py. Leave it out" in capsys.readouterr().err
