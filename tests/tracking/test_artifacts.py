"""What goes into an artifact, what it is called, and what syncing does to it (what the scripts log: test_show.py)."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from rsdyn.tracking import artifacts
from rsdyn.tracking import session as tracking


@pytest.fixture(autouse=True)
def _copies_stay_here(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))


class Keeper:
    """A logger whose run keeps the artifacts; ``outputs`` are the names of those that it made."""

    def __init__(self):
        self.lost, self.kept, self.outputs, self.experiment, self.id = {}, [], [], self, "abcd1234"

    def _log_artifact(self, artifact, *, is_user_created, use_after_commit):
        self.kept.append((artifact, use_after_commit))
        self.outputs += [] if is_user_created else [artifact.name]


def a_cache(folder):
    """As much of a cache as is logged, without shards."""
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    return SimpleNamespace(folder=folder, name=folder.name, fields={"lm": "a"}, key="k", files=list)


def test_a_file_that_is_too_large_is_not_uploaded_and_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "MAX_BYTES", 10)
    (tmp_path / "results.npz").write_bytes(b"x" * 11)
    (tmp_path / "summary.json").write_text("{}")
    logger = Keeper()
    artifacts.log_results(logger, tmp_path)
    assert logger.kept == []
    (said,) = logger.lost.values()
    assert said.startswith("results.npz has")


@pytest.mark.parametrize(
    ("provenance", "name"),
    [('{"wandb_id": "12ab34cd"}', "checkpoint-12ab34cd"), ('{"wandb_id": "../x"}', None), ("[1]", None), (None, None)],
)
def test_a_checkpoint_is_called_by_its_run_or_else_by_its_contents(tmp_path, provenance, name):
    path = tmp_path / "run" / "checkpoints" / "best.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    if provenance:
        (tmp_path / "run" / "provenance.json").write_text(provenance)
    logger = Keeper()
    artifacts.use_checkpoint(logger, path)
    ((artifact, uses),) = logger.kept
    assert uses and logger.outputs == []
    assert artifact.type == "model" and list(artifact.manifest.entries) == ["best.ckpt"]
    other = tmp_path / "other"
    other.write_bytes(b"weights!")
    artifacts.use_checkpoint(logger, other)
    if name:
        assert artifact.name == name
    else:
        assert len(artifact.name) == len("checkpoint-") + 16 and artifact.name != logger.kept[1][0].name


def test_the_metadata_is_redacted(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "correct horse battery")
    (tmp_path / "best.ckpt").write_bytes(b"weights")
    logger = Keeper()
    artifacts.log_checkpoint(logger, tmp_path / "best.ckpt", lm="correct horse battery", widths=[4, 2])
    ((artifact, uses),) = logger.kept
    assert not uses and logger.outputs == [artifact.name] == ["checkpoint-abcd1234"]
    assert "horse" not in json.dumps(artifact.metadata) and artifact.metadata["widths"] == [4, 2]


@pytest.mark.parametrize("recorded", [0, 3])
def test_a_cache_that_any_process_recorded_into_is_made_and_then_used(tmp_path, recorded):
    """What this process recorded by itself does not matter."""
    cache = a_cache(tmp_path / "lm-original")
    logger = Keeper()
    artifacts.log_caches(logger, [SimpleNamespace(cache=cache, n_recorded=3 - recorded)], [recorded])
    assert [uses for _, uses in logger.kept] == ([False, True] if recorded else [True])
    assert logger.outputs == (["cache-lm-original"] if recorded else [])
    assert len({artifact.digest for artifact, _ in logger.kept}) == 1 and logger.lost == {}


def test_a_checkpoint_is_a_copy_as_it_was_when_it_was_logged(tmp_path):
    """Later runs write it, and the manifest of a cache, again."""
    (tmp_path / "best.ckpt").write_text("as it was")
    logger = Keeper()
    artifacts.log_checkpoint(logger, tmp_path / "best.ckpt")
    ((artifact, _),) = logger.kept
    (entry,) = artifact.manifest.entries.values()
    (tmp_path / "best.ckpt").write_text("other")
    assert Path(entry.local_path).read_text() == "as it was"
    assert Path(entry.local_path).is_relative_to(tmp_path / "data")


@pytest.mark.parametrize(("version", "copied"), [("0.28.0", True), ("0.31.0", False)])
def test_results_are_not_twice_in_the_folder_unless_syncing_would_remove_them(tmp_path, monkeypatch, version, copied):
    import wandb

    monkeypatch.setattr(wandb, "__version__", version)
    for name in ("results.npz", "summary.json"):
        (tmp_path / name).write_text(name)
    logger = Keeper()
    artifacts.log_results(logger, tmp_path)
    ((artifact, _),) = logger.kept
    for name, entry in artifact.manifest.entries.items():
        assert (Path(entry.local_path) == tmp_path / name) != copied


@pytest.mark.parametrize("log", [artifacts.log_checkpoint, artifacts.log_results])
def test_a_mistake_of_ours_is_not_taken_for_wandbs(tmp_path, monkeypatch, log):
    def broken(metadata):
        raise TypeError("a mistake of ours")

    monkeypatch.setattr(artifacts, "plain", broken)
    logger = Keeper()
    with pytest.raises(TypeError, match="a mistake of ours"):
        log(logger, tmp_path, lm="a")
    assert logger.lost == {}


def test_without_a_logger_or_a_cache_nothing_happens(tmp_path):
    logger = Keeper()
    artifacts.log_cache(logger, None, recorded=True)
    artifacts.log_cache(None, None, recorded=True)
    artifacts.log_results(None, tmp_path)
    artifacts.log_checkpoint(None, tmp_path)
    artifacts.use_checkpoint(None, tmp_path)
    assert logger.kept == [] and logger.lost == {}


# -- what the server is told -------------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """As much of W&B's server as uploading a run asks for; it has the contents of every artifact already.

    ``made`` and ``used`` are names of artifacts, ``made`` with the run that made them.
    """

    made: list
    used: list

    def do_POST(self):
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        query, variables = sent.get("query", ""), sent.get("variables") or {}
        data = {"viewer": None, "serverInfo": None, "organization": None}
        if "upsertBucket" in query:
            owner = {"id": "p", "name": "streams", "entity": {"id": "e", "name": "lab"}}
            bucket = {"id": "r", "name": variables["name"], "config": "{}", "project": owner, "historyLineCount": 0}
            data = {"upsertBucket": {"bucket": bucket, "inserted": True}}
        elif "createArtifact(" in query:
            name, by = variables["input"]["artifactCollectionName"], variables["input"].get("runName")
            self.made.append((name, by))
            artifact = {"id": name, "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}
            data = {"createArtifact": {"artifact": artifact}}
        elif "useArtifact(" in query:
            self.used.append((variables["input"]["artifactID"], variables["input"]["runName"]))
            data = {"useArtifact": {"artifact": {"id": self.used[-1][0]}}}
        elif "createRunFiles" in query:
            data = {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []}}
        body = json.dumps({"data": data} if query else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_POST

    def log_message(self, *words):
        pass


def test_syncing_tells_the_server_the_lineage_and_leaves_the_run_as_it_was(tmp_path, monkeypatch):
    """By `wandb sync` itself, with W&B's server played by this process."""
    run, other = tmp_path / "run", tmp_path / "other"
    files = [run / "results.npz", run / "summary.json", run / "best.ckpt", other / "checkpoints" / "best.ckpt"]
    cache = a_cache(tmp_path / "lm-original")
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    (other / "provenance.json").write_text('{"wandb_id": "12ab34cd"}')
    logger = tracking.make_wandb_logger(mode="offline", project="streams", run_dir=run, config={}, run_id="abcd1234")
    artifacts.log_cache(logger, cache, recorded=True)
    artifacts.use_checkpoint(logger, files[-1])
    artifacts.log_checkpoint(logger, run / "best.ckpt")
    artifacts.log_results(logger, run)
    tracking.finish(logger)
    assert logger.lost == {}

    handler = type("OneServer", (Server,), {"made": [], "used": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "0123456789" * 4}
        env = os.environ | address
        env |= {"HOME": str(tmp_path), "WANDB_DIR": str(tmp_path), "WANDB_CACHE_DIR": str(tmp_path / "cache")}
        (folder,) = run.glob("wandb/offline-run-*")
        command = [sys.executable, "-m", "wandb", "sync", str(folder)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        server.shutdown()
    assert done.returncode == 0, done.stdout + done.stderr
    mine = "abcd1234"
    cached, used, trained, found = "cache-lm-original", "checkpoint-12ab34cd", f"checkpoint-{mine}", f"results-{mine}"
    assert sorted(handler.made, key=str) == sorted(
        [(cached, mine), (cached, None), (used, None), (trained, mine), (found, mine)], key=str
    )
    assert sorted(handler.used) == [(cached, mine), (used, mine)]
    assert all(path.read_text() == path.name for path in files) and (cache.folder / "manifest.json").exists()
