"""Handing something to W&B, which may refuse it without ending the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rsdyn.redaction import redact


class Forgiving(Protocol):
    """A logger that keeps what W&B did not take, with the reason of the first time."""

    lost: dict[str, str]


@contextmanager
def sending(logger: Forgiving, what: str) -> Iterator[None]:
    """Hand something to W&B; when that fails, the run goes on, and its end names ``what`` was not logged.

    Only what calls W&B, or reads the files that it is to have, belongs in here: a mistake of ours must show itself.
    """
    try:
        yield
    except Exception as error:
        logger.lost.setdefault(what, redact(" ".join(str(error).split())[:200] or type(error).__name__))
