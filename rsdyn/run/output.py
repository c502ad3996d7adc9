"""Standard output that may be closed or full, unable to spell a name, or narrow: printing is never worth the work."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WIDE = 120  # columns of a table where there is no terminal to ask
_LABEL = re.compile(r" *[A-Z][\w&]*(?: \([a-z_0-9]+\)| folder)?: +|\(\d+\) | +")


def terminal_columns() -> int | None:
    """How many columns the terminal has that standard output is; None for a file or a pipe, where lines stay whole."""
    if sys.stdout is None or not sys.stdout.isatty():
        return None
    return shutil.get_terminal_size().columns


def table_columns() -> int:
    """How wide a table may be: as the terminal, else :data:`WIDE`."""
    return terminal_columns() or WIDE


def fitted(line: str, columns: int | None) -> list[str]:
    """A line in pieces of at most this many columns; the later ones stand below the text behind the first one's label.

    A word that is longer than that, such as a path, stays whole, to be copied.
    """
    if columns is None or len(line) <= columns:
        return [line]
    label = _LABEL.match(line)
    end = 0 if label is None else label.end()
    indent = end if end <= 13 else 6
    return textwrap.wrap(
        line,
        columns,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    ) or [line]


class Unbroken:
    """A stream of text that goes on taking text when nobody reads it any more (``| head``), or its disk is full.

    ``lost`` is the error that ended it; None while all goes well, and where the reader has had enough.
    """

    def __init__(self, stream: Any) -> None:
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
    sys.stdout, sys.stderr = out, Unbroken(before[1])
    try:
        yield out
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
        for stream, errors in escapes:
            stream.reconfigure(errors=errors)
