"""What each script shows in W&B, read back from small offline runs of all three by W&B's own reader."""

import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from leet import inspect  # noqa: E402
from lightning.pytorch.strategies import SingleDeviceStrategy  # noqa: E402

from rsdyn.commands import analyze, perturb, train  # noqa: E402
from rsdyn.figures import static  # noqa: E402
from rsdyn.report.page import make_page  # noqa: E402
from rsdyn.report.reading import read_run  # noqa: E402
from rsdyn.tracking.keys import CURVES  # noqa: E402

N, S, D = 40, 6, 32
SCRIPTS = ("train", "analyze", "perturb")
CONDITIONS = ("original", "token_shuffled")
NULLS = ("layer_shuffle", "increment_shuffle_windowed", "token_shuffled")


def small(figure, folder, name=None):
    """A small picture: what takes seconds, and is looked at elsewhere, is how large it is."""
    folder.mkdir(exist_ok=True)
    if name is None:
        figure, name = static.draw(figure), figure.key
    figure.savefig(folder / f"{name}.png", dpi=20)


def run(script, words):
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        patch.setenv("RSDYN_RUN_DIR", "")
        patch.setattr(static, "save", small)
        assert script.main(words) == 0
    return [str(w.message) for w in said if "W&B" in str(w.message)]


@pytest.fixture(scope="module")
def common(tiny_llama, tmp_path_factory):
    return [f"lm.name={tiny_llama}", f"data.limit={N}", "data.l_max=220", "cache.shard_sequences=16",
            f"cache.dir={tmp_path_factory.mktemp('cache')}", "tracking.mode=offline",
            "trainer.accelerator=cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def folders(common, tmp_path_factory):
    """One finished run of each script; the perturbation is in the plane of the autoencoder that was trained."""
    base = tmp_path_factory.mktemp("runs")
    own = {
        train: ["trainer.max_epochs=2", "analysis.on_train=true", "analysis.measures=[activations,cosine]",
                "cae.layers=3"],
        analyze: ["analysis.rotation.surrogates=40", f"analysis.rotation.nulls=[{','.join(NULLS)}]",
                  "analysis.conditions=[original,token_shuffled]"],
        perturb: ["perturb.grid.n=3", "perturb.samples=30", "perturb.from_text=6", "perturb.space=cae",
                  f"perturb.checkpoint={base / 'train' / 'checkpoints' / 'best.ckpt'}"],
    }  # fmt: skip
    for script, words in own.items():
        assert run(script, [*common, *words, f"run.dir={base / script.__name__.rpartition('.')[2]}"]) == []
    return base


@pytest.fixture(scope="module")
def shown(folders):
    return {name: inspect(folders / name) for name in SCRIPTS}


@pytest.fixture(scope="module")
def shuffled(folders, common, tmp_path_factory):
    """A run of train.py on shuffled text, all of it in the cache by then, whose other process recorded the rest."""
    folder = tmp_path_factory.mktemp("shuffled") / "run"
    words = ["data.condition=shuffled", "analysis.on_train=true", "analysis.measures=[cosine]", "trainer.max_epochs=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SingleDeviceStrategy, "reduce", lambda self, tensor, *args, **more: tensor + 7)
        assert run(train, [*common, *words, f"run.dir={folder}"]) == []
    return folder


@pytest.fixture(scope="module")
def other_kinds(folders, common, tmp_path_factory):
    """A run of perturb.py of each kind but teleport, by kind."""
    base = tmp_path_factory.mktemp("kinds")
    for kind in ("noise", "swap"):
        words = [f"perturb.kind={kind}", "perturb.points=4", "perturb.samples=30", "perturb.layers=[1]"]
        words += ["perturb.from_text=0"]
        assert run(perturb, [*common, *words, f"run.dir={base / kind}"]) == []
    return {kind: base / kind for kind in ("noise", "swap")}


def summary_of(folders, name):
    return json.loads((folders / name / "summary.json").read_text())


def arrays_of(folders, name):
    with np.load(folders / name / "results.npz") as file:
        return {key: file[key] for key in file.files}


# -- every run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_job_type_group_tags_config_and_provenance(shown, folders, tiny_llama, name):
    found = shown[name]
    model = summary_of(folders, name)["lm"]
    assert found.run["job_type"] == name and found.run["run_group"] == model and found.run["project"] == "rsdyn"
    assert found.run["display_name"] == name
    conditions = CONDITIONS if name == "analyze" else ("original",)
    assert found.summed["tags"] == [model, "embedded", *conditions]
    assert found.config["data"]["limit"] == N and found.config["trainer"]["accelerator"] == "cpu"
    # complete: what is known only once the model ran is there too
    provenance = json.loads((folders / name / "provenance.json").read_text())
    assert found.config["provenance"] == provenance and provenance["certificates"]["original"]["sublayers"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_rule_overlaps_another_and_each_curve_has_its_axis(shown, name):
    """Where two globs match one name, W&B takes either of them at random."""
    metrics, history = shown[name].metrics, shown[name].history
    keys = {key for row in history for key in row}
    for key in keys:
        matching = [rule for rule in metrics if rule == key or (rule.endswith("*") and key.startswith(rule[:-1]))]
        assert len(matching) <= 1, (key, matching)
    assert metrics["depth"]["options"]["hidden"] and metrics["depth"]["summary"] == {"none": True}
    assert metrics["depth/*"]["step_metric"] == "depth" and metrics["depth/*"]["summary"] == {"none": True}
    assert metrics["val/*"]["step_metric"] == "trainer/global_step"
    curves = {key for key in keys if key.startswith("depth/")}
    assert curves and {key.split("/")[1] for key in curves} <= {curves.measure for curves in CURVES}
    rows = [row for row in history if "depth" in row]
    assert [row["depth"] for row in rows] == [pytest.approx(s / (S - 1)) for s in range(S)]  # of all curves together


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_panel_is_a_chart_and_a_picture_and_the_page_is_there(shown, folders, name):
    found = shown[name]
    pictures = {path.stem: path for path in (folders / name / "figures").glob("*.png")}
    images, charts = found.media("figures/"), found.media("charts/")
    assert images.keys() == pictures.keys() and charts.keys() == pictures.keys() - {"fig1"}
    for picture, image in images.items():
        assert image["_type"] == "image-file"
        assert (found.folder / "files" / image["path"]).read_bytes() == pictures[picture].read_bytes()
    for chart, media in charts.items():
        assert media["_type"] == "plotly-file"
        figure = json.loads((found.folder / "files" / media["path"]).read_text())
        assert figure["data"] and figure["layout"]["title"]["text"].startswith("Fig. "), chart
        assert "bdata" not in json.dumps(figure) and '"@' not in json.dumps(figure)
    page = found.summary["page"]
    assert page["_type"] == "html-file"
    assert (found.folder / "files" / page["path"]).read_bytes() == (folders / name / "report.html").read_bytes()


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_summary_holds_neither_lists_nor_the_last_values_of_curves(shown, name):
    allowed = ("charts/", "figures/", "tables/", "_", "page")
    rest = {k: v for k, v in shown[name].summary.items() if not k.startswith(allowed)}
    assert not any(isinstance(v, (list, dict)) for v in rest.values())
    heads = {k.split("/")[0] for k in rest}
    own = {"train": {"test", "best", "fit", "val", "condition"}, "analyze": {"findings", "n_massive_units"},
           "perturb": {"recovery", "beyond_still", "kind", "space", "n_prompts"}}[name]  # fmt: skip
    assert heads - own <= {"lm", "text", "n_sublayers", "n_units", "n_sequences", "seconds"}
    assert own <= heads


@pytest.mark.parametrize("name", SCRIPTS)
def test_all_that_would_be_uploaded_is_in_the_run_folder(shown, folders, name):
    """Of ``wandb sync`` this is what can be seen without a server: each file that the record names is there."""
    named = shown[name].named_files()
    assert len(named) > 5
    for path in named:
        results = {folders / name / "results.npz", folders / name / "summary.json"}  # which are not there twice
        assert path.is_file() and (path.is_relative_to(folders / name / "wandb") or path in results)
        assert path.suffix != ".safetensors"


# -- each script -------------------------------------------------------------------------------------------------------


def test_training_shows_losses_curves_and_the_test(shown, folders):
    found, arrays, summary = shown["train"], arrays_of(folders, "train"), summary_of(folders, "train")
    losses = [(row["trainer/global_step"], row["val/loss"]) for row in found.history if "val/loss" in row]
    assert [v for _, v in losses] == pytest.approx([v for _, v in summary["history"]["val"]])
    curve = {round(d * (S - 1)): v for d, v in found.curve("depth/explained_variance/autoencoder")}
    wanted = {s: v for s, v in enumerate(arrays["ev_cae"].tolist()) if np.isfinite(v)}
    assert curve == pytest.approx(wanted, rel=1e-6)
    low = [v for _, v in found.curve("depth/latent_distance/autoencoder_low")]
    assert low == pytest.approx((arrays["latent_distance"] - arrays["latent_distance_std"]).tolist(), rel=1e-5)
    # measured while it recorded (analysis.on_train)
    assert [v for _, v in found.curve("depth/cosine/original")] == pytest.approx(
        arrays["analysis/cosine/mean"].tolist(), rel=1e-6
    )
    assert found.summary["test/r2_cae"] == pytest.approx(summary["test"]["r2_cae"])
    assert found.summary["best/epoch"] == summary["best_epoch"]
    assert found.metrics["test/*"]["options"]["hidden"]


def test_analysis_shows_every_condition_with_interval_and_null(shown, folders):
    found, arrays = shown["analyze"], arrays_of(folders, "analyze")
    measures = {key.split("/")[1] for row in found.history for key in row if key.startswith("depth/")}
    assert measures == {c.measure for c in CURVES if c.script == "analyze"} - {
        "paper_literal",
        "norm",
    }  # which is asked for by name
    for condition in CONDITIONS:
        for series, key, row in (("", "", ...), ("_low", "/interval", 0), ("_high", "/interval", 1)):
            curve = [v for _, v in found.curve(f"depth/speed/{condition}{series}")]
            assert curve == pytest.approx(arrays[f"{condition}/velocity/speed{key}"][row].tolist(), rel=1e-6)
        null = [v for _, v in found.curve(f"depth/mutual_information/{condition}_null")]
        assert null == pytest.approx(arrays[f"{condition}/mutual_information/floor"].tolist(), rel=1e-6)
        share = [v for _, v in found.curve(f"depth/participation/{condition}")]
        assert share == pytest.approx((arrays[f"{condition}/activations/participation"] / D).tolist(), rel=1e-6)


def test_findings_are_numbers_of_the_runs_table_and_rows_of_a_table(shown, folders):
    found, summary = shown["analyze"], summary_of(folders, "analyze")
    rows_of = {row["key"]: row["values"] for row in summary["findings"]}
    for key in ("correlation_first", "speed_cross_over_within", "turns"):
        for condition in CONDITIONS:
            value = rows_of[key][condition]
            assert found.summary[f"findings/{key}/{condition}"] == pytest.approx(value["value"])
            for end in ("low", "high"):
                if value[end] is not None:
                    assert found.summary[f"findings/{key}/{condition}_{end}"] == pytest.approx(value[end])
    columns, rows = found.table("findings")
    assert columns[:6] == ["claim", "paper", "statistic", "condition", "value", "low"]
    assert len(rows) == sum(len(row["values"]) for row in summary["findings"])
    for row in rows:
        if row["key"] in found.summary:  # rows of detail are in the table alone
            assert found.summary[row["key"]] == pytest.approx(row["value"])


def test_units_by_rotation_have_every_null_and_the_strongest_first(shown, folders):
    found, arrays = shown["analyze"], arrays_of(folders, "analyze")
    columns, rows = found.table("units_by_rotation")
    assert columns == ["condition", "null", "unit", "turns", "null mean", "null std", "z", "p", "q_normal", "q_ranks"]
    pairs = {(r["condition"], r["null"]) for r in rows}
    assert pairs == {("original", null) for null in NULLS} | {("token_shuffled", null) for null in NULLS[:2]}
    assert len(rows) == D * len(pairs)
    for condition, null in pairs:
        some = [r for r in rows if (r["condition"], r["null"]) == (condition, null)]
        sizes = [abs(r["z"]) for r in some if r["z"] is not None]
        assert sizes == sorted(sizes, reverse=True) and sorted(r["unit"] for r in some) == list(range(D))
        for r in some[:5]:
            assert r["turns"] == pytest.approx(-arrays[f"{condition}/rotation/turns"][r["unit"]])
            under = f"{condition}/rotation/nulls/{null}"
            assert r["p"] == pytest.approx(arrays[f"{under}/p"][r["unit"]])
            for column, name in (("q_normal", "q_normal"), ("q_ranks", "q")):
                assert r[column] == pytest.approx(arrays[f"{under}/{name}"][r["unit"]])
            # clockwise: the sign of z is that of turns less the null's
            assert np.sign(r["z"]) == np.sign(r["turns"] - r["null mean"])


def test_training_on_shuffled_text_has_the_name_that_an_analysis_gives_that_stream(shown, shuffled, folders):
    found, analysed = inspect(shuffled), shown["analyze"]
    assert json.loads((shuffled / "summary.json").read_text())["condition"] == "token_shuffled"
    assert "token_shuffled" in found.summed["tags"] and found.summary["condition"] == "token_shuffled"
    over_depth = [dict(each.curve("depth/cosine/token_shuffled")) for each in (found, analysed)]
    assert len(over_depth[0]) == S - 1 and over_depth[0] == pytest.approx(over_depth[1], rel=1e-5)
    assert not any(key.endswith("/shuffled") for row in found.history for key in row)
    # and so the analysis' PCA of that stream stands beside the autoencoder
    html = make_page([read_run(shuffled), read_run(folders / "analyze")])
    assert "components (analysis)" in html and "components (analysis)" not in make_page([read_run(shuffled)])


def test_perturbation_shows_recovery_by_slots_of_depth(shown, folders):
    found, arrays, summary = shown["perturb"], arrays_of(folders, "perturb"), summary_of(folders, "perturb")
    slots = dict(zip(summary["layers"], ("0.00", "0.50", "1.00"), strict=True))  # of three layers
    for layer, slot in slots.items():
        curve = found.curve(f"depth/recovery_cosine/{slot.replace('.', '')}_teleport")
        means = np.median(arrays[f"layer{layer}/teleport/cosine_curve"][1:], 0)  # of those drawn from the text
        assert [d * (S - 1) for d, _ in curve] == pytest.approx(list(range(2 * layer, S)))  # from the injection on
        assert [v for _, v in curve] == pytest.approx(means.tolist(), rel=1e-6)
        low = dict(found.curve(f"depth/recovery_cosine/{slot.replace('.', '')}_teleport_low"))
        assert all(low[s] <= v for s, v in curve)
        row = next(r for r in summary["rows"] if (r["layer"], r["condition"]) == (layer, "teleport"))
        assert found.summary[f"recovery/depth_{slot}/teleport/nearer"] == pytest.approx(row["nearer"])
        beyond = next(r for r in summary["beyond_still"] if r["layer"] == layer)
        assert found.summary[f"beyond_still/depth_{slot}/nearer"] == pytest.approx(beyond["nearer"])
        assert found.summary[f"beyond_still/depth_{slot}/nearer_low"] == pytest.approx(beyond["nearer_interval"][0])
    columns = [key for key in found.summary if key.startswith(("recovery/", "beyond_still/"))]
    assert len(columns) <= 10 * len(slots)


def test_perturbation_points_are_those_of_the_run(shown, folders):
    found, arrays, summary = shown["perturb"], arrays_of(folders, "perturb"), summary_of(folders, "perturb")
    columns, rows = found.table("perturbation_points")
    assert {"layer", "control", "prompt", "point", "coordinate 1", "distance put", "nearer"} <= set(columns)
    for row in summary["rows"]:
        layer, control = row["layer"], row["condition"]
        key = f"layer{layer}/{control.replace(' ', '_')}"
        some = [r for r in rows if (r["layer"], r["control"]) == (layer, control)]
        first = [r for r in some if r["prompt"] == 0]
        put = arrays[f"{key}/points_latents"][:, 0]
        assert np.allclose([[r["coordinate 1"], r["coordinate 2"]] for r in first], put, rtol=1e-5)
        ends = arrays[f"{key}/ends_cosine"][0]
        ends = ends[np.isfinite(ends)]  # another prompt may have more states to swap in
        assert [r["cosine at the end"] for r in first] == pytest.approx(ends.tolist(), rel=1e-6)
        assert {r["prompt"] for r in some} == {*range(7)}
        for name, column in (("nearer", "nearer"), ("contraction", "contraction")):
            drawn = [[r[column] for r in some if r["prompt"] == p and r[column] is not None] for p in range(1, 7)]
            if all(drawn):
                over = np.mean if name == "nearer" else np.median
                assert over([np.mean(v) for v in drawn]) == pytest.approx(row[name], rel=1e-5, abs=1e-9)


def test_the_other_perturbations_have_series_points_and_pictures_of_their_own(other_kinds):
    for kind, folder in other_kinds.items():
        found, summary = inspect(folder), json.loads((folder / "summary.json").read_text())
        with np.load(folder / "results.npz") as arrays:
            means = arrays[f"layer1/{kind}/cosine_curve"].mean(0)
        assert summary["kind"] == found.summary["kind"] == kind
        curve = found.curve(f"depth/recovery_cosine/050_{kind}")
        assert [v for _, v in curve] == pytest.approx(means.tolist(), rel=1e-6)
        (row,) = [r for r in summary["rows"] if r["condition"] == kind]
        assert found.summary[f"recovery/depth_0.50/{kind}/nearer"] == pytest.approx(row["nearer"])
        _, rows = found.table("perturbation_points")
        assert {r["control"] for r in rows} == {r["condition"] for r in summary["rows"]}
        assert f"fig4d_{kind}" in found.media("figures/") and f"fig4d_{kind}" in found.media("charts/")


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20:wandb_workspaces")
def test_the_layout_has_what_these_runs_log_and_no_key_that_none_does(shown, other_kinds):
    """The rest is in the runs of test_workspace.py: an untrained model, more layers, more steps."""
    from test_workspace import ELSEWHERE, assert_logged, logged_by

    from rsdyn.tracking.keys import PANELS
    from rsdyn.tracking.workspace.__main__ import specs

    runs = [*shown.values(), *(inspect(folder) for folder in other_kinds.values())]
    logged = set().union(*(logged_by(run) for run in runs))
    elsewhere = (*ELSEWHERE, "untrained", "shuffled_keep_last", "_trend/", "innovation_shuffle", "train/batch_loss",
                 "depth_0.25", "depth_0.75", "depth/norm/", *(f"/{name}" for name in (*PANELS["S"], *PANELS["G"])),
                 "tables/by_group")  # fmt: skip
    assert_logged(specs("rsdyn"), logged, elsewhere)


# -- artifacts ---------------------------------------------------------------------------------------------------------


def test_lineage_from_the_cache_over_the_checkpoint_to_the_results(shown, folders):
    ids = {name: json.loads((folders / name / "provenance.json").read_text())["wandb_id"] for name in SCRIPTS}
    caches = json.loads((folders / "analyze" / "provenance.json").read_text())["caches"]
    cache, shuffled = (f"cache-{Path(caches[c]['cache_folder']).name}" for c in CONDITIONS)
    kinds = {name: {a: v["type"] for a, v in shown[name].artifacts.items()} for name in SCRIPTS}
    results = {name: f"results-{ids[name]}" for name in SCRIPTS}
    checkpoint = f"checkpoint-{ids['train']}"
    assert kinds["train"] == {cache: "cache", checkpoint: "model", results["train"]: "results"}
    assert kinds["analyze"] == {cache: "cache", shuffled: "cache", results["analyze"]: "results"}
    assert kinds["perturb"] == {cache: "cache", checkpoint: "model", results["perturb"]: "results"}

    roles = {name: {a: shown[name].roles(a) for a in shown[name].artifacts} for name in SCRIPTS}
    recorded = ["made", "uses"]  # and so the cache is upstream of the checkpoint
    assert roles["train"] == {cache: recorded, checkpoint: ["made"], results["train"]: ["made"]}
    assert roles["analyze"] == {cache: ["uses"], shuffled: recorded, results["analyze"]: ["made"]}
    assert roles["perturb"] == {cache: ["uses"], checkpoint: ["uses"], results["perturb"]: ["made"]}
    # the same contents, so that the server takes them for the same version
    digests = [shown[name].artifacts[artifact]["digest"] for artifact, name in (
        (cache, "train"), (cache, "analyze"), (cache, "perturb"))]  # fmt: skip
    assert len(set(digests)) == 1
    assert shown["train"].artifacts[checkpoint]["digest"] == shown["perturb"].artifacts[checkpoint]["digest"]


def test_shards_are_references_with_their_own_checksums(shown, folders):
    from safetensors import safe_open

    caches = json.loads((folders / "train" / "provenance.json").read_text())["caches"]
    folder = Path(caches["original"]["cache_folder"])
    contents = shown["train"].artifacts[f"cache-{folder.name}"]["manifest"]["contents"]
    by_path = {entry["path"]: entry for entry in contents}
    shards = {path.name for path in folder.glob("shard-*.safetensors")}
    assert len(shards) == 3 and by_path.keys() == {"manifest.json", *shards}
    assert Path(by_path["manifest.json"]["local_path"]).read_bytes() == (folder / "manifest.json").read_bytes()
    for name in shards:
        with safe_open(folder / name, framework="numpy") as file:
            header = json.loads(file.metadata()["rsdyn"])
        assert by_path[name]["digest"] == header["xxh3"] and by_path[name]["ref"] == (folder / name).as_uri()
        assert "local_path" not in by_path[name] and int(by_path[name]["size"]) == (folder / name).stat().st_size


def test_what_any_process_recorded_is_made_by_the_run(shuffled):
    """The first process asks all of them, and none of its own sequences was missing."""
    caches = json.loads((shuffled / "provenance.json").read_text())["caches"]
    cache = f"cache-{Path(caches['token_shuffled']['cache_folder']).name}"
    assert inspect(shuffled).roles(cache) == ["made", "uses"]


def test_without_artifacts_there_are_none(common, tmp_path):
    assert (
        run(train, [*common, "trainer.max_epochs=1", "tracking.artifacts=false", f"run.dir={tmp_path / 'run'}"]) == []
    )
    assert inspect(tmp_path / "run").artifacts == {}


# -- failures ----------------------------------------------------------------------------------------------------------


def test_what_wandb_refuses_is_one_warning_and_loses_no_result(common, tmp_path, monkeypatch):
    """From the first epoch on, W&B takes nothing: as when its process died, or the disk of its files is full."""
    import wandb

    def refuse(self, *args, **kwargs):
        raise wandb.errors.CommError("the service has gone")

    from wandb.sdk.wandb_run import Run

    for method in ("log", "_log_artifact"):
        monkeypatch.setattr(Run, method, refuse)
    folder = tmp_path / "run"
    (said,) = run(train, [*common, "trainer.max_epochs=1", f"run.dir={folder}"])
    for what in ("losses", "curves over depth", "charts", "figures", "the cache ", "best.ckpt", "of the results"):
        assert what in said, what
    assert "the service has gone" in said and "in the run folder" in said
    for file in ("summary.json", "results.npz", "report.html", "checkpoints/best.ckpt", "figures/loss.png"):
        assert (folder / file).stat().st_size > 0
    assert not [name for name in os.environ if name.startswith("WANDB") and name.endswith("_DIR")]
