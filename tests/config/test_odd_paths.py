"""Paths of bytes that are no UTF-8, which Python spells with halves of surrogates: files that hold them are written."""

import json
import os

import pytest

from rsdyn.config.command_line import load_config
from rsdyn.config.schema import to_yaml
from rsdyn.files import write_json, write_text
from rsdyn.stream.cache.manifest import FORMAT, MANIFEST, cache_key, read_manifest, seal
from rsdyn.stream.text.corpus import load_rows

ODD = os.fsdecode(b"caf\xe9\n [x]")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / ODD).mkdir()
    return tmp_path / ODD


def test_records_of_a_run(folder):
    write_json(folder / "a.json", {"path": folder, ODD: [ODD]})
    found = json.loads((folder / "a.json").read_text(encoding="utf-8"))
    assert found["path"].endswith("caf\\udce9\n [x]") and len(found) == 2
    write_text(folder / "a.md", f"# {ODD}")
    assert (folder / "a.md").read_text(encoding="utf-8") == "# caf\\udce9\n [x]"
    assert "udce9" in to_yaml(load_config([f"data.path={folder}"], "train"))


def test_a_cache_made_from_a_text_of_such_a_name(folder):
    made_from = {"text": ODD}
    (folder / MANIFEST).write_bytes(seal({"format": FORMAT, "key": cache_key(made_from), "made_from": made_from}))
    assert read_manifest(folder)["made_from"] == made_from
    assert cache_key({"text": ODD}) != cache_key({"text": "other"})


def test_a_text_in_such_a_folder(folder):
    (folder / f"{ODD}.txt").write_text("row\n")
    assert list(load_rows(path=folder)["text"]) == list(load_rows(path=folder / f"{ODD}.txt")["text"]) == ["row"]
