"""What a run left on disk, as the report reads it: finished, of a version that we know, and never a pickle."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from packaging.version import InvalidVersion, Version

import rsdyn
from rsdyn.analysis.jacobians import JacobianResult
from rsdyn.analysis.results import AnalysisResults
from rsdyn.analysis.settings import JACOBIAN, RotationConfig
from rsdyn.analysis.stored import unflatten
from rsdyn.autoencoder.result import Trained
from rsdyn.errors import UserError
from rsdyn.files import LAYOUT
from rsdyn.perturbation.layers import LayerEffects
from rsdyn.perturbation.result import Found

SCRIPTS = ("train", "analyze", "perturb")
# What a page reads of a summary.json, and of what kind it is: a type, or a list of them as [type].
NEEDED: dict[str, dict[str, Any]] = {
    "train": {
        **{"lm": str, "text": str, "condition": str, "n_sequences": dict, "n_sublayers": int, "n_units": int},
        **{"widths": [int], "test": dict, "history": dict},
    },
    "analyze": {
        **{"lm": str, "text": str, "conditions": [str], "measures": [str], "n_sequences": int},
        **{"n_sublayers": int, "n_units": int, "findings": [dict]},
    },
    "perturb": {
        **{"lm": str, "text": str, "kind": str, "layers": [int], "n_prompts": int, "n_points": int, "rows": [dict]},
        "in_words": [str],
    },
    # a run of perturb.py that changed layers and moved no points
    "layers": {
        **{"lm": str, "text": str, "kind": str, "layers": [int], "n_prompts": int, "effects": [dict]},
        "in_words": [str],
    },
}
ROW = ("layer", "condition")
EFFECT = ("layer", "kl", "perplexity")


class Arrays(Mapping[str, np.ndarray]):
    """The arrays of a ``results.npz``, each read when it is first asked for; ``under`` is a view of one condition's.

    A missing or damaged array is a UserError that names the file and the array.
    """

    def __init__(self, path: Path, prefix: str = "", of: Any = None) -> None:
        self.path, self.prefix = path, prefix
        if of is None:
            if not zipfile.is_zipfile(path):
                raise UserError(f"{path}: this is not a results file that can be read (no zip archive). {AGAIN}")
            try:
                of = np.load(path, allow_pickle=False)
            except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
                raise UserError(
                    f"{path}: this is not a results file that can be read ({_brief(error)}). {AGAIN}"
                ) from error
            if not isinstance(of, np.lib.npyio.NpzFile):
                raise UserError(f"{path}: this holds one array and not a run's results. {AGAIN}")
        self._file = of

    def under(self, prefix: str) -> Arrays:
        return Arrays(self.path, self.prefix + prefix, self._file)

    def __getitem__(self, name: str) -> np.ndarray:
        key = self.prefix + name
        if key not in self._file.files:
            raise UserError(f"{self.path}: the array {key!r} is missing. {AGAIN}")
        try:
            return np.asarray(self._file[key])
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
            raise UserError(f"{self.path}: the array {key!r} cannot be read ({_brief(error)}). {AGAIN}") from error

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.prefix + name in self._file.files

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self.prefix) for key in self._file.files if key.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


AGAIN = "Run the script again into a new folder, or leave this run out."


@dataclass(frozen=True)
class RunFiles:
    """One finished run: its settings, what ran, its closing numbers and its arrays.

    ``sites_per_layer`` is None where the run does not say it.
    """

    folder: Path
    script: str
    config: dict[str, Any]
    provenance: dict[str, Any]
    summary: dict[str, Any]
    arrays: Arrays
    config_text: str = field(repr=False, default="")

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def measured(self) -> bool:
        """Whether it is an analysis that measured something of its streams, and not their Jacobians alone."""
        return self.script == "analyze" and self.summary["measures"] != [JACOBIAN]

    @cached_property
    def results(self) -> AnalysisResults:
        """What an analysis measured of its streams."""
        return unflatten(self.arrays, str(self.arrays.path))

    @cached_property
    def jacobians(self) -> JacobianResult:
        """What an analysis measured of Jacobians."""
        sites = int(self.summary["sites_per_layer"])
        return JacobianResult.from_arrays(
            self.arrays, n_layers=self.n_sublayers // sites, n_units=int(self.summary["n_units"]), sites=sites
        )

    @cached_property
    def trained(self) -> Trained:
        """What a training left."""
        return Trained.of(self.arrays, self.summary)

    @cached_property
    def points(self) -> Found:
        """What came of perturbed points."""
        return Found.from_arrays(self.arrays, self.summary)

    @cached_property
    def effects(self) -> LayerEffects:
        """What came of changed layers."""
        drawn = bool(self.summary.get("n_drawn"))
        return LayerEffects.from_arrays(self.arrays, str(self.summary["kind"]), drawn=drawn)

    @property
    def seed(self) -> int:
        return int(self.config.get("seed") or 0)

    @property
    def rotation_settings(self) -> RotationConfig:
        """The settings of the null models of an analysis."""
        given = (self.config.get("analysis") or {}).get("rotation") or {}
        return RotationConfig(**{f.name: given[f.name] for f in fields(RotationConfig) if f.name in given})

    @property
    def model(self) -> str:
        """The model's label, with its revision where one was asked for."""
        label, revision = str(self.summary["lm"]), (self.provenance.get("lm") or {}).get("revision")
        return f"{label}@{revision}" if revision and str(revision) not in label else label

    @property
    def n_sublayers(self) -> int:
        if self.script == "perturb" and not self.changed_layers:
            return len(self.arrays["reference"])
        return int(self.summary["n_sublayers"])

    @property
    def changed_layers(self) -> bool:
        """Whether it is a perturbation that changed layers of the model, and moved no points."""
        return self.script == "perturb" and "effects" in self.summary

    @property
    def sites_per_layer(self) -> int | None:
        return self.summary.get("sites_per_layer")


def read_runs(folders: Sequence[str | Path]) -> list[RunFiles]:
    """Read all runs, in the order given; UserError when they cannot stand on one page."""
    if not folders:
        raise UserError("No run was given: name at least one run folder, as in python -m rsdyn.report runs/my-run.")
    runs = [read_run(folder) for folder in folders]
    seen: dict[Path, None] = {}
    for run in runs:
        path = run.folder.resolve()
        if path in seen:
            raise UserError(f"{run.folder} is given twice: name each run once.")
        seen[path] = None
    _check_widths(runs)
    return runs


def read_run(folder: str | Path) -> RunFiles:
    """Read one run folder; UserError when it is not one of ours, is not finished, or is of a newer version."""
    folder = Path(folder).expanduser()
    if not os.path.isdir(folder):  # False, where Path.is_dir raises, for a name that is too long
        raise UserError(f"{folder} is not a folder: give the folder that a run printed as its run folder.")
    provenance_path = folder / "provenance.json"
    if not provenance_path.is_file() or not (folder / "config.yaml").is_file():
        missing = "provenance.json" if not provenance_path.is_file() else "config.yaml"
        raise UserError(
            f"{folder} is not a run folder of rsdyn: it has no {missing}. Give a folder that train.py, analyze.py or "
            "perturb.py made."
        )
    provenance = _json(provenance_path)
    script = provenance.get("script")
    if script not in SCRIPTS:
        raise UserError(
            f"{folder}: provenance.json says script={script!r}, but must say one of {', '.join(SCRIPTS)}. Give a run "
            "folder of rsdyn."
        )
    _check_version(folder, provenance.get("rsdyn"))
    for name in ("summary.json", "results.npz"):
        if not (folder / name).is_file():
            unfinished = " and results.npz" if name == "summary.json" and not (folder / "results.npz").is_file() else ""
            why = "is not finished" if unfinished else "is incomplete"
            cure = "Wait for the run to end, or start it again." if unfinished else AGAIN
            raise UserError(f"{folder} {why}: it has no {name}{unfinished}. {cure}")
    summary = _json(folder / "summary.json")
    needed = NEEDED["layers" if script == "perturb" and "effects" in summary else script]
    lacking = [key for key in needed if key not in summary]
    if lacking:
        raise UserError(f"{folder}: summary.json has no {', '.join(lacking)}, which {script}.py writes. {AGAIN}")
    layout = summary.get("layout", 1)  # before 2, none was written
    if layout != LAYOUT:
        raise UserError(f"{folder}: its results have layout {layout}, and this rsdyn reads layout {LAYOUT}. {AGAIN}")
    for key, kind in needed.items():
        if not _is_of(summary[key], kind):
            words = f"a list of {kind[0].__name__}" if isinstance(kind, list) else kind.__name__
            raise UserError(
                f"{folder}: summary.json says {key}={str(summary[key])[:40]}, and {script}.py writes {words}. {AGAIN}"
            )
    for key, names in (("rows", ROW), ("effects", EFFECT)):
        for row in summary[key] if key in needed else ():
            if any(name not in row for name in names):
                raise UserError(f"{folder}: summary.json has a row without {' and '.join(names)}. {AGAIN}")
    text = _text(folder / "config.yaml")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{folder}: config.yaml cannot be read ({_brief(error)}). {AGAIN}") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder}: config.yaml holds no settings. {AGAIN}")
    return RunFiles(folder, script, config, provenance, summary, Arrays(folder / "results.npz"), text)


def _check_version(folder: Path, version: Any) -> None:
    try:
        newer = Version(str(version)) > Version(rsdyn.__version__)
    except InvalidVersion:
        raise UserError(f"{folder}: provenance.json says rsdyn={version!r}, which is no version. {AGAIN}") from None
    if newer:
        raise UserError(
            f"{folder} was made by rsdyn {version}, and this is {rsdyn.__version__}: update rsdyn, or make the report "
            "with the version that made the run."
        )


def _check_widths(runs: Sequence[RunFiles]) -> None:
    """Runs of one model must have its width and depth: they are drawn as series of one panel, unit by unit."""
    first: dict[str, RunFiles] = {}
    for run in runs:
        other = first.setdefault(run.model, run)
        here, there = _shape(run), _shape(other)
        for key, what in (("n_units", "units"), ("n_sublayers", "sublayers")):
            if key in here and key in there and here[key] != there[key]:
                raise UserError(
                    f"{run.folder} and {other.folder} are both of the model {run.model}, but their streams have "
                    f"{here[key]} and {there[key]} {what}: they cannot stand in one comparison. Make a page of each."
                )
        if len(here) > len(there):  # a perturbation does not say its width
            first[run.model] = run


def _shape(run: RunFiles) -> dict[str, int]:
    shape = {"n_sublayers": run.n_sublayers}
    if "n_units" in run.summary:
        shape["n_units"] = int(run.summary["n_units"])
    return shape


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({_brief(error)}). {AGAIN}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: this is not JSON ({_brief(error)}). {AGAIN}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: this holds a {type(found).__name__}, but must hold named values. {AGAIN}")
    return found


def _is_of(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and all(_is_of(entry, kind[0]) for entry in value)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _brief(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split())[:160] or type(error).__name__
