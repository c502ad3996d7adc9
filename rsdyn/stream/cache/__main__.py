"""Look after the cache of recorded trajectories: list what is there, verify it, remove what is damaged or not wanted.

The cache has a folder for each model and condition, with the shards of all texts that were recorded, and an index for
each corpus. Nothing outside the cache folder is touched, links are not followed, and only files of names that rsdyn
gives, in folders whose manifest it wrote, are removed.
"""

from __future__ import annotations

import argparse
import errno
import os
import stat
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np

from rsdyn.errors import UserError
from rsdyn.stream.cache.corpus import read_index
from rsdyn.stream.cache.lock import if_unused
from rsdyn.stream.cache.manifest import MANIFEST, DamagedManifestError, UnknownFormatError
from rsdyn.stream.cache.old import OldCache
from rsdyn.stream.cache.shard import DamagedShardError
from rsdyn.stream.cache.store import CORPORA, LOCKS, SHARD, ShardStore, default_cache_dir

PROGRAM = "python -m rsdyn.stream.cache"
EXIT_DAMAGED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when all is well, 1 when ``verify`` found damage, 2 for a mistake in the command."""
    arguments = _parser().parse_args(argv)
    root = arguments.dir.expanduser()
    try:
        if not root.is_dir():
            raise UserError(f"--dir={root}: there is no such folder. Give the cache.dir of your runs.")
        if arguments.command == "list":
            return list_caches(root)
        if arguments.command == "verify":
            return verify(root, arguments.names)
        return prune(
            root, arguments.names, damaged=arguments.damaged, unused_days=arguments.unused_days, yes=arguments.yes
        )
    except UserError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"{PROGRAM}: error: {where}{error.strerror}.", file=sys.stderr)
        return UserError.exit_code


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--dir", type=Path, default=default_cache_dir(), help="the cache folder (cache.dir); default %(default)s"
    )
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "list", parents=[common], help="what is in the cache: folders, their corpora, sizes, complete or not"
    )
    command = commands.add_parser("verify", parents=[common], help="compare every shard with its checksum")
    command.add_argument("names", nargs="*", metavar="name", help="folders to verify; default all")
    command = commands.add_parser(
        "prune",
        parents=[common],
        help="remove what killed runs left; with names or --unused-days, folders and corpora",
        description="A corpus goes with the shards that no other corpus has sequences in. Without --yes it only says "
        "what it would remove.",
    )
    command.add_argument("names", nargs="*", metavar="name", help="folders or corpora to remove, as list shows them")
    command.add_argument("--unused-days", type=_days, metavar="DAYS", help="remove what no run opened for so long")
    command.add_argument("--damaged", action="store_true", help="verify all, and remove damaged shards")
    command.add_argument("--yes", action="store_true", help="do remove")
    return parser


def _days(text: str) -> float:
    days = float(text)
    if not 0 <= days < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: a number of days, 0 or more")
    return days


@dataclass
class Found:
    """What is in a cache folder.

    Attributes:
        stores: the folders of models.
        old: caches in an older layout.
        strange: what else has a manifest: name and what is wrong with it.
    """

    stores: list[ShardStore] = field(default_factory=list)
    old: list[OldCache] = field(default_factory=list)
    strange: dict[str, str] = field(default_factory=dict)


@dataclass
class CorpusIndex:
    """A corpus of a model's folder, by its index.

    Attributes:
        path: the index.
        facts: what the corpus is.
        keys: of its sequences.
        wrong: what is wrong with the index; None where it is whole.
    """

    path: Path
    facts: dict[str, object]
    keys: set[bytes]
    wrong: str | None = None

    @property
    def name(self) -> str:
        return self.path.stem


def find_caches(root: Path) -> Found:
    """The folders of models in ``root``, caches in an older layout, and what else has a manifest there."""
    found = Found()
    for folder in sorted(root.iterdir()):
        if folder.is_symlink() or not folder.is_dir() or not os.path.lexists(folder / MANIFEST):
            continue  # not ours
        try:
            store = ShardStore.from_folder(folder)
            store.refresh()
            found.stores.append(store)
        except UnknownFormatError as error:
            if old := OldCache.from_folder(folder):
                found.old.append(old)
            else:
                found.strange[folder.name] = f"its manifest {error}"
        except (DamagedManifestError, KeyError, TypeError, ValueError, OSError) as error:
            found.strange[folder.name] = f"its manifest is damaged: {error}"
    return found


def corpora_of(store: ShardStore) -> list[CorpusIndex]:
    """The corpora that were opened with a model, by name."""
    folder = store.folder / CORPORA
    found = []
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() and not folder.is_symlink() else []:
        try:
            facts, keys = read_index(path)
        except (ValueError, OSError) as error:
            found.append(CorpusIndex(path, {}, set(), str(error)))
        else:
            found.append(CorpusIndex(path, facts, {key.tobytes() for key in keys}))
    return found


def list_caches(root: Path) -> int:
    """Print a line for each folder, and under it one for each of its corpora."""
    found = find_caches(root)
    rows = [("name", "what", "sequences", "size", "last use")]
    n_corpora = n_bytes = 0
    for store in found.stores:
        corpora, form = corpora_of(store), store.form
        recorded = {key.tobytes() for keys in store.files.values() for key in keys}
        sizes = {name: _bytes(store.folder / name) for name in (*store.files, *store.damaged)}
        n_corpora, n_bytes = n_corpora + len(corpora), n_bytes + sum(sizes.values())
        what = f"{store.fields.get('condition', '')}, {form.n_sublayers} x {form.n_units}, {store.fields['dtype']}"
        size, use = _size(sum(sizes.values())), _date(store.folder / MANIFEST)
        rows.append((store.folder.name, what, str(len(recorded)), size, use))
        for corpus in corpora:
            if corpus.wrong is not None:
                rows.append((f"  {corpus.name}", f"its index cannot be read: {corpus.wrong}", "", "", ""))
                continue
            there, n = len(corpus.keys & recorded), len(corpus.keys)
            in_words = [corpus.facts.get(name) for name in ("text", "positions")]
            what = ", ".join(str(word) for word in in_words if word not in (None, "last"))
            state = f"complete, {n}" if there == n else f"{there} of {n}"
            of_it = sum(sizes[name] for name, keys in store.files.items() if _has_any(keys, corpus.keys))
            rows.append((f"  {corpus.name}", what, state, _size(of_it), _date(corpus.path)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for old in found.old:
        print(f"{old.folder.name}: {_size(old.n_bytes())} in the layout of an older rsdyn, which is not read")
    if found.old:
        print(f"What is wanted of those is recorded anew; {PROGRAM} prune NAME --yes removes them.")
    for name, reason in found.strange.items():
        print(f"{name}: {reason}")
    counted = f"{_counted(len(found.stores), 'folder')}, {_counted(n_corpora, 'corpus', 'corpora')}"
    print(f"{counted}, {_size(n_bytes)} in {root}")
    return 0


def verify(root: Path, names: Sequence[str] = ()) -> int:
    """Compare every shard with its checksum and name those that are damaged; 1 when there are any."""
    found = find_caches(root)
    chosen = _choose(root, found, names)
    n_read = n_damaged = 0
    for store in chosen:
        for name in sorted({*store.files, *store.damaged}):
            n_read += 1
            if damage := _damage(store, name):
                n_damaged += 1
                print(damage)
        for corpus in corpora_of(store):
            if corpus.wrong is not None:
                n_damaged += 1
                print(f"{corpus.path}: {corpus.wrong}; the next run that wants it writes it again")
    for old in found.old:
        if not names or old.folder.name in names:
            print(f"{old.folder.name}: in the layout of an older rsdyn, which is not read; not verified")
    wrong = {name: reason for name, reason in found.strange.items() if not names or name in names}
    for name, reason in wrong.items():
        print(f"{name}: {reason}")
    print(f"{_counted(len(chosen), 'folder')}, {_counted(n_read, 'shard')} read, {n_damaged} damaged")
    if n_damaged:
        print(f"A run that wants them records them again; {PROGRAM} prune --damaged --yes removes them now.")
    return EXIT_DAMAGED if n_damaged or wrong else 0


def prune(
    root: Path,
    names: Sequence[str] = (),
    *,
    damaged: bool = False,
    unused_days: float | None = None,
    yes: bool = False,
) -> int:
    """Remove what killed runs left; damaged shards too with ``damaged``, and models or corpora by name or age.

    Without ``yes`` it only prints what it would remove.
    """
    found = find_caches(root)
    corpora = {store.folder.name: corpora_of(store) for store in found.stores}
    of_corpora = {corpus.name for several in corpora.values() for corpus in several}
    named = [name for name in names if name not in of_corpora]
    whole = [store.folder.name for store in _choose(root, found, named, of_corpora)] if named else []
    old = [cache for cache in found.old if cache.folder.name in names]
    parts = {name: [c for c in several if c.name in names] for name, several in corpora.items()}
    if unused_days is not None:
        latest = time.time() - unused_days * 86400
        whole += [store.folder.name for store in found.stores if _last_use(store.folder / MANIFEST) < latest]
        old += [c for c in found.old if c not in old and _last_use(c.folder / MANIFEST) < latest]
        parts = {
            name: [c for c in several if c in parts[name] or _last_use(c.path) < latest]
            for name, several in corpora.items()
        }
    verb = "removed" if yes else "would remove"
    n = 0
    for cache in old:
        n += _prune_old(cache, verb, yes=yes)
    for store in found.stores:
        name = store.folder.name
        if name in whole:
            size = _size(sum(_bytes(store.folder / file) for file in (*store.files, *store.damaged)))
            if not yes or _remove(store):
                n += 1
                print(f"{verb} {name}, {size}")
            continue
        for path in store.strays():
            n += 1
            print(f"{verb} {path.relative_to(root)}, left by a run that was killed")
            if yes:
                path.unlink(missing_ok=True)
        for file in sorted({*store.files, *store.damaged}) if damaged else ():
            if damage := _damage(store, file):
                n += 1
                print(f"{verb} {damage}")
                if yes:
                    with store.holding(file):
                        if _damage(store, file):  # still: no run has recorded it again meanwhile
                            store.discard(file)
        if parts[name]:
            n += _prune_corpora(store, parts[name], corpora[name], verb, yes=yes)
    print("Nothing to remove." if n == 0 else "Done." if yes else "Nothing was removed. Add --yes to remove it.")
    return 0


def _choose(
    root: Path, found: Found, names: Sequence[str], others: set[str] | frozenset[str] = frozenset()
) -> list[ShardStore]:
    """The models of these names, or all; those of older layouts are passed over. ``others`` may be named too."""
    by_name = {store.folder.name: store for store in found.stores}
    older = {cache.folder.name for cache in found.old}
    for name in names:
        if name in found.strange:
            raise UserError(f"{name}: {found.strange[name]}. What is in it is not known to be ours: remove it by hand.")
        if name not in by_name and name not in older:
            there = ", ".join([*by_name, *sorted(older), *sorted(others)]) or "none"
            raise UserError(f"{name}: no such cache in {root}. There are: {there}.")
    return [by_name[name] for name in dict.fromkeys(names) if name in by_name] if names else found.stores


def _damage(store: ShardStore, name: str) -> str | None:
    try:
        store.verify(name)
    except DamagedShardError as damage:
        return str(damage)
    except FileNotFoundError:
        return None  # another process removed it meanwhile
    return None


def _has_any(keys: np.ndarray, wanted: set[bytes]) -> bool:
    return any(key.tobytes() in wanted for key in keys)


def _prune_corpora(
    store: ShardStore, chosen: list[CorpusIndex], corpora: list[CorpusIndex], verb: str, *, yes: bool
) -> int:
    """Remove corpora and the shards that none of the others has a sequence in; how many went."""
    kept = [corpus for corpus in corpora if corpus not in chosen]
    if any(corpus.wrong is not None for corpus in kept):
        print(f"{store.folder.name}: an index cannot be read, so it is unknown which shards are wanted: none goes.")
        wanted = {key.tobytes() for keys in store.files.values() for key in keys}
    else:
        wanted = set().union(*(corpus.keys for corpus in kept))
    gone = {key for corpus in chosen for key in corpus.keys}
    files = [f for f, keys in store.files.items() if _has_any(keys, gone) and not _has_any(keys, wanted)]
    size = _size(sum(_bytes(store.folder / file) for file in files))
    if yes:
        with store.if_unused() as is_unused:
            if not is_unused:
                print(f"{store.folder.name} is left alone: a run is reading it.")
                return 0
            for corpus in chosen:
                corpus.path.unlink(missing_ok=True)
            for file in files:
                store.discard(file)
    for corpus in chosen:
        print(f"{verb} {store.folder.name}/{corpus.name}")
    print(f"{verb} {_counted(len(files), 'shard')} that no other corpus has sequences in, {size}")
    return len(chosen)


def _remove(store: ShardStore) -> bool:
    """Remove a model's folder with all that is ours in it, unless a run has it open; whether it was removed."""
    busy = next((lock for lock in sorted(_locks(store)) if not _is_free(store, lock)), None)
    if busy is not None:
        print(f"{store.folder.name} is left alone: a run is recording into it.")
        return False
    with store.if_unused() as is_unused:
        if not is_unused:
            print(f"{store.folder.name} is left alone: a run is reading it.")
            return False
        _remove_files(store)
    return True


def _locks(store: ShardStore) -> set[str]:
    """The names of locks that were ever taken of what is recorded."""
    folder = store.folder / LOCKS
    if folder.is_symlink() or not folder.is_dir():
        return set()
    return {path.stem for pattern in ("recording-*", "shard-*") for path in folder.glob(pattern)}


def _remove_files(store: ShardStore) -> None:
    for path in store.folder.iterdir():
        if SHARD.fullmatch(path.name):
            store.discard(path.name)
    for path in store.strays():
        path.unlink(missing_ok=True)
    folder = store.folder / CORPORA
    if not folder.is_symlink():
        for path in folder.glob("*.safetensors"):
            path.unlink(missing_ok=True)
    _remove_last(store.folder, (CORPORA, LOCKS))


def _remove_last(folder: Path, inner: Sequence[str]) -> None:
    """Remove a cache's locks, its manifest and the folders that are empty then."""
    locks = folder / LOCKS
    if not locks.is_symlink():
        for path in locks.glob("*.lock"):
            if path.stem == "manifest" or path.stem.startswith(("recording-", "shard-")):
                path.unlink(missing_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # the last: until then the rest can be pruned again
    for each in (*(folder / name for name in inner), folder):
        with suppress(FileNotFoundError):
            try:
                each.rmdir()
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                print(f"{each} is kept: there are files in it that are not the cache's.")


def _prune_old(cache: OldCache, verb: str, *, yes: bool) -> int:
    size = _size(cache.n_bytes())
    if yes:
        with if_unused(cache.folder) as is_unused:
            if not is_unused:
                print(f"{cache.folder.name} is left alone: a run of an older rsdyn is reading it.")
                return 0
            for path in cache.shards():
                path.unlink(missing_ok=True)
            _remove_last(cache.folder, (LOCKS,))
    print(f"{verb} {cache.folder.name}, {size}, in an older layout")
    return 1


def _is_free(store: ShardStore, lock: str) -> bool:
    with store.locks.hold_if_free(lock) as is_free:
        return is_free


def _counted(n: int, one: str, several: str | None = None) -> str:
    return f"{n} {one if n == 1 else several or one + 's'}"


def _bytes(path: Path) -> int:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def _last_use(path: Path) -> float:
    return os.lstat(path).st_mtime  # each run that opens a cache touches its manifest and its index


def _date(path: Path) -> str:
    return datetime.fromtimestamp(_last_use(path)).strftime("%Y-%m-%d %H:%M")


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
