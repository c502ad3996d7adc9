"""The run folder and the files in it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rsdyn import files, ranks
from rsdyn.errors import UserError
from rsdyn.run import folder as run_folder

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("nobodys_environment")


def test_run_folder_has_time_script_and_slug(tmp_path):
    folder = run_folder.create_run_folder("train", "my run: α/β", None)
    assert folder.parent == tmp_path / "runs" and folder.is_dir() and not any(folder.iterdir())
    assert re.fullmatch(r"\d{8}-\d{6}-train-my-run", folder.name)
    assert os.environ[run_folder.RUN_DIR_VARIABLE] == str(folder)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", "", "a\nb", "x" * 500, "~root", "C:\\x"])
def test_a_hostile_name_stays_under_the_root(tmp_path, name):
    folder = run_folder.create_run_folder("train", name, None, root=tmp_path / "r")
    assert folder.resolve().parent == (tmp_path / "r").resolve()
    assert re.fullmatch(r"[A-Za-z0-9._-]+", folder.name)


def test_runs_of_the_same_second_get_their_own_folder():
    assert len({run_folder.create_run_folder("train", "n", None) for _ in range(5)}) == 5


def test_an_explicit_folder_is_made_with_parents_and_must_be_empty(tmp_path):
    folder = run_folder.create_run_folder("train", "n", str(tmp_path / "a" / "b"))
    assert folder == tmp_path / "a" / "b"
    assert run_folder.create_run_folder("train", "n", str(folder)) == folder  # empty: fine
    (folder / "old.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"run\.dir=.*not empty.*choose another"):
        run_folder.create_run_folder("train", "n", str(folder))
    assert (folder / "old.txt").read_text() == "keep me"


@pytest.mark.parametrize("explicit", [True, False])
def test_an_unwritable_place_is_one_clear_error(tmp_path, explicit):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        arguments = {"directory": str(place)} if explicit else {"directory": None, "root": place}
        with pytest.raises(UserError, match=r"run\.dir"):
            run_folder.create_run_folder("train", "n", **arguments)


def test_the_other_ranks_take_rank_zeros_folder(monkeypatch):
    folder = run_folder.create_run_folder("train", "n", None)
    (folder / "config.yaml").write_text("not empty any more")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")  # inherited from the parent
    assert not ranks.is_rank_zero()
    assert run_folder.create_run_folder("train", "n", None) == folder
    monkeypatch.setenv(run_folder.RUN_DIR_VARIABLE, "")
    with pytest.raises(UserError, match=r"run\.dir is not set"):
        run_folder.create_run_folder("train", "n", None)
    assert run_folder.create_run_folder("train", "n", str(folder)) == folder


# --- going on with a run that was killed ---


def differing(theirs, ours):
    return [] if theirs == ours else [f"{theirs} there and {ours} here"]


def unfinished(folder, settings="a: 1"):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(settings)
    return folder


def find(settings="a: 1", directory=None, root="runs"):
    return run_folder.find_unfinished("train", settings, directory, root, differing=differing)


def test_the_newest_unfinished_run_of_the_same_settings_is_found(tmp_path):
    assert find() is None
    for day, settings in ((1, "a: 1"), (2, "a: 1"), (3, "a: 2")):
        unfinished(tmp_path / "runs" / f"2026010{day}-000000-train-x", settings)
    finished = unfinished(tmp_path / "runs" / "20260104-000000-train-x")
    (finished / "summary.json").write_text("{}")
    unfinished(tmp_path / "runs" / "20260105-000000-analyze-x")
    (tmp_path / "runs" / "20260106-000000-train-x").mkdir()  # nobody knows what of
    held = find()
    assert held.path.name == "20260102-000000-train-x"
    assert find().path.name == "20260101-000000-train-x"  # the other is held
    held.lock.release()
    assert find().path.name == "20260102-000000-train-x"


def test_a_given_folder_is_gone_on_with_or_refused_with_the_reason(tmp_path):
    folder = unfinished(tmp_path / "mine")
    assert find(directory=str(tmp_path / "other")) is None
    held = find(directory=str(folder))
    assert held.path == folder
    with pytest.raises(UserError, match=r"run\.dir=.*mine belongs to a run that is still going"):
        find(directory=str(folder))
    with pytest.raises(UserError, match=r"unfinished run of other settings: a: 1 there and a: 2 here"):
        find("a: 2", directory=str(folder))
    (folder / "summary.json").write_text("{}")
    assert find(directory=str(folder)) is None
    with pytest.raises(UserError, match=r"run\.dir=.*mine holds a finished run"):
        run_folder.create_run_folder("train", "n", str(folder))


def test_the_lock_goes_with_its_holder(tmp_path):
    folder = unfinished(tmp_path / "mine")
    program = (
        "import sys; from pathlib import Path; from rsdyn.run.folder import hold\n"
        "held = hold(Path(sys.argv[1])); print(held is not None, flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout.readline() == "True\n"
        assert run_folder.hold(folder) is None
        other.kill()
        other.wait()
        assert run_folder.hold(folder) is not None


# --- files ---


def test_write_json_is_strict_and_knows_arrays(tmp_path):
    path = tmp_path / "x.json"
    value = {
        "nan": float("nan"),
        "inf": [np.inf, 1.5],
        "np": np.arange(3, dtype=np.int64),
        "scalar": np.float32(0.5),
        "torch": torch.ones(2, dtype=torch.bfloat16, requires_grad=True),
        "zero_d": torch.tensor(float("nan")),
        "path": Path("a") / "b",
        3: (True, None),
    }
    files.write_json(path, value)
    read = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert read["nan"] is None and read["inf"] == [None, 1.5] and read["np"] == [0, 1, 2] and read["scalar"] == 0.5
    assert read["torch"] == [1.0, 1.0] and read["zero_d"] is None
    assert read["path"] == "a/b" and read["3"] == [True, None]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError, match=r"value\.b\[1\] is a object"):
        files.write_json(path, {"b": [1, object()]})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
