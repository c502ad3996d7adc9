"""The measure jacobian: curves of a text, verdicts, the command and what it refuses, on a tiny model."""

import errno
import io
import json
import os
import re

import numpy as np
import pytest
import torch
from tiny_models import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from rsdyn.analysis import jacobian_table, jacobians
from rsdyn.analysis.finding import Value
from rsdyn.analysis.jacobians import (
    SERIES,
    SIZES,
    Claim,
    JacobianResult,
    claims,
    depths_of,
    measure_text,
    range_end,
)
from rsdyn.commands import analyze
from rsdyn.dynamics.jacobian import lyapunov, spectrum
from rsdyn.dynamics.projection import PCA
from rsdyn.lm.jacobians import sublayer_jacobians
from rsdyn.lm.null_models import permuted_weights
from rsdyn.lm.source import find_lm
from rsdyn.tracking.analysis import claims_table

LAYERS, S, D = 3, 6, 32
TOKENS = np.random.default_rng(0).integers(3, 200, size=9)


@pytest.fixture(scope="module")
def lm(tiny_llama):
    return find_lm(str(tiny_llama)).load()


@pytest.fixture(scope="module")
def found(lm):
    plane = PCA.fit(lm.record([TOKENS, TOKENS[::-1].copy()]).flatten(0, 1).double(), 2)
    return measure_text(lm, TOKENS, "trained", nulls=3, plane=plane, keep_eigenvalues=True)


# -- one text ----------------------------------------------------------------------------------------------------------


def test_curves_are_those_of_the_matrices(lm, found):
    js = sublayer_jacobians(lm, TOKENS)
    assert list(found) == ["full", "gaussian", "rotated", "none"] or set(found) == {
        "full",
        "none",
        "gaussian",
        "rotated",
    }
    full = found["full"]
    every = spectrum(js)
    for name in jacobians.CURVES:
        np.testing.assert_allclose(full[name], getattr(every, name), rtol=1e-4, atol=1e-6)
    products = [torch.linalg.multi_dot([*js[s:].double().flip(0)]) if s < S - 1 else js[s].double() for s in range(S)]
    values = [torch.linalg.svdvals(p) for p in products]
    np.testing.assert_allclose(full["product_gain"], [float(v[0]) for v in values], rtol=1e-3)
    expected = [float(v.square().sum() ** 2 / v.pow(4).sum()) for v in values]
    np.testing.assert_allclose(full["product_participation"], expected, rtol=1e-6)
    np.testing.assert_allclose(full["exponents"], 2 * lyapunov(js), atol=1e-5)
    np.testing.assert_allclose(full["exponents"].sum() * LAYERS, full["log_abs_det"].sum(), atol=1e-3)
    stream = lm.record([TOKENS])[0]
    assert np.exp(full["growth"] * LAYERS) * float(stream[0].norm()) > 0
    assert full["eigenvalues"].shape == (S, D) and full["singular"].sum() == 0


def test_nulls_keep_what_they_say(found):
    np.testing.assert_allclose(found["gaussian"]["rms"], found["full"]["rms"], rtol=0.15)
    np.testing.assert_allclose(found["rotated"]["rms"], found["full"]["rms"], rtol=1e-4)
    assert found["gaussian"]["antisymmetric"].mean() == pytest.approx(0.5, abs=0.05)
    assert set(found["none"]) == set(found["rotated"])  # without a linear range


def test_small_displacements_are_linear(found):
    linear = found["full"]["linear"]
    assert linear.shape == (len(depths_of(S)), 3, len(SIZES))
    np.testing.assert_allclose(linear[..., 0], 1, atol=0.02)
    assert np.abs(np.log(linear[..., -1])).max() > 0.02


def test_range_end():
    ones = np.ones(len(SIZES))
    assert range_end(ones) == float("inf")
    assert np.isnan(range_end(3 * ones))
    falling = np.minimum(1, 0.1 / np.array(SIZES))  # a half at .2
    assert range_end(falling) == pytest.approx(0.2, rel=1e-6)


def test_permuted_weights_keep_the_entries(lm):
    before = {n: p.clone() for n, p in lm.base.named_parameters()}
    permuted = permuted_weights(lm, 0)
    for name, p in permuted.base.named_parameters():
        assert torch.equal(before[name].flatten().sort().values, p.flatten().sort().values)
        assert torch.equal(before[name], p) == (p.ndim < 2 or "embed" in name)
        assert torch.equal(dict(lm.base.named_parameters())[name], before[name])
    assert not torch.equal(
        permuted.base.layers[0].mlp.up_proj.weight, permuted_weights(lm, 1).base.layers[0].mlp.up_proj.weight
    )


# -- all texts ---------------------------------------------------------------------------------------------------------


def test_the_jackknife_is_that_of_the_mean():
    result = JacobianResult(LAYERS, D, 2)
    values = np.random.default_rng(0).normal(size=(12, S))
    for row in values:
        result.add({"full": {"henrici": row}})
    low, high = result.interval("full", "henrici")
    half = 2.201 * values.std(0, ddof=1) / 12**0.5  # Student's t with 11 degrees of freedom
    np.testing.assert_allclose(high - result.mean("full", "henrici"), half, rtol=1e-3)
    np.testing.assert_allclose(result.mean("full", "henrici") - low, half, rtol=1e-3)


def test_an_interval_leaves_out_whole_documents():
    """Ten documents of three texts that are one state: as ten texts, not thirty."""
    values = np.repeat(np.random.default_rng(0).normal(size=(10, S)), 3, 0)
    result = JacobianResult(LAYERS, D, 2, documents=np.repeat(np.arange(10), 3))
    for row in values:
        result.add({"full": {"henrici": row}})
    low, high = result.interval("full", "henrici")
    half = 2.262 * values[::3].std(0, ddof=1) / 10**0.5  # Student's t with 9 degrees of freedom
    np.testing.assert_allclose((high - low) / 2, half, rtol=1e-3)


@pytest.mark.parametrize(
    ("holding", "verdict", "also"),
    [
        (("full",), "holds", ()),
        (("full", "none", "permuted"), "holds", ("permuted",)),
        (("full", "untrained"), "holds untrained too", ("untrained",)),
        (("none",), "only without context", ()),
        (("none", "untrained"), "only without context", ("untrained",)),
        (("untrained",), "not", ("untrained",)),
        ((), "not", ()),
    ],
)
def test_verdicts(holding, verdict, also):
    claim = Claim("x", "", "", "x", lambda c: 0.0, low=0.5)
    values = {s: Value(1.0, 0.6, 1.4) if s in holding else Value(0.6, 0.4, 0.8) for s in SERIES}
    assert jacobians._verdict(claim, values) == (verdict, also)


def test_a_rotation_that_dies_out_is_seen():
    """Every claim on made-up curves that obey it, with little spread over texts."""
    result, rng = JacobianResult(4, D, 2), np.random.default_rng(0)
    for _ in range(2):  # two texts that differ: an interval of a share ends where a share does
        curves = dict.fromkeys(jacobians.CURVES, rng.random(8)) | {"singular": np.zeros(8), "growth": np.array(0.2)}
        curves |= {"product_gain": np.ones(8), "product_participation": D * rng.random(8)}
        result.add({"gaussian": curves | {"exponents": rng.normal(size=D)}})
    for _ in range(10):
        noise = 1 + 1e-3 * rng.normal(size=8)
        falling = np.repeat(np.linspace(0.9, 0.1, 4), 2) * noise
        curves = dict.fromkeys(jacobians.CURVES, falling) | {"complex_share": 0.98 * noise, "singular": 0 * noise}
        curves |= {"product_gain": 9 - falling, "product_participation": 1.0 / falling}
        curves |= {"exponents": np.linspace(0.1, -1, D) + 1e-3 * rng.normal(), "growth": np.array(0.2)}
        result.add({"full": curves})
    wide = {c.key: c.values["gaussian"] for c in claims(result)}
    for key in ("complex_share", "antisymmetric_early", "antisymmetric_late", "bottleneck", "expanding"):
        assert 0 <= wide[key].low < wide[key].value < wide[key].high <= 1
    assert any(wide[key].low == 0 or wide[key].high == 1 for key in ("antisymmetric_early", "bottleneck"))
    verdicts = {c.key: c.verdict for c in claims(result)}
    bounded = {k: v for k, v in verdicts.items() if k not in ("gain", "expanding")}
    assert set(bounded.values()) == {"holds"}, bounded
    assert verdicts["gain"] == verdicts["expanding"] == ""


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tiny_llama, tmp_path_factory):
    return {
        "lm.name": str(tiny_llama), "data.limit": 30, "data.l_max": 220, "tracking.mode": "disabled",
        "cache.dir": str(tmp_path_factory.mktemp("cache")), "analysis.measures": "[jacobian]",
        "analysis.jacobian.texts": 3,
    }  # fmt: skip


def run(words, **more):
    return analyze.main([f"{k}={v}" for k, v in (words | more).items()])


def test_the_command(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RSDYN_RUN_DIR", "")
    folder = tmp_path / "run"
    assert run(words, **{"run.dir": folder}) == 0
    shown = capsys.readouterr().out
    assert "3 texts: the claims of arXiv 2605.14258" in shown and "untrained, full context" in shown
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["measures"] == ["jacobian"] and summary["jacobian"]["texts"] == 3
    rows = {row["key"]: row for row in summary["jacobian"]["claims"]}
    assert set(rows["complex_share"]["values"]) == set(SERIES)
    with np.load(folder / "results.npz") as arrays:
        curve = arrays["jacobian/full/complex_share"]
        assert curve.shape == (3, S)
        assert arrays["jacobian/sink/rest/product_gain"].shape == (3, S)
        assert arrays["jacobian/sink/massive_units"].tolist() == summary["jacobian"]["sink"]["massive_units"]
    assert "Does the sink own the gain?" in shown and "one token alone" in shown
    assert summary["jacobian"]["sink"]["texts"] == 3
    assert rows["complex_share"]["values"]["full"]["value"] == pytest.approx(curve.mean())
    findings = (folder / "findings.md").read_text()
    assert "| verdict |" in findings and "## Does the sink own the gain?" in findings
    page = (folder / "report.html").read_text()
    for name in ("eigenvalues", "antisymmetric", "exponents_relative", "participation", "linear_range"):
        assert (folder / "figures" / f"jacobian_{name}.png").stat().st_size > 0
        assert f"jacobian_{name}" in page
    assert "does the sink own the gain? 3 texts" in page
    assert "Jacobians over depth" in page and "G&#x27;s singular values, rotated" in page

    # what is measured is not measured again, and more texts resume from it
    for function in ("measure_text", "measure_sink"):
        monkeypatch.setattr(f"rsdyn.commands.jacobians.{function}", lambda *a, **k: pytest.fail("measured again"))
    monkeypatch.setattr("rsdyn.commands.jacobians.jacobian_panels", lambda *a: [])  # drawn once is enough
    again = tmp_path / "again"
    assert run(words, **{"run.dir": again}) == 0
    same = json.loads((again / "summary.json").read_text())["jacobian"]
    assert same == summary["jacobian"]


def test_a_damaged_text_of_the_cache_is_measured_again(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rsdyn.commands.jacobians.jacobian_panels", lambda *a: [])
    words = words | {"cache.dir": tmp_path / "cache", "analysis.jacobian.texts": 1, "run.dir": tmp_path / "run"}
    assert run(words) == 0
    files = sorted((tmp_path / "cache" / "jacobians").iterdir())
    texts = {file: file.read_bytes() for file in files}
    for file, data in texts.items():
        file.write_bytes(data[: len(data) // 2])
    capsys.readouterr()
    assert run(words, **{"run.dir": tmp_path / "again"}) == 0
    assert capsys.readouterr().out.count("is damaged") == len(files)
    for file, data in texts.items():
        with np.load(file) as now, np.load(io.BytesIO(data)) as before:
            assert all(np.allclose(now[name], before[name], equal_nan=True) for name in before.files)


def test_a_cache_that_cannot_be_written_is_refused_before_the_work(words, tmp_path, capsys, monkeypatch):
    def refuse(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("rsdyn.files.try_to_write", refuse)
    monkeypatch.setattr("rsdyn.commands.jacobians.measure_text", lambda *a, **k: pytest.fail("measured before"))
    assert run(words, **{"run.dir": tmp_path / "run"}) == 2
    said = capsys.readouterr().err
    assert re.search("cache.dir=.*: cannot be written there .Read-only file system", said)


def test_the_plan_says_what_it_costs(words, tmp_path, capsys):
    """Forward and backward of every row: twice two operations a weight, D times, for all layers."""
    assert analyze.main(["--plan", *[f"{k}={v}" for k, v in words.items()]]) == 0
    shown = capsys.readouterr().out
    attention, mlp = 2 * D * D + 2 * D * D // 2, 3 * D * 2 * D
    rows = 2 * D * 2 * LAYERS * (attention + mlp)
    assert f"{rows / 1e6:.3g} MFLOP for all 32 rows" in shown and "3 texts in 4 series" in shown


def test_a_model_that_cannot_be_continued_is_refused_before_anything_is_measured(words, tmp_path, capsys, monkeypatch):
    """Mamba's layers mix tokens by a recurrence: there is no attention to a context that stands still."""
    monkeypatch.setattr("rsdyn.commands.jacobians.measure_text", lambda *a, **k: pytest.fail("measured"))
    sizes = {"hidden_size": D, "num_hidden_layers": 3, "state_size": 4, "expand": 2, "vocab_size": 400}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)).save_pretrained(tmp_path / "lm")
    tiny_tokenizer(tmp_path / "lm")
    assert run(words, **{"lm.name": tmp_path / "lm", "run.dir": tmp_path / "run"}) == 2
    said = capsys.readouterr().err
    assert re.search("lm.name: .*cannot be continued from a sublayer: .*Give another model", said), said
    assert said.count("error:") == 1 and "Traceback" not in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"analysis.jacobian.texts": 31}, "analysis.jacobian.texts=31: the text has 30 sequences"),
        ({"analysis.jacobian.sublayers": "[6]"}, "analysis.jacobian.sublayers: 6 is not one"),
        ({"trainer.devices": 2}, "trainer.devices=2: .*one process"),
    ],
)
def test_what_the_command_refuses(words, tmp_path, more, message, capsys, monkeypatch):
    monkeypatch.setenv("RSDYN_RUN_DIR", "")
    assert run(words, **{"run.dir": tmp_path / "run"}, **more) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_claims_as_a_table_of_wandb():
    result, rng = JacobianResult(3, D, 2), np.random.default_rng(0)
    for _ in range(3):
        curves = dict.fromkeys((*jacobians.CURVES, "singular", *jacobians.PRODUCTS), 1 + rng.random(S))
        result.add({"full": curves | {"exponents": rng.random(D), "growth": np.array(0.2)}})
    table = claims_table(jacobian_table.as_json(result, claims(result)))
    assert len(table.rows) == len(claims(result)) and {len(row) for row in table.rows} == {len(table.columns)}
    assert table.rows[0][0] == "complex_share" and table.rows[0][8] == 3
