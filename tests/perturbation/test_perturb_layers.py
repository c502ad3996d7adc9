"""`perturb.py perturb.kind=skip` and `swap_layers` as a user meets them."""

import json

import numpy as np
import pytest
import torch

from rsdyn.commands import perturb
from rsdyn.figures.perturbation import effect_panels
from rsdyn.report.reading import read_run


@pytest.fixture(scope="module")
def words(tiny_llama, tmp_path_factory):
    return {
        "lm.name": str(tiny_llama), "data.limit": 30, "data.l_max": 220, "tracking.mode": "disabled",
    }  # fmt: skip


def run(words, folder, **more):
    argv = [f"{k}={v}" for k, v in {**words, "run.dir": folder, **more}.items()]
    assert perturb.main(argv) == 0
    with np.load(folder / "results.npz") as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads((folder / "summary.json").read_text()), arrays


@pytest.mark.parametrize("kind", ["skip", "swap_layers"])
def test_a_run_from_the_words_to_the_page(words, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setenv("RSDYN_RUN_DIR", "")
    folder = tmp_path / kind
    summary, arrays = run(words, folder, **{"perturb.kind": kind})
    n = 3 if kind == "skip" else 2
    assert arrays["kl"].shape == (21, n) and summary["layers"] == [*range(n)] and summary["n_drawn"] == 20
    drawn = arrays["sample"]
    for i, effect in enumerate(summary["effects"]):
        expected = arrays["kl"][drawn, i].sum() / arrays["n_tokens"][drawn].sum()
        assert (
            effect["kl"] == pytest.approx(expected) and effect["kl_interval"][0] < expected < effect["kl_interval"][1]
        )
    said = capsys.readouterr().out
    assert "Cache" not in said and all(line in said for line in summary["in_words"])
    for name in ("kl", "perplexity"):
        assert (folder / "figures" / f"{kind}_{name}.png").stat().st_size > 0
    page = (folder / "report.html").read_text()
    assert "KL of the next token, by the layer" in page and summary["in_words"][0] in page
    read = read_run(folder)
    panels = effect_panels(read.effects)
    assert read.changed_layers and [panel.key for panel in panels] == [f"{kind}_kl", f"{kind}_perplexity"]
    assert page.count('<td data-label="perplexity">') == n


def test_the_skip_is_that_of_transformers(words, tmp_path, monkeypatch):
    """Perplexity of the text without its second layer, by hand: the layer taken out of the model's own list."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("RSDYN_RUN_DIR", "")
    summary, _ = run(
        words, tmp_path / "run", **{"perturb.kind": "skip", "perturb.from_text": 0, "perturb.layers": "[1]"}
    )
    model = AutoModelForCausalLM.from_pretrained(words["lm.name"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(words["lm.name"])
    ids = tokenizer("I'm sorry, Dave. I'm afraid I can't do that.", add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([[tokenizer.bos_token_id, *ids]])
    with torch.inference_mode():
        plain = float(model(tokens, labels=tokens, use_cache=False).loss)
        del model.model.layers[1]
        model.config.num_hidden_layers = 2
        without = float(model(tokens, labels=tokens, use_cache=False).loss)
    (effect,) = summary["effects"]
    assert summary["perplexity"] == pytest.approx(np.exp(plain), rel=1e-4)
    assert effect["perplexity"] == pytest.approx(100 * (np.exp(without - plain) - 1), rel=1e-3)
    assert "kl_interval" not in effect and effect["layer"] == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"perturb.kind": "swap_layers", "perturb.layers": "[2]"}, "from 0 to 1"),
        ({"perturb.kind": "skip", "perturb.layers": "[3]"}, "its 3 layers are 0 to 2"),
        ({"perturb.kind": "skip", "perturb.grid.n": "5"}, "perturb.grid.n"),
        ({"perturb.kind": "skip", "perturb.site": "resid_mid"}, "would change nothing with perturb.kind=skip"),
        ({"perturb.kind": "skip", "cache.dtype": "float32"}, "records no stream"),
    ],
    ids=str,
)
def test_a_mistake_is_one_message(words, tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.setenv("RSDYN_RUN_DIR", "")
    argv = [f"{k}={v}" for k, v in {**words, **more, "run.dir": tmp_path / "run"}.items()]
    assert perturb.main(argv) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
