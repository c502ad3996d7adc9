"""The run folder, provenance, redaction and W&B, read back as a dashboard would read it."""

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rsdyn import ranks
from rsdyn.config.command_line import load_config
from rsdyn.errors import UserError
from rsdyn.run import folder as run_folder
from rsdyn.run import run as run_of
from rsdyn.tracking import session as tracking

ROOT = Path(__file__).parents[2]
HF_KEY = "hf_" + "AbCdEfGhIjKlMnOpQrSt"
WANDB_KEY = "0123456789abcdef" * 2 + "01234567"
ENV_SECRET = "correct horse battery"
COMMIT = "fedcba9876543210" * 2 + "fedcba98"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch, tmp_path):
    for name in (*ranks.RANK_VARIABLES, *(name for name in os.environ if name.startswith("WANDB_")), "NETRC"):
        monkeypatch.delenv(name, raising=False)
    # setenv first, so that what create_run_folder leaves behind is undone after the test
    monkeypatch.setenv(run_folder.RUN_DIR_VARIABLE, "")
    monkeypatch.chdir(tmp_path)


def test_mode_follows_the_configuration_first(tmp_path):
    env = {"HOME": str(tmp_path), "WANDB_MODE": "online"}
    assert tracking.wandb_mode("disabled", env)[0] == "disabled"
    mode, line = tracking.wandb_mode("offline", env, run_dir="runs/x")
    assert mode == "offline" and "wandb sync runs/x/wandb/offline-run-*" in line
    with pytest.raises(UserError, match=r"mode=online needs a key.*WANDB_API_KEY"):
        tracking.wandb_mode("online", env)
    assert tracking.wandb_mode("online", {**env, "WANDB_API_KEY": "k"})[0] == "online"
    with pytest.raises(UserError, match=r"mode=onlin .*auto, online"):
        tracking.wandb_mode("onlin", env)


def test_auto_follows_the_environment_then_the_key(tmp_path):
    home = {"HOME": str(tmp_path)}
    assert tracking.wandb_mode("auto", {**home, "WANDB_MODE": "dryrun"})[0] == "offline"
    assert tracking.wandb_mode("auto", {**home, "WANDB_MODE": "disabled"})[0] == "disabled"
    with pytest.raises(UserError, match="WANDB_MODE=online needs a key"):
        tracking.wandb_mode("auto", {**home, "WANDB_MODE": "online"})
    with pytest.raises(UserError, match="WANDB_MODE=quick"):
        tracking.wandb_mode("auto", {**home, "WANDB_MODE": "quick"})
    mode, line = tracking.wandb_mode("auto", home)
    assert mode == "offline" and "no API key" in line and "\n" not in line


@pytest.mark.parametrize("value", ["true", "1", "True"])
def test_auto_follows_the_older_variable_too(value):
    assert tracking.wandb_mode("auto", {"WANDB_DISABLED": value})[0] == "disabled"
    assert tracking.wandb_mode("offline", {"WANDB_DISABLED": value})[0] == "offline"
    assert tracking.wandb_mode("auto", {"WANDB_DISABLED": "false"})[0] == "offline"


def started(monkeypatch, tmp_path, words, env):
    """What W&B is started with by a script of these settings, in this environment; and the lines that it prints."""
    found, lines = {}, []
    monkeypatch.setattr(run_of, "make_wandb_logger", lambda **given: found.update(given))
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    config = load_config([f"{key}={value}" for key, value in words.items()], "train")
    run = run_of.Run("train", config, tmp_path / "folder", 0.0)
    run.folder.mkdir()
    monkeypatch.setattr(run_of.Run, "say", lambda self, line="": lines.append(line))
    run.start_tracking(group="lm", tags=["lm", "text"])
    return found, lines


def test_the_environment_names_what_no_setting_names(monkeypatch, tmp_path):
    env = {
        **{"WANDB_PROJECT": "mine", "WANDB_NAME": "first", "WANDB_RUN_GROUP": "all", "WANDB_TAGS": "a, b,,lm"},
        **{"WANDB_JOB_TYPE": "night", "WANDB_RUN_ID": "abc", "WANDB_MODE": "offline", "WANDB_DIR": "/elsewhere"},
    }
    given, lines = started(monkeypatch, tmp_path, {}, env)
    named = {key: given[key] for key in ("project", "name", "group", "tags", "job_type", "run_id", "mode", "entity")}
    assert named == {
        **{"project": "mine", "name": "first", "group": "all", "tags": ["a", "b", "lm", "text"]},
        **{"job_type": "night", "run_id": "abc", "mode": "offline", "entity": None},  # W&B reads WANDB_ENTITY itself
    }
    assert lines[1] == "W&B: its files are in the run folder; WANDB_DIR=/elsewhere is not used"


def test_settings_come_before_the_environment(monkeypatch, tmp_path):
    env = {"WANDB_PROJECT": "mine", "WANDB_NAME": "first", "WANDB_ENTITY": "us", "WANDB_MODE": "online"}
    words = {"tracking.project": "ours", "run.name": "second", "tracking.entity": "them", "tracking.mode": "offline"}
    given, _ = started(monkeypatch, tmp_path, words, env)
    assert [given[key] for key in ("project", "name", "entity", "mode")] == ["ours", "folder", "them", "offline"]


def test_without_either_names_are_ours(monkeypatch, tmp_path):
    given, lines = started(monkeypatch, tmp_path, {}, {"WANDB_MODE": "offline"})
    found = [given[key] for key in ("project", "name", "group", "tags", "job_type")]
    assert found == ["rsdyn", "folder", "lm", ["lm", "text"], "train"] and len(lines) == 1


def test_what_wandb_reads_of_the_environment_by_itself_reaches_the_run(tmp_path):
    code = f"""
from rsdyn.tracking import session
logger = session.make_wandb_logger(mode="offline", project="p", run_dir={str(tmp_path)!r}, config={{}})
print(logger.experiment.notes, logger.experiment.settings.entity)
session.finish(logger)
"""  # a process of its own: W&B keeps one service, and what it read of the environment, for the whole process
    env = {**os.environ, "WANDB_NOTES": "a note", "WANDB_ENTITY": "us", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert "a note us" in done.stdout, done.stderr


@pytest.mark.parametrize("where", ["variable", "netrc", "settings"])
def test_auto_is_online_with_a_key_and_an_answering_server(tmp_path, where):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        env = {"HOME": str(tmp_path), "WANDB_BASE_URL": url, "WANDB_API_KEY": WANDB_KEY}
        if where != "variable":
            del env["WANDB_API_KEY"]
            (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login user password {WANDB_KEY}\n")
        if where == "settings":
            del env["WANDB_BASE_URL"]
            (tmp_path / ".config" / "wandb").mkdir(parents=True)
            (tmp_path / ".config" / "wandb" / "settings").write_text(f"[default]\nbase_url = {url}\n")
        mode, line = tracking.wandb_mode("auto", env)
        assert mode == "online" and url in line
        assert tracking.wandb_mode("auto", {**env, "HTTP_PROXY": "http://127.0.0.1:9"})[0] == "offline"
        assert tracking.wandb_mode("auto", {**env, "HTTP_PROXY": "127.0.0.1:9", "NO_PROXY": "127.0.0.1"})[0] == "online"
    mode, line = tracking.wandb_mode("auto", env)
    assert mode == "offline" and "no connection to 127.0.0.1" in line


def test_a_name_lookup_that_hangs_costs_two_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: time.sleep(6) or socket.socket())
    start = time.monotonic()
    assert tracking.wandb_mode("auto", {"HOME": str(tmp_path), "WANDB_API_KEY": WANDB_KEY})[0] == "offline"
    assert time.monotonic() - start < 4


# --- the run, read back ---

SCRIPT = """
import os, sys, time
import PIL.Image, plotly.graph_objects, torch, wandb
from lightning.pytorch.loggers import WandbLogger
start = time.monotonic()  # from here on it is ours: the imports are not
from rsdyn import files
from rsdyn.figures import panel
from rsdyn.tracking import artifacts, log as dashboard, session as tracking
from rsdyn.run import provenance, folder as run_folder
run_dir = run_folder.create_run_folder("train", "demo", sys.argv[1])
files.write_json(run_dir / "provenance.json", provenance.provenance(seed=7))
logger = tracking.make_wandb_logger(
    mode="auto", project="rsdyn", run_dir=run_dir, name="demo", job_type="train", group="embedded",
    tags=["original", "x" * 80], entity=None,
    config={"seed": 7, "cae": {"lr": 1e-3, "bad": float("nan")}, "lm": {"token": "s3cr3t-value", "note": sys.argv[2]},
            "provenance": provenance.provenance()},
)
for epoch in range(3):
    logger.log_metrics({"train/loss": 1.0 / (epoch + 1), "epoch": epoch}, step=10 * (epoch + 1))
    logger.log_metrics({"val/loss": 2.0 / (epoch + 1), "epoch": epoch}, step=10 * (epoch + 1))
curves = {"explained_variance": {"pca": torch.tensor([0.1, float("nan"), 0.3, 0.4])},
          "latent_distance": {"autoencoder": [1.0, 2.0, 3.0]}}
dashboard.log_curves(logger, curves, n_sublayers=4)
PIL.Image.new("RGB", (20, 10)).save(run_dir / "latent_trajectory.png")
rows = [["a", 1, float("nan"), torch.tensor(0.5, dtype=torch.bfloat16)], ["b", 2, float("inf"), None]]
dashboard.log_tables(logger, {"massive_units": dashboard.Table(["condition", "unit", "x", "y"], rows)})
line = panel.Line(name="original", x=[0, 1], y=[1, 2])
speed = panel.Panel(key="speed", title="Speed", marks=(line,), x=panel.Axis("layer"), y=panel.Axis("speed"))
dashboard.log_panels(logger, [speed], run_dir)
(run_dir / "report.html").write_text("<!DOCTYPE html><title>page</title>")
dashboard.log_page(logger, run_dir / "report.html")
tracking.update_config(logger, provenance={"argv": ["late"], "note": sys.argv[2]})
dashboard.log_summary(logger, {"test": {"mse": torch.tensor(0.25), "curve": [1, 2], "bad": float("inf")}, "note": "ok"})
(run_dir / "results.npz").write_bytes(b"numbers")
files.write_json(run_dir / "summary.json", {"n": 1})
artifacts.log_results(logger, run_dir)
assert logger.lost == {}, logger.lost
tracking.finish(logger, exit_code=int(sys.argv[3]))
tracking.finish(logger, exit_code=0)
assert not [k for k in os.environ if k.startswith("WANDB") and k.endswith("_DIR")]
print("seconds", time.monotonic() - start)
"""


def _inspect(run_dir, *options):
    (log,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *options, "--json", str(log)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory):
    """Run the script once, in a home of its own, with no terminal and no key, and secrets planted all around."""
    base = tmp_path_factory.mktemp("offline")
    for name in ("home", "tmp", "cwd"):
        (base / name).mkdir()
    (base / "script.py").write_text(SCRIPT)
    env = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "XDG_"))}
    for name in (*ranks.RANK_VARIABLES, run_folder.RUN_DIR_VARIABLE, "NETRC"):
        env.pop(name, None)
    env |= {"HOME": str(base / "home"), "TMPDIR": str(base / "tmp"), "PYTHONPATH": str(ROOT)}
    env |= {"MY_TOKEN": ENV_SECRET, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(base / "script.py"), str(base / "run"), f"{HF_KEY} {ENV_SECRET} {WANDB_KEY}", "1"]
    done = subprocess.run(
        command, env=env, cwd=base / "cwd", stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return base, done


def test_it_neither_prompts_nor_waits_nor_chats(offline_run):
    _, done = offline_run
    assert done.stdout.startswith("seconds ") and len(done.stdout.splitlines()) == 1, done.stdout
    assert "wandb" not in done.stderr.lower(), done.stderr
    assert float(done.stdout.split()[1]) < 20  # 2 to 4 s on an idle machine; a prompt takes 28 s, a time-out 100 s


def test_it_writes_nothing_outside_the_run_folder(offline_run):
    base, _ = offline_run
    outside = [p for p in base.rglob("*") if p.is_file() and base / "run" not in p.parents]
    outside = [p.relative_to(base) for p in outside if "matplotlib" not in str(p)]  # its font list, by design
    assert outside == [Path("script.py")]


def test_no_secret_reaches_any_file_of_the_run(offline_run):
    base, _ = offline_run
    files = [p for p in (base / "run").rglob("*") if p.is_file()]
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        for secret in (HF_KEY, WANDB_KEY, ENV_SECRET, "s3cr3t-value"):
            assert secret.encode() not in content, path


def test_the_summary_a_dashboard_shows(offline_run):
    base, _ = offline_run
    run = json.loads(_inspect(base / "run", "--summary"))
    assert run["state"] == "failed" and run["exit_code"] == 1 and run["project"] == "rsdyn" and run["name"] == "demo"
    assert run["config"]["seed"] == 7 and run["config"]["cae"]["lr"] == 1e-3 and run["config"]["cae"]["bad"] is None
    assert run["config"]["lm"] == {"token": "***", "note": "*** *** ***"}
    # what became known later is in the config too, redacted
    assert run["config"]["provenance"]["argv"] == ["late"]
    assert run["config"]["provenance"]["note"] == "*** *** ***"
    assert run["tags"] == ["original", "x" * 64] and run["console"] == []
    assert run["summary"]["test/mse"] == 0.25 and run["summary"]["note"] == "ok"
    assert not {"test/curve", "test/bad"} & set(run["summary"])
    image = run["summary"]["figures/latent_trajectory"]
    (files,) = (base / "run" / "wandb").glob("offline-run-*/files")
    assert image["_type"] == "image-file" and (files / image["path"]).stat().st_size == image["size"]
    page = run["summary"]["page"]
    assert page["_type"] == "html-file" and "<title>page</title>" in (files / page["path"]).read_text()


def test_the_panels_and_their_axes(offline_run):
    base, _ = offline_run
    records = [json.loads(line) for line in _inspect(base / "run").splitlines()]
    run = next(r["run"] for r in records if r["type"] == "run")
    assert run["job_type"] == "train" and run["run_group"] == "embedded"
    metrics = [r["metric"] for r in records if r["type"] == "metric"]
    axes = {m.get("name") or m["glob_name"]: m.get("step_metric") for m in metrics}
    assert axes["depth/*"] == "depth" and not any("sublayer" in name for name in axes)
    assert axes["train/*"] == axes["val/*"] == "trainer/global_step"
    assert "*" not in axes  # of two rules that match a name, W&B takes either

    history = [r["history"]["item"] for r in records if r["type"] == "history"]
    rows = [row for row in history if "depth" in row]
    assert [row["depth"] for row in rows] == [pytest.approx(s / 3) for s in range(4)]
    curve = [row.get("depth/explained_variance/pca") for row in rows]
    assert curve[1] is None and curve[::2] + curve[3:] == pytest.approx([0.1, 0.3, 0.4], rel=1e-6)
    assert [row.get("depth/latent_distance/autoencoder") for row in rows] == [1, 2, 3, None]
    losses = [(row["trainer/global_step"], row["val/loss"]) for row in history if "val/loss" in row]
    assert losses == [(10, 2.0), (20, 1.0), (30, pytest.approx(2 / 3))]


def test_the_table_is_clean_and_the_chart_whole(offline_run):
    base, _ = offline_run
    summary = json.loads(_inspect(base / "run", "--summary"))["summary"]
    (files,) = (base / "run" / "wandb").glob("offline-run-*/files")
    table = json.loads((files / summary["tables/massive_units"]["path"]).read_text())
    assert table["columns"] == ["condition", "unit", "x", "y"]
    assert table["data"] == [["a", 1, None, 0.5], ["b", 2, None, None]]
    chart = json.loads((files / summary["charts/speed"]["path"]).read_text())
    assert chart["data"][0]["y"] == [1.0, 2.0]
    # neither curves nor losses of the last step stand in the runs table; what the best model is judged by does
    assert not [k for k in summary if k.startswith(("depth", "train/", "trainer/", "epoch"))]
    assert summary["val/loss"] == pytest.approx(2 / 3)


def test_a_run_that_goes_on_keeps_its_id(tmp_path):
    """Offline each session has a folder of its own; both carry the id, under which they are one run once uploaded."""
    arguments = {"mode": "offline", "project": "p", "run_dir": tmp_path, "config": {}, "run_id": "abcd1234"}
    for _ in range(2):
        logger = tracking.make_wandb_logger(**arguments)
        assert logger.experiment.id == "abcd1234"
        tracking.finish(logger, 130)
        time.sleep(1.1)  # the folder's name is made of the second and the id
    folders = sorted(tmp_path.glob("wandb/offline-run-*-abcd1234"))
    assert len(folders) == 2 and all((folder / "run-abcd1234.wandb").stat().st_size > 0 for folder in folders)


def test_an_online_run_that_cannot_start_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UserError, match=r"W&B \(online\) did not start: .*mode=offline") as caught:
        tracking.make_wandb_logger(mode="online", project="p", run_dir=tmp_path, config={})
    assert "\n" not in str(caught.value) and not {"WANDB_DIR", "WANDB_SILENT"} & set(os.environ)


# --- a server that lets a run down ---


class Server(http.server.BaseHTTPRequestHandler):
    """As much of W&B's server as starting a run asks for; ``does`` says what goes wrong."""

    does = ""
    started = False

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.does == "refuse the key":
            return self.answer(401, {"errors": [{"message": "user is not logged in"}]})
        if self.path.startswith("/sdk/otel"):  # W&B's own telemetry
            return self.answer(200, {})
        if self.started:
            return self.answer(503 if self.does == "go away" else 403, {})
        query = json.loads(body)["query"]
        owner = {"id": "p", "name": "p", "entity": {"id": "e", "name": "lab"}}
        if "upsertBucket" in query and self.does == "refuse the run":
            return self.answer(200, {"data": None, "errors": [{"message": "permission denied"}]})
        if "upsertBucket" in query:
            type(self).started = self.does in ("go away", "throw out")
            bucket = {"id": "r", "name": "abcd1234", "displayName": "x", "config": "{}", "project": owner}
            return self.answer(200, {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}})
        viewer = {"id": "u", "entity": "lab", "username": "ann", "email": "", "flags": "{}", "teams": {"edges": []}}
        data = {"viewer": viewer, "serverInfo": {"features": []}, "model": {**owner, "bucket": None}}
        return self.answer(200, {"data": data})

    def answer(self, status, content):
        content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words):
        pass


def with_server(does, script, folder):
    """What a script prints, in a process of its own, while a server ``does`` something."""
    handler = type("OneServer", (Server,), {"does": does})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "XDG_"))}
        env |= {"HOME": str(folder), "WANDB_API_KEY": WANDB_KEY, "PYTHONPATH": str(ROOT)}
        env["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.server_port}"
        command = [sys.executable, "-c", script, str(folder / "run")]
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=120)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


LATE = """
import sys, warnings
from rsdyn.tracking import session as tracking
tracking.FINISH_TIMEOUT = 2.0
logger = tracking.make_wandb_logger(mode="online", project="p", run_dir=sys.argv[1], config={}, run_id="abcd1234")
logger.log_metrics({"val/loss": 1.0}, step=1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    tracking.finish(logger)
print(*(one.message for one in caught), sep="\\n")
"""


@pytest.mark.parametrize(("does", "reason"), [("go away", "no answer within 2 s"), ("throw out", ".*403.*")])
def test_a_server_that_lets_go_of_a_run_is_a_warning_with_its_cure(tmp_path, does, reason):
    said = with_server(does, LATE, tmp_path)
    (log,) = (tmp_path / "run").glob("wandb/run-*-abcd1234/run-abcd1234.wandb")
    assert said.count("\n") == 1 and re.search(rf"the end of the run \({reason}\)", said) and "losses" in said
    assert f"wandb sync {log.parent}" in said and log.stat().st_size > 0


FALL_BACK = """
import os, sys
from pathlib import Path
from rsdyn.config.command_line import load_config
from rsdyn.errors import UserError
from rsdyn.run.run import Run
from rsdyn.tracking.session import finish

def begin(mode):
    run = Run("train", load_config([f"tracking.mode={mode}"], "train"), folder, 0.0)
    run.start_tracking(group="g", tags=["t"])
    return run

def environment():
    return {k: v for k, v in os.environ.items() if k.startswith("WANDB") and k != "WANDB_SERVICE"}

folder, before = Path(sys.argv[1]), environment()
folder.mkdir()
for mode in ("online", "auto"):
    try:
        run = begin(mode)
        run.logger.log_metrics({"val/loss": 1.0}, step=1)
        finish(run.logger)
        assert run.logger.lost == {}, run.logger.lost
    except UserError as error:
        print("raised:", error)
    assert environment() == before
"""


@pytest.mark.parametrize(
    ("does", "reason"), [("refuse the key", "(?i)key|401|logged in"), ("refuse the run", "permission denied")]
)
def test_auto_goes_offline_when_the_server_refuses_and_online_does_not(tmp_path, does, reason):
    lines = with_server(does, FALL_BACK, tmp_path).splitlines()
    assert [line.partition(" (")[0].partition(", http")[0] for line in lines] == [
        "W&B: online", "raised: W&B", "W&B: online", "W&B: offline",
    ], lines  # fmt: skip
    assert re.search(reason, lines[1]) and "mode=offline" in lines[1]
    assert re.search(reason, lines[3]) and f"wandb sync {tmp_path}/run/wandb/offline-run-*" in lines[3]
    (log,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    assert log.stat().st_size > 0


def test_whatever_wandb_raises_at_its_start_is_one_error(tmp_path, monkeypatch):
    def refuse(**settings):
        raise Exception("Failed to connect to the service\nand more")

    monkeypatch.setattr("wandb.init", refuse)
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    before = {name: value for name, value in os.environ.items() if name.startswith("WANDB")}
    with pytest.raises(tracking.NotStarted, match=r"did not start: Failed to connect to the service\. Check"):
        tracking.make_wandb_logger(mode="online", project="p", run_dir=tmp_path, config={})
    assert {name: value for name, value in os.environ.items() if name.startswith("WANDB")} == before


# --- no logger ---


def test_without_a_logger_nothing_happens(tmp_path, monkeypatch):
    arguments = {"project": "p", "run_dir": tmp_path, "config": {}}
    assert tracking.make_wandb_logger(mode="disabled", **arguments) is None
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert tracking.make_wandb_logger(mode="offline", **arguments) is None
    tracking.update_config(None, a=1)
    tracking.finish(None, 1)
    assert not any(tmp_path.iterdir())
