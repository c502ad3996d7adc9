"""``configs/sweep-cae*.yaml``, through W&B's own agent: the command that it builds is one that train.py takes."""

import itertools
import json
import math
import os
import random
import sys
from pathlib import Path

import pytest
import yaml
from leet import inspect
from wandb import wandb_agent

from rsdyn.autoencoder.model import geometric_widths
from rsdyn.config.command_line import CONFIGS, load_config, preset_names
from rsdyn.config.schema import options
from rsdyn.errors import UserError
from rsdyn.run import run as of_run
from rsdyn.tracking.workspace.__main__ import METRIC

ROOT = Path(__file__).parents[2]
PATHS = sorted(CONFIGS.glob("sweep-*.yaml"))
# as `wandb sweep` reads them
HYPERBAND, SWEEP = SWEEPS = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in PATHS]


def samples(parameter):
    """Values that a sweep can draw: all of them, or the ends and the middle."""
    if "values" in parameter:
        return parameter["values"]
    assert parameter["distribution"] == "log_uniform_values"
    low, high = parameter["min"], parameter["max"]
    assert isinstance(low, float) and isinstance(high, float)  # not "1e-4", which YAML reads as a text
    return [low, math.sqrt(low * high), high]


def drawn(sweep):
    """What a sweep can draw: each value of each parameter beside the middle of the others, and ten at random."""
    all_values = {name: samples(parameter) for name, parameter in sweep["parameters"].items()}
    middle = {name: values[len(values) // 2] for name, values in all_values.items()}
    rng = random.Random(0)
    ones = [middle | {name: value} for name, values in all_values.items() for value in values]
    return ones + [{name: rng.choice(values) for name, values in all_values.items()} for _ in range(10)]


@pytest.fixture
def agent(tmp_path, monkeypatch):
    """W&B's agent of this sweep, in the checkout, without a server; what it writes goes to ``tmp_path``."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SWEEP_ID", "swp12345")
    for variable in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # the agent sets them for each run
        monkeypatch.setenv(variable, "")
    made = wandb_agent.Agent(api=None, queue=None, sweep_id="swp12345")
    made._sweep_command = list(SWEEP["command"])
    return made


def give(agent, values, run_id="run12345"):
    """Have the agent start a run with these values, as when the server sends them."""
    args = {name: {"value": value} for name, value in values.items()}
    agent._command_run({"type": "run", "run_id": run_id, "program": SWEEP["program"], "args": args})


class Started:
    """What the agent would have started."""

    last_sigterm_time = None

    def __init__(self, *, command, **more):
        self.command = command


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep["name"])
def test_each_value_comes_from_the_command_line_that_the_agent_builds(agent, monkeypatch, sweep):
    monkeypatch.setattr(wandb_agent, "AgentProcess", Started)
    assert (sweep["program"], sweep["command"]) == (SWEEP["program"], SWEEP["command"])
    for i, values in enumerate(drawn(sweep)):
        give(agent, values, f"run{i}")
        env, python, program, *words = agent._run_processes[f"run{i}"].command
        assert (env, python, program) == ("/usr/bin/env", "python", "train.py")
        assert (ROOT / program).is_file()
        config = load_config(words, "train")
        for key, value in values.items():
            section, _, name = key.partition(".")
            assert getattr(getattr(config, section), name) == value


def test_no_two_settings_are_the_same_network():
    shapes = set()
    layers, counts, bottlenecks = (
        SWEEP["parameters"][key]["values"] for key in ("cae.layers", "cae.count", "cae.bottleneck")
    )
    for k, count, latents in itertools.product(layers, counts, bottlenecks):
        widths = geometric_widths(128, latents, k, count)
        assert (len(widths), widths[-1]) == (k + (count == "maps"), latents)
        shapes.add(tuple(widths))
    assert len(shapes) == len(layers) * len(counts) * len(bottlenecks)


def test_what_is_varied_is_all_that_can_be_chosen():
    assert {"cae.layers", "cae.count", "cae.bottleneck", "cae.standardise", "cae.lr"} == SWEEP["parameters"].keys()
    for key in ("cae.count", "cae.standardise"):
        assert set(samples(SWEEP["parameters"][key])) == set(options()[key].rules.choices)


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20:wandb_workspaces")
def test_the_layout_shows_what_is_varied_and_what_came_of_it():
    from rsdyn.tracking.workspace.plots import SWEPT

    assert [key for key, log in SWEPT.items() if log] == ["cae.lr"]
    for sweep in SWEEPS:
        assert SWEPT.keys() == sweep["parameters"].keys()
        assert sweep["metric"] == {"name": METRIC, "goal": "minimize"}


def test_a_sweep_is_no_preset():
    for path in PATHS:
        assert path.stem not in preset_names()
        with pytest.raises(UserError, match="no preset has this name"):
            load_config(["--config", path.stem], "train")


def test_early_termination_compares_like_with_like_and_comes_within_the_epochs():
    """Wider bottlenecks always have the lower error: all others would be stopped."""
    assert [sweep["name"] for sweep in SWEEPS if "early_terminate" in sweep] == ["cae-hyperband"]
    assert len(HYPERBAND["parameters"]["cae.bottleneck"]["values"]) == 1
    others = [{k: v for k, v in sweep["parameters"].items() if k != "cae.bottleneck"} for sweep in SWEEPS]
    assert others[0] == others[1]
    assert HYPERBAND["early_terminate"]["min_iter"] < load_config([], "train").trainer.max_epochs


@pytest.fixture
def sweeps():
    """W&B's own package of sweeps, which its server runs."""
    return pytest.importorskip(
        "sweeps", reason="needs `pip install --no-deps sweeps jsonref`: sweeps asks for an older numpy"
    )


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep["name"])
def test_a_sweep_is_valid_by_wandbs_own_schema(sweeps, sweep):
    assert sweeps.schema_violations_from_proposed_config(sweep) == []
    for _ in range(20):
        values = {key: entry["value"] for key, entry in sweeps.next_run(sweep, []).config.items()}
        load_config([f"{key}={value}" for key, value in values.items()], "train")


def test_wandbs_own_hyperband_stops_the_run_that_lags_behind(sweeps):
    """By the errors in the rows that train.py logs, ten epochs in."""
    bands = {"lags": (5.0, 12), "leads": (1.0, 12), "middle": (2.0, 12), "begins": (9.0, 8)}  # error, epochs

    def run(name, error, epochs):
        # as they come from train.py: rows of steps, of which those at an epoch's end have the error
        rows = [
            row for epoch in range(epochs) for row in ({"train/batch_loss": 1.0}, {"val/mse": error + 1 / (1 + epoch)})
        ]
        return sweeps.SweepRun(name=name, state=sweeps.RunState.running, history=rows)

    runs = [run(name, *band) for name, band in bands.items()]
    assert [found.name for found in sweeps.stop_runs(HYPERBAND, runs)] == ["lags"]


def test_the_agent_runs_train_py_which_logs_the_metric(agent, tmp_path, monkeypatch):
    values = {"cae.layers": 3, "cae.count": "maps", "cae.bottleneck": 2, "cae.standardise": "unit_sublayer",
              "cae.lr": 0.003}  # fmt: skip
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("RSDYN_RUN_DIR", raising=False)
    run = tmp_path / "run"
    words = ["data.limit=60", "trainer.max_epochs=2", "trainer.accelerator=cpu"]
    agent._sweep_command += [*words, f"run.dir={run}", f"cache.dir={tmp_path / 'cache'}"]
    give(agent, values)
    assert agent._run_processes["run12345"].wait() == 0
    assert len(list(run.glob("wandb/offline-run-*-run12345"))) == 1  # the run that the server knows
    logged = inspect(run)
    error = find(logged.summary, SWEEP["metric"]["name"])
    assert 1 / 3 < error / json.loads((run / "summary.json").read_text())["test"]["test_mse"] < 3  # of another split
    rows = [row for row in logged.history if "val/mse" in row]
    assert [row["epoch"] for row in rows] == [0, 1] and rows[-1]["val/mse"] == pytest.approx(error)  # one an epoch
    assert find(logged.summed, "cae.lr") == 0.003  # as W&B's sweep page names it
    assert json.loads((run / "provenance.json").read_text())["wandb_id"] == "run12345"
    config = yaml.safe_load((run / "config.yaml").read_text())["cae"]
    assert [config[key.partition(".")[2]] for key in values] == list(values.values())


def test_the_agents_id_wins_over_that_of_a_run_that_goes_on(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(of_run, "make_wandb_logger", lambda **settings: given.append(settings["run_id"]))
    for sweep, of_agent, wins in [("s", "run12345", "run12345"), ("", "run12345", "0ld12345"), ("s", "", "0ld12345")]:
        monkeypatch.setenv("WANDB_SWEEP_ID", sweep)
        monkeypatch.setenv("WANDB_RUN_ID", of_agent)
        run = of_run.Run("train", load_config(["tracking.mode=offline"], "train"), tmp_path, 0.0)
        run.record_provenance(wandb_id="0ld12345")
        run.start_tracking(group="g", tags=[])
        assert given.pop() == wins == json.loads((tmp_path / "provenance.json").read_text())["wandb_id"]


def find(tree, key):
    """The value under ``key``, wherever it lies."""
    if isinstance(tree, dict):
        if key in tree:
            return tree[key]
        tree = list(tree.values())
    found = [find(branch, key) for branch in tree] if isinstance(tree, list) else []
    return next((value for value in found if value is not None), None)
