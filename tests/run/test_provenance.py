"""Provenance, and the secrets that must not be in it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rsdyn import redaction
from rsdyn.run import provenance

ROOT = Path(__file__).parents[2]
HF_KEY = "hf_" + "AbCdEfGhIjKlMnOpQrSt"
WANDB_KEY = "0123456789abcdef" * 2 + "01234567"
ENV_SECRET = "correct horse battery"
COMMIT = "fedcba9876543210" * 2 + "fedcba98"
pytestmark = pytest.mark.usefixtures("nobodys_environment")


@pytest.mark.parametrize(
    "secret",
    [
        {"api_key": "abc"},
        {"lm": {"token": "abc"}},
        {"auth": {"user": "abc"}},
        ["--token", "abc"],
        ["lm.api_key=abc"],
        ["password=a b abc"],
        ["https://me:abc@host/x"],
        "curl -H 'Authorization: Bearer abc'",
        '{"secret": "abc"}',
    ],
)
def test_a_secret_is_known_by_its_name(secret):
    assert "abc" not in json.dumps(redaction.redact(secret)) and "***" in json.dumps(redaction.redact(secret))


@pytest.mark.parametrize("secret", [HF_KEY, WANDB_KEY, "sk-proj-abcdefghijklmnop", "ghp_" + "a1" * 18])
def test_a_secret_is_known_by_its_shape(secret):
    assert secret not in json.dumps(redaction.redact({"note": [f"use {secret} here", (secret,)]}))


def test_the_values_of_secret_environment_variables_are_hidden(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_PASSWORD", ENV_SECRET)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsehood")
    assert redaction.redact([f"x={ENV_SECRET}", "falsehood"]) == ["x=***", "falsehood"]


@pytest.mark.parametrize(
    "harmless",
    [
        {"lm": {"revision": COMMIT}, "cache_key": "deadbeef", "git": {"commit": COMMIT}},
        [f"lm.revision={COMMIT}", "cae.bottleneck=2", "data.max_tokens=5"],
        f"hub/models--x/snapshots/{COMMIT}/model.safetensors",
        {"bos_token": "<s>", "n_tokens": 12, "keys": ["a"], "token": None},
    ],
)
def test_what_is_no_secret_stays(harmless):
    assert redaction.redact(harmless) == harmless


# --- provenance ---


def test_provenance_says_what_ran_where(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", f"lm.token={HF_KEY}", "seed=3", WANDB_KEY])
    info = provenance.provenance(seed=3, cache_key="abc")
    assert info["argv"] == ["train.py", "lm.token=***", "seed=3", "***"]
    assert info["seed"] == 3 and info["cache_key"] == "abc" and info["versions"]["torch"] == torch.__version__
    assert any(line.startswith("numpy==") for line in info["packages"])
    assert info["cpu"]["cores"] >= 1 and info["started"].endswith("+00:00")
    json.dumps(info, allow_nan=False)


def test_git_state_follows_the_checkout_and_never_fails(tmp_path, monkeypatch):
    package = tmp_path / "repo" / "pkg"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("a = 1\n")
    assert provenance.git_state(package) is None

    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, "-C", str(package), *arguments], check=True, capture_output=True)

    git("init")
    assert provenance.git_state(package) is None  # not tracked: somebody else's repository
    git("add", ".")
    git("commit", "-m", "x")
    clean = provenance.git_state(package)
    assert re.fullmatch("[0-9a-f]{40}", clean["commit"]) and not clean["dirty"] and clean["diff_sha256"] is None
    (package / "__init__.py").write_text("a = 2\n")
    first = provenance.git_state(package)
    (package / "__init__.py").write_text("a = 3\n")
    second = provenance.git_state(package)
    assert first["dirty"] and first["commit"] == clean["commit"] and first["diff_sha256"] != second["diff_sha256"]
    monkeypatch.setenv("PATH", "")
    assert provenance.git_state(package) is None
    assert provenance.provenance()["gpus"] == []
