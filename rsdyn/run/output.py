"""Standard output that may be closed or full, or unable to spell a name: what is printed is never worth the work."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Unbroken:
    """A stream of text that goes on taking text when nobody reads it any more (``| head``), or its disk is full.

    ``lost`` is the error that ended it; None while all goes well, and where the reader has had enough.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self._is_closed = stream is None  # closed before Python started
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(lambda: self._stream.flush())

    def _try(self, what: Any) -> None:
        if self._is_closed:
            return
        try:
            what()
        except OSError as error:
            self._is_closed = True
            self.lost = None if error.errno == errno.EPIPE else error
            self._turn_away()

    def _turn_away(self) -> None:
        """Let what is still in the buffer go nowhere, or Python would try it again, and complain, at its end."""
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except (OSError, io.UnsupportedOperation, AttributeError):  # no file of the operating system's
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unbroken_output() -> Iterator[Unbroken]:
    """While open, standard output and error take whatever is printed; gives the first of the two.

    Characters that their encoding has not, and odd bytes of a path, are written as escapes.
    """
    before = sys.stdout, sys.stderr
    escapes = [(stream, getattr(stream, "errors", None)) for stream in before if hasattr(stream, "reconfigure")]
    for stream, _ in escapes:
        stream.reconfigure(errors="backslashreplace")
    out = Unbroken(before[0])
    sys.stdout, sys.stderr = out, Unbroken(before[1])  # type: ignore[assignment]
    try:
        yield out
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
        for stream, errors in escapes:
            stream.reconfigure(errors=errors)
