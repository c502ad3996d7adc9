"""Readout and geometry from the command line: tables, files, two processes, every token, and mistakes."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from script_runs import argv_of, arrays_of, run_analyze
from tiny_models import PROSE, tiny_lm

from rsdyn.commands import analyze, perturb
from rsdyn.lm.lens import JacobianLens
from rsdyn.lm.source import find_lm

N = 61
SEEDS = {"analysis.untrained_seeds": 2, "analysis.readout.samples": 20, "analysis.readout.examples": 2}
SHAPE = "[cosine,velocity,curvature,dimension,similarity,readout]"

pytest.importorskip("skdim")


@pytest.fixture(scope="module")
def words(tiny_llama, tmp_path_factory):
    return {
        "lm.name": str(tiny_llama), "data.limit": N, "data.l_max": 220, "cache.shard_sequences": 16,
        "cache.dir": str(tmp_path_factory.mktemp("cache")), "tracking.mode": "disabled", "trainer.accelerator": "cpu",
        "analysis.measures": SHAPE, "analysis.conditions": "[original,token_shuffled,untrained]",
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    monkeypatch.setenv("RSDYN_RUN_DIR", "")


@pytest.fixture(scope="module")
def default(words, tmp_path_factory):
    return run_analyze(words, tmp_path_factory.mktemp("runs") / "default", **SEEDS)


def test_every_measure_has_rows_numbers_and_curves_in_each_condition(default):
    folder, said = default
    summary = json.loads((folder / "summary.json").read_text())
    rows = {row["key"]: row for row in summary["findings"]}
    for key in ("curvature", "curvature_shuffled_steps", "straightness", "dimension_twonn", "similarity_adjacent",
                "readout_commit", "readout_kl"):  # fmt: skip
        assert set(rows[key]["values"]) == {"original", "token_shuffled", "untrained"}, key
        assert len(rows[key]["values"]["untrained"]["seeds"] or [1]) == 1
    assert set(rows["similarity_with_main"]["values"]) == {"token_shuffled", "untrained"}
    assert {"curvature/angle", "dimension/mle", "similarity/adjacent", "readout/kl"} <= set(
        summary["curves"]["original"]
    )
    arrays = arrays_of(folder)
    assert arrays["original/curvature/angle"].shape == (4,) and arrays["original/similarity/map"].shape == (6, 6)
    assert arrays["untrained/curvature/angle/seeds"].shape == (1, 4)
    assert arrays["original/readout/kl/n"] == 20
    pairs = N * (N - 1) // 2
    kept = {key: value.shape for key, value in arrays.items() if key.endswith("grams/pairs")}
    assert kept == {f"{c}/similarity/grams/pairs": (6, pairs) for c in ("original", "untrained")}
    assert len(np.unique(arrays["original/similarity/grams/texts"])) == N
    assert len(arrays["original/readout/examples/0/tokens"]) == 7 * 5
    assert "Readout through the logit lens, at the last token of 20 sequences" in " ".join(said.split())


def test_two_processes_give_what_one_does(default, words, tmp_path):
    folder, _ = run_analyze(words, tmp_path / "two", **SEEDS, **{"trainer.devices": 2})
    one, two = arrays_of(default[0]), arrays_of(folder)
    assert set(one) == set(two)
    for name, expected in one.items():
        if expected.dtype.kind == "U":
            assert two[name].tolist() == expected.tolist(), name
        else:
            near = 2e-3 if expected.dtype == np.float16 else 1e-5  # what is kept in half precision may round elsewhere
            np.testing.assert_allclose(two[name], expected, rtol=near, atol=near, err_msg=name)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Layers enough for phases."""
    return tiny_lm(tmp_path_factory.mktemp("deep"), layers=10)


def test_phases_are_the_same_for_two_processes(words, deep, tmp_path):
    more = {"lm.name": deep, "analysis.measures": "[cosine,readout,phases]"}
    one, two = (
        arrays_of(run_analyze(words, tmp_path / str(n), **SEEDS, **more, **{"trainer.devices": n})[0]) for n in (1, 2)
    )
    for condition in ("original", "token_shuffled", "untrained"):
        names = [name for name in one if name.startswith(f"{condition}/phases/")]
        assert f"{condition}/phases/places" in names and len(names) >= 7, condition
        for name in names:
            if one[name].dtype.kind == "f":
                np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-5, err_msg=name)
            else:
                assert np.array_equal(two[name], one[name]), name
    assert one["original/phases/curves"].tolist() == ["cosine/mean", "readout/kl"]


def test_dynamics_over_depth_are_the_same_for_two_processes(words, deep, tmp_path):
    pytest.importorskip("DSA", reason="dsa-metric is not installed: pip install -e '.[dsa]'")
    more = {"lm.name": deep, "analysis.measures": "dsa", "analysis.conditions": "[original,untrained]",
            "analysis.untrained_seeds": 1}  # fmt: skip
    one, two = (arrays_of(run_analyze(words, tmp_path / str(n), **more, **{"trainer.devices": n})[0]) for n in (1, 2))
    for name in ("original/dsa/states/states", "original/dsa/predicted", "untrained/dsa/predicted"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-4, err_msg=name)
    for name in ("original/dsa/halves", "untrained/dsa/halves", "untrained/dsa/with_main"):
        assert np.isfinite(one[name]).all()
        np.testing.assert_allclose(two[name], one[name], atol=2e-3, err_msg=name)  # where the optimiser stops


@pytest.mark.parametrize("devices", [1, 2])
def test_what_reads_the_model_itself_records_no_stream(default, words, tmp_path, devices):
    """Readout says what it says beside the others, and nothing goes through a cache."""
    more = {"analysis.measures": "readout", "cache.dir": tmp_path / "cache", "trainer.devices": devices}
    folder, said = run_analyze(words, tmp_path / "alone", **SEEDS, **more)
    assert "No stream is recorded" in said and "massive" in said and "No unit is massive" not in said
    assert not (tmp_path / "cache").exists()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["sequences_recorded"] == 0 and summary["n_sequences"] == 20 and summary["processes"] == devices
    assert summary["without_largest"] is None and set(summary["curves"]["untrained"]) == {
        f"readout/{name}" for name in ("kl", "entropy", "rank", "probability", "agreement")
    }
    beside, alone = arrays_of(default[0]), arrays_of(folder)
    for condition in ("original", "token_shuffled", "untrained"):
        for name in ("kl", "rank", "commit", "committed"):
            key = f"{condition}/readout/{name}"
            np.testing.assert_allclose(alone[key], beside[key], rtol=1e-5, atol=1e-5, err_msg=key)


def test_the_plan_of_a_readout_has_the_head_and_no_cache(words, capsys):
    assert analyze.main([*argv_of(words, **{"analysis.measures": "readout"}), "--plan"]) == 0
    said = capsys.readouterr().out
    assert "with the LM head" in said and "records no stream" in said and "to record" not in said


def test_every_token_gives_curves_by_position_and_over_tokens(words, tmp_path):
    options = {"data.positions": "all", "analysis.samples": 13, "analysis.conditions": "original",
               "analysis.measures": "[cosine,velocity,curvature]", "run.dir": tmp_path / "all"}  # fmt: skip
    assert analyze.main(argv_of(words, **options)) == 0
    arrays = arrays_of(tmp_path / "all")
    assert arrays["original/cosine/by_position"].shape == (5, 5)
    assert arrays["original/velocity/relative_by_position"].shape == (5, 5)
    assert arrays["original/curvature/by_position"].shape == (5, 4)
    assert np.isfinite(arrays["original/curvature/by_position"][:4]).all()
    assert arrays["original/curvature/over_tokens"].shape == (6,)
    assert "angle over tokens, degrees" in (tmp_path / "all" / "findings.md").read_text()


def test_every_measure_by_position_is_the_same_for_two_processes(words, tmp_path):
    """One token of each range is read of each sequence; of some ranges there are too few, of others none."""
    options = {"data.positions": "all", "data.limit": 23, "analysis.conditions": "original",
               "analysis.measures": "[curvature,dimension,similarity,massive,readout]"}  # fmt: skip
    folder, _ = run_analyze(words, tmp_path / "one", **options)
    one = arrays_of(folder)
    two = arrays_of(run_analyze(words, tmp_path / "two", **options, **{"trainer.devices": 2})[0])
    names = [name for name in one if "by_position" in name]
    dimensions = ("twonn", "mle", "participation", "components_90", "effective_rank", "matrix_entropy")
    readouts = ("kl", "entropy", "rank", "probability", "agreement")
    wanted = {f"original/dimension/by_position/{name}" for name in dimensions}
    wanted |= {f"original/readout/by_position/{name}" for name in readouts}
    assert wanted | {"original/similarity/by_position", "original/curvature/by_position"} <= set(names)
    assert one["original/massive/ratio/others/interval"].shape == (2, 6)
    for name in (n for n in one if n.startswith("original/massive/")):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-6, atol=1e-9, err_msg=name)
    for name in (n for n in names if "n_by_position" not in n):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-4, err_msg=name)
        finite = np.isfinite(one[name]).all(-1).tolist()
        assert finite[1:4] == [True] * 3 or ("twonn" in name or "mle" in name), name
    # at position 0 each sequence has BOS, of which nothing varies, and the readout of one token is read 23 times
    assert np.isnan(one["original/dimension/by_position/twonn"][0]).all()
    lone = one["original/readout/by_position/probability"][0]
    assert np.isfinite(lone).all() and ((lone > 0) & (lone < 1)).all()
    findings = (tmp_path / "one" / "findings.md").read_text()
    assert "arXiv 2402.17762, section 2" in findings and "## Without the largest units" in findings
    assert "of independent normal units" in findings
    row = next(line for line in findings.splitlines() if "angle over tokens, degrees" in line)
    first = float(row.split("<br>")[1].split(" ")[0])
    assert 100 < first < 140  # degrees, as the row itself


def test_a_table_without_rows_is_not_shown(words, tmp_path):
    options = {"analysis.measures": "massive", "analysis.conditions": "original"}
    folder, _ = run_analyze(words, tmp_path / "run", **options)
    assert "Without the largest units" not in (folder / "findings.md").read_text()


def test_a_lens_that_knows_nothing_says_the_same_everywhere(words, tmp_path):
    """Weight 0 and bias 0: after the norm the head gives every token alike, log V nats."""
    save_file({"weight": torch.zeros(6, 32, 32), "bias": torch.zeros(6, 32)}, tmp_path / "zero.safetensors")
    options = {"analysis.readout.lens": tmp_path / "zero.safetensors", "analysis.measures": "readout",
               "analysis.conditions": "original", "run.dir": tmp_path / "run"}  # fmt: skip
    assert analyze.main(argv_of(words, **options)) == 0
    arrays = arrays_of(tmp_path / "run")
    assert str(arrays["original/readout/lens"]) == "affine lens"
    entropy = arrays["original/readout/entropy"]
    np.testing.assert_allclose(entropy, entropy[0], rtol=1e-6)
    assert np.exp(entropy[0]) == pytest.approx(round(float(np.exp(entropy[0]))), rel=1e-4)


def test_a_model_with_one_site_a_layer(words, tmp_path):
    pythia = tiny_lm(tmp_path / "pythia", model_type="gpt_neox")
    options = {"lm.name": pythia, "run.dir": tmp_path / "run", "cache.dir": tmp_path / "cache",
               "analysis.conditions": "original"}  # fmt: skip
    assert analyze.main(argv_of(words, **options)) == 0
    assert arrays_of(tmp_path / "run")["original/curvature/angle"].shape == (1,)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"analysis.readout.lens": "none.pt"}, "analysis.readout.lens=none.pt: no such file"),
        ({"analysis.readout.samples": 0}, "analysis.readout.samples=0"),
        ({"analysis.measures": "cosine", "analysis.readout.samples": 9}, "would change nothing without readout in"),
        ({"analysis.measures": "phases"}, "phases look at the curves of other measures"),
        ({"analysis.measures": "[curvature,phases]"}, "at least 8 layers, and curvature has 2 in this model of 3"),
        ({"analysis.measures": "dimension", "analysis.keep": 9}, "dimension needs at least 10 sequences and gets 9"),
    ],
)
def test_a_mistake_is_one_message(more, said, words, tmp_path, capsys):
    assert analyze.main(argv_of(words, **{"run.dir": tmp_path / "run"}, **more)) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def headless(tiny_llama, tmp_path_factory):
    """The same model saved without its head, and one whose file calls the head by a name that nobody knows."""
    bare, renamed = tmp_path_factory.mktemp("bare"), tmp_path_factory.mktemp("renamed")
    for folder in (bare, renamed):
        shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)
    find_lm(str(tiny_llama)).load().base.save_pretrained(bare)
    weights = load_file(tiny_llama / "model.safetensors")
    weights["unembed.weight"] = weights.pop("lm_head.weight")
    save_file(weights, renamed / "model.safetensors", metadata={"format": "pt"})
    return {"bare": bare, "renamed": renamed}


@pytest.mark.parametrize(
    ("program", "model", "more"),
    [
        (analyze, "bare", {"analysis.measures": "[cosine,readout]"}),
        (analyze, "bare", {"analysis.measures": "readout"}),
        (analyze, "renamed", {"analysis.measures": "[cosine,readout]"}),
        (perturb, "bare", {"perturb.from_text": 2}),
        (perturb, "renamed", {"perturb.from_text": 2}),
        (perturb, "bare", {"perturb.from_text": 2, "perturb.kind": "skip", "cache.dir": None}),
    ],
)
def test_a_model_without_a_head_is_refused_before_anything_is_recorded(
    program, model, more, words, headless, tmp_path, capsys
):
    ours = {key: value for key, value in words.items() if program is analyze or not key.startswith("analysis.")}
    ours |= {"lm.name": headless[model], "cache.dir": tmp_path / "cache", "run.dir": tmp_path / "run", **more}
    argv = argv_of({key: value for key, value in ours.items() if value is not None and "shard" not in key})
    assert program.main(argv) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "saved with its LM head" in said.err
    assert model != "bare" or "Text:" not in said.out
    assert "recording" not in said.err and not (tmp_path / "run").exists()
    assert [path for path in (tmp_path / "cache").rglob("*.safetensors") if path.parent.name != "corpora"] == []
    if model == "bare":
        assert program.main([*argv, "--plan"]) == 2
        assert "saved with its LM head" in capsys.readouterr().err


@pytest.mark.parametrize("plan", [False, True])
def test_a_lens_of_another_width_is_refused_before_the_text_is_read(plan, words, tmp_path, capsys):
    JacobianLens({0: torch.eye(64)}, 1).save(tmp_path / "wide.pt")
    more = {"analysis.readout.lens": tmp_path / "wide.pt", "run.dir": tmp_path / "run"}
    assert analyze.main([*argv_of(words, **more), *(["--plan"] if plan else [])]) == 2
    said = capsys.readouterr()
    assert "64 units, and this model has 32" in said.err and "Text:" not in said.out


def test_phases_that_have_no_curve_to_look_at_say_so(words, deep, tmp_path, capsys):
    """A Jacobian lens does not read the first layer, so its only curve has a gap."""
    JacobianLens({layer: torch.eye(32) for layer in range(9)}, 1).save(tmp_path / "lens.pt")
    more = {"lm.name": deep, "analysis.measures": "[readout,phases]", "analysis.conditions": "original",
            "analysis.readout.lens": tmp_path / "lens.pt", "run.dir": tmp_path / "run"}  # fmt: skip
    assert analyze.main(argv_of(words, **more)) == 0
    assert "Phases were not looked for" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("measure", "said"),
    [
        (name, "too few sequences (1)")
        for name in ("curvature", "dimension", "similarity", "massive", "[curvature,readout]")
    ]
    + [("readout", None)],
)
def test_one_sequence_has_a_readout_without_intervals_and_nothing_of_a_stream(measure, said, words, tmp_path, capsys):
    more = {"analysis.measures": measure, "data.limit": 1, "analysis.conditions": "original"}
    code = analyze.main(argv_of(words, **{"run.dir": tmp_path / "run"}, **more))
    printed = capsys.readouterr()
    if measure != "readout":
        assert code == 2 and "too few sequences (1)" in printed.err and not (tmp_path / "run").exists()
        return
    assert code == 0 and "on the first 1 sequence; no intervals, from 1 document" in printed.out
    arrays = arrays_of(tmp_path / "run")
    assert np.isfinite(arrays["original/readout/kl"]).all() and "original/readout/kl/interval" not in arrays
    assert "nan" not in (tmp_path / "run" / "findings.md").read_text()


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])  # two sites a layer, and one
def test_a_first_sublayer_that_is_one_vector_is_no_measure_of_anything(model_type, words, tmp_path, capsys):
    """As WikiText's, whose rows all end in one token: what needs variance has none there, and the rest is finite."""
    rng = np.random.default_rng(0)
    vocabulary = sorted({word for line in PROSE for word in line.split()})
    rows = [" ".join([*rng.choice(vocabulary, 25), "end!"]) for _ in range(40)]
    (tmp_path / "rows.txt").write_text("\n".join(rows))
    model = tiny_lm(tmp_path / "model", model_type=model_type, layers=4)
    more = {"lm.name": model, "data.path": tmp_path / "rows.txt", "analysis.conditions": "original", "data.limit": 40,
            "analysis.measures": "[cosine,curvature,dimension,similarity,readout,massive]", "data.l_max": 400,
            "cache.dir": tmp_path / "cache", "run.dir": tmp_path / "run"}  # fmt: skip
    assert analyze.main(argv_of(words, **more)) == 0
    arrays = arrays_of(tmp_path / "run")
    for name in ("dimension/twonn", "dimension/mle", "dimension/participation", "dimension/effective_rank"):
        values = arrays[f"original/{name}"]
        assert np.isnan(values[0]) and np.isfinite(values[1:]).all(), name
    assert arrays["original/dimension/repeated"][0] == 39
    cka = arrays["original/similarity/map"]
    assert np.isnan(cka[0]).all() and np.isnan(cka[:, 0]).all() and np.isfinite(cka[1:, 1:]).all()
    for name in ("curvature/angle", "curvature/straightness", "readout/kl", "massive/ratio/others", "cosine/mean"):
        assert np.isfinite(arrays[f"original/{name}"]).all(), name
    assert np.isnan(arrays["original/massive/normal_p"][2, 0])  # one state
    assert "constant" in capsys.readouterr().out
