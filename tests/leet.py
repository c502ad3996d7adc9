"""A run of W&B read back from its folder, with W&B's own reader (``wandb leet inspect``)."""

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass
class Inspected:
    """What a dashboard would know of an offline run."""

    folder: Path
    records: list
    summed: dict

    @property
    def config(self):
        return self.summed["config"]

    @property
    def summary(self):
        return self.summed["summary"]

    @property
    def run(self):
        return next(r["run"] for r in self.records if r["type"] == "run")

    @property
    def history(self):
        return [r["history"]["item"] for r in self.records if r["type"] == "history"]

    @property
    def metrics(self):
        """``define_metric`` by name or glob."""
        every = [r["metric"] for r in self.records if r["type"] == "metric"]
        return {m.get("name") or m["glob_name"]: m for m in every}

    @property
    def _artifacts(self):
        every = [r["artifact"] for r in self.records if r["type"] == "artifact"]
        return [a for a in every if a["type"] != "run_table"]

    @property
    def artifacts(self):
        """By name, without the tables, which W&B makes artifacts of by itself."""
        return {a["name"]: a for a in self._artifacts}

    def roles(self, name):
        """What the run is to an artifact, in turn: it ``made`` it, or ``uses`` it, which nobody then made."""
        roles = {(False, False): "made", (True, True): "uses"}
        keys = ("user_created", "use_after_commit")
        return [roles[tuple(bool(a.get(key)) for key in keys)] for a in self._artifacts if a["name"] == name]

    def media(self, prefix):
        """The media under a prefix, by what follows it: path, type, size."""
        return {k.removeprefix(prefix): v for k, v in self.summary.items() if k.startswith(prefix) and "path" in v}

    def table(self, name):
        """Columns, and rows as dictionaries."""
        found = json.loads((self.folder / "files" / self.summary[f"tables/{name}"]["path"]).read_text())
        return found["columns"], [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]

    def curve(self, key, axis="depth"):
        """``[(place, value), ...]`` of a key."""
        return [(row[axis], row[key]) for row in self.history if key in row]

    def named_files(self):
        """Every file that the record names and that is to be uploaded, by its path on disk."""
        found = []
        for record in self.records:
            if record["type"] == "files":
                found += [self.folder / "files" / f["path"] for f in record["files"]["files"]]
            if record["type"] == "artifact":
                contents = record["artifact"]["manifest"]["contents"]
                found += [Path(entry["local_path"]) for entry in contents if "ref" not in entry]
        return found


@cache
def inspect(run_dir):
    """The one offline run in a run folder, which is finished."""
    (found,) = sessions(run_dir)
    return found


def sessions(run_dir):
    """The offline runs in a run folder, one each time it was started, the first first."""
    return [_read(log) for log in sorted(Path(run_dir).glob("wandb/offline-run-*/run-*.wandb"))]


def _read(log):
    def read(*options):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", *options, "--json", str(log)]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout

    records = [json.loads(line) for line in read().splitlines() if line.strip()]
    return Inspected(log.parent, records, json.loads(read("--summary")))
