"""What a model in a folder is called."""

import pytest

from rsdyn.labels import folder_label


@pytest.mark.parametrize(
    ("folder", "label"),
    [
        ("/models/Llama-3.1-8B", "Llama-3.1-8B"),
        ("/runs/a/checkpoint-500", "a/checkpoint-500"),
        ("/runs/b/checkpoint-500/", "b/checkpoint-500"),
        ("/runs/a/step64", "a/step64"),
        ("/runs/a/global_step_1000", "a/global_step_1000"),
        ("/runs/a/500", "a/500"),
        ("/runs/a/checkpoints/step-500", "a/checkpoints/step-500"),
        ("/runs/a/final", "a/final"),
        ("/runs/a/final_model", "a/final_model"),
        ("/runs/a/gpt2", "gpt2"),
        ("/runs/a/pythia-70m", "pythia-70m"),
        ("/runs/stepwise", "stepwise"),
        ("/checkpoint-500", "checkpoint-500"),
        ("/", "/"),
    ],
)
def test_a_checkpoint_is_named_with_the_folder_above(folder, label):
    assert folder_label(folder) == label


def test_more_folders_are_named_where_two_models_have_to_be_told_apart():
    assert folder_label("/x/a/llama", levels=1) == "a/llama"
    assert folder_label("/x/a/checkpoint-5", levels=1) == "a/checkpoint-5"
    assert folder_label("/x/a/checkpoint-5", levels=2) == "x/a/checkpoint-5"
    assert folder_label("/a", levels=9) == "a"


def test_a_relative_folder_is_named_by_where_it_lies(tmp_path, monkeypatch):
    (tmp_path / "mine" / "checkpoint-3").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine" / "checkpoint-3")
    assert folder_label(".") == "mine/checkpoint-3"
