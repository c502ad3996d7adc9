"""What ran, where and from what, with the secrets taken out."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import rsdyn
from rsdyn.files import plain
from rsdyn.redaction import redact

PACKAGES = ("torch", "lightning", "transformers", "datasets", "torchmetrics", "numpy", "scipy", "wandb", "omegaconf")

# --- secrets ----------------------------------------------------------------------------------------------------------


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
    described: dict[str, Any] = redact(plain({**info, **extra}))
    return described


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
