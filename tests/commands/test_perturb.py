"""`perturb.py` as a user meets it: from the command line to the closing table, on a tiny model and real text."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


from recorded_streams import recorded  # noqa: E402

from rsdyn.commands import perturb  # noqa: E402
from rsdyn.config.command_line import load_config  # noqa: E402
from rsdyn.dynamics.projection import PCA  # noqa: E402
from rsdyn.errors import UserError  # noqa: E402
from rsdyn.figures.perturbation import perturbation_panels  # noqa: E402
from rsdyn.lm.source import find_lm  # noqa: E402
from rsdyn.perturbation.plane import Recorded, read_trajectories  # noqa: E402
from rsdyn.perturbation.points import _swapped as swapped  # noqa: E402
from rsdyn.perturbation.points import _usable  # noqa: E402
from rsdyn.perturbation.prompts import Prompt, layers_of, prompts_of  # noqa: E402
from rsdyn.report.reading import read_run  # noqa: E402
from rsdyn.run.opening import find_source, open_stream  # noqa: E402
from rsdyn.run.run import Run  # noqa: E402
from rsdyn.tracking import show  # noqa: E402
from rsdyn.tracking.perturbation import points_table  # noqa: E402

N, LAYERS, S, D = 40, 3, 6, 32


@pytest.fixture(scope="module")
def words(tiny_llama, tmp_path_factory):
    """The words every run here has in common: tiny model, little text, one cache."""
    return {
        "lm.name": str(tiny_llama), "data.limit": N, "data.l_max": 220, "cache.shard_sequences": 16,
        "cache.dir": str(tmp_path_factory.mktemp("cache")), "tracking.mode": "disabled", "perturb.layers": "[0,1,2]",
        "perturb.from_text": 0,
    }  # fmt: skip


def argv_of(words, **more):
    every = {**words, **more}
    small = {"perturb.grid.n": 4} if every.get("perturb.kind", "teleport") == "teleport" else {"perturb.points": 9}
    return [f"{k}={v}" for k, v in (small | every).items()]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    monkeypatch.setenv("RSDYN_RUN_DIR", "")


def run(words, folder, **more):
    assert perturb.main(argv_of(words, **{"run.dir": folder}, **more)) == 0
    with np.load(folder / "results.npz") as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads((folder / "summary.json").read_text()), arrays


@pytest.fixture(scope="module")
def default(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "default"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RSDYN_RUN_DIR", "")
        return folder, *run(words, folder)


@pytest.fixture(scope="module")
def plane(words, default):
    """The plane that the default run must have used: PCA of the same stream, from its cache."""
    trajectories = recorded(words["cache.dir"])
    assert trajectories.shape == (N, S, D)
    return PCA.fit(trajectories.reshape(-1, D), 2), trajectories


def test_the_run_folder_is_complete(default):
    folder, summary, _ = default
    for file in ["config.yaml", "provenance.json", "summary.json", "results.npz"]:
        assert (folder / file).stat().st_size > 0
    for name in ("fig4d_teleport", "recovery_relative", "recovery_cosine", "recovery_mse", "recovery_readout"):
        assert (folder / "figures" / f"{name}.png").stat().st_size > 0
    assert [row["condition"] for row in summary["rows"][:6]] == [
        "teleport",
        "stays put",
        "random writes",
        "random directions",
        "swapped-in state",
        "attention frozen",
    ]
    assert summary["n_points"] == 16 and len(summary["rows"]) == 6 * LAYERS


def test_the_linear_range_stands_below_the_table(default):
    folder, summary, _ = default
    assert [int(layer) for layer in summary["linear_range"]] == list(range(LAYERS))
    for layer, found in summary["linear_range"].items():
        assert set(found) == {"outside", "ratio", "error", "contraction", "measured"}, layer
        assert found["ratio"] > 0 and found["error"] > 0
    page = (folder / "report.html").read_text()
    assert "J predicts" in page and page.count("layer, points") == 1


def test_the_grid_is_where_it_was_put(default, plane):
    """Entry 0 of each teleport, seen in the plane, is the grid over the range of the text's trajectories."""
    pca, trajectories = plane
    latents = pca.encode(trajectories.to(torch.float32)).reshape(-1, 2)
    low, high = latents.amin(0), latents.amax(0)
    reach = 0.1 * (high - low)
    for layer in range(LAYERS):
        put = torch.from_numpy(default[2][f"layer{layer}/teleport/points_latents"][:, 0])
        assert put.shape == (16, 2)
        torch.testing.assert_close(put.amin(0), low - reach, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(put.amax(0), high + reach, rtol=1e-3, atol=1e-3)


def test_a_point_goes_where_transformers_takes_it(default, words, plane):
    """One teleport again, by hand: transformers' own forward with a hook that replaces the last token's state."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, _, arrays = default
    pca, _ = plane
    model = AutoModelForCausalLM.from_pretrained(words["lm.name"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(words["lm.name"])
    ids = tokenizer("I'm sorry, Dave. I'm afraid I can't do that.", add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([[tokenizer.bos_token_id, *ids]])
    layer, point = 1, 6
    put = torch.from_numpy(arrays[f"layer{layer}/teleport/points_latents"][point, 0])
    state = pca.decode(put.to(torch.float64)).to(torch.float32)

    def replace(module, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        hidden[:, -1] = state
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    with torch.inference_mode():
        before = model(tokens).logits[0, -1].log_softmax(-1)
        handle = model.model.layers[layer].register_forward_pre_hook(replace, with_kwargs=True)
        after = model(tokens).logits[0, -1].log_softmax(-1)
        handle.remove()
    expected = float((before.exp() * (before - after)).sum())
    assert arrays[f"layer{layer}/teleport/points_kl"][point] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_table_is_the_points(default):
    _, summary, arrays = default
    rows = {(row["layer"], row["condition"]): row for row in summary["rows"]}
    for layer in range(LAYERS):
        relative = arrays[f"layer{layer}/teleport/points_relative"]
        row = rows[layer, "teleport"]
        assert row["relative_put"] == pytest.approx(relative[:, 0].mean(), rel=1e-5)
        assert row["relative"] == pytest.approx(relative[:, -1].mean(), rel=1e-5)
        assert row["kl"] == pytest.approx(arrays[f"layer{layer}/teleport/points_kl"].mean(), rel=1e-5)
        latents, reference = arrays[f"layer{layer}/teleport/points_latents"], arrays["reference"][2 * layer :]
        mse = ((latents[:, 1:] - reference[1:]) ** 2).mean()
        assert row["plane_mse"] == pytest.approx(mse, rel=1e-3)
        # random directions start exactly as far away
        assert rows[layer, "random directions"]["relative_put"] == pytest.approx(row["relative_put"], rel=1e-4)
        assert rows[layer, "attention frozen"]["relative_put"] == pytest.approx(row["relative_put"], rel=1e-6)


def test_the_same_seed_gives_the_same_numbers_and_another_does_not(default, words, tmp_path):
    _, same = run(words, tmp_path / "same")
    for name, value in same.items():
        np.testing.assert_array_equal(value, default[2][name], err_msg=name)
    _, other = run(words, tmp_path / "other", seed=1, **{"data.order_seed": 0})  # of the same sequences
    name = "layer1/random_directions/points_kl"
    assert not np.allclose(other[name], same[name])
    np.testing.assert_allclose(other["layer1/teleport/points_kl"], same["layer1/teleport/points_kl"])


@pytest.mark.parametrize(
    "more",
    [
        {"perturb.off_plane": "keep"},
        {"perturb.position": "all"},
        {"perturb.site": "resid_mid"},
        {"perturb.kind": "noise"},
        {"perturb.kind": "noise", "perturb.noise.sigma": 0.1},
        {"perturb.kind": "swap"},
        {"perturb.kind": "swap", "perturb.through": "projection"},
        {"perturb.kind": "swap", "perturb.through": "projection", "perturb.off_plane": "keep"},
        {"perturb.prompt": "Good day to you."},
        {"perturb.grid.range": "[-1,1,-2,2]"},
        {"perturb.samples": 10},
        {"lm.dtype": "bfloat16"},
    ],
    ids=str,
)
def test_every_option_changes_something(default, words, tmp_path, more):
    _, arrays = run(words, tmp_path / "run", **more)
    kind = more.get("perturb.kind", "teleport")
    name = f"layer1/{kind}/points_kl"
    assert arrays[name].size in (9, 16)
    before = default[2]["layer1/teleport/points_kl"]
    assert arrays[name].shape != before.shape or not np.allclose(arrays[name], before)
    if kind == "noise":
        sigma = float(more.get("perturb.noise.sigma", 0.5))
        assert arrays["layer1/noise/points_relative"][:, 0].mean() == pytest.approx(sigma, rel=0.15)


@pytest.mark.parametrize("kind", ["noise", "swap"])
@pytest.mark.parametrize("off_plane", ["drop", "keep"])
def test_through_the_projection_only_the_plane_is_touched(words, tmp_path, kind, off_plane):
    """In the plane the points are where the whole states were; with keep the distance is the one in the plane."""
    _, full = run(words, tmp_path / "full", **{"perturb.kind": kind})
    more = {"perturb.kind": kind, "perturb.through": "projection", "perturb.off_plane": off_plane}
    _, through = run(words, tmp_path / "through", **more)
    for layer in range(LAYERS):
        key = f"layer{layer}/{kind}/points_"
        np.testing.assert_allclose(through[key + "latents"][:, 0], full[key + "latents"][:, 0], rtol=1e-3, atol=1e-3)
        in_plane = np.linalg.norm(full[key + "latents"][:, 0] - full["reference"][2 * layer], axis=-1)
        distance = through[f"layer{layer}/{kind}/ends_relative_put"][0]
        if off_plane == "keep":  # the distance in full space is the one in the plane
            ratio = distance / in_plane
            np.testing.assert_allclose(ratio, ratio[0], rtol=2e-3)
        else:  # what lay off the plane is lost too, so it is further than that
            assert np.std(distance / in_plane) > 0.01 * np.mean(distance / in_plane)


def test_every_point_of_every_prompt_is_kept(words, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("Good day to you.\nThe wind had changed.\nNumbers such as 12 and 305.\n")
    _, arrays = run(words, tmp_path / "run", **{"perturb.prompts": file})
    for name in ("relative_put", "relative", "cosine", "kl"):
        assert arrays[f"layer1/teleport/ends_{name}"].shape == (3, 16)
    np.testing.assert_allclose(arrays["layer1/teleport/ends_kl"][0], arrays["layer1/teleport/points_kl"])
    np.testing.assert_allclose(arrays["layer1/teleport/ends_kl"].mean(1), arrays["layer1/teleport/kl"], rtol=1e-5)


def test_prompts_of_the_text_stand_beside_the_written_one(words, tmp_path, default):
    """Intervals are over those of the text, a sample of it; figures draw the written one."""
    summary, arrays = run(words, tmp_path / "text", **{"perturb.from_text": 6})
    assert (summary["n_prompts"], summary["n_drawn"]) == (7, 6) and arrays["layer0/teleport/kl"].shape == (7,)
    assert arrays["sample"].tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(arrays["layer1/teleport/points_kl"], default[2]["layer1/teleport/points_kl"], rtol=1e-5)
    row = next(r for r in summary["rows"] if (r["layer"], r["condition"]) == (1, "teleport"))
    drawn = arrays["layer1/teleport/kl"][1:]
    assert row["kl"] == pytest.approx(np.median(drawn)) and row["kl_interval"] == [drawn.min(), drawn.max()]
    nearer = arrays["layer1/teleport/nearer"][1:]
    assert row["nearer"] == pytest.approx(nearer.mean())
    beyond = next(b for b in summary["beyond_still"] if b["layer"] == 1)
    difference = nearer - arrays["layer1/stays_put/nearer"][1:]
    low, high = scipy.stats.t.interval(0.95, 5, difference.mean(), scipy.stats.sem(difference))
    assert beyond["nearer"] == pytest.approx(difference.mean()) and beyond["nearer_interval"] == pytest.approx(
        [low, high]
    )
    ratio = arrays["layer1/teleport/plane_mse"][1:] / arrays["layer1/stays_put/plane_mse"][1:]
    assert beyond["mse_ratio"] == pytest.approx(ratio.mean())


def replaced(config, n):
    config.perturb.from_text = n
    return config.perturb


def test_the_text_s_prompts_by_default(words):
    config = load_config(argv_of({k: v for k, v in words.items() if k != "perturb.from_text"}), "perturb")
    source = find_source(Run("perturb", config, Path(), 0.0))
    found = prompts_of(config.perturb, source.sequences, source.lm, seed=0)
    assert found[0].sequence is None and len({p.sequence for p in found[1:]}) == len(found) - 1 == 20
    assert all(np.array_equal(p.tokens, source.sequences[p.sequence]) for p in found[1:])
    documents = replace(source.sequences, documents=np.arange(N) // 4)
    for n in (5, 10, 15):
        drawn = [p.sequence // 4 for p in prompts_of(replaced(config, n), documents, source.lm, seed=0)[1:]]
        assert len(drawn) == n and len(set(drawn)) == min(n, 10)  # another document each, while there are any
    config.perturb.from_text, config.perturb.prompts = None, str(ROOT / "constraints.txt")
    assert all(p.sequence is None for p in prompts_of(config.perturb, source.sequences, source.lm, seed=0))


@pytest.fixture(scope="module")
def of_two_kinds(tmp_path_factory):
    """Rows of which every other one is spoken, a few of no kind."""
    file = tmp_path_factory.mktemp("text") / "kinds.jsonl"
    some = "river letter wind boat wall mill word morning drawer sea village".split()
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(some, 8)), "kind": ("spoken", "written")[i % 2] if i < 36 else None}
            for i in range(N)]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data.path": file, "data.l_min": 1, "data.group_column": "kind"}


def test_prompts_of_one_group_and_states_of_another(words, of_two_kinds, tmp_path, monkeypatch, capsys):
    seen = []
    from rsdyn.perturbation import points

    monkeypatch.setattr(points, "_swapped", lambda trajectories, rows, *more: seen.append(
        trajectories.sequence[rows]) or swapped(trajectories, rows, *more))  # fmt: skip
    more = {"perturb.prompt_group": "spoken", "perturb.swap_group": "written", "perturb.from_text": 5}
    summary, _ = run(words, tmp_path / "run", **of_two_kinds, **more, **{"perturb.kind": "swap"})
    out = capsys.readouterr().out
    assert "groups: spoken (18), written (18); 4 without a label, in no group" in out
    assert "Prompts of the text are of group spoken; states swapped in are of group written." in " ".join(out.split())
    assert (summary["prompt_group"], summary["swap_group"], summary["n_drawn"]) == ("spoken", "written", 5)
    config = load_config(argv_of(words, **of_two_kinds, **more, **{"perturb.kind": "swap"}), "perturb")
    source = find_source(Run("perturb", config, Path(), 0.0))
    written = source.sequences.labels.members("written", "swap_group")
    assert seen and all(written[numbers.numpy()].all() for numbers in seen)
    prompts = prompts_of(config.perturb, source.sequences, source.lm, seed=0)
    assert all(source.sequences.labels.members("spoken", "prompt_group")[p.sequence] for p in prompts[1:])
    config.perturb.from_text = None
    assert len(prompts_of(config.perturb, source.sequences, source.lm, seed=0)) == 1 + 18
    config.perturb.from_text = 19
    with pytest.raises(UserError, match="from_text=19: the group spoken has 18 sequences"):
        prompts_of(config.perturb, source.sequences, source.lm, seed=0)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"perturb.prompt_group": "sung", "perturb.from_text": 2},
         "perturb.prompt_group=sung: no sequence of the text is of that group. There is spoken (18), written (18)."),
        ({"perturb.swap_group": "sung"}, "perturb.swap_group=sung: no sequence of the text is of that group. There is"),
        ({"perturb.swap_group": "spoken", "perturb.samples": 3, "data.order": "corpus", "seed": 1, "data.limit": 40,
          "data.group_column": "text"}, "different values in 40 sequences"),
        ({"perturb.prompt_group": "spoken"}, "perturb.prompt_group=spoken changes nothing with perturb.from_text=0"),
        ({"perturb.swap_group": "spoken", "data.group_column": "null"}, "swap_group=spoken needs data.group_column"),
        ({}, "data.group_column=kind (command line) would change nothing without perturb.prompt_group or"),
        ({"perturb.kind": "skip", "perturb.swap_group": "spoken"}, "perturb.kind=skip"),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_in_a_group_is_one_message(more, said, words, of_two_kinds, tmp_path, capsys):
    assert perturb.main(argv_of(words, **{**of_two_kinds, **more}, **{"run.dir": tmp_path / "run"})) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error, error


def test_points_that_stay_put_are_where_they_were_put(default):
    _, summary, arrays = default
    for layer in range(LAYERS):
        latents = arrays[f"layer{layer}/stays_put/points_latents"]
        teleported = arrays[f"layer{layer}/teleport/points_latents"]
        np.testing.assert_allclose(latents, np.broadcast_to(teleported[:, :1], latents.shape), rtol=1e-4, atol=1e-4)
    assert len(summary["beyond_still"]) == LAYERS and "nearer_interval" not in summary["beyond_still"][0]
    assert any("points that stay put: " in line and "One prompt says nothing" in line for line in summary["in_words"])


@pytest.mark.parametrize("lacks", [0, 1])
def test_a_prompt_without_a_state_to_swap_in(words, tmp_path, monkeypatch, capsys, lacks):
    """Every line ends in a full stop, as one of the prompts does: at layer 0 its own state is all there is."""
    rng, some = np.random.default_rng(0), "river letter wind boat wall mill word morning drawer sea village".split()
    (tmp_path / "text.txt").write_text("".join(f"{' '.join(rng.choice(some, 6))}.\n" for _ in range(N)))
    prompts = ["Hello there my friend"]
    prompts.insert(lacks, "She opened the letter.")
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    kept = []
    monkeypatch.setattr(show, "perturbation", lambda shared, *, found, **given: kept.append(found))
    more = {"data.path": tmp_path / "text.txt", "data.l_min": 1, "perturb.layers": "[0,2]"}
    summary, arrays = run(words, tmp_path / "run", **more, **{"perturb.prompts": tmp_path / "prompts.txt"})
    said, has, key = capsys.readouterr().out, 1 - lacks, "layer0/swapped-in_state/"
    rows = {(row["layer"], row["condition"]): row for row in summary["rows"]}
    assert {at: row["n_prompts"] for at, row in rows.items() if row["n_prompts"] < 2} == {(0, "swapped-in state"): 1}
    assert "swapped-in state, 1 of 2 prompts" in said and "is over 1 of the 2 prompts" in said
    for name in ("kl", "relative_curve", "ends_kl", "ends_relative"):  # one row per prompt, in their order
        assert len(arrays[key + name]) == 2
        assert np.isnan(arrays[key + name][lacks]).all() and np.isfinite(arrays[key + name][has]).all()
    assert rows[0, "swapped-in state"]["kl"] == pytest.approx(arrays[key + "kl"][has])
    assert (key + "points_latents" in arrays) == (has == 0)

    html = (tmp_path / "run" / "report.html").read_text()
    assert "layer 0, swapped-in state, 1 of 2 prompts" in html
    assert ("The first prompt has no swapped-in state at layer 0." in html) == (lacks == 0)
    panels = perturbation_panels(read_run(tmp_path / "run").points, steps=12)
    drawn = next(panel for panel in panels if panel.key == "recovery_relative").drawn({"layer": "0"})
    (curve,) = [mark.y for mark in drawn if mark.name == "swapped-in state"]
    np.testing.assert_array_equal(curve, arrays[key + "relative_curve"][has])

    table = points_table(kept[0])
    mine = [row for row in table.rows if row[:2] == [0, "swapped-in state"]]
    assert {row[2] for row in mine} == {has} and {row[4] is None for row in mine} == {has == 1}
    np.testing.assert_allclose([row[-1] for row in mine], arrays[key + "ends_kl"][has])
    assert {row[2] for row in table.rows if row[:2] == [2, "swapped-in state"]} == {0, 1}


def test_through_an_autoencoder(words, tmp_path, capsys):
    from rsdyn.autoencoder.model import CompressingAutoencoder

    torch.manual_seed(0)
    for d_in in (D, 16):
        arguments = {"d_in": d_in, "bottleneck": 2, "layers": 3, "standardise": "none", "n_sublayers": S}
        cae = CompressingAutoencoder(**arguments)
        state = {f"autoencoder.{k}": v for k, v in cae.state_dict().items()}
        hyper = {"autoencoder": arguments, "n_sublayers": S}
        torch.save({"state_dict": state, "hyper_parameters": hyper}, tmp_path / f"{d_in}.ckpt")
    cae = {"perturb.space": "cae", "perturb.checkpoint": tmp_path / f"{D}.ckpt"}
    summary, arrays = run(words, tmp_path / "run", **cae)
    assert summary["space"] == "cae" and np.isfinite(arrays["layer0/teleport/points_kl"]).all()
    cae["perturb.checkpoint"] = tmp_path / "16.ckpt"
    wrong = {"run.dir": tmp_path / "wrong", "tracking.mode": "offline"}
    assert perturb.main(argv_of(words, **cae, **wrong)) == 2
    assert "takes 16 units" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()  # although W&B had begun


@pytest.mark.parametrize("alike", [(), (3, 8)])
def test_no_token_of_the_prompts_own_sequence_is_swapped_in(alike):
    x = torch.randn(12, S, D, generator=torch.Generator().manual_seed(0))
    sequence = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4])
    state = torch.randn(D, generator=torch.Generator().manual_seed(1))
    x[list(alike), 2] = state  # the same token elsewhere
    found = _usable(Recorded(x, sequence), 2, state, Prompt(np.array([0, 1]), sequence=1))
    assert found.tolist() == [i for i in range(12) if i not in (2, 3, 4, *alike)]
    without = _usable(Recorded(x, sequence), 2, state, Prompt(np.array([0, 1])))
    assert without.tolist() == [i for i in range(12) if i not in alike]


def test_the_plane_is_that_of_the_recorded_tokens(words, tmp_path):
    options = {"data.positions": "{sample: 3}", "perturb.from_text": 2, "perturb.samples": 21, "cache.dtype": "float32"}
    summary, arrays = run(words, tmp_path / "drawn", **options)
    config = load_config(argv_of(words, **options), "perturb")
    one = Run("perturb", config, tmp_path, 0.0)
    stream = open_stream(one, find_source(one), samples=21)
    recorded = read_trajectories(stream, 21, lambda n: None)
    assert torch.equal(recorded.sequence, torch.arange(21).repeat_interleave(3)) and not stream.lm_loaded
    by_hand = PCA.fit(recorded.x.flatten(0, 1), 2)
    prompt = source_prompt(one, config)
    reference = find_lm(words["lm.name"]).load().record([prompt])[0]
    found = arrays["reference"]
    np.testing.assert_allclose(found, by_hand.encode(reference).numpy(), rtol=1e-3, atol=1e-3)
    assert any("Tokens that are in the first prompt's own state" in line for line in summary["in_words"])


def source_prompt(run, config):
    """The tokens of the first prompt."""
    source = find_source(run)
    return prompts_of(config.perturb, source.sequences, source.lm, seed=config.seed)[0].tokens


def test_layers_follow_the_depth():
    assert layers_of(None, 32) == [0, 7, 15, 23, 31]
    assert layers_of(None, 16) == [0, 3, 7, 11, 15]
    assert layers_of(None, 1) == [0]
    assert layers_of([0.0, 0.5, 1.0], 17) == [0, 8, 16]
    assert layers_of([0.25, 1.0], 17) == [4, 16]
    assert layers_of([3.0, 1.0], 4) == [1, 3]
    with pytest.raises(UserError, match="no layer 4; its 4 layers are 0 to 3"):
        layers_of([4.0], 4)
    with pytest.raises(UserError, match="fractions of the depth"):
        layers_of([0.5, 2.0], 4)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"perturb.layers": "[3]"}, "no layer 3; its 3 layers are 0 to 2"),
        ({"perturb.prompt": " "}, "perturb.prompt= (command line) has no value"),
        ({"perturb.prompt": "long " * 300}, "more than the model's context of 256"),
        ({"perturb.prompts": "nowhere.txt"}, "perturb.prompts=nowhere.txt: cannot be read"),
        ({"perturb.from_text": 41}, "the text has 40 sequences"),
        ({"perturb.grid.n": 1}, "perturb.grid.n=1"),
        ({"perturb.grid.range": "[1,0,0,1]"}, "min below its max"),
        ({"perturb.space": "cae", "perturb.checkpoint": "nowhere.ckpt"}, "nowhere.ckpt"),
        ({"perturb.kind": "swap", "data.limit": 1, "perturb.from_text": 1}, "other sequences"),
    ],
    ids=str,
)
def test_a_mistake_is_one_message(more, said, words, tmp_path, capsys):
    assert perturb.main(argv_of({**words, **more}, **{"run.dir": tmp_path / "run"})) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_resid_mid_of_a_parallel_model_is_refused(tiny_llama):

    one_site = replace(find_lm(str(tiny_llama)), site_names=("resid_pre",))
    with pytest.raises(UserError, match="resid_mid"):
        one_site.sublayer(1, "resid_mid")
