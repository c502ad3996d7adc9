"""Keep the pages that large tensors lay in, instead of giving them back to the system and faulting them in anew."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

# From glibc's malloc.h: blocks of so many bytes are mapped by themselves, and unmapped when freed; so many free bytes
# at the end of the heap are given back.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
MMAP_THRESHOLD = 32 << 20  # the largest that glibc takes on 64 bits; torch's larger tensors are mapped as ever
TRIM_THRESHOLD = 128 << 20  # with 256, perturb.py kept 97 MiB more that nothing came to use; with 128, nothing more

_kept = False


class _SymbolInfo(ctypes.Structure):
    """``Dl_info``: the file that a symbol lies in, and where."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def keep_pages() -> bool:
    """Tell the C library to keep freed memory of up to 32 MiB a tensor for the next one, for this whole process.

    By default glibc unmaps what a forward has freed, and the next forward gets the same pages from the system one by
    one, each cleared anew: a sixth of the time of recording, rows of 1,024 tokens of 512 units. No number changes; a
    process keeps some 50 MiB more for each thread that records (there, 16 threads: 830 MiB instead of 680 at the peak),
    until :func:`give_back`.

    Returns whether it was done. It is not where the C library is not glibc (macOS, Windows, musl), where another
    allocator has taken its place (jemalloc, tcmalloc), and where the environment has settings of malloc (``MALLOC_*``,
    ``GLIBC_TUNABLES``), which are the user's to choose.
    """
    if not sys.platform.startswith("linux") or _is_chosen(os.environ):
        return False
    process = ctypes.CDLL(None)
    if not _is_glibc(process):
        return False
    mallopt = process.mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    # the first one fails on 32 bits; either of them ends glibc's own adaptation of both, so they go together
    global _kept
    _kept = bool(mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD))
    return _kept


def give_back() -> None:
    """Give the system the pages that were kept, once the work that needed them is over; nothing where none are kept."""
    if _kept:
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def _is_chosen(environment: Any) -> bool:
    """Whether the environment sets how malloc works, by glibc's names or jemalloc's."""
    named = any(name.startswith("MALLOC_") for name in environment)
    return named or "glibc.malloc." in environment.get("GLIBC_TUNABLES", "")


def _is_glibc(process: Any) -> bool:
    """Whether ``malloc`` is glibc's own: it lies in the file that says which glibc this is."""
    try:
        places = [_file_of(process, name) for name in ("gnu_get_libc_version", "malloc", "mallopt")]
    except AttributeError:  # musl has no such names
        return False
    return places[0] is not None and len(set(places)) == 1


def _file_of(process: Any, name: str) -> bytes | None:
    found = _SymbolInfo()
    address = ctypes.cast(getattr(process, name), ctypes.c_void_p)
    return found.file if process.dladdr(address, ctypes.byref(found)) else None
