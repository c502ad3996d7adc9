"""analyze.py on a stream that was recorded elsewhere: all of it that needs no model, and what does is named."""

import json

import numpy as np
import pytest
import torch
from tiny_models import PROSE, tiny_lm

import rsdyn
from rsdyn.commands import analyze, perturb, train
from rsdyn.lm.source import find_lm
from rsdyn.stream.text.corpus import load_rows
from rsdyn.stream.text.tokens import tokenise

N = 40
MEASURES = "analysis.measures=[activations,correlation,cosine,velocity,mutual_information,rotation,pca]"
FEW = ["analysis.rotation.surrogates=20", "tracking.mode=disabled", "trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def place(tiny_llama, tmp_path_factory):
    """A text, its tokens, and the stream of them."""
    folder = tmp_path_factory.mktemp("streams")
    rows = [{"text": f"{PROSE[i % len(PROSE)]} {i}"} for i in range(N)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lm = find_lm(str(tiny_llama))
    sequences = tokenise(load_rows(path=folder / "text.jsonl"), lm.tokenizer(), l_min=20, l_max=400)
    x = rsdyn.record(lm, [sequences[i].tolist() for i in range(len(sequences))], stored="bfloat16")
    x.save(folder / "stream.npz")
    half = {"axes": ["trajectory", "sublayer", "unit"], "sites": ["resid_pre"], "label": "half"}
    np.save(folder / "half.npy", x.tensor[:, ::2].float().numpy())
    (folder / "half.json").write_text(json.dumps(half))
    tiny_lm(folder / "other", seed=7)
    return folder


def arrays_of(folder):
    with np.load(folder / "results.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def test_the_whole_of_it_as_from_the_text(place, tiny_llama, tmp_path, capsys):
    words = [f"data.stream={place / 'stream.npz'}", f"run.dir={tmp_path / 'npz'}", MEASURES, *FEW]
    assert analyze.main([*words, f"lm.name={tiny_llama}"]) == 0
    out = capsys.readouterr().out
    assert (
        "compared with" in out
        and "Skipped, since it needs the model: token_shuffled, shuffled_keep_last, untrained" in out
    )
    assert "not needed: the stream was recorded elsewhere" in out
    text = [f"lm.name={tiny_llama}", f"data.path={place / 'text.jsonl'}", "data.l_min=20", "data.l_max=400"]
    text += [f"cache.dir={tmp_path / 'cache'}", "analysis.conditions=[original]", f"run.dir={tmp_path / 'text'}"]
    assert analyze.main([*text, MEASURES, *FEW]) == 0
    assert arrays_of(tmp_path / "npz").keys() == arrays_of(tmp_path / "text").keys()
    # intervals leave out other blocks where a file does not say which rows stood beside each other; values are the same
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("npz", "text")]
    curves = [summary["curves"]["original"] for summary in summaries]
    for name, curve in curves[1].items():
        if isinstance(curve, list) and "interval" not in name:
            values = [np.array(c[name], float) for c in curves]
            assert np.allclose(*values, rtol=1e-4, atol=1e-5, equal_nan=True), name
    for file in ("report.html", "findings.md"):
        assert (tmp_path / "npz" / file).stat().st_size > 0
    provenance = json.loads((tmp_path / "npz" / "provenance.json").read_text())
    assert provenance["lm"]["identity"].startswith("a stream, xxh3 ") and provenance["text"] == "stream.npz"


def test_one_half_of_the_sublayers(place, tmp_path, capsys):
    few = "analysis.measures=[correlation,velocity]"
    words = [f"data.stream={place / 'half.npy'}", f"run.dir={tmp_path / 'half'}", few, *FEW, "data.limit=30"]
    assert analyze.main(words) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "3 layers (resid_pre)" in out and "30 trajectories of 30 sequences" in out
    assert "not compared with a model (lm.name=...)" in out
    assert out.count("what attention and MLP add is not told apart") == 2  # at the start, and beside the findings
    summary = json.loads((tmp_path / "half" / "summary.json").read_text())
    assert summary["sites_per_layer"] == 1 and summary["n_sublayers"] == 3 and summary["n_sequences"] == 30
    assert "Nothing compared this stream with the model" in " ".join(summary["in_words"])


def test_a_plan_reads_and_checks_it(place, capsys):
    assert analyze.main([f"data.stream={place / 'stream.npz'}", "--plan"]) == 0
    assert "No language model is needed" in capsys.readouterr().out
    assert analyze.main([f"data.stream={place / 'nowhere.npz'}", "--plan"]) == 2


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["data.stream=nowhere.npy"], "data.stream=nowhere.npy: .*no such file or folder"),
        (["data.stream={place}/text.jsonl"], "files of type .jsonl are not read"),
        (["data.stream={place}/stream.npz", "data.path={place}/text.jsonl"], "are both given"),
        (
            ["data.stream={place}/stream.npz", "data.l_min=3"],
            "data.l_min=3 .* with data.stream, which was recorded already",
        ),
        (["data.stream={place}/stream.npz", "cache.dtype=float32"], "would change nothing with data.stream"),
        (["data.stream={place}/stream.npz", "analysis.measures=[jacobian]"], "derivatives and readout need the model"),
        (["data.stream={place}/stream.npz", "analysis.conditions=[untrained]"], "data.stream is the original alone"),
        (["data.stream={place}/bare.npy"], "nothing says what this array .* Give axes and sites, or a JSON file"),
        (["data.stream={place}/infinite.npy"], r"65,504"),
        (["data.stream={place}/stream.npz", "lm.name={place}/other"], "differs from other, recorded again"),
    ],
)
def test_mistakes_are_one_line_before_any_work(place, tmp_path, words, match, capsys):
    import re

    x = rsdyn.load(place / "stream.npz").tensor.float()
    np.save(place / "bare.npy", x.numpy())
    np.save(place / "infinite.npy", torch.where(x == x.max(), torch.inf, x).half().numpy())
    (place / "infinite.json").write_text('{"axes": "trajectory sublayer unit", "sites": ["resid_pre", "resid_mid"]}')
    given = [word.format(place=place) for word in words]
    assert analyze.main([*given, f"run.dir={tmp_path / 'run'}", "tracking.mode=disabled"]) == 2
    error = capsys.readouterr().err
    assert re.search(match, error) and "Traceback" not in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [train, perturb])
def test_only_analyze_takes_one(place, tmp_path, script, capsys):
    assert script.main([f"data.stream={place / 'stream.npz'}", f"run.dir={tmp_path / 'run'}"]) == 2
    assert "data.stream is used by analyze.py" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text(f"data:\n  stream: {place / 'stream.npz'}\n")
    assert script.main(["--config", str(tmp_path / "c.yaml"), f"run.dir={tmp_path / 'run'}"]) == 2
    assert "Use it with analyze.py" in capsys.readouterr().err
