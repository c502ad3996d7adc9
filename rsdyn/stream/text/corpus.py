"""Open a corpus: a file, a folder, a dataset of the Hub or the text that ships with rsdyn, all through `datasets`."""

from __future__ import annotations

import difflib
import errno
import glob
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rsdyn.embedded import TEXT
from rsdyn.errors import UserError
from rsdyn.lm.hub import explain_hub_error, first_line, hub_offline, hub_reachable

if TYPE_CHECKING:
    import datasets

_log = logging.getLogger(__name__)
_READERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_rows(
    *,
    path: str | Path | None = None,
    name: str | None = None,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    text_column: str = "text",
) -> datasets.Dataset:
    """Open a corpus through `datasets` and return its rows, with the one column `text_column`.

    `path` is a file (.txt with one row a line, .json, .jsonl, .parquet, .csv) or a folder of such files, among them
    the Hub's parquet layout; `name` a dataset on the Hub, taken from the local caches when the network is out of
    reach. With neither, the text that ships with rsdyn. `split` may be an expression of `datasets`, such as
    ``train+test``. No remote code is ever run.

    Raises UserError, naming the ``data.`` key and what exists, when the rows cannot be had.
    """
    import datasets.exceptions

    if path is not None and name is not None:
        raise UserError(f"data.path={path} and data.name={name} exclude each other: leave one of them out.")
    if name is None and revision is not None:
        raise UserError(
            f"data.revision={revision} needs data.name, a dataset on the Hub: local files have no revision."
        )
    if name is not None:
        key, builder = f"data.name={name}", _open_hub(name, config, revision)
    else:
        path = Path(TEXT if path is None else path).expanduser()
        key, builder = f"data.path={path}", _open_local(path, config)
    try:
        with _quiet_datasets() as said:
            builder.download_and_prepare()
    except Exception as error:
        if name is not None and not isinstance(error, datasets.exceptions.DatasetGenerationError):
            raise explain_hub_error(error, kind="data", name=name, revision=revision) from error
        raise _damaged(key, error, said) from error
    try:
        rows = builder.as_dataset(split=split)
    except (ValueError, AssertionError) as error:  # unknown name, or an expression that does not parse
        raise UserError(f"data.split={split} is not in {key}. Splits there: {_listed(builder.info.splits)}.") from error
    columns = rows.features
    if text_column not in columns:
        raise UserError(f"data.text_column={text_column} is not in {key}. Columns there: {_listed(columns)}.")
    texts = [column for column, feature in columns.items() if "string" in str(getattr(feature, "dtype", ""))]
    if text_column not in texts:
        kind = getattr(columns[text_column], "dtype", columns[text_column])
        raise UserError(
            f"data.text_column={text_column} of {key} holds {kind}, not text. Columns of text: {_listed(texts)}."
        )
    return rows.select_columns([text_column])


def _open_local(path: Path, config: str | None, key: str | None = None) -> datasets.DatasetBuilder:
    import datasets

    key = key or f"data.path={path}"
    if not path.exists():
        raise UserError(f"{key}: no such file or folder.{_nearby(path)}")
    if path.is_file():
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise UserError(f"{key}: files of type {path.suffix or '(none)'} are not read. Known: {_listed(_READERS)}.")
        if config is not None:
            raise UserError(f"data.config={config} is for a dataset of several: {path.name} is one file. Leave it out.")
        if path.stat().st_size == 0:
            raise UserError(f"{key}: the file is empty.")
        return datasets.load_dataset_builder(reader, data_files=glob.escape(str(path.absolute())))
    if glob.has_magic(str(path.resolve())):
        raise UserError(f"{key}: datasets would take the *, ? or [ in the folder's name as a pattern: rename it.")
    if (path / "state.json").exists() and (path / "dataset_info.json").exists():
        raise UserError(f"{key} was written by save_to_disk, which is not read: write it with to_parquet instead.")
    try:
        with _quiet_datasets():
            configs = datasets.get_dataset_config_names(str(path))
            if configs != ["default"]:  # the folder's README.md names them
                if config is not None and config not in configs:
                    raise UserError(_choose_config(key, config, configs))
                return datasets.load_dataset_builder(str(path), config)
            # Without a README datasets would read every config's shards as one.
            folders = sorted(folder.name for folder in path.iterdir() if _is_config(folder))
            if (config is None and len(folders) > 1) or config not in (None, "default", *folders):
                raise UserError(_choose_config(key, config, folders))
            builder = datasets.load_dataset_builder(str(path), data_dir=config if config in folders else None)
        _refuse_mixture(key, path / config if config in folders else path, builder)
        return builder
    except UserError:
        raise
    except FileNotFoundError as error:  # an empty folder, no known file, or a README that lists files not there
        if config is not None and _is_config(path / config):
            return _open_local(path / config, None, key)  # a partial copy, as the Hub cache keeps it
        raise UserError(
            f"{key}: the folder has no data that can be read ({first_line(error)}). Known files: {_listed(_READERS)}."
        ) from error
    except ValueError as error:
        if found := _configs_in(error):
            raise UserError(_choose_config(key, config, found)) from error
        raise UserError(f"{key}: the folder could not be opened as a dataset ({first_line(error)}).") from error


def _refuse_mixture(key: str, folder: Path, builder: datasets.DatasetBuilder) -> None:
    """A folder of several types: datasets would take the commonest (.md is one) and leave the others' rows out."""

    def suffix(file: str | Path) -> str:
        suffixes = [suffix.lower() for suffix in Path(file).suffixes] or ["(none)"]
        return next((suffix for suffix in suffixes if suffix in _READERS), suffixes[-1])  # a.txt.gz is text

    found = {suffix(file) for files in builder.config.data_files.values() for file in files}
    others = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith((".", "dataset_info")))
    found |= {suffix(file) for file in others} & set(_READERS)
    if len({_READERS.get(each) for each in found}) > 1 or not found <= set(_READERS):
        raise UserError(
            f"{key}: the folder has files of types {_listed(sorted(found))}, of which only one would be read. "
            f"Keep one of {_listed(_READERS)} in it, or give a single file."
        )


def _is_config(folder: Path) -> bool:
    """Whether `folder` is one config in the Hub's layout: shards named <split>-00000-of-00001.parquet."""
    return folder.is_dir() and folder.name != "data" and any(folder.glob("*-[0-9]*-of-[0-9]*.parquet"))


def _open_hub(name: str, config: str | None, revision: str | None) -> datasets.DatasetBuilder:
    import datasets
    from huggingface_hub import HfApi

    # A name without an owner is refused because datasets takes "text" or "json" for its own readers, and those read
    # whatever lies in the working directory.
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or Path(name).exists():
        raise UserError(
            f"data.name={name} must be a dataset on the Hub, as owner/name (Salesforce/wikitext), and no folder that "
            f"is here; a local file or folder goes by data.path={name}."
        )
    try:
        if not hub_reachable():
            builder = _open_offline(name, config, revision)
            _log.warning("data.name=%s: the network is out of reach, the copy in the local cache is used", name)
            return builder
        # Asked first, because datasets answers an unknown revision with the latest version that it has cached.
        HfApi().dataset_info(name, revision=revision, timeout=10)
        with _quiet_datasets():
            return datasets.load_dataset_builder(name, config, revision=revision)
    except UserError:
        raise
    except Exception as error:
        if configs := _configs_in(error):
            raise UserError(_choose_config(f"data.name={name}", config, configs)) from error
        raise explain_hub_error(error, kind="data", name=name, revision=revision) from error


def _open_offline(name: str, config: str | None, revision: str | None) -> datasets.DatasetBuilder:
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
                    key = f"data.name={name} (network out of reach, local cache only)"
                    raise UserError(_choose_config(key, config, configs)) from error
                raise
        return _open_local(Path(folder), config, key=f"data.name={name} (network out of reach, local cache {folder})")


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
        return f"{key} has several configs: choose one with data.config. There: {_listed(configs)}."
    return f"data.config={config} is not in {key}. Configs there: {_listed(configs)}."


def _damaged(key: str, error: Exception, said: list[str]) -> UserError:
    import datasets.config

    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(
            f"{key}: {first_line(cause)}. datasets keeps its cache in {datasets.config.HF_DATASETS_CACHE}: make that "
            "folder writable and free some space there, or set HF_DATASETS_CACHE to another."
        )
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
