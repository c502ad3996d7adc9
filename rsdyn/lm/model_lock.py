"""Build models with transformers, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.RLock()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let one thread of this process build or load a model while the context lasts; the others wait.

    transformers replaces functions of its own classes (``tie_weights``) and torch's default dtype for as long as a
    model is built, and puts back what it found. Two threads at once find each other's: ``tie_weights`` then does
    nothing for the rest of the process, and every model loaded afterwards whose head is its embedding has an empty one.
    """
    with _LOCK:
        yield
