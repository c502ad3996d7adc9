"""Rows of text out of files on this disk: their splits, their encodings, and of their columns those that are wanted.

Files are read here and not by the readers of `datasets`, which give every column of a JSON file one type where one
column is wanted, take a byte-order mark for text, find "train" inside other words of a file's name, and know a file by
its path and date. What `datasets` still does is keep the rows on disk and slice them (:class:`LocalText`).
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

READERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_BROKEN = (OSError, EOFError, lzma.LZMAError, zlib.error)
_MARKS = (  # UTF-32's first: it begins as UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d+-of-\d+")
_NUMBERED = re.compile(rf"({'|'.join(_SPLITS)})(?:[-_.]?\d+)*", re.IGNORECASE)
_ABOUT = re.compile(r"\.|readme|licen[sc]e|dataset_infos?\.json", re.IGNORECASE)  # what lies beside data and is none
_BATCH = 1000  # rows
_LOOK = 1000  # values of a JSON file that are looked at to learn its columns


class DamagedError(Exception):
    """A file that is not what its name says; the message names the file and why, in a clause."""

    def __init__(self, file: Path, why: object) -> None:
        super().__init__(f"{file.name}: {' '.join(str(why).split())[:200]}")


class NotTextError(Exception):
    """A value of the column of text that is none; the message names row, file and value, in a clause."""


def type_of(file: Path) -> str | None:
    """What reads a file, by its name: ``text``, ``json``, ``parquet`` or ``csv``; None when nothing here does."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in file.suffixes)]
    reader = READERS.get(before if last in _OPENERS else last)
    return None if last in _OPENERS and reader == "parquet" else reader


def splits_of(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of a folder by split, each in the order of its path.

    A split is read off a name only where the whole name says it (``train.txt``, ``test-1.jsonl``,
    ``train-00000-of-00002.parquet``, ``validation/a.csv``) and *every* file's does. Otherwise all are ``train``:
    ``night_train_to_lisbon.txt`` is a book.
    """
    named = {file: _split_in(file.relative_to(folder)) for file in sorted(files)}
    if None in named.values():
        return {"train": list(named)}
    found: dict[str, list[Path]] = {}
    for file, split in named.items():
        found.setdefault(cast(str, split), []).append(file)
    usual = list(dict.fromkeys(_SPLITS.values()))
    return {split: found[split] for split in sorted(found, key=lambda s: usual.index(s) if s in usual else len(usual))}


def _split_in(path: Path) -> str | None:
    if shard := _SHARD.fullmatch(path.name.partition(".")[0]) or _SHARD.fullmatch(path.name.rpartition(".")[0]):
        return shard[1]
    for folder in path.parts[-2::-1]:
        if folder.lower() in _SPLITS:
            return _SPLITS[folder.lower()]
    numbered = _NUMBERED.fullmatch(path.name.partition(".")[0])
    return None if numbered is None else _SPLITS[numbered[1].lower()]


def is_about(file: Path) -> bool:
    """Whether a file of this name is about the data that it lies beside, and none of them."""
    return _ABOUT.match(file.name) is not None


def files_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of a folder and of those in it: those that can be read, and the others; none that is about the data."""
    everything = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    files = [file for file in everything if not is_about(file)]
    return [file for file in files if type_of(file)], [file for file in files if not type_of(file)]


def content_digest(files: Iterable[Path]) -> str:
    """Hex digest of what files hold, in their order: a text is its content, whatever its path and its date."""
    digest = xxhash.xxh3_128()
    for file in files:
        size = 0
        with file.open("rb") as opened:
            while block := opened.read(1 << 24):
                digest.update(block)
                size += len(block)
        digest.update(f"{file.suffix} {size};".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


# --- what is in a file ------------------------------------------------------------------------------------------------


def columns_of(file: Path) -> dict[str, str]:
    """The columns of a file, each with the kind of its values: ``string``, ``int64``, ``list``...

    Of a JSON file they are those of its first values. Raises :class:`DamagedError`.
    """
    reader = type_of(file)
    if reader == "text":
        return {"text": "string"}
    if reader == "parquet":
        return {field.name: _arrow_kind(field.type) for field in _parquet(file).schema_arrow}
    if reader == "csv":
        with _csv_rows(file) as (header, _):
            return dict.fromkeys(header, "string")
    kinds: dict[str, str] = {}
    for row in islice(_json_rows(file), _LOOK):
        for name, value in row.items():
            if kinds.get(name, "null") == "null":
                kinds[name] = _json_kind(value)
    return kinds


def rows_of(file: Path, columns: Sequence[str]) -> Iterator[list[str | None]]:
    """The rows of a file, of each the values of ``columns``: the first one text or null, the others turned into text.

    Raises :class:`DamagedError`, and :class:`NotTextError` for a value of the first column that is not text.
    """
    reader = type_of(file)
    if reader == "text":
        for line in lines_of(file):
            yield [line]
    elif reader == "parquet":
        yield from _parquet_rows(file, columns)
    elif reader == "csv":
        with _csv_rows(file) as (header, rows):
            places = [header.index(column) for column in columns]
            yield from ([row[place] if place < len(row) else None for place in places] for row in rows)
    else:
        for number, row in enumerate(_json_rows(file), start=1):
            text = row.get(columns[0])
            if text is not None and not isinstance(text, str):
                raise NotTextError(f"row {number} of {file.name} holds {_json_kind(text)} ({str(text)[:40]})")
            others = (row.get(column) for column in columns[1:])
            yield [text, *(None if other is None else str(other) for other in others)]


def _arrow_kind(kind: Any) -> str:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)
    return "string" if is_text else str(kind)


def _json_kind(value: Any) -> str:
    names = {str: "string", bool: "bool", int: "int64", float: "double", list: "list", dict: "struct"}
    return names.get(type(value), "null")


def _parquet(file: Path) -> Any:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, *_BROKEN) as error:
        raise DamagedError(file, error) from error


def _parquet_rows(file: Path, columns: Sequence[str]) -> Iterator[list[str | None]]:
    opened = _parquet(file)
    try:
        for batch in opened.iter_batches(batch_size=_BATCH, columns=list(columns)):
            values = [batch.column(batch.schema.get_field_index(column)).to_pylist() for column in columns]
            for text, *others in zip(*values, strict=True):
                yield [text, *(None if other is None else str(other) for other in others)]
    except (pa.ArrowException, UnicodeDecodeError, *_BROKEN) as error:
        raise DamagedError(file, error) from error


@contextmanager
def _opened(file: Path, *, newline: str | None = None) -> Iterator[IO[str]]:
    """A file of text in the encoding that its byte-order mark says, else UTF-8; unpacked where it is compressed."""
    opener: Any = _OPENERS.get(file.suffix.lower(), open)
    try:
        with opener(file, "rb") as opened:
            head = opened.peek(4096)[:4096] if hasattr(opened, "peek") else b""
            encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")
            if encoding == "utf-8" and b"\0" in head:
                raise DamagedError(file, "there are zero bytes in it, as in UTF-16 without a byte-order mark")
            with io.TextIOWrapper(opened, encoding=encoding, newline=newline) as text:
                yield text
    except (UnicodeError, *_BROKEN) as error:
        raise DamagedError(file, error) from error


def lines_of(file: Path) -> Iterator[str]:
    """The lines of a file of text without their ends. Raises :class:`DamagedError`."""
    with _opened(file) as text:
        for line in text:
            yield line.removesuffix("\n")


def _json_rows(file: Path) -> Iterator[Mapping[str, Any]]:
    """The objects of a JSON file: one a line, or a list of them; or one object, of columns or a row by itself."""
    with _opened(file) as text:
        number = 0
        for number, line in enumerate(text, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                if number == 1 and line.lstrip()[0] in "[{":
                    break  # one value over several lines
                raise DamagedError(file, f"line {number}: {error}") from error
            is_columns = isinstance(row, dict) and row and all(isinstance(value, list) for value in row.values())
            if number == 1 and (isinstance(row, list) or (is_columns and ".jsonl" not in file.suffixes)):
                break
            if not isinstance(row, dict):
                raise DamagedError(file, f"line {number} is no JSON object")
            yield row
        else:
            return
    with _opened(file) as text:
        try:
            whole = json.load(text)
        except ValueError as error:
            raise DamagedError(file, error) from error
    if isinstance(whole, dict):
        columns = {name: values for name, values in whole.items() if isinstance(values, list)}
        if len(columns) < len(whole) or len({len(values) for values in columns.values()}) != 1:
            yield whole
            return
        whole = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    for number, row in enumerate(whole, start=1):
        if isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, dict):
            raise DamagedError(file, f"value {number} of its list is no JSON object")
        yield row


@contextmanager
def _csv_rows(file: Path) -> Iterator[tuple[list[str], Iterator[list[str]]]]:
    """The header of a CSV file, and its rows."""
    limit = csv.field_size_limit(sys.maxsize)  # 128 KiB, which is less than an article
    try:
        with _opened(file, newline="") as text:
            reader = csv.reader(text, strict=True)

            def rows() -> Iterator[list[str]]:
                for row in reader:
                    if len(row) > len(header):
                        raise DamagedError(file, f"line {reader.line_num} has {len(row)} values under {len(header)}")
                    if row:
                        yield row

            header = next(reader, [])
            yield header, rows()
    except csv.Error as error:
        raise DamagedError(file, error) from error
    finally:
        csv.field_size_limit(limit)


# --- kept on disk -----------------------------------------------------------------------------------------------------


class LocalText(datasets.ArrowBasedBuilder):
    """Rows of local files, kept in the cache of `datasets` under a digest of what the files hold.

    Args:
        files: by split.
        columns: see :func:`rows_of`.
    """

    VERSION = datasets.Version("1.0.0")  # raise it whenever other rows would come of the same files

    def __init__(self, files: Mapping[str, Sequence[Path]], columns: Sequence[str], **options: Any) -> None:
        self.files, self.columns = files, list(columns)
        identity = xxhash.xxh3_128(repr(self.columns).encode())
        for split, paths in files.items():
            identity.update(f"{split} {content_digest(paths)};".encode())
        super().__init__(dataset_name="rsdyn_text", config_name=identity.hexdigest(), **options)

    def _info(self) -> Any:
        string = datasets.Value("string")
        return datasets.DatasetInfo(features=datasets.Features(dict.fromkeys(self.columns, string)))

    def _split_generators(self, dl_manager: Any) -> list[Any]:
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"files": list(paths)})
            for split, paths in self.files.items()
        ]

    def _generate_shards(self, files: Sequence[Path]) -> Iterator[str]:
        yield from map(str, files)

    def _generate_tables(self, files: Sequence[Path]) -> Iterator[tuple[Any, pa.Table]]:
        for number, file in enumerate(files):
            rows, batch = rows_of(file, self.columns), 0
            while some := list(islice(rows, _BATCH)):
                try:
                    columns = [pa.array(values, pa.string()) for values in zip(*some, strict=True)]
                except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
                    raise DamagedError(file, error) from error
                yield (number, batch), pa.Table.from_arrays(columns, names=self.columns)
                batch += 1
