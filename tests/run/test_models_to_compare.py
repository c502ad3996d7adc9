"""Which models a comparison is of, from its words alone: nothing is loaded."""

import json

import pytest

from rsdyn.errors import UserError
from rsdyn.run import models_to_compare
from rsdyn.run.models_to_compare import default_models, find_models, read_list, step_of


def model_folder(path, *, config=True, weights=True):
    path.mkdir(parents=True)
    if config:
        (path / "config.json").write_text("{}")
    if weights:
        (path / "model.safetensors").write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-500", 500), ("step512", 512), ("step-0", 0), ("global_step1000", 1000), ("ckpt_20", 20),
        ("iter_0001000", 1000), ("epoch=3", 3), ("500", 500), ("stage1-step1000-tokens5B", 1000), ("main", None),
        ("llama-3", None), ("mine-step500", 500), ("pythia-70m", None), ("final", None),
    ],
)  # fmt: skip
def test_the_step_that_a_name_says(name, step):
    assert step_of(name) == step


def test_names_revisions_and_labels():
    found = find_models(["embedded", "org/model@step5", {"name": "org/other", "label": "mine", "dtype": "bfloat16"}])
    assert [entry.label for entry in found] == ["embedded", "org/model@step5", "mine"]
    assert found[1].words() == ["lm.name=org/model", "lm.label=org/model@step5", "lm.revision=step5"]
    assert {"lm.dtype=bfloat16", "lm.revision=null"} <= {*found[2].words()} and not found[1].series


def test_revisions_are_checkpoints_of_one_training():
    found = find_models(["org/model"], ["step0", "step512", "main"])
    assert [(e.label, e.series, e.step) for e in found] == [
        ("org/model@step0", "org/model", 0), ("org/model@step512", "org/model", 512),
        ("org/model@main", "org/model", None),
    ]  # fmt: skip
    named = find_models(["org/model@step0", "org/model@step512"])
    assert [(e.series, e.step) for e in named] == [("org/model", 0), ("org/model", 512)]
    listed = find_models([{"name": "org/model", "label": "m", "revision": ["a1", "b2"]}])
    assert [e.label for e in listed] == ["m@a1", "m@b2"]


def test_a_folder_of_checkpoints_is_read_in_the_order_of_steps_and_its_gaps_are_named(tmp_path):
    run = tmp_path / "mine"
    for step in (1000, 500, 20):
        model_folder(run / f"checkpoint-{step}")
    model_folder(run / "checkpoint-1500", config=False)
    model_folder(run / "checkpoint-2000", weights=False)
    (run / "logs").mkdir()
    (run / ".git").mkdir()
    found = find_models([str(run)])
    assert [e.step for e in found] == [20, 500, 1000, 1500, 2000]
    assert [e.label for e in found][:2] == ["mine/checkpoint-20", "mine/checkpoint-500"]
    assert [e.failure for e in found] == ["", "", "", "it has no config.json", "it has no *.safetensors"]
    assert {e.series for e in found} == {"mine"}


def test_checkpoints_named_one_by_one_are_of_one_training(tmp_path):
    folders = [str(model_folder(tmp_path / "mine" / f"checkpoint-{s}")) for s in (500, 1000)]
    found = find_models([*folders, "embedded"])
    assert [(e.series, e.step) for e in found] == [("mine", 500), ("mine", 1000), ("", None)]


def test_two_folders_of_one_name_are_told_apart(tmp_path):
    one, two = (str(model_folder(tmp_path / x / "y" / "checkpoint-500")) for x in "ab")
    assert [e.label for e in find_models([one])] == ["y/checkpoint-500"]
    assert [e.label for e in find_models([one, two])] == ["a/y/checkpoint-500", "b/y/checkpoint-500"]
    three, four = (str(model_folder(tmp_path / x / "llama")) for x in "cd")
    assert [e.label for e in find_models([three, four])] == ["c/llama", "d/llama"]
    both = find_models([str(tmp_path / "a" / "y"), str(tmp_path / "b" / "y")])
    assert [e.label for e in both] == ["a/y/checkpoint-500", "b/y/checkpoint-500"]
    assert [e.series for e in both] == ["a/y", "b/y"]


def test_one_model_with_two_settings_is_two_models():
    found = find_models(["embedded", {"name": "embedded", "bos": "none"}])
    assert [e.label for e in found] == ["embedded", "embedded, bos=none"]


def test_a_finished_run_is_taken_as_it_is(tmp_path):
    run = tmp_path / "20260101-analyze-x"
    run.mkdir()
    (run / "provenance.json").write_text(json.dumps({"script": "analyze"}))
    (entry,) = find_models([str(run)])
    assert entry.run == run and entry.label == run.name


@pytest.mark.parametrize(
    ("words", "revisions", "said"),
    [
        (["/nowhere/at/all"], [], "/nowhere/at/all: no such folder"),
        (["./nowhere"], [], "no such folder"),
        (["a/b/c"], [], "no such folder"),
        (["missing.gguf"], [], "no such folder"),
        (["embedded", "embedded"], [], "embedded is given twice"),
        (["embedded@step5"], [], "embedded: revision=step5 is for a model on the Hub"),
        (["embedded"], ["step0"], "revision=step0 is for models on the Hub"),
        ([{"name": "x", "lable": "y"}], [], "there is no key lable. Did you mean label?"),
        (["EMPTY"], [], "holds no model"),
        ([{"name": "MODEL", "revision": "step5"}], [], "this is a folder"),
        ([{"name": "x", "label": "l"}, {"name": "y", "label": "l"}], [], "l would be the label of two models"),
    ],
)
def test_mistakes_are_said_before_anything_runs(words, revisions, said, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": str(tmp_path / "empty"), "MODEL": str(model_folder(tmp_path / "model"))}
    words = [places.get(w, w) if isinstance(w, str) else w | {"name": places.get(w["name"], w["name"])} for w in words]
    with pytest.raises(UserError) as error:
        find_models(words, revisions)
    assert said in str(error.value)


def test_a_list_in_yaml(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text(
        "models:\n- embedded\n- {name: org/model, revision: [step0, step5], label: m}\n"
        "data: {limit: 300, positions: {sample: 4}}\nanalysis:\n  measures: [cosine, pca]\nlm: {bos: none}\nseed: 3\n"
    )
    models, words = read_list(path)
    assert [e.label for e in find_models(models)] == ["embedded", "m@step0", "m@step5"]
    assert words == [
        "data.limit=300", "data.positions={sample: 4}", "analysis.measures=[cosine, pca]", "lm.bos=none", "seed=3",
    ]  # fmt: skip
    from rsdyn.config.command_line import load_config

    assert load_config(words, "analyze").data.positions == {"sample": 4}


@pytest.mark.parametrize("text", ["", "models: []", "- a", "models: [3]", "models: [{label: x}]", "models: [", "\x00"])
def test_what_is_no_list_is_refused(text, tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="Write models:"):
        read_list(path)


def test_what_is_compared_by_default(monkeypatch, tmp_path):
    monkeypatch.setattr(models_to_compare, "SHIPPED", tmp_path / "none")
    monkeypatch.setattr(models_to_compare, "find_spec", lambda name: None)
    found, notes = default_models()
    assert [e.label for e in found] == ["embedded"]
    assert "examples/checkpoints" in notes[0] and "smollm2" in notes[1] and "skipped" in notes[1]
    model_folder(tmp_path / "some" / "step-0")
    model_folder(tmp_path / "some" / "step-64")
    monkeypatch.setattr(models_to_compare, "SHIPPED", tmp_path / "some")
    monkeypatch.setattr(models_to_compare, "find_spec", lambda name: object())
    found, notes = default_models()
    assert [e.label for e in found] == ["embedded", "half-width/step-0", "half-width/step-64", "smollm2"] and not notes
