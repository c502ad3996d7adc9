"""Secrets taken out of what is written or sent."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REDACTED = "***"


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
