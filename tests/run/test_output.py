"""Standard output that is closed or full, and names that it cannot spell, never cost a run or end it in a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rsdyn.run.output import Unbroken, unbroken_output

ROOT = Path(__file__).parents[2]
WORK = """
import sys
from rsdyn.run import script
script._open = lambda *a: None
def work(run):
    for i in range(20000): print("line", i)
    open(sys.argv[1], "w").write("done")
script.keep_pages = lambda: None
sys.exit(script.run_script("perturb", work, []))
"""


def shell(command):
    return subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("where", "code", "says"),
    [("| true", 0, ""), ("> /dev/full", 2, "No space left on device"), (">&-", 0, "")],
)
def test_help_to_nobody(where, code, says):
    done = shell(f"'{sys.executable}' train.py --help {where}")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert says in done.stderr and len(done.stderr.splitlines()) == bool(says)


@pytest.mark.parametrize(("where", "says"), [("| head -1", ""), ("> /dev/full", "No space left"), ("2>/dev/full", "")])
def test_a_run_whose_output_ends_goes_on_to_its_end(tmp_path, where, says):
    (tmp_path / "work.py").write_text(WORK)
    done = shell(f"PYTHONPATH='{ROOT}' '{sys.executable}' '{tmp_path}/work.py' '{tmp_path}/done' {where}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done").read_text() == "done"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr and says in done.stderr


def test_what_the_encoding_has_not_and_odd_bytes_are_escaped():
    code = "from rsdyn.run.output import unbroken_output\nwith unbroken_output(): print('caf\\udce9', 'δ')"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=env)
    assert done.stdout == "caf\\udce9 \\u03b4\n"


def test_it_is_put_back(capsys):
    before = sys.stdout, sys.stderr

    def fails():
        with unbroken_output() as out:
            assert isinstance(sys.stdout, Unbroken) and sys.stdout is out
            print("seen")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert (sys.stdout, sys.stderr) == before and capsys.readouterr().out == "seen\n"
