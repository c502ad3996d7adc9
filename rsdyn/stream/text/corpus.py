"""Open a corpus: a file, a folder, a dataset of the Hub or the text that ships with rsdyn."""

from __future__ import annotations

import atexit
import difflib
import errno
import glob
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rsdyn.embedded import TEXT
from rsdyn.errors import UserError
from rsdyn.lm.hub import explain_hub_error, first_line, hub_offline, hub_reachable

if TYPE_CHECKING:
    import datasets
    from huggingface_hub.hf_api import DatasetInfo

_log = logging.getLogger(__name__)
_OF_CONFIG = re.compile(r"[^/]+/[^/]*-\d+-of-\d+\.parquet")


class Corpus(NamedTuple):
    """A text that was opened.

    Attributes:
        rows: with the column of text, and those of documents and of groups if they were asked for.
        unread: what lies beside these rows and was not read, in a sentence; None where that is nothing.
    """

    rows: datasets.Dataset
    unread: str | None


def load_rows(**where: Any) -> datasets.Dataset:
    """The rows of :func:`open_corpus`, whose arguments it takes."""
    return open_corpus(**where).rows


def open_corpus(
    *,
    path: str | Path | None = None,
    name: str | None = None,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    text_column: str = "text",
    document_column: str | None = None,
    group_column: str | None = None,
) -> Corpus:
    """Open a corpus and return its rows, with the column `text_column`, kept on disk by `datasets`.

    With `document_column`, which says what document a row is from, they have that column too, and so with
    `group_column`, which says what group it is of.

    `path` is a file (.txt with one row a line, .json, .jsonl, .parquet, .csv; text in UTF-8, or in what its byte-order
    mark says; .gz, .bz2 and .xz are unpacked) or a folder of such files, among them the Hub's parquet layout; `name` a
    dataset on the Hub, taken from the local caches when the network is out of reach. With neither, the text that ships
    with rsdyn. `split` may be an expression of `datasets`, such as ``train+test``; a folder has splits where the name
    of every file in it says one, or its README does. No remote code is ever run.

    Raises UserError, naming the ``data.`` key and what exists, when the rows cannot be had.
    """
    if path is not None and name is not None:
        raise UserError(f"path={path} and name={name} exclude each other: leave one of them out.")
    if name is None and revision is not None:
        raise UserError(f"revision={revision} needs `name`, a dataset on the Hub: local files have no revision.")
    unread: list[str] = []
    asked = {"text_column": text_column, "document_column": document_column, "group_column": group_column}
    wanted: dict[str, str] = {}  # column -> the setting that names it, the text's first
    for setting, column in asked.items():
        if column is not None:
            wanted.setdefault(column, setting)
    if name is not None:
        key, builder = f"name={name}", _open_hub(name, config, revision, wanted, unread)
    else:
        path = Path(TEXT if path is None else path).expanduser()
        key = f"path={path}"
        builder = _open_local(path, config, wanted, unread=unread)
    builder = _prepared(key, builder, name, revision)
    try:
        rows = builder.as_dataset(split=split)
    except (ValueError, AssertionError) as error:  # unknown name, or an expression that does not parse
        raise UserError(f"split={split} is not in {key}. Splits there: {_listed(builder.info.splits)}.") from error
    columns = {column: str(getattr(feature, "dtype", feature)) for column, feature in rows.features.items()}
    _check_columns(key, wanted, columns)
    others = [each for each in builder.info.splits or () if not re.search(rf"(?<!\w){re.escape(each)}(?!\w)", split)]
    if others and name is None:
        unread.append(f"the split{'s' * (len(others) > 1)} {_listed(others)}, beside split={split}")
    return Corpus(rows.select_columns(list(wanted)), "; ".join(unread) or None)


def _prepared(
    key: str, builder: datasets.DatasetBuilder, name: str | None, revision: str | None
) -> datasets.DatasetBuilder:
    """The builder with its rows on disk; ``UserError`` when they cannot be had."""
    import datasets.exceptions

    said: list[str] = []
    try:
        with _quiet_datasets() as said, _bar_only(name is not None or not _is_small(builder)):
            builder.download_and_prepare()
    except Exception as error:
        cause = _cause(error)
        if isinstance(cause, UserError):
            raise cause from error
        if name is not None and not isinstance(error, datasets.exceptions.DatasetGenerationError):
            raise explain_hub_error(error, kind="data", name=name, revision=revision) from error
        raise _damaged(key, error, said) from error
    return builder


SMALL = 20_000_000  # bytes of text that are read in a few seconds, without a bar


def _is_small(builder: datasets.DatasetBuilder) -> bool:
    files = [file for some in (getattr(builder, "files", None) or {}).values() for file in some]
    return bool(files) and sum(Path(file).stat().st_size for file in files) < SMALL


@contextmanager
def _bar_only(wanted: bool) -> Iterator[None]:
    """Without the bars of ``datasets`` where they are not wanted; afterwards as it was."""
    import datasets

    if wanted or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _check_columns(key: str, wanted: Mapping[str, str], columns: Mapping[str, str]) -> None:
    """Raise ``UserError`` unless the columns are there: that of text, which holds text, and maybe others.

    ``wanted`` has the setting that names each.
    """
    for column, setting in wanted.items():
        if column not in columns:
            raise UserError(f"data.{setting}={column} is not in {key}. Columns there: {_listed(columns)}.")
    text_column, texts = next(iter(wanted)), [column for column, kind in columns.items() if "string" in kind]
    if text_column not in texts:
        raise UserError(
            f"text_column={text_column} of {key} holds {columns[text_column]}, not text. Columns of text: "
            f"{_listed(texts)}."
        )


def _local_text(key: str, files: Mapping[str, Sequence[Path]], wanted: Mapping[str, str]) -> datasets.DatasetBuilder:
    """What reads files of this disk; ``UserError`` where they are damaged, or lack a column."""
    from rsdyn.stream.text.local_files import DamagedError, LocalText, columns_of

    columns: dict[str, str] = {}
    try:
        for file in (file for paths in files.values() for file in paths):
            found = columns_of(file) if file.stat().st_size else dict.fromkeys(wanted, "string")
            if not set(wanted) <= set(found):
                _check_columns(f"{key}, {file.name}", wanted, found)
            columns |= {name: kind for name, kind in found.items() if columns.get(name, "null") == "null"}
    except (DamagedError, OSError) as error:
        raise _damaged(key, error, []) from error
    _check_columns(key, wanted, columns)
    return LocalText(files, list(wanted), cache_dir=_writable_cache())


def _writable_cache() -> str | None:
    """None for the cache of `datasets`, or a folder for this process where that one cannot be written."""
    import datasets.config

    folder = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError:
        return _own_cache()


@cache
def _own_cache() -> str:
    folder = tempfile.TemporaryDirectory(prefix="rsdyn-text-", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    return folder.name


def _open_local(
    path: Path,
    config: str | None,
    wanted: Mapping[str, str],
    *,
    key: str | None = None,
    unread: list[str] | None = None,
) -> datasets.DatasetBuilder:
    """What reads a file or folder; what of the folder it does not read is added to ``unread``."""
    import datasets

    from rsdyn.stream.text.local_files import READERS, splits_of, type_of

    key = key or f"path={path}"
    if not path.exists():
        raise UserError(f"{key}: no such file or folder.{_nearby(path)}")
    if path.is_file():
        if type_of(path) is None:
            raise UserError(f"{key}: files of type {path.suffix or '(none)'} are not read. Known: {_listed(READERS)}.")
        if config is not None:
            raise UserError(f"config={config} is for a dataset of several: {path.name} is one file. Leave it out.")
        if path.stat().st_size == 0:
            raise UserError(f"{key}: the file is empty.")
        return _local_text(key, {"train": [path]}, wanted)
    if (path / "state.json").exists() and (path / "dataset_info.json").exists():
        raise UserError(f"{key} was written by save_to_disk, which is not read: write it with to_parquet instead.")
    if not _has_configs(path / "README.md"):
        # Without a README datasets would read every config's shards as one.
        folders = sorted(folder.name for folder in path.iterdir() if _is_config(folder))
        if (config is None and len(folders) > 1) or config not in (None, "default", *folders):
            raise UserError(_choose_config(key, config, folders))
        folder = path / config if config in folders else path
        return _local_text(key, splits_of(folder, _files(key, folder, unread)), wanted)
    if glob.has_magic(str(path.resolve())):
        raise UserError(f"{key}: datasets would take the *, ? or [ in the folder's name as a pattern: rename it.")
    try:
        with _quiet_datasets():
            configs = datasets.get_dataset_config_names(str(path))
            if config is not None and config not in configs:
                raise UserError(_choose_config(key, config, configs))
            builder = datasets.load_dataset_builder(str(path), config)
    except UserError:
        raise
    except FileNotFoundError as error:  # an empty folder, no known file, or a README that lists files not there
        if config is not None and _is_config(path / config):
            return _open_local(path / config, None, wanted, key=key)  # a partial copy, as the Hub cache keeps it
        raise UserError(
            f"{key}: the folder has no data that can be read ({first_line(error)}). Known files: {_listed(READERS)}."
        ) from error
    except ValueError as error:
        if found := _configs_in(error):
            raise UserError(_choose_config(key, config, found)) from error
        raise UserError(f"{key}: the folder could not be opened as a dataset ({first_line(error)}).") from error
    files = {str(split): [Path(file) for file in paths] for split, paths in builder.config.data_files.items()}
    kinds = {type_of(file) for paths in files.values() for file in paths}
    if len(kinds) == 1 and None not in kinds and _is_plain(builder.config):
        return _local_text(key, files, wanted)
    from rsdyn.stream.text.local_files import content_digest

    # read by datasets, as the README says (another separator, a field of the file), under a digest of the content
    digest = content_digest([path / "README.md", *(file for paths in files.values() for file in paths)])
    root = Path(_writable_cache() or datasets.config.HF_DATASETS_CACHE)
    with _quiet_datasets():
        return datasets.load_dataset_builder(str(path), config, cache_dir=str(root / "rsdyn_text" / digest))


def _has_configs(readme: Path) -> bool:
    """Whether a dataset's README says which files it has."""
    import yaml

    try:
        head = readme.read_text(encoding="utf-8-sig").split("---")
        return head[0].strip() == "" and "configs" in (yaml.safe_load(head[1]) or {})
    except (OSError, UnicodeError, IndexError, TypeError, yaml.YAMLError):
        return False


def _is_plain(config: Any) -> bool:
    """Whether a README gives files alone, and nothing on how to read them."""
    where = ("name", "version", "data_dir", "data_files", "description")
    plain = type(config)(name=config.name)
    return all(getattr(config, f.name) == getattr(plain, f.name) for f in fields(config) if f.name not in where)


def _files(key: str, folder: Path, unread: list[str] | None) -> list[Path]:
    """The files of a folder without a README that lists them; ``UserError`` for none, or several types."""
    from rsdyn.stream.text.local_files import READERS, files_in, type_of

    files, others = files_in(folder)
    types = sorted({file.suffix.lower() for file in others})
    if not files:
        there = f" (it has {_listed(types)})" if types else ""
        raise UserError(f"{key}: the folder has no data that can be read{there}. Known files: {_listed(READERS)}.")
    if len({type_of(file) for file in files}) > 1:
        found = sorted({next(s for s in reversed(file.suffixes) if s.lower() in READERS).lower() for file in files})
        raise UserError(
            f"{key}: the folder has files of types {_listed(found)}, of which only one is read. Keep one of them in "
            "it, or give a single file."
        )
    if unread is not None:
        unread += _other_types(others)
    return files


def _other_types(files: Sequence[Path]) -> list[str]:
    """What to say of files among these that hold no text that is read, and are not about the data."""
    from rsdyn.stream.text.local_files import is_about, type_of

    others = [file for file in files if type_of(file) is None and not is_about(file)]
    if not others:
        return []
    types = sorted({file.suffix.lower() for file in others})
    return [f"{len(others)} file{'s' * (len(others) > 1)} of other types ({_listed(types)})"]


def _is_config(folder: Path) -> bool:
    """Whether `folder` is one config in the Hub's layout: shards named <split>-00000-of-00001.parquet."""
    return folder.is_dir() and folder.name != "data" and any(folder.glob("*-[0-9]*-of-[0-9]*.parquet"))


def _open_hub(
    name: str, config: str | None, revision: str | None, wanted: Mapping[str, str], unread: list[str]
) -> datasets.DatasetBuilder:
    import datasets
    from huggingface_hub import HfApi

    # A name without an owner is refused because datasets takes "text" or "json" for its own readers, and those read
    # whatever lies in the working directory.
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or Path(name).exists():
        raise UserError(
            f"name={name} must be a dataset on the Hub, as owner/name (Salesforce/wikitext), and no folder that "
            f"is here; a local file or folder goes by path={name}."
        )
    try:
        if not hub_reachable():
            builder = _open_offline(name, config, revision, wanted)
            _log.warning("%s: the network is out of reach, the copy in the local cache is used", name)
            return builder
        # Asked first, because datasets answers an unknown revision with the latest version that it has cached.
        info = HfApi().dataset_info(name, revision=revision, timeout=10)
        if info is not None and (files := _files_without_configs(info)):
            # Read as a folder of this disk is: datasets would find "train" inside other words of a file's name.
            unread += _other_types([Path(each.rfilename) for each in info.siblings or []])
            return _open_downloaded(name, config, revision, wanted, files, unread)
        with _quiet_datasets():
            return datasets.load_dataset_builder(name, config, revision=revision)
    except UserError:
        raise
    except Exception as error:
        if configs := _configs_in(error):
            raise UserError(_choose_config(f"name={name}", config, configs)) from error
        raise explain_hub_error(error, kind="data", name=name, revision=revision) from error


def _files_without_configs(info: DatasetInfo) -> list[str]:
    """The files that can be read of a dataset on the Hub whose README does not say which it has, else none."""
    from rsdyn.stream.text.local_files import is_about, type_of

    if info.card_data is not None and info.card_data.get("configs"):
        return []
    paths = [Path(each.rfilename) for each in info.siblings or []]
    return [str(path) for path in paths if type_of(path) and not is_about(path) and not path.parts[0].startswith(".")]


def _open_downloaded(
    name: str, config: str | None, revision: str | None, wanted: Mapping[str, str], files: list[str], unread: list[str]
) -> datasets.DatasetBuilder:
    """A dataset on the Hub out of its files, which come into the Hub's own cache; of several configs only one's."""
    from huggingface_hub import snapshot_download

    key = f"name={name}"
    configs = sorted({file.partition("/")[0] for file in files if _OF_CONFIG.fullmatch(file)} - {"data"})
    if (config is None and len(configs) > 1) or config not in (None, "default", *configs):
        raise UserError(_choose_config(key, config, configs))
    if config in configs:
        files = [file for file in files if file.startswith(f"{config}/")]
    patterns = [glob.escape(file) for file in files]
    folder = snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns)
    return _open_local(Path(folder), config, wanted, key=key, unread=unread)


def _open_offline(
    name: str, config: str | None, revision: str | None, wanted: Mapping[str, str]
) -> datasets.DatasetBuilder:
    """The dataset as an earlier run left it: prepared by `datasets`, else its files in the Hub's cache.

    The first knows no revision, so a revision is looked for in the second alone.
    """
    import datasets
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with hub_offline(), _quiet_datasets():
        prepared: Exception | None = None
        if revision is None:
            try:
                return datasets.load_dataset_builder(name, config)
            except Exception as error:
                prepared = error
        try:
            folder = snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
        except LocalEntryNotFoundError as error:
            folder = getattr(error, "snapshot_path", "")  # a part of the files, which may be the part wanted
            if not folder:
                if prepared is not None and (configs := _configs_in(prepared)):
                    key = f"name={name} (network out of reach, local cache only)"
                    raise UserError(_choose_config(key, config, configs)) from error
                raise
        key = f"name={name} (network out of reach, local cache {folder})"
        return _open_local(Path(folder), config, wanted, key=key)


def _configs_in(error: BaseException) -> list[str]:
    """The configs that datasets lists in a message about a missing or unknown one, else an empty list."""
    message = str(error)
    if found := re.search(r"(?:[Aa]vailable[^\[\n]*: )(\[[^\]]*\])", message):
        return re.findall(r"'([^']*)'", found.group(1))
    if found := re.search(r"multiple .* in the cache: (.*)", message):
        return found.group(1).split(", ")
    return []


def _choose_config(key: str, config: str | None, configs: Iterable[str]) -> str:
    if config is None:
        return f"{key} has several configs: choose one with `config`. There: {_listed(configs)}."
    return f"config={config} is not in {key}. Configs there: {_listed(configs)}."


def _cause(error: BaseException) -> BaseException:
    """The first error of a chain, but for what a reader of ours turned into its own words."""
    from rsdyn.stream.text.local_files import DamagedError, NotTextError

    while error.__cause__ is not None and not isinstance(error, (DamagedError, NotTextError, UserError)):
        error = error.__cause__
    return error


def _damaged(key: str, error: Exception, said: list[str]) -> UserError:
    import datasets.config

    from rsdyn.stream.text.local_files import NotTextError

    cause = _cause(error)
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(
            f"{key}: {first_line(cause)}. datasets keeps its cache in {datasets.config.HF_DATASETS_CACHE}: make that "
            "folder writable and free some space there, or set HF_DATASETS_CACHE to another."
        )
    if isinstance(cause, NotTextError):
        return UserError(f"{key}: {cause} in the column of text, `text_column`. Write such values in quotes.")
    if isinstance(cause.__cause__, OSError) and cause.__cause__.errno:
        return UserError(f"{key} could not be read: {cause}. Check the file's permissions and its disk.")
    detail = said[0].splitlines()[0] if said else f"{type(cause).__name__}: {first_line(cause)}"
    return UserError(f"{key} could not be read: {detail}. The file is damaged, or not of the type that its name says.")


@contextmanager
def _quiet_datasets() -> Iterator[list[str]]:
    """Collect what `datasets` logs instead of printing it: its errors name the damaged file, ours repeat it."""
    import datasets  # noqa: F401  (makes the logger)

    said: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger = logging.getLogger("datasets")
    before, propagate = logger.handlers[:], logger.propagate
    logger.handlers[:], logger.propagate = [Collector(logging.ERROR)], False
    try:
        yield said
    finally:
        logger.handlers[:], logger.propagate = before, propagate


def _nearby(path: Path) -> str:
    """A sentence on what stands beside a path that does not exist."""
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist either."
    names = [entry.name for entry in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _listed(names: Iterable[str] | None, most: int = 20) -> str:
    names = list(names or ())
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"
