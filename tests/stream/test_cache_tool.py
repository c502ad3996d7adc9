"""`python -m rsdyn.stream.cache`: what it lists, finds and removes, and what it leaves alone."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest
from cache_entries import D, N, S, new_cache, shard_of

from rsdyn.stream.cache import __main__ as tool
from rsdyn.stream.cache.__main__ import main


@pytest.fixture
def root(tmp_path):
    """A complete cache, one with a shard of three, and things that are not ours."""
    root = tmp_path / "cache"
    for fields, shards in (({}, (0, 1, 2)), ({"lm": "other", "condition": "shuffled"}, (1,))):
        cache = new_cache(root, fields)
        cache.open()
        for k in shards:
            cache.write(k, shard_of(cache, k))
    (root / "not ours").mkdir()
    (root / "not ours" / "shard-00000.safetensors").write_text("precious")
    (root / "notes.txt").write_text("precious")
    return root


@pytest.fixture
def caches(root):
    return new_cache(root), new_cache(root, {"lm": "other", "condition": "shuffled"})


def everything(root):
    return {
        p.relative_to(root): p.read_bytes() if p.is_file() else None for p in root.rglob("*") if "locks" not in p.parts
    }


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_list(root, caches, capsys):
    os.utime(caches[1].folder / "manifest.json", (0, time.mktime((2026, 3, 1, 12, 30, 0, 0, 0, -1))))
    assert main(["list", "--dir", str(root)]) == 0
    head, *rows, total = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "model", "condition", "N", "x", "S", "x", "D", "size", "shards", "last", "use"]
    rows = {row.split()[0]: row for row in rows}
    assert set(rows) == {cache.folder.name for cache in caches}
    complete, part = (rows[cache.folder.name] for cache in caches)
    assert f"{N} x {S} x {D}" in complete and " tiny " in complete and "original" in complete and "complete" in complete
    assert "1 of 3" in part and " other " in part and "shuffled" in part and part.endswith("2026-03-01 12:30")
    assert total.startswith("2 caches")


def test_the_command_itself(root):
    """As a user types it, from another folder; --help tells the three commands."""
    environment = {**os.environ, "RSDYN_CACHE": str(root), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    for words, expected in ((["list"], "2 caches"), (["--help"], "list,verify,prune")):
        command = [sys.executable, "-m", "rsdyn.stream.cache", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=120)
        assert done.returncode == 0 and expected in done.stdout and done.stderr == ""


def test_verify(root, caches, capsys):
    assert main(["verify", "--dir", str(root)]) == 0
    assert "2 caches, 4 shards read, 0 damaged" in capsys.readouterr().out
    flip(caches[0].path(2))
    caches[1].path(1).write_bytes(b"")
    before = everything(root)
    assert main(["verify", "--dir", str(root)]) == 1
    out = capsys.readouterr().out
    assert "4 shards read, 2 damaged" in out and "prune --damaged --yes" in out
    for cache, k in ((caches[0], 2), (caches[1], 1)):
        assert f"shard {k} (shard-0000{k}.safetensors in {cache.folder}) is damaged" in out
    assert main(["verify", caches[1].folder.name, "--dir", str(root)]) == 1
    assert "1 shards read, 1 damaged" in capsys.readouterr().out
    assert everything(root) == before


@pytest.mark.parametrize("text", ["{", '{"format": 77}'])
def test_a_manifest_that_cannot_be_read_is_named_and_its_folder_left_alone(root, caches, capsys, text):
    (caches[0].folder / "manifest.json").write_text(text)
    before = everything(root)
    name = caches[0].folder.name
    assert main(["list", "--dir", str(root)]) == 0
    assert re.search(rf"{name}: its manifest (is damaged|has format 77)", capsys.readouterr().out)
    assert main(["verify", "--dir", str(root)]) == 1
    assert main(["prune", name, "--yes", "--dir", str(root)]) == 2
    assert "remove it by hand" in capsys.readouterr().err
    assert main(["prune", "--unused-days", "0", "--yes", "--dir", str(root)]) == 0
    assert {p: v for p, v in before.items() if p.parts[0] != caches[1].folder.name} == everything(root)


def test_prune_clears_strays_and_damaged_shards(root, caches, capsys):
    stray = caches[0].folder / ".shard-00001.safetensors.0123456789abcdef.tmp"
    live = caches[0].folder / ".shard-00002.safetensors.0123456789abcdef.tmp"
    stray.write_text("half")
    live.write_text("half")
    flip(caches[0].path(0))
    before = everything(root)
    with caches[0].lock(2):
        assert main(["prune", "--damaged", "--dir", str(root)]) == 0
        out = capsys.readouterr().out
        assert "would remove" in out and "--yes" in out and everything(root) == before
        assert main(["prune", "--yes", "--dir", str(root)]) == 0
        assert not stray.exists() and live.exists() and caches[0].has(0)
        assert main(["prune", "--damaged", "--yes", "--dir", str(root)]) == 0
    assert "is damaged: its checksum does not match" in capsys.readouterr().out
    gone = {stray.relative_to(root), caches[0].path(0).relative_to(root)}
    assert everything(root) == {p: v for p, v in before.items() if p not in gone}
    assert main(["prune", "--yes", "--dir", str(root)]) == 0
    assert caches[0].missing() == [0] and not live.exists()
    capsys.readouterr()
    assert main(["prune", "--damaged", "--yes", "--dir", str(root)]) == 0
    assert capsys.readouterr().out == "Nothing to remove.\n"


def test_prune_removes_a_whole_cache_by_name(root, caches, capsys):
    before = everything(root)
    name = caches[0].folder.name
    assert main(["prune", name, "--dir", str(root)]) == 0
    assert f"would remove {name}" in capsys.readouterr().out and everything(root) == before
    assert main(["prune", name, "--yes", "--dir", str(root)]) == 0
    assert not caches[0].folder.exists()
    assert everything(root) == {p: v for p, v in before.items() if p.parts[0] != name}
    assert main(["prune", name, "--yes", "--dir", str(root)]) == 2
    assert f"no such cache in {root}. There are: {caches[1].folder.name}" in capsys.readouterr().err


def test_prune_removes_caches_by_age(root, caches):
    day = 86400
    os.utime(caches[1].folder / "manifest.json", (time.time() - 10 * day,) * 2)
    assert main(["prune", "--unused-days", "11", "--yes", "--dir", str(root)]) == 0
    assert caches[1].folder.exists()
    assert main(["prune", "--unused-days", "9", "--yes", "--dir", str(root)]) == 0
    assert not caches[1].folder.exists() and caches[0].missing() == []
    caches[0].open()  # a run that opens a cache uses it
    os.utime(caches[0].folder / "manifest.json", (0, 0))
    caches[0].open()
    assert main(["prune", "--unused-days", "1", "--yes", "--dir", str(root)]) == 0
    assert caches[0].missing() == []


def test_a_cache_that_a_run_writes_to_is_left_alone(root, caches, capsys):
    with caches[0].lock(1):
        assert main(["prune", caches[0].folder.name, "--yes", "--dir", str(root)]) == 0
    assert "a run is recording shard 1 of it" in capsys.readouterr().out and caches[0].missing() == []


def test_a_cache_that_a_run_only_reads_is_left_alone_until_it_ends(root, caches, capsys):
    """By name and by age, whatever process has it open; the run records nothing and takes no other lock."""
    name, words = caches[0].folder.name, ["prune", "--unused-days", "0", "--yes", "--dir", str(root)]
    reader = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\nfrom pathlib import Path\nfrom rsdyn.stream.cache import TrajectoryCache\n"
            "cache = TrajectoryCache.from_folder(Path(sys.argv[1]))\ncache.open()\n"
            "print(float(cache.read(0).activations.sum()), flush=True)\nsys.stdin.read()\n",
            str(caches[0].folder),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    try:
        assert reader.stdout.readline()
        before = everything(caches[0].folder)
        for command in (["prune", name, "--yes", "--dir", str(root)], words):
            assert main(command) == 0
            assert f"{name} is left alone: a run is reading it." in capsys.readouterr().out
        assert everything(caches[0].folder) == before
        assert not caches[1].folder.exists()  # nobody had that one open
    finally:
        reader.kill()  # however it ends
        reader.communicate()
    assert main(words) == 0
    assert not caches[0].folder.exists()


def test_a_run_that_opens_a_cache_while_it_is_removed_gets_a_new_one(root, caches, monkeypatch):
    """It waits for the removal to end, and is not left with a folder that is gone."""
    opened, real = [], tool._remove_files

    def remove(cache):
        def open_it():
            caches[0].open()
            opened.append(caches[0].missing())

        thread = threading.Thread(target=open_it)
        thread.start()
        time.sleep(0.1)
        assert not opened
        real(cache)
        threads.append(thread)

    threads = []
    monkeypatch.setattr(tool, "_remove_files", remove)
    assert main(["prune", caches[0].folder.name, "--yes", "--dir", str(root)]) == 0
    threads[0].join(10)
    assert opened == [[0, 1, 2]] and caches[0].manifest()["key"] == caches[0].key
    assert main(["prune", caches[0].folder.name, "--yes", "--dir", str(root)]) == 0
    assert caches[0].folder.exists()  # it is marked, the new one


def test_what_others_put_into_a_cache_is_kept(root, caches, capsys):
    (caches[0].folder / "my results.txt").write_text("precious")
    (caches[0].folder / "shard-99999.safetensors").write_text("no shard of this cache")
    assert main(["prune", caches[0].folder.name, "--yes", "--dir", str(root)]) == 0
    assert "is kept" in capsys.readouterr().out
    assert {p.name for p in caches[0].folder.iterdir()} == {"my results.txt", "shard-99999.safetensors"}


@pytest.mark.parametrize("what", ["the folder", "a shard", "the locks"])
def test_links_are_removed_and_not_followed(root, caches, tmp_path, what, capsys):
    outside = tmp_path / "outside"
    cache = caches[0]
    if what == "the folder":
        shutil.move(cache.folder, outside)
        cache.folder.symlink_to(outside)
    elif what == "a shard":
        outside.mkdir()
        shutil.move(cache.path(0), outside / "shard")
        cache.path(0).symlink_to(outside / "shard")
    else:
        shutil.move(cache.folder / "locks", outside)
        (cache.folder / "locks").symlink_to(outside)
    before = everything(outside), sorted(p.name for p in outside.iterdir())
    for words in (["list"], ["verify"], ["prune", "--damaged", "--yes"], ["prune", cache.folder.name, "--yes"]):
        main([*words, "--dir", str(root)])
    assert "Traceback" not in capsys.readouterr().err
    assert (everything(outside), sorted(p.name for p in outside.iterdir())) == before
    if what == "a shard":
        assert not cache.folder.exists()


def test_mistakes(root, tmp_path, capsys):
    assert main(["list", "--dir", str(tmp_path / "nowhere")]) == 2
    assert re.search(r"error: --dir=\S+nowhere: there is no such folder", capsys.readouterr().err)
    for name in ("../outside", "not ours", "/etc", ""):
        assert main(["prune", name, "--yes", "--dir", str(root)]) == 2
        assert "no such cache" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["remove"])


@pytest.mark.parametrize("days", ["-5", "nan", "inf", "soon"])
def test_days_that_are_no_days_remove_nothing(root, days, capsys):
    before = everything(root)
    with pytest.raises(SystemExit) as left:
        main(["prune", "--unused-days", days, "--yes", "--dir", str(root)])
    assert left.value.code == 2 and "--unused-days" in capsys.readouterr().err
    assert everything(root) == before
