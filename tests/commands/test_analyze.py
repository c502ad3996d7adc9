"""`analyze.py` as a user meets it: from the command line to the findings, on a tiny model and real text."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from script_runs import argv_of, arrays_of, run_analyze, summary_of

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from rsdyn.analysis.settings import MEASURES, NULLS  # noqa: E402
from rsdyn.commands import analyze  # noqa: E402
from rsdyn.config.command_line import load_config  # noqa: E402
from rsdyn.run.opening import find_source  # noqa: E402
from rsdyn.run.run import Run  # noqa: E402

N = 61  # divides neither by the shards nor by the processes
FIGURES = [
    "fig1b_mean_activations",
    "fig1",
    "fig1b_active_share",
    "fig1b_participation",
    "fig1c_correlation",
    "fig1d_correlation_density",
    "fig1e_cosine",
    "fig1f_speed",
    "fig1f_relative_speed",
    "fig1g_information",
    "fig1h_information_mean",
    "fig2a_portraits",
    "fig2b_rotations",
    "fig2c_rotations_by_unit",
    "fig4a_trajectory",
    "fig4b_cumulative_variance",
    "fig4c_variance_by_sublayer",
    "fig4c_components_needed",
    "fig4_loadings",
    "findings_without_largest",
]
STREAMS = ("token_shuffled", "shuffled_keep_last", "untrained", "untrained_2", "untrained_3")  # beside the original


@pytest.fixture(scope="module")
def words(tiny_llama, tmp_path_factory):
    """The words every run here has in common: tiny model, little text, one cache."""
    return {
        "lm.name": str(tiny_llama), "data.limit": N, "data.l_max": 220, "cache.shard_sequences": 16,
        "cache.dir": str(tmp_path_factory.mktemp("cache")), "analysis.rotation.surrogates": 60,
        "tracking.mode": "disabled", "trainer.accelerator": "cpu",
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    monkeypatch.setenv("RSDYN_RUN_DIR", "")


@pytest.fixture(scope="module")
def default(words, tmp_path_factory):
    """Everything, in one process, from an empty cache."""
    return run_analyze(words, tmp_path_factory.mktemp("runs") / "default", **{"tracking.mode": "offline"})


# -- the default way ---------------------------------------------------------------------------------------------------


def test_the_run_folder_is_complete(default):
    folder, _ = default
    for file in ["config.yaml", "provenance.json", "summary.json", "results.npz", "findings.md"]:
        assert (folder / file).stat().st_size > 0
    for name in FIGURES:
        assert (folder / "figures" / f"{name}.png").stat().st_size > 0
        assert (folder / "figures" / f"{name}.pdf").stat().st_size > 0
    assert list(folder.glob("wandb/offline-run-*"))
    seconds = summary_of(folder)["seconds"]
    assert set(seconds["parts"]) == {"start", "passes", *MEASURES, "figures"}
    assert 0.5 * seconds["total"] < sum(seconds["parts"].values()) < seconds["total"]
    caches = json.loads((folder / "provenance.json").read_text())["caches"]
    assert len({c["cache_key"] for c in caches.values()}) == 6


def test_the_three_conditions_are_recorded_once_each(default):
    folder, said = default
    assert summary_of(folder)["sequences_recorded"] == 6 * N
    for condition in STREAMS:
        assert f"Cache ({condition}): {N} of {N} sequences to record" in said


def test_the_findings_are_the_results(default):
    """Some cells of the table computed again from the arrays, in the terminal, the summary and the page."""
    folder, said = default
    arrays, summary = arrays_of(folder), summary_of(folder)
    cells = {f["key"]: f["values"] for f in summary["findings"]}
    page = (folder / "findings.md").read_text()
    for condition in ("original", "token_shuffled", "untrained"):
        r = arrays[f"{condition}/correlation/units"]
        cell = cells["correlation_first"][condition]
        assert cell["value"] == pytest.approx(np.nanmean(r[0]), rel=1e-9)
        assert cell["low"] < cell["value"] < cell["high"]
        assert f"{cell['value']:.3f} [" in said and f"{cell['value']:.3f} [" in page
        speed = arrays[f"{condition}/velocity/speed"]
        cell = cells["speed_cross_over_within"][condition]
        assert cell["value"] == pytest.approx(speed[1::2].mean() / speed[0::2].mean(), rel=1e-9)
        turns = np.abs(arrays[f"{condition}/rotation/turns"]).mean()
        assert cells["turns"][condition]["value"] == pytest.approx(turns)
    tested = [null for null in NULLS if f"original/rotation/nulls/{null}/p" in arrays]
    assert tested == [null for null in NULLS if null != "layer_shuffle_regradient"]
    assert "a random walk of equal length turns" in said and "10.74" in said


def test_untrained_models_have_a_spread_and_the_largest_units_are_one_set(default):
    folder, said = default
    arrays, summary = arrays_of(folder), summary_of(folder)
    assert summary["untrained_seeds"] == 3
    assert summary["conditions"] == ["original", "token_shuffled", "shuffled_keep_last", "untrained"]
    rows = {f["key"]: f["values"] for f in summary["findings"]}
    speeds = [arrays["untrained/velocity/speed"], *arrays["untrained/velocity/speed/seeds"]]
    ratios = [s[1::2].mean() / s[0::2].mean() for s in speeds]
    found = rows["speed_cross_over_within"]["untrained"]
    assert [found["value"], *found["seeds"]] == pytest.approx(ratios) and len(set(ratios)) == 3
    assert f"seeds {min(ratios):.3f} to {max(ratios):.3f}" in said
    assert rows["speed_cross_over_within"]["original"]["seeds"] == []
    largest = {c: arrays[f"{c}/flags/largest_units"].tolist() for c in summary["conditions"]}
    assert all(units == largest["original"] for units in largest.values())
    left_out = summary["without_largest"]
    assert left_out["counts"] == [0, 1, 2, 4, 8] and left_out["units"] == largest["original"]  # a quarter of 32 units
    stays = np.setdiff1d(np.arange(32), largest["original"][:4])
    r = arrays["original/correlation/units"]
    first = next(row["values"]["original"] for row in left_out["rows"] if row["key"] == "correlation_first")
    assert first[0] == pytest.approx(np.nanmean(r[0])) and first[3] == pytest.approx(np.nanmean(r[0, stays]))
    assert "## Without the largest units" in (folder / "findings.md").read_text()


def test_each_row_says_on_how_many_it_was_measured(default):
    folder, _ = default
    for row in summary_of(folder)["findings"]:
        for value in row["values"].values():
            assert value["n"] is not None or row["key"] == "turns_of_random_walk", row["key"]


def test_a_second_run_reads_the_caches_and_gives_the_same_numbers(default, words, tmp_path):
    folder, said = run_analyze(words, tmp_path / "again", **{"analysis.measures": "[correlation,rotation]"})
    assert said.count("the LM is not loaded") == 6
    before, after = arrays_of(default[0]), arrays_of(folder)
    nulls = "original/rotation/nulls/token_shuffled/p"
    assert {"original/correlation/units", "untrained/rotation/turns", nulls} <= set(after)
    assert "original/cosine/mean" not in after and "original/pca/ratio" not in after
    assert after.pop("measures").tolist() == ["correlation", "rotation"]
    for name, value in after.items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_two_processes_give_what_one_does(default, words, tmp_path):
    folder, _ = run_analyze(words, tmp_path / "two", **{"trainer.devices": 2})
    one, two = arrays_of(default[0]), arrays_of(folder)
    assert summary_of(folder)["processes"] == 2 and summary_of(folder)["sequences_recorded"] == 0
    names = {path.name for path in (default[0] / "figures").iterdir()}
    assert {path.name for path in (folder / "figures").iterdir()} == names  # each drawn by one of the two
    assert_alike(one, two)


def assert_alike(one, two):
    assert set(one) == set(two)
    for name, expected in one.items():
        found = two[name]
        assert found.shape == expected.shape, name
        if expected.dtype.kind == "U":
            assert found.tolist() == expected.tolist(), name
            continue
        scale = max(1.0, float(np.nanmax(np.abs(np.where(np.isfinite(expected), expected, 0)), initial=0)))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * scale, err_msg=name)


def test_a_cache_with_one_condition_gets_the_others(words, tmp_path):
    cache = tmp_path / "cache"
    options = {"cache.dir": cache, "analysis.measures": "cosine"}
    alone = {"run.dir": tmp_path / "a", "analysis.conditions": "original"}
    assert analyze.main(argv_of(words, **options, **alone)) == 0
    assert analyze.main(argv_of(words, **options, **{"run.dir": tmp_path / "b"})) == 0
    assert summary_of(tmp_path / "a")["sequences_recorded"] == N
    assert summary_of(tmp_path / "b")["sequences_recorded"] == 5 * N


def test_only_the_shards_that_are_wanted_are_recorded(words, tmp_path):
    options = {"cache.dir": tmp_path / "cache", "analysis.measures": "cosine", "analysis.conditions": "original"}
    assert analyze.main(argv_of(words, **options, **{"run.dir": tmp_path / "a", "analysis.samples": 20})) == 0
    summary = summary_of(tmp_path / "a")
    assert summary["n_sequences"] == 20 and summary["sequences_recorded"] == 32


def test_the_papers_sum_is_flagged_and_shown_beside_the_true_one(words, tmp_path, capsys):
    options = {"analysis.measures": "mutual_information", "analysis.conditions": "original"}
    argv = argv_of(words, **options, **{"run.dir": tmp_path / "a", "analysis.mi.estimator": "paper_literal"})
    assert analyze.main(argv) == 0
    assert (tmp_path / "a/figures/fig1h_information_kde_mean.png").exists()
    arrays = arrays_of(tmp_path / "a")
    assert not np.allclose(
        arrays["original/mutual_information/units"], arrays["original/mutual_information/true_units"], rtol=0.5
    )
    assert "not a mutual information" in capsys.readouterr().out
    assert "not a mutual information" in (tmp_path / "a/findings.md").read_text()


def test_options_of_rotations_change_them(words, tmp_path):
    base = {"analysis.measures": "rotation", "analysis.conditions": "original"}
    found = {}
    for name, options in {
        "plain": {"analysis.rotation.nulls": "[increment_shuffle_windowed]"},
        "shared": {"analysis.rotation.nulls": "[increment_shuffle_windowed]", "analysis.rotation.shared": "true"},
        "window": {"analysis.rotation.nulls": "[increment_shuffle_windowed]", "analysis.rotation.window": 4},
        "seed": {"analysis.rotation.nulls": "[increment_shuffle_windowed]", "seed": 1},
    }.items():
        assert analyze.main(argv_of(words, **base, **options, **{"run.dir": tmp_path / name})) == 0
        found[name] = arrays_of(tmp_path / name)["original/rotation/nulls/increment_shuffle_windowed/mean"]
    assert len({tuple(v) for v in found.values()}) == len(found)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"analysis.measures": "[corelation]"}, "Did you mean analysis.measures=[correlation]?"),
        ({"analysis.rotation.nulls": "[layer]"}, "layer_shuffle"),
        ({"analysis.samples": 2}, "analysis.samples: too few sequences (2)"),
        ({"analysis.keep": 4, "analysis.mi.estimator": "ksg"}, "analysis.mi.estimator=ksg needs at least 5 sequences"),
        ({"analysis.samples": 3}, "analysis.mi.estimator=kde needs at least 4 sequences and gets 3"),
        ({"analysis.components": 33}, "analysis.components=33"),
        (
            {"analysis.samples": 3, "analysis.components": 32, "analysis.measures": "pca"},
            "at most 17 principal components",
        ),
        ({"analysis.rotation.units": "[1,32]"}, "32 is not a unit of this model"),
        ({"analysis.rotation.window": 3}, "analysis.rotation.window=3 must be at least 4"),
        ({"trainer.devices": 9}, "trainer.devices: 9 processes"),
        ({"cae.lr": 1}, "cae.lr=1"),
    ],
)
def test_a_mistake_is_one_message(more, said, words, tmp_path, capsys):
    assert analyze.main(argv_of(words, **{"run.dir": tmp_path / "run"}, **more)) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_model_of_one_layer_has_no_rotation(tmp_path, capsys, words):
    from tiny_models import tiny_lm

    shallow = tiny_lm(tmp_path / "shallow", layers=1)
    folder = {"lm.name": shallow, "run.dir": tmp_path / "run"}
    assert analyze.main(argv_of(words, **folder)) == 2
    assert "rotation needs at least 3 sublayers and this model has 2" in capsys.readouterr().err
    assert analyze.main(argv_of(words, **folder, **{"analysis.measures": "[cosine,velocity,correlation]"})) == 0


def test_a_stream_without_resid_mid_has_one_kind_of_transition(words, tmp_path):
    """A Pythia, whose attention and MLP are added at once, is recorded at one site a layer."""
    from tiny_models import tiny_lm

    pythia = tiny_lm(tmp_path / "pythia", model_type="gpt_neox")
    options = {"lm.name": pythia, "run.dir": tmp_path / "run", "cache.dir": tmp_path / "cache"}
    assert analyze.main(argv_of(words, **options)) == 0
    summary = summary_of(tmp_path / "run")
    assert summary["n_sublayers"] == 3 and summary["sites_per_layer"] == 1
    assert not any("cross" in f["key"] for f in summary["findings"])


def test_the_measures_ride_along_a_training(words, tmp_path):
    from rsdyn.commands import train

    argv = argv_of(
        {k: v for k, v in words.items() if not k.startswith("analysis")},
        **{"run.dir": tmp_path / "train", "analysis.on_train": "true", "trainer.max_epochs": 2, "cae.layers": 4,
           "cache.dir": tmp_path / "cache", "data.shuffle_shards": 1},
    )  # fmt: skip
    assert train.main(argv) == 0
    summary = summary_of(tmp_path / "train")
    assert summary["sequences_recorded"] == N
    options = {"analysis.conditions": "original", "run.dir": tmp_path / "analyze", "cache.dir": tmp_path / "cache"}
    assert analyze.main(argv_of(words, **options)) == 0
    assert summary_of(tmp_path / "analyze")["sequences_recorded"] == 0
    rode, alone = arrays_of(tmp_path / "train"), arrays_of(tmp_path / "analyze")
    for name in ("correlation/units", "cosine/mean", "velocity/speed", "mutual_information/units",
                 "activations/density", "rotation/turns", "pca/ratio", "activations/mean"):  # fmt: skip
        np.testing.assert_allclose(rode[f"analysis/{name}"], alone[f"original/{name}"], rtol=1e-6, atol=1e-8)
    assert summary["analysis"]["correlation/mean"] == pytest.approx(list(alone["original/correlation/mean"]))


def test_an_interrupted_run_says_what_is_kept(words, tmp_path, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("rsdyn.analysis.measures.cosine.cosine", stop)
    options = {"run.dir": tmp_path / "run", "analysis.measures": "cosine", "analysis.conditions": "original"}
    assert analyze.main(argv_of(words, **options)) == 130
    assert f"{N} of {N} sequences of original are in the cache" in capsys.readouterr().err
    assert not (tmp_path / "run/summary.json").exists()


# -- every token of each sequence ------------------------------------------------------------------------------------


def hidden_states(words, n):
    """transformers' own hidden states of every token of the first ``n`` sequences: ``(tokens, layers, D)``."""
    config = load_config(argv_of(words), "analyze")
    source = find_source(Run("analyze", config, Path(), 0.0))
    base = source.lm.load().base
    with torch.no_grad():
        outputs = [
            base(torch.from_numpy(source.sequences[i])[None], output_hidden_states=True).hidden_states[:-1]
            for i in range(n)
        ]
    return torch.cat([torch.stack(states, 2)[0] for states in outputs]).double().numpy()


def test_every_token_is_measured_and_means_are_transformers_own(words, tmp_path, capsys):
    options = {
        "data.positions": "all",
        "cache.dtype": "float32",
        "cache.dir": tmp_path / "cache",
        "analysis.samples": 13,
    }
    small = {"analysis.measures": "[activations,cosine,rotation]", "analysis.rotation.nulls": "[token_shuffled]",
             "analysis.conditions": "[original,token_shuffled]", "analysis.keep": 50}  # fmt: skip
    assert analyze.main(argv_of(words, **options, **small, **{"run.dir": tmp_path / "all"})) == 0
    said = capsys.readouterr().out
    x = hidden_states(words, 13)
    arrays, summary = arrays_of(tmp_path / "all"), summary_of(tmp_path / "all")
    np.testing.assert_allclose(arrays["original/activations/mean"][::2], x.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(arrays["original/activations/std"][::2], x.std(0), rtol=1e-4, atol=1e-5)
    assert (summary["n_sequences"], summary["n_trajectories"], summary["positions"]) == (13, len(x), "all")
    counts = summary["counts"]["original"]
    assert (counts["trajectories"], counts["bos"]) == (len(x), 13)
    assert f"every token of each sequence, {len(x)} trajectories of 13 sequences" in said
    assert f"13 BOS and {counts['sinks']} sinks of {len(x)} (original)" in " ".join(said.split())
    assert summary["sequences_recorded"] == 32  # two conditions, a shard of 16 each
    page = (tmp_path / "all" / "findings.md").read_text()
    assert f"13 sequences, {len(x)} trajectories" in page and "13 BOS" in page
    # nothing is kept without a cache: each of two passes runs the LM, and the numbers are the same
    bare = {**options, "cache.enabled": "false", "run.dir": tmp_path / "bare"}
    del bare["cache.dtype"], bare["cache.dir"]
    assert analyze.main(argv_of({k: v for k, v in words.items() if k != "cache.dir"}, **bare, **small)) == 0
    assert summary_of(tmp_path / "bare")["sequences_recorded"] == 64
    again = arrays_of(tmp_path / "bare")
    np.testing.assert_allclose(
        again["original/activations/mean"], arrays["original/activations/mean"], rtol=2e-2, atol=2e-2
    )  # in bf16


def test_two_processes_keep_the_same_tokens(words, tmp_path):
    options = {"data.positions": "{sample: 3}", "analysis.conditions": "original", "analysis.keep": 70,
               "analysis.measures": "[cosine,mutual_information,rotation,pca]", "analysis.samples": 45,
               "analysis.rotation.nulls": "layer_shuffle", "analysis.rotation.surrogates": 5}  # fmt: skip
    assert analyze.main(argv_of(words, **options, **{"run.dir": tmp_path / "one"})) == 0
    run_analyze(words, tmp_path / "two", **options, **{"trainer.devices": 2})
    one, two = arrays_of(tmp_path / "one"), arrays_of(tmp_path / "two")
    assert_alike(one, two)
    assert one["original/counts/trajectories"] == 135 and one["original/mutual_information/mean/n"] == 70
