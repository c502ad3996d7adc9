"""Files that a command is asked to write: refused before the work where they cannot be, and in one line after it."""

import errno
import os
import re

import pytest

from rsdyn import files
from rsdyn.commands import claims, lens
from rsdyn.errors import UserError
from rsdyn.files import output_file, write_text, writing


def refuse(number):
    def make(path):
        raise OSError(number, os.strerror(number))

    return make


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "is a folder: name a file in it, as in --out"),
        ("no/where/out.md", "there is no folder"),
        ("x" * 250, "cannot be written there (File name too long)"),  # the temporary one beside it
    ],
)
def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path, name, words):
    with pytest.raises(UserError) as error:
        output_file(tmp_path / name, "--out")
    assert words in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_can_be_written_is_neither_made_nor_changed(tmp_path):
    (tmp_path / "old.md").write_text("old")
    assert output_file(tmp_path / "old.md", "--out") == tmp_path / "old.md"
    assert output_file(tmp_path / "new.md", "--out") == tmp_path / "new.md"
    assert [p.name for p in tmp_path.iterdir()] == ["old.md"] and (tmp_path / "old.md").read_text() == "old"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fills_or_closes_after_the_work_is_one_line(tmp_path, monkeypatch, number):
    monkeypatch.setattr(files, "_temporary", refuse(number))
    message = f"--out .*cannot be written there .{os.strerror(number)}"
    with pytest.raises(UserError, match=message) as error, writing(f"--out {tmp_path / 'x.md'}"):
        write_text(tmp_path / "x.md", "found")
    assert isinstance(error.value.__cause__, OSError)


@pytest.mark.parametrize(("command", "name"), [(claims, "x.json"), (lens, "x.pt")])
def test_commands_say_so_before_they_open_a_model(command, name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "_temporary", refuse(errno.EROFS))
    assert command.main(["embedded", "--texts", "5", "--out", str(tmp_path / name)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "Read-only file system" in said.err and said.err.count("\n") == 1


def test_so_does_a_cache_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "_temporary", refuse(errno.EROFS))
    assert claims.main(["embedded", "--texts", "5", "--cache", str(tmp_path / "cache")]) == 2
    said = capsys.readouterr()
    assert re.search("--cache .*cannot be written there .Read-only file system", said.err) and said.err.count("\n") == 1
