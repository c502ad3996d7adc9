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

from rsdyn.stream.cache import Shard
from rsdyn.stream.cache import __main__ as tool
from rsdyn.stream.cache.__main__ import main
from rsdyn.stream.cache.manifest import key_of_format, seal


@pytest.fixture
def root(tmp_path):
    """A folder whose corpus is complete, one that has a shard of three, and things that are not ours."""
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


def lines_of(out):
    return {line.split()[0]: line for line in out.splitlines()}


def test_list(root, caches, capsys):
    for path in (caches[1].folder / "manifest.json", caches[1].index_path):
        os.utime(path, (0, time.mktime((2026, 3, 1, 12, 30, 0, 0, 0, -1))))
    assert main(["list", "--dir", str(root)]) == 0
    out = capsys.readouterr().out
    head, *_, total = out.splitlines()
    assert head.split() == ["name", "what", "sequences", "size", "last", "use"]
    lines = lines_of(out)
    for cache, n, state, condition in (
        (caches[0], N, f"complete, {N}", "original"),
        (caches[1], 4, "4 of 10", "shuffled"),
    ):
        model, corpus = lines[cache.folder.name], lines[cache.index_path.stem]
        assert f"{condition}, {S} x {D}, bfloat16" in model and f"  {n}  " in model
        assert state in corpus
        assert model.endswith("2026-03-01 12:30") == corpus.endswith("2026-03-01 12:30") == (cache is caches[1])
    assert total.startswith("2 folders, 2 corpora, ")


def test_two_texts_of_one_model(root, caches, capsys):
    """The second holds what the first has, and a sequence more: it is one more shard, and each is known by itself."""
    longer = new_cache(root, n_sequences=N + 1)
    longer.open()
    assert longer.folder == caches[0].folder and longer.missing_sequences().tolist() == [N]
    assert main(["list", "--dir", str(root)]) == 0
    lines = lines_of(capsys.readouterr().out)
    assert f"{N} of {N + 1}" in lines[longer.index_path.stem] and "complete" in lines[caches[0].index_path.stem]
    whole = shard_of(longer, 2)
    longer.write(2, Shard(whole.activations[-1:], whole.index[-1:], whole.n_tokens[-1:]))
    new = {path.name for path in longer.files()} - {path.name for path in caches[0].files()}
    name = longer.index_path.stem
    assert len(new) == 1
    del longer  # else it is in use
    assert main(["prune", name, "--dir", str(root)]) == 0
    out = capsys.readouterr().out
    assert f"would remove {caches[0].folder.name}/{name}" in out and "would remove 1 shard that" in out
    assert main(["prune", name, "--yes", "--dir", str(root)]) == 0
    assert not (caches[0].folder / new.pop()).exists() and caches[0].missing() == []
    assert main(["prune", caches[0].index_path.stem, "--yes", "--dir", str(root)]) == 0
    assert caches[0].missing() == [0, 1, 2] and (caches[0].folder / "manifest.json").exists()


def test_a_corpus_that_nobody_opened_for_long_goes_by_age(root, caches):
    longer = new_cache(root, n_sequences=N + 1)
    longer.open()
    os.utime(longer.index_path, (time.time() - 10 * 86400,) * 2)
    index = longer.index_path
    del longer
    assert main(["prune", "--unused-days", "9", "--yes", "--dir", str(root)]) == 0
    assert not index.exists() and caches[0].index_path.exists() and caches[0].missing() == []


def old_cache(root):
    """A cache as rsdyn 0.1 left it: its manifest has format 2, and shards are numbered."""
    made_from = {"lm": "tiny", "weights": "xxh3 0", "tokens": "1", "shape": [4, S, D], "dtype": "bfloat16"}
    key = key_of_format(2, made_from)
    folder = root / f"tiny-original-{key[:16]}"
    (folder / "locks").mkdir(parents=True)
    (folder / "manifest.json").write_bytes(seal({"format": 2, "key": key, "made_from": made_from, "made_by": {}}))
    (folder / "shard-00000.safetensors").write_bytes(b"x" * (1 << 20))
    (folder / "locks" / "shard-00000.lock").touch()
    return folder


def test_an_older_layout_is_named_as_old_and_can_be_removed(root, caches, capsys):
    folder = old_cache(root)
    assert main(["list", "--dir", str(root)]) == 0
    out = capsys.readouterr().out
    assert f"{folder.name}: 1.0 MiB in the layout of an older rsdyn, which is not read" in out and "2 folders" in out
    assert main(["verify", "--dir", str(root)]) == 0
    assert f"{folder.name}: in the layout of an older rsdyn" in capsys.readouterr().out
    caches[0].discard(1)
    (note,) = new_cache(root).open()
    assert folder.name in note and "recorded anew" in note and f"prune {folder.name} --yes" in note
    assert new_cache(root, {"tokens": "others"}).open() == []  # those are not in it
    assert main(["prune", folder.name, "--dir", str(root)]) == 0
    assert f"would remove {folder.name}" in capsys.readouterr().out and folder.exists()
    assert main(["prune", folder.name, "--yes", "--dir", str(root)]) == 0
    assert not folder.exists() and caches[0].missing() == [1]


def test_a_damaged_index_is_named_and_written_again(root, caches, capsys):
    caches[0].index_path.write_bytes(b"x")
    assert main(["list", "--dir", str(root)]) == 0
    assert "its index cannot be read" in capsys.readouterr().out
    assert main(["verify", "--dir", str(root)]) == 1
    assert f"{caches[0].index_path}: it is damaged" in capsys.readouterr().out
    assert caches[0].open() == [] and main(["verify", "--dir", str(root)]) == 0


def test_the_command_itself(root):
    """As a user types it, from another folder; --help tells the three commands."""
    environment = {**os.environ, "RSDYN_CACHE": str(root), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    for words, expected in ((["list"], "2 folders, 2 corpora"), (["--help"], "list,verify,prune")):
        command = [sys.executable, "-m", "rsdyn.stream.cache", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=120)
        assert done.returncode == 0 and expected in done.stdout and done.stderr == ""


def test_verify(root, caches, capsys):
    assert main(["verify", "--dir", str(root)]) == 0
    assert "2 folders, 4 shards read, 0 damaged" in capsys.readouterr().out
    flip(caches[0].path(2))
    caches[1].path(1).write_bytes(b"")
    before = everything(root)
    assert main(["verify", "--dir", str(root)]) == 1
    out = capsys.readouterr().out
    assert "4 shards read, 2 damaged" in out and "prune --damaged --yes" in out
    for cache, k in ((caches[0], 2), (caches[1], 1)):
        assert f"{cache.path(k).name} in {cache.folder} is damaged" in out
    assert main(["verify", caches[1].folder.name, "--dir", str(root)]) == 1
    assert "1 shard read, 1 damaged" in capsys.readouterr().out
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
    stray, live = (caches[0].folder / f".{caches[0].path(k).name}.0123456789abcdef.tmp" for k in (1, 2))
    stray.write_text("half")
    live.write_text("half")
    flip(caches[0].path(0))
    before = everything(root)
    with caches[0].store.holding(caches[0].path(2).name):
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
    assert f"no such cache in {root}. There are: {caches[1].folder.name}, " in capsys.readouterr().err


def test_prune_removes_caches_by_age(root, caches):
    day = 86400
    os.utime(caches[1].folder / "manifest.json", (time.time() - 10 * day,) * 2)
    assert main(["prune", "--unused-days", "11", "--yes", "--dir", str(root)]) == 0
    assert caches[1].folder.exists()
    assert main(["prune", "--unused-days", "9", "--yes", "--dir", str(root)]) == 0
    assert not caches[1].folder.exists() and caches[0].missing() == []
    caches[0].open()  # a run that opens a cache uses it
    for path in (caches[0].folder / "manifest.json", caches[0].index_path):
        os.utime(path, (0, 0))
    caches[0].open()
    assert main(["prune", "--unused-days", "1", "--yes", "--dir", str(root)]) == 0
    assert caches[0].missing() == []


def test_a_cache_that_a_run_writes_to_is_left_alone(root, caches, capsys):
    with caches[0].lock(1):
        assert main(["prune", caches[0].folder.name, "--yes", "--dir", str(root)]) == 0
    assert "a run is recording into it" in capsys.readouterr().out and caches[0].missing() == []


def test_a_cache_that_a_run_only_reads_is_left_alone_until_it_ends(root, caches, capsys):
    """By name and by age, whatever process has it open; the run records nothing and takes no other lock."""
    name, words = caches[0].folder.name, ["prune", "--unused-days", "0", "--yes", "--dir", str(root)]
    reader = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\nfrom pathlib import Path\nfrom rsdyn.stream.cache import ShardStore\n"
            "store = ShardStore.from_folder(Path(sys.argv[1]))\nstore.open({})\nstore.refresh()\n"
            "print(float(store.read(min(store.files)).activations.sum()), flush=True)\nsys.stdin.read()\n",
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
    assert opened == [[0, 1, 2]] and caches[0].manifest()["key"] == caches[0].store.key
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
