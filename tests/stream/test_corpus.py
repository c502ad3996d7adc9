import bz2
import codecs
import gzip
import json
import lzma
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rsdyn.errors import UserError
from rsdyn.stream.text import corpus
from rsdyn.stream.text.corpus import open_corpus
from rsdyn.stream.text.local_files import splits_of
from rsdyn.stream.text.tokens import load_rows

NAME = "Salesforce/wikitext"


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Nothing of these tests reaches the user's caches, nor theirs us."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".caches" / "datasets")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / ".caches" / "downloads")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / ".caches" / "hub"))
    return tmp_path / ".caches"


@pytest.fixture
def wikitext(tmp_path):
    """A folder in the Hub's parquet layout, as `hf download Salesforce/wikitext` leaves it, README apart."""
    return write_wikitext(tmp_path / "wikitext")


def shard_rows(config, split, shard):
    return [" \n", f" = {config} = \n", *(f" {config} {split} {shard} {i} \n" for i in range(5))]


def write_wikitext(folder, configs=("wikitext-103-raw-v1", "wikitext-2-raw-v1"), splits=("test", "train")):
    for config in configs:
        (folder / config).mkdir(parents=True)
        for split in splits:
            for shard in range(2):
                rows = shard_rows(config, split, shard)
                table = pa.table({"text": rows, "n": list(range(len(rows)))})
                pq.write_table(table, folder / config / f"{split}-{shard:05d}-of-00002.parquet")
    return folder


def write_readme(folder, configs=("wikitext-103-raw-v1", "wikitext-2-raw-v1"), more=""):
    lines = ["---", "license: cc-by-sa-3.0", "configs:"]
    for config in configs:
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [f"  - split: {split}\n    path: {config}/{split}-*" for split in ("test", "train")]
    (folder / "README.md").write_text("\n".join([*lines, more, "---", "# WikiText"]))


def texts(**where):
    return list(load_rows(**where)["text"])


# ---- files


def test_txt_is_one_row_a_line(tmp_path):
    (tmp_path / "a.txt").write_text(" = Title = \n\nfirst line \nsecond, é\n")
    assert texts(path=tmp_path / "a.txt") == [" = Title = ", "", "first line ", "second, é"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.JSON", "b [1] *.jsonl"])
def test_json(tmp_path, name):
    rows = [{"text": "one \n", "n": 1}, {"text": "two", "n": 2}]
    body = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
    (tmp_path / name).write_text(body)
    (tmp_path / "b 1 x.jsonl").write_text('{"text": "not this"}')
    loaded = load_rows(path=tmp_path / name)
    assert loaded.column_names == ["text"]
    assert list(loaded["text"]) == ["one \n", "two"]


def test_parquet_csv_and_another_column(tmp_path):
    table = pa.table({"body": pa.array(["x", "y, z"], pa.large_string()), "n": [1, 2]})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text('body,n\nx,1\n"y, z",2\n')
    for name in ("a.parquet", "a.csv"):
        assert list(load_rows(path=str(tmp_path / name), text_column="body")["body"]) == ["x", "y, z"]


def test_embedded_text_is_the_default(tmp_path, monkeypatch):
    (tmp_path / "text.jsonl").write_text('{"text": "ours"}\n')
    monkeypatch.setattr(corpus, "TEXT", tmp_path / "text.jsonl")
    assert texts() == ["ours"]


def rewritten(file, body):
    """Other content under the path and the date that it had, as `cp -p` and reproducible archives leave it."""
    body = body.encode() if isinstance(body, str) else body
    times = file.stat() if file.exists() else None
    file.write_bytes(body)
    if times is not None:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_text_is_its_content_whatever_path_and_date(tmp_path, caches):
    file = tmp_path / "in" / "a.txt"
    file.parent.mkdir()
    for body in ("old\n", "new\n", "old\n"):
        rewritten(file, body)
        assert texts(path=file) == [body.strip()]
        assert texts(path=file.parent) == [body.strip()]
    kept = len(list(caches.rglob("*.arrow")))
    (tmp_path / "elsewhere.txt").write_text("old\n")
    assert texts(path=tmp_path / "elsewhere.txt") == ["old"]
    assert len(list(caches.rglob("*.arrow"))) == kept  # the same content at another path


@pytest.mark.parametrize("readme", [False, True])
def test_a_parquet_of_the_hub_layout_that_changed_in_place(wikitext, readme):
    if readme:
        write_readme(wikitext)
    where = {"path": wikitext, "config": "wikitext-2-raw-v1", "split": "test"}
    assert texts(**where) == expected("wikitext-2-raw-v1", "test")
    file = wikitext / "wikitext-2-raw-v1" / "test-00000-of-00002.parquet"
    other = wikitext.parent / "other.parquet"
    pq.write_table(pa.table({"text": ["changed"] * 7, "n": list(range(7))}), other)
    rewritten(file, other.read_bytes())
    assert texts(**where)[:7] == ["changed"] * 7


def test_a_readme_that_says_how_to_read_is_followed_and_its_text_is_its_content(tmp_path):
    (tmp_path / "a.csv").write_text("text;n\none, two;1\n")
    lines = ["---", "configs:", "- config_name: default", "  data_files: a.csv", '  sep: ";"', "---"]
    (tmp_path / "README.md").write_text("\n".join(lines))
    assert texts(path=tmp_path) == ["one, two"]
    rewritten(tmp_path / "a.csv", "text;n\ntwo, one;1\n")
    assert texts(path=tmp_path) == ["two, one"]


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("packed", ["", ".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_says_the_encoding_and_is_no_text(tmp_path, name, encoding, packed):
    rows = ["é one", "two"]
    body = {
        "a.txt": "\n".join(rows),
        "a.jsonl": "\n".join(json.dumps({"text": row}, ensure_ascii=False) for row in rows),
        "a.json": json.dumps([{"text": row} for row in rows], ensure_ascii=False),
        "a.csv": "\n".join(["text", *rows]),
    }[name]
    mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}.get(encoding, b"")
    pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[packed]
    (tmp_path / (name + packed)).write_bytes(pack(mark + body.encode(encoding)))
    assert texts(path=tmp_path / (name + packed)) == rows


def test_utf_16_without_a_mark_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("some row\n".encode("utf-16-le"))
    wrong("zero bytes.*UTF-16", path=tmp_path / "a.txt")


def test_only_the_column_of_text_matters(tmp_path):
    """datasets types every column of each ten megabytes, and calls the file damaged where another one changes."""
    rows = [{"text": f"row {i}", "meta": i, "more": [i]} for i in range(3000)]
    rows += [{"text": "last", "meta": {"a": "n/a"}}, {"text": None, "meta": 1.5}, {"meta": "no text"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert texts(path=tmp_path / "a.jsonl") == [row.get("text") for row in rows]
    (tmp_path / "b.csv").write_text("text,n\none,1\ntwo,x\n42,\n")
    assert texts(path=tmp_path / "b.csv") == ["one", "two", "42"]
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"text": 42}\n')
    wrong(r"row 2 of c\.jsonl holds int64 \(42\).*text_column", path=tmp_path / "c.jsonl")


@pytest.mark.parametrize(
    ("body", "rows"),
    [
        ('{"text": ["a", "b"], "n": [1, 2]}', ["a", "b"]),
        ('{\n "text": "alone"\n}', ["alone"]),
        ('["a", "b"]', ["a", "b"]),
        ('[\n {"text": "a"},\n {"text": "b"}\n]', ["a", "b"]),
        ('{"text": "a"}\n\n{"text": "b"}\n', ["a", "b"]),
    ],
)
def test_shapes_of_json(tmp_path, body, rows):
    (tmp_path / "a.json").write_text(body)
    assert texts(path=tmp_path / "a.json") == rows


def test_rows_are_those_that_datasets_reads(tmp_path):
    (tmp_path / "a.txt").write_bytes("one \r\ntwo\rthree\x0b\u2028four\n\n five".encode())
    (tmp_path / "a.csv").write_text('n,text\n1,"a ""b"",\nc"\n\n2, d \n')
    (tmp_path / "a.jsonl").write_text('{"text": "a\\nb"}\n{"text": "\\u00e9"}\n')
    for reader, name in (("text", "a.txt"), ("csv", "a.csv"), ("json", "a.jsonl")):
        theirs = datasets.load_dataset(reader, data_files=str(tmp_path / name), split="train")
        assert texts(path=tmp_path / name) == list(theirs["text"])


def test_a_cache_of_datasets_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "datasets")
    (tmp_path / "a.txt").write_text("row\n")
    assert texts(path=tmp_path / "a.txt") == ["row"]


def test_nothing_is_written_beside_the_data(tmp_path, wikitext, caches):
    (tmp_path / "a.txt").write_text("row\n")
    before = {path for path in tmp_path.rglob("*") if caches not in (path, *path.parents)}
    load_rows(path=tmp_path / "a.txt")
    load_rows(path=wikitext, config="wikitext-2-raw-v1")
    assert {path for path in tmp_path.rglob("*") if caches not in (path, *path.parents)} == before


# ---- folders


def expected(config, split):
    return shard_rows(config, split, 0) + shard_rows(config, split, 1)


@pytest.mark.parametrize("readme", [False, True])
@pytest.mark.parametrize("config", ["wikitext-103-raw-v1", "wikitext-2-raw-v1"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_hub_layout(wikitext, readme, config, split):
    if readme:
        write_readme(wikitext)
    assert texts(path=wikitext, config=config, split=split) == expected(config, split)
    own = datasets.load_dataset("parquet", data_files=str(wikitext / config / f"{split}-*.parquet"), split="train")
    assert texts(path=wikitext, config=config, split=split) == list(own["text"])
    assert texts(path=wikitext / config, split=split) == expected(config, split)


def test_split_expressions(wikitext):
    config = "wikitext-2-raw-v1"
    got = texts(path=wikitext, config=config, split="train+test")
    assert got == expected(config, "train") + expected(config, "test")
    assert texts(path=wikitext, config=config, split="train[:3]") == expected(config, "train")[:3]


def test_data_folder_layout_and_readme_default(tmp_path):
    folder = write_wikitext(tmp_path / "one", configs=("data",))
    assert texts(path=folder, split="test") == expected("data", "test")
    assert texts(path=folder, config="default") == expected("data", "train")
    folder = write_wikitext(tmp_path / "two")
    write_readme(folder)
    readme = folder / "README.md"
    readme.write_text(
        readme.read_text().replace("wikitext-2-raw-v1\n  data", "wikitext-2-raw-v1\n  default: true\n  data")
    )
    assert texts(path=folder) == expected("wikitext-2-raw-v1", "train")


def test_folder_of_text_files(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "a.txt").write_text("a1\na2\n")
    (folder / "b.txt").write_text("b1\n")
    (folder / "README.md").write_text("# Books\n")
    assert texts(path=folder) == ["a1", "a2", "b1"]
    lines = tmp_path / "lines"
    lines.mkdir()
    for split in ("train", "validation"):
        (lines / f"{split}.jsonl").write_text(json.dumps({"text": split}) + "\n")
    assert texts(path=lines, split="validation") == ["validation"]


def test_folder_of_several_types_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a\n")
    (tmp_path / "in" / "b.txt").write_text("b\n")
    (tmp_path / "in" / "dataset_infos.json").write_text("{}")
    assert texts(path=tmp_path / "in") == ["a", "b"]
    (tmp_path / "in" / "c.jsonl").write_text('{"text": "c"}\n')
    wrong(r"types \.jsonl, \.txt.*only one", path=tmp_path / "in")


def test_what_a_folder_has_beside_the_rows_is_said(tmp_path):
    for name in ("a.txt", "LICENSE.md", "notes.md", "more/b.txt", ".hidden/c.txt"):
        file = tmp_path / "in" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{name}\n")
    corpus = open_corpus(path=tmp_path / "in")
    assert list(corpus.rows["text"]) == ["a.txt", "more/b.txt"]
    assert corpus.unread == "1 file of other types (.md)"
    (tmp_path / "in" / "notes.md").unlink()
    assert open_corpus(path=tmp_path / "in").unread is None


def test_a_split_is_what_a_whole_name_says_and_every_name(tmp_path):
    """datasets finds train and test inside other words, and read 20 of these 80 rows."""
    books = ("night_train_to_lisbon", "the_litmus_test", "emma", "middlemarch")
    for name in books:
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i}\n" for i in range(20)))
    assert len(texts(path=tmp_path)) == 80
    assert open_corpus(path=tmp_path).unread is None
    (tmp_path / "train.txt").write_text("a book of that title\n")
    assert len(texts(path=tmp_path)) == 81  # one name says a split, the others do not
    for name in books:
        (tmp_path / f"{name}.txt").rename(tmp_path / f"test_{books.index(name)}.txt")
    corpus = open_corpus(path=tmp_path)
    assert list(corpus.rows["text"]) == ["a book of that title"]
    assert corpus.unread == "the split test, beside split=train"
    assert len(texts(path=tmp_path, split="test")) == 80
    assert open_corpus(path=tmp_path, split="train+test").unread is None


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train/a.txt", "validation/b.txt"], {"train": 1, "validation": 1}),
        (["data/train-00000-of-00001.txt", "data/extra-00000-of-00001.txt"], {"train": 1, "extra": 1}),
        (["dev.txt", "train.0.txt", "train.1.txt"], {"train": 2, "validation": 1}),
        (["training_notes.txt", "dev.txt"], {"train": 2}),
        (["contest.txt", "latest.txt", "attest.txt"], {"train": 3}),
        (["my train/a.txt", "test/b.txt"], {"train": 2}),
    ],
)
def test_splits_of_names(tmp_path, names, splits):
    files = [tmp_path / name for name in names]
    assert {split: len(found) for split, found in splits_of(tmp_path, files).items()} == splits


def test_several_configs_are_never_mixed(wikitext):
    for readme in (False, True):
        if readme:
            write_readme(wikitext)
        with pytest.raises(UserError, match=r"config.*wikitext-103-raw-v1, wikitext-2-raw-v1"):
            load_rows(path=wikitext)
        with pytest.raises(UserError, match=r"config=wikitext-3 .*wikitext-103-raw-v1, wikitext-2-raw-v1"):
            load_rows(path=wikitext, config="wikitext-3")


def test_a_readme_that_lists_more_than_is_there(wikitext):
    write_readme(wikitext, configs=("absent", "wikitext-2-raw-v1"))
    assert texts(path=wikitext, config="wikitext-2-raw-v1") == expected("wikitext-2-raw-v1", "train")


# ---- mistakes


def wrong(match, **where):
    start = time.monotonic()
    with pytest.raises(UserError, match=match) as caught:
        load_rows(**where)
    assert time.monotonic() - start < 5
    message = str(caught.value)
    assert "Traceback" not in message and "\n" not in message
    return message


def test_unknown_split_column_and_type(tmp_path, wikitext):
    where = {"path": wikitext, "config": "wikitext-2-raw-v1"}
    wrong(r"split=valid .*: train, test\.", **where, split="valid")
    wrong(r"split=train\[ .*: train, test\.", **where, split="train[")
    wrong(r"text_column=body .*text, n", **where, text_column="body")
    wrong(r"text_column=n .*int64.*text: text", **where, text_column="n")
    (tmp_path / "a.txt").write_text("row\n")
    wrong(r"split=test .*: train", path=tmp_path / "a.txt", split="test")
    wrong(r"config=x .*one file", path=tmp_path / "a.txt", config="x")


def test_missing_empty_and_unknown_files(tmp_path):
    (tmp_path / "notes.txt").write_text("row\n")
    wrong(r"path=.*nots\.txt: no such file.*Did you mean notes\.txt", path=tmp_path / "nots.txt")
    wrong(r"no such file.*folder .*absent does not exist", path=tmp_path / "absent" / "a.txt")
    (tmp_path / "empty.txt").touch()
    wrong(r"empty\.txt: the file is empty", path=tmp_path / "empty.txt")
    (tmp_path / "a.pdf").write_text("x")
    wrong(r"\.pdf are not read.*\.parquet", path=tmp_path / "a.pdf")
    (tmp_path / "plain").write_text("x")
    wrong(r"\(none\) are not read", path=tmp_path / "plain")
    (tmp_path / "folder").mkdir()
    wrong(r"path=.*folder.*no data", path=tmp_path / "folder")
    (tmp_path / "folder" / "x.bin").write_text("x")
    wrong(r"path=.*folder.*no data", path=tmp_path / "folder")
    odd = tmp_path / "old [1]"
    odd.mkdir()
    (odd / "a.txt").write_text("row\n")
    assert texts(path=odd) == ["row"]
    (odd / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: a.txt\n---\n")
    wrong(r"rename it", path=odd)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("a.parquet", b"PAR1 this is no parquet PAR1"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": broken\n'),
        ("a.json", b'[{"text": "fine"}, '),
        ("a.txt", b"caf\xe9 in latin-1\n"),
        ("a.csv", b'text,n\n"a,1\n'),
    ],
)
def test_damaged_files(tmp_path, name, body, capfd):
    (tmp_path / name).write_bytes(body)
    message = wrong(r"path=.*could not be read", path=tmp_path / name)
    assert "damaged" in message and name in message
    assert "Traceback" not in capfd.readouterr().err


def test_the_damaged_shard_is_named(wikitext):
    shard = wikitext / "wikitext-2-raw-v1" / "train-00001-of-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    wrong(r"could not be read.*train-00001-of-00002\.parquet", path=wikitext, config="wikitext-2-raw-v1")


def test_save_to_disk_folder(tmp_path):
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(tmp_path / "saved")
    wrong("save_to_disk.*to_parquet", path=tmp_path / "saved")


def test_keys_that_exclude_each_other(tmp_path):
    wrong(r"path=a\.txt and name=", path="a.txt", name=NAME)
    wrong(r"revision=v1 needs `name`", path="a.txt", revision="v1")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("row\n")
    (tmp_path / "occupied").write_text("a file, where the cache's folder should go")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "/cache")

    monkeypatch.setattr(datasets.DatasetBuilder, "download_and_prepare", refuse)
    wrong("Permission denied.*HF_DATASETS_CACHE", path=tmp_path / "a.txt")


# ---- the Hub, simulated


def online(monkeypatch, answer):
    """A Hub that can be reached and whose every request ends in `answer`."""

    def request(*args, **kwargs):
        raise answer

    monkeypatch.setattr(corpus, "hub_reachable", lambda: True)
    for method in ("dataset_info", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub.HfApi, method, request)


def offline(monkeypatch):
    monkeypatch.setattr(corpus, "hub_reachable", lambda: False)


def in_hub_cache(caches, write=write_wikitext, commit="c" * 40, ref="main"):
    """The dataset as huggingface_hub keeps it after a download."""
    repo = caches / "hub" / "datasets--Salesforce--wikitext"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / ref).write_text(commit)
    return write(repo / "snapshots" / commit)


def test_no_network_and_nothing_cached(monkeypatch):
    offline(monkeypatch)
    message = wrong(r"name=Salesforce/wikitext.*network is out of reach", name=NAME, config="wikitext-2-raw-v1")
    assert "path=" in message


def test_no_network_but_in_the_hub_cache(monkeypatch, caches, caplog):
    offline(monkeypatch)
    write_readme(in_hub_cache(caches))
    got = texts(name=NAME, config="wikitext-2-raw-v1", split="test")
    assert got == expected("wikitext-2-raw-v1", "test")
    assert "network is out of reach" in caplog.text
    wrong(r"name=Salesforce/wikitext.*several configs.*wikitext-2-raw-v1", name=NAME)
    wrong(r"config=nope.*name=Salesforce/wikitext", name=NAME, config="nope")


def test_revision_without_network(monkeypatch, caches):
    offline(monkeypatch)
    in_hub_cache(caches, commit="a" * 40)
    in_hub_cache(caches, lambda folder: write_wikitext(folder, splits=("train",)), commit="b" * 40, ref="v1")
    where = {"name": NAME, "config": "wikitext-2-raw-v1"}
    assert texts(**where, revision="a" * 40, split="test") == expected("wikitext-2-raw-v1", "test")
    wrong(r"split=test .*: train\.", **where, revision="v1", split="test")
    wrong("revision v2 is not in the local Hub cache", **where, revision="v2")


def test_prepared_by_datasets_earlier(monkeypatch, caches, wikitext):
    """datasets' own cache folder, under the name that it gives a Hub dataset, is found without network."""
    offline(monkeypatch)
    builder = datasets.load_dataset_builder(
        "parquet", "wikitext-2-raw-v1", data_files={"train": str(wikitext / "wikitext-2-raw-v1/train-*")}
    )
    builder.download_and_prepare()
    made = Path(builder.cache_dir)
    prepared = caches / "datasets" / "Salesforce___wikitext" / "wikitext-2-raw-v1" / "0.0.0" / ("d" * 40)
    prepared.parent.mkdir(parents=True)
    made.rename(prepared)
    info = json.loads((prepared / "dataset_info.json").read_text())
    info.update(config_name="wikitext-2-raw-v1", dataset_name="wikitext")
    (prepared / "dataset_info.json").write_text(json.dumps(info))
    for file in prepared.glob("parquet-*.arrow"):
        file.rename(file.with_name(file.name.replace("parquet-", "wikitext-")))
    assert texts(name=NAME, config="wikitext-2-raw-v1") == expected("wikitext-2-raw-v1", "train")
    wrong(r"config=nope.*wikitext-2-raw-v1", name=NAME, config="nope")
    wrong(r"revision v1 is not in the local", name=NAME, config="wikitext-2-raw-v1", revision="v1")


def hub_error(kind, status=404):
    import httpx

    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/x"))
    return kind("the server's words", response=response)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (
            "GatedRepoError",
            r"name=Salesforce/wikitext.*gated.*huggingface\.co/datasets/Salesforce/wikitext.*HF_TOKEN",
        ),
        ("RepositoryNotFoundError", r"name=Salesforce/wikitext.*no such dataset.*HF_TOKEN"),
        ("RevisionNotFoundError", r"revision=v9.*Salesforce/wikitext"),
    ],
)
def test_hub_refusals(monkeypatch, kind, match):
    error = hub_error(getattr(huggingface_hub.errors, kind))
    online(monkeypatch, error)
    wrong(match, name=NAME, revision="v9")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *a, **k: None)  # then datasets asks, and wraps
    wrong(match, name=NAME, revision="v9")


def test_connection_lost_after_the_probe(monkeypatch):
    online(monkeypatch, ConnectionError("reset"))
    wrong("network is out of reach", name=NAME)


@pytest.mark.parametrize("name", ["./text", "/data/text.txt", "~/text", "a/b/c", "text", "json"])
def test_a_path_or_a_reader_given_as_name(name):
    wrong(r"name=.*owner/name.*path=", name=name)


def test_a_folder_here_does_not_shadow_the_hub(tmp_path, monkeypatch):
    write_wikitext(tmp_path / "Salesforce" / "wikitext")
    monkeypatch.chdir(tmp_path)
    wrong(r"no folder that is here.*path=Salesforce/wikitext", name=NAME)


def test_offline_with_an_empty_cache_in_a_fresh_process(tmp_path):
    code = """
from rsdyn.errors import UserError
from rsdyn.stream.text.tokens import load_rows
try:
    load_rows(name="Salesforce/wikitext", config="wikitext-2-raw-v1")
except UserError as error:
    print(error)
"""
    env = {"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert time.monotonic() - start < 10
    assert run.stdout.startswith("name=Salesforce/wikitext: the network is out of reach")
    assert run.stderr == ""


def test_a_small_text_is_read_without_a_bar_and_a_large_one_with_it(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    file = tmp_path / "a.txt"
    file.write_text("\n".join(f"row {i}" for i in range(50)))
    assert len(load_rows(path=file)) == 50 and capfd.readouterr().err == ""
    monkeypatch.setattr("rsdyn.stream.text.corpus.SMALL", 10)
    file.write_text("\n".join(f"line {i}" for i in range(60)))
    assert len(load_rows(path=file)) == 60 and "train split" in capfd.readouterr().err
    assert not datasets.are_progress_bars_disabled()


# ---- a Hub dataset whose README lists no files is read as a folder of this disk is

BOOKS = ("night_train_to_lisbon", "the_litmus_test", "emma", "middlemarch")


def on_the_hub(monkeypatch, folder, *, configs=None):
    """A dataset on the Hub with the files of a folder; which of them were asked for."""
    asked = []
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    info = SimpleNamespace(
        siblings=[SimpleNamespace(rfilename=name) for name in names], card_data={"configs": configs} if configs else {}
    )

    def snapshot_download(name, *, repo_type, revision, allow_patterns):
        assert (name, repo_type, revision) == (NAME, "dataset", None)
        asked.extend(huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns))
        return str(folder)

    monkeypatch.setattr(corpus, "hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **more: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_name_with_train_in_it_is_no_split_on_the_hub_either(tmp_path, monkeypatch):
    for book in BOOKS:
        (tmp_path / f"{book}.txt").write_text("".join(f"{book} {i}\n" for i in range(20)))
    (tmp_path / "README.md").write_text("about the books")
    (tmp_path / "cover.png").write_bytes(b"x")
    asked = on_the_hub(monkeypatch, tmp_path)
    opened = corpus.open_corpus(name=NAME)
    assert len(opened.rows) == 80 and {row.rpartition(" ")[0] for row in opened.rows["text"]} == set(BOOKS)
    assert asked == sorted(f"{book}.txt" for book in BOOKS)  # neither the README nor the picture
    assert "1 file of other types (.png)" in opened.unread


def test_one_config_of_a_hub_dataset_is_all_that_is_fetched(wikitext, monkeypatch):
    asked = on_the_hub(monkeypatch, wikitext)
    got = texts(name=NAME, config="wikitext-2-raw-v1", split="test")
    assert got == expected("wikitext-2-raw-v1", "test")
    assert asked and all(name.startswith("wikitext-2-raw-v1/") for name in asked)
    wrong(r"name=Salesforce/wikitext has several configs.*wikitext-2-raw-v1", name=NAME)
    wrong(r"config=nope is not in name=Salesforce/wikitext", name=NAME, config="nope")


def test_a_byte_order_mark_and_changing_types_of_a_hub_dataset(tmp_path, monkeypatch):
    rows = [{"text": f"row {i}", "other": i if i < 5 else "a word"} for i in range(10)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8-sig")
    on_the_hub(monkeypatch, tmp_path)
    assert texts(name=NAME) == [row["text"] for row in rows]
