"""What ran, where and from what, with the secrets taken out."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import rsdyn
from rsdyn.run_folder import plain

PACKAGES = ("torch", "lightning", "transformers", "datasets", "torchmetrics", "numpy", "scipy", "wandb", "omegaconf")
REDACTED = "***"

# --- secrets ----------------------------------------------------------------------------------------------------------

_SECRET_NAME = re.compile(
    r"(?:^|[._-])(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)(?:api_?key|(?:access|private)_?key|"
    r"secret(?:_?key)?|token|password|passwd|pwd|credentials?|auth|authorization)$",
    re.IGNORECASE,
)
_ASSIGNMENT = re.compile(r"([A-Za-z_][\w.-]*)([\"']?\s?[=:]\s?[\"']?)([^\s\"'&,;]+)")
_SHAPES = re.compile(
    r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[a-z]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|AKIA[A-Z0-9]{16}"
    r"|wandb_v\d+_[\w-]{16,}|(?<=Bearer )\S+|(?<=://)[^/\s@:]*:[^/\s@]+(?=@)"
)
_HEX40 = re.compile(r"(?<![0-9A-Za-z])[0-9a-f]{40}(?![0-9A-Za-z])")  # a W&B key, but also a commit: the name decides
_HASH_NAME = re.compile(r"(?:revision|commit|sha\d*|hash|digest|cache_key|[/@])[\"']?\s?[=:]?\s?[\"']?$", re.IGNORECASE)


def redact(obj: Any, name: str = "") -> Any:
    """Return a copy of nested containers in which whatever looks like a secret reads ``***``.

    Hidden are strings under a name like ``api_key``, ``token`` or ``password`` (as a dictionary's key, as
    ``name=value`` inside a string, or as the list item after ``--name``), the known shapes of keys (Hugging Face,
    GitHub, OpenAI, AWS, W&B, ``Bearer``, a password inside an address), and the value of every environment variable
    whose name contains KEY, TOKEN, SECRET or PASSWORD. Forty hex digits are a W&B key unless their name says revision,
    commit or hash.
    """
    values = {
        value
        for variable, value in os.environ.items()
        if re.search("KEY|TOKEN(?!IZER)|SECRET|PASSWORD", variable, re.IGNORECASE) and len(value) >= 6
    }
    return _redact(obj, name, sorted(values, key=len, reverse=True))


def _redact(obj: Any, name: str, values: list[str]) -> Any:
    if isinstance(obj, Path):
        obj = str(obj)
    if isinstance(obj, str):
        return _redact_text(obj, name, values)
    if isinstance(obj, Mapping):
        secret = name if _SECRET_NAME.search(name) else ""
        return {key: _redact(value, secret or str(key), values) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        items, flag = [], ""
        for item in obj:
            items.append(_redact(item, flag or name, values))
            flag = item.lstrip("-") if isinstance(item, str) and re.fullmatch(r"--?[\w.-]+", item) else ""
        return tuple(items) if type(obj) is tuple else items
    return obj


def _redact_text(text: str, name: str, values: list[str]) -> str:
    if text and _SECRET_NAME.search(name):
        return REDACTED
    assignment = re.fullmatch(r"(-{0,2}([\w.+-]+)=).+", text, re.DOTALL)  # one argument: the value may hold spaces
    if assignment and _SECRET_NAME.search(assignment[2]):
        return assignment[1] + REDACTED
    for value in values:
        text = text.replace(value, REDACTED)
    text = _SHAPES.sub(REDACTED, text)
    text = _ASSIGNMENT.sub(lambda m: m[1] + m[2] + REDACTED if _SECRET_NAME.search(m[1]) else m[0], text)
    if _HASH_NAME.search(name):
        return text
    return _HEX40.sub(lambda m: m[0] if _HASH_NAME.search(text[: m.start()]) else REDACTED, text)


# --- provenance -------------------------------------------------------------------------------------------------------


def provenance(**extra: Any) -> dict[str, Any]:
    """Describe what made a run: code, versions, machine, command line and start time (UTC), secrets redacted.

    ``extra`` (seed, cache key, ...) joins the dictionary. Nothing here fails: what cannot be found is None. GPUs are
    asked from ``nvidia-smi``, not torch, because initialising CUDA here would break workers that fork later.
    """
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"]}
    info = {
        "rsdyn": rsdyn.__version__,
        "git": git_state(Path(rsdyn.__file__).parent),
        "python": platform.python_version(),
        "versions": {name: installed.get(name) for name in (*PACKAGES, "safetensors")},
        "packages": sorted((f"{name}=={version}" for name, version in installed.items()), key=str.lower),
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "memory_bytes": _memory_bytes()},
        "gpus": _gpus(),
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "argv": list(sys.argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return redact(plain({**info, **extra}))


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return ``commit``, ``dirty`` and ``diff_sha256`` of the checkout that tracks this package, or None.

    The hash covers the difference from the last commit and the names of untracked files; it is None when clean. A
    package installed into someone else's repository (a virtual environment there) is not tracked by it: None.
    """
    # A git hook's GIT_DIR and GIT_INDEX_FILE would point every command at the hook's own repository.
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")} | {"LC_ALL": "C"}

    def git(*arguments: str) -> bytes:
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        return subprocess.run(command, env=env, capture_output=True, check=True, timeout=10).stdout

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        commit = git("rev-parse", "HEAD").decode().strip()
        changes = git("status", "--porcelain")
        digest = hashlib.sha256(git("diff", "HEAD", "--binary", "--no-ext-diff") + changes).hexdigest()
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(changes), "diff_sha256": digest if changes else None}


def _cpu_model() -> str | None:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _gpus() -> list[dict[str, Any]]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, check=True, text=True, timeout=10).stdout.splitlines()
        pairs = [line.rsplit(",", 1) for line in lines]
        return [{"name": name.strip(), "memory_mib": int(memory)} for name, memory in pairs]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
