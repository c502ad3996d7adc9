"""What a finished analysis left on disk, as a comparison takes it: of this version of the results, or of an older one.

``summary.json``, ``config.yaml`` and ``provenance.json`` are enough for all but the curves' intervals.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from packaging.version import InvalidVersion, Version

import rsdyn
from rsdyn.analysis.comparison import Curve, Facts, Model
from rsdyn.analysis.results import DepthStates, Grams
from rsdyn.analysis.stored import unflatten_part
from rsdyn.analysis.table import from_json
from rsdyn.errors import UserError
from rsdyn.figures.comparison import CURVES
from rsdyn.files import CONFIG, PROVENANCE, SUMMARY

RESULTS = "results.npz"
PARTICIPATION = "activations/participation"  # counts units: drawn as a share, since models have other widths
AGAIN = "Run analyze again into a new folder, or leave it out."


# curves that a comparison draws which had other names in results.npz before layout 2
OLD_NAMES = {
    "correlation/mean": "r_mean",
    "cosine/mean": "cosine",
    "velocity/relative": "relative_speed",
    "mutual_information/mean": "mi_mean",
    "activations/density": "density",
    PARTICIPATION: "participation",
    "pca/over_depth/dimensions": "dimensions",
}


def failed(label: str, reason: str, **about: Any) -> Model:
    """A model of which there is nothing, and why."""
    return Model(label, failure=reason, about=about)


def read_model(folder: str | Path, label: str | None = None, *, series: str = "", step: int | None = None) -> Model:
    """What the analysis in ``folder`` found; ``label`` None takes the model's own.

    Raises ``UserError`` for a folder that is no finished analysis of ours, or of a newer version.
    """
    folder = Path(folder).expanduser()
    made = _json(folder, PROVENANCE)
    if made.get("script") != "analyze":
        raise UserError(f"{folder} is a run of {made.get('script') or 'nothing known'}: only analyze can be compared.")
    version = str(made.get("rsdyn"))
    _check_version(folder, version)
    if not (folder / SUMMARY).is_file():
        raise UserError(f"{folder} is not finished: it has no {SUMMARY}. Wait for the run to end, or start it again.")
    summary, config = _json(folder, SUMMARY), _config(folder)
    try:
        findings = tuple(from_json(summary["findings"]))
        conditions = tuple(map(str, summary["conditions"]))
        facts = _facts(summary, config, made)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder} was made by rsdyn {version}, and {SUMMARY} cannot be compared: {_brief(error)}. {AGAIN}"
        ) from error
    if not findings:
        raise UserError(f"{folder} measured nothing that has findings (measures {summary.get('measures')}). {AGAIN}")
    lm = made.get("lm") or {}
    about = {
        "run": str(folder.absolute()),
        "name": lm.get("name"),
        "revision": lm.get("revision"),
        "commit": lm.get("commit"),
        "identity": lm.get("identity"),
        "started": made.get("started"),
    }
    curves, grams, states = _of_results(folder, conditions, facts)
    own = label or _own_label(summary, lm)
    return Model(own, facts, findings, conditions, curves, grams, states, series, step, about=about)


def _own_label(summary: Mapping[str, Any], lm: Mapping[str, Any]) -> str:
    label, revision = str(summary["lm"]), lm.get("revision")
    return f"{label}@{revision}" if revision and str(revision) not in label else label


def _facts(summary: Mapping[str, Any], config: Mapping[str, Any], made: Mapping[str, Any]) -> Facts:
    data, lm, seed = config["data"], config["lm"], config.get("seed", 0)
    parts = {key: data.get(key) for key in ("config", "split", "revision")} if data.get("name") else {}
    order = data.get("order", "corpus")
    drawn = data.get("order_seed")
    certificate = (made.get("certificates") or {}).get(summary["conditions"][0]) or {}
    bos = made.get("bos", certificate.get("opened_by"))
    flags = [words for key, words in (("strip", "stripped"), ("truncate", "cut to the context")) if data.get(key)]
    if data.get("chat_template", "none") != "none":
        flags.append("as a chat turn")
    quantised = (made.get("lm") or {}).get("quantisation")
    formats = f"computed in {lm.get('dtype')}, kept in {(config.get('cache') or {}).get('dtype')}"
    return Facts(
        text=" ".join([str(summary["text"]), *(str(part) for part in parts.values() if part is not None)]),
        filter=", ".join([f"{data['l_min'] + 1} to {data['l_max'] - 1} characters", *flags]),
        order="as in the text" if order == "corpus" else f"drawn by seed {seed if drawn is None else drawn}",
        n_sequences=int(summary["n_sequences"]),
        n_trajectories=int(summary.get("n_trajectories", summary["n_sequences"])),
        positions=str(summary.get("positions", data.get("positions", "last"))),
        bos=None if bos is None else str(bos),
        own_bos=lm.get("bos", "auto") == "auto",
        tokenizer=made.get("tokenizer"),
        n_sublayers=int(summary["n_sublayers"]),
        n_units=int(summary["n_units"]),
        sites_per_layer=int(summary.get("sites_per_layer", 2)),
        computed=formats + (f", weights stored as {quantised}" if quantised else ""),
        settings=_flat(config.get("analysis") or {}, "analysis.") | {"analysis.measures": summary["measures"]},
        version=str(made.get("rsdyn")),
    )


def _flat(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


# -- curves ------------------------------------------------------------------------------------------------------------


def _of_results(
    folder: Path, conditions: tuple[str, ...], facts: Facts
) -> tuple[dict[str, dict[str, Curve]], dict[str, Grams], dict[str, DepthStates]]:
    """Curves, and what is kept to be compared, of each condition; without the file of results there are none."""
    where = str(folder / RESULTS)
    try:
        with np.load(folder / RESULTS, allow_pickle=False) as arrays:
            curves = {c: _curves_of(arrays, c, facts) for c in conditions}
            names = {c: f"{c}/similarity/grams" for c in conditions if f"{c}/similarity/grams/pairs" in arrays.files}
            grams = {c: unflatten_part(Grams, arrays, name, where) for c, name in names.items()}
            names = {c: f"{c}/dsa/states" for c in conditions if f"{c}/dsa/states/states" in arrays.files}
            return curves, grams, {c: unflatten_part(DepthStates, arrays, name, where) for c, name in names.items()}
    except FileNotFoundError:
        return {}, {}, {}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{folder / RESULTS} cannot be read: {_brief(error)}. {AGAIN}") from error


def _curves_of(arrays: Any, condition: str, facts: Facts) -> dict[str, Curve]:
    found = {}
    for new in (drawn.name for drawn in CURVES):
        old = OLD_NAMES.get(new, new)
        for name, interval in ((new, f"{new}/interval"), (old, f"{old}_interval")):
            key = f"{condition}/{name}"
            if key not in arrays.files:
                continue
            values = np.asarray(arrays[key], dtype=float)
            ends = f"{condition}/{interval}"
            band = np.asarray(arrays[ends], dtype=float) if ends in arrays.files else None
            if values.ndim != 1 or (band is not None and band.shape != (2, len(values))):
                continue
            scale = facts.n_units if new == PARTICIPATION else 1.0
            at = np.arange(len(values)) + (facts.n_sublayers - len(values)) / 2  # of steps, and of angles between them
            low, high = (None, None) if band is None else (band[0] / scale, band[1] / scale)
            found[new] = Curve(at / max(facts.n_sublayers - 1, 1), values / scale, low, high)
            break
    return found


# -- files -------------------------------------------------------------------------------------------------------------


def _json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise UserError(f"{folder} is no run folder of rsdyn: it has no {name}.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {_brief(error)}. {AGAIN}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__} and no named values. {AGAIN}")
    return found


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read: {_brief(error)}. {AGAIN}") from error
    if not isinstance(found, dict):
        raise UserError(f"{folder / CONFIG} holds no settings. {AGAIN}")
    return found


def _check_version(folder: Path, version: str) -> None:
    try:
        newer = Version(version) > Version(rsdyn.__version__)
    except InvalidVersion:
        raise UserError(f"{folder}: {PROVENANCE} says rsdyn={version}, which is no version. {AGAIN}") from None
    if newer:
        raise UserError(
            f"{folder} was made by rsdyn {version}, and this is {rsdyn.__version__}: update rsdyn, or leave it out."
        )


def _brief(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:160] or type(error).__name__
