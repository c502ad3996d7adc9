"""Freed pages stay with the process: what the system says of page faults, and who is left alone."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rsdyn.lm import allocator
from rsdyn.run import plan, script

ROOT = Path(__file__).parents[2]
IS_GLIBC = "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "") if "CS_GNU_LIBC_VERSION" in os.confstr_names else False
needs_glibc = pytest.mark.skipif(not IS_GLIBC, reason="the C library is not glibc")

# no torch is needed: what a forward does is to fill blocks of 6 MiB, 1,536 pages each, and to free them
FORWARDS = """
import ctypes, resource, sys
from rsdyn.lm.allocator import keep_pages

kept = keep_pages() if sys.argv[1] == "keep" else None
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
libc.free.argtypes = (ctypes.c_void_p,)

def forward():
    blocks = [libc.malloc(6 << 20) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, 6 << 20)
    for block in blocks:
        libc.free(block)

forward()
forward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    forward()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def forwards(what, **environment):
    """What ``keep_pages`` returned in a process of its own, and the page faults of five forwards after two others."""
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", FORWARDS, what], env=bare | environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kept, faults = done.stdout.split()
    return kept, int(faults)


@needs_glibc
def test_pages_are_kept_where_glibc_gives_them_back():
    pages = 5 * 4 * (6 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert forwards("leave")[1] > pages / 2  # else there would be nothing to mend
    kept, faults = forwards("keep")
    assert kept == "True" and faults < pages / 100


@needs_glibc
def test_kept_pages_can_be_given_back():
    """Freed under a block that is still in use, so that glibc itself cannot shorten its heap."""
    code = """
import ctypes, sys
from rsdyn.lm.allocator import give_back, keep_pages

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

if sys.argv[1] == "keep":
    assert keep_pages()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
libc.free.argtypes = (ctypes.c_void_p,)
blocks = [libc.malloc(6 << 20) for _ in range(8)]
for block in blocks:
    ctypes.memset(block, 1, 6 << 20)
full = resident()
for block in blocks[:-1]:
    libc.free(block)
kept = resident()
give_back()
print(full - kept, kept - resident())
"""
    pages = 7 * (6 << 20) // os.sysconf("SC_PAGE_SIZE")
    found = {}
    for what in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", code, what], cwd=ROOT, capture_output=True, text=True)
        found[what] = [int(n) for n in done.stdout.split()]
    assert found["keep"][0] < pages / 10 and found["keep"][1] > 0.9 * pages
    assert found["leave"][0] > 0.9 * pages and found["leave"][1] < pages / 10


@needs_glibc
@pytest.mark.parametrize(
    "setting", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_the_users_own_settings_win(setting):
    kept, faults = forwards("keep", **setting)
    assert kept == "False" and faults > 1000


@needs_glibc
def test_tunables_of_other_things_are_no_choice_of_malloc():
    assert forwards("keep", GLIBC_TUNABLES="glibc.rtld.nns=4")[0] == "True"


@needs_glibc
def test_another_allocator_in_place_of_malloc_is_left_alone(tmp_path):
    """A library put in front, as jemalloc and tcmalloc are; this one only hands on to glibc's."""
    compiler = next((c for c in ("cc", "gcc", "clang") if _works(c)), None)
    if compiler is None:
        pytest.skip("no C compiler to make one with")
    source, library = tmp_path / "other.c", tmp_path / "libother.so"
    source.write_text(
        "extern void *__libc_malloc(unsigned long n);\nvoid *malloc(unsigned long n) { return __libc_malloc(n); }\n"
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    kept, faults = forwards("keep", LD_PRELOAD=str(library))
    assert kept == "False" and faults > 1000


def _works(compiler):
    try:
        return subprocess.run([compiler, "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_not_asked(monkeypatch, platform):
    monkeypatch.setattr(allocator, "sys", SimpleNamespace(platform=platform))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("a library was opened"))
    assert allocator.keep_pages() is False


def test_a_c_library_without_glibcs_names_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator, "sys", SimpleNamespace(platform="linux"))
    monkeypatch.setattr(allocator.os, "environ", {})
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: SimpleNamespace(malloc=len))  # musl's
    assert allocator.keep_pages() is False


def test_a_script_keeps_its_pages_from_its_start(monkeypatch):
    calls = []
    monkeypatch.setattr(script, "keep_pages", lambda: calls.append("kept"))
    monkeypatch.setattr(script, "_quiet", lambda: None)  # imports Lightning
    monkeypatch.setattr(plan, "show_plan", lambda run: calls.append("plan"))
    assert script.run_script("train", lambda run: None, ["--plan"]) == 0
    assert calls == ["kept", "plan"]
