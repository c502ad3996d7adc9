"""Look after the cache of recorded trajectories: list what is there, verify it, remove what is damaged or not wanted.

Nothing outside the cache folder is touched, links are not followed, and only files that a cache's own manifest vouches
for are removed.
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
from datetime import datetime
from pathlib import Path

from rsdyn.errors import UserError
from rsdyn.stream.cache.manifest import MANIFEST, DamagedManifestError, UnknownFormatError
from rsdyn.stream.cache.shard import DamagedShardError
from rsdyn.stream.cache.store import LOCKS, TrajectoryCache, default_cache_dir

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
    commands.add_parser("list", parents=[common], help="what is in the cache: model, condition, size, complete or not")
    command = commands.add_parser("verify", parents=[common], help="compare every shard with its checksum")
    command.add_argument("names", nargs="*", metavar="name", help="folders to verify, as list shows them; default all")
    command = commands.add_parser(
        "prune",
        parents=[common],
        help="remove what killed runs left; with names or --unused-days, whole caches",
        description="Without --yes it only says what it would remove.",
    )
    command.add_argument("names", nargs="*", metavar="name", help="caches to remove, as list shows them")
    command.add_argument(
        "--unused-days", type=_days, metavar="DAYS", help="remove caches that no run opened for so long"
    )
    command.add_argument("--damaged", action="store_true", help="verify all, and remove damaged shards")
    command.add_argument("--yes", action="store_true", help="do remove")
    return parser


def _days(text: str) -> float:
    days = float(text)
    if not 0 <= days < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: a number of days, 0 or more")
    return days


def find_caches(root: Path) -> tuple[list[TrajectoryCache], dict[str, str]]:
    """The caches in ``root``, and what else has a manifest there: name and what is wrong with it."""
    caches, strange = [], {}
    for folder in sorted(root.iterdir()):
        if folder.is_symlink() or not folder.is_dir() or not os.path.lexists(folder / MANIFEST):
            continue  # not ours
        try:
            caches.append(TrajectoryCache.from_folder(folder))
        except UnknownFormatError as error:
            strange[folder.name] = f"its manifest {error}"
        except (DamagedManifestError, KeyError, TypeError, ValueError, OSError) as error:
            strange[folder.name] = f"its manifest is damaged: {error}"
    return caches, strange


def list_caches(root: Path) -> int:
    """Print a line a cache."""
    caches, strange = find_caches(root)
    rows = [("name", "model", "condition", "N x S x D", "size", "shards", "last use")]
    for cache in caches:
        n_there = cache.n_shards - len(cache.missing())
        rows.append(
            (
                cache.folder.name,
                str(cache.fields.get("lm")),
                str(cache.fields.get("condition")),
                " x ".join(map(str, (cache.n_trajectories, *cache.shape[1:]))),
                _size(_bytes(cache)),
                "complete" if n_there == cache.n_shards else f"{n_there} of {cache.n_shards}",
                datetime.fromtimestamp(_last_use(cache)).strftime("%Y-%m-%d %H:%M"),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for name, reason in strange.items():
        print(f"{name}: {reason}")
    print(f"{len(caches)} caches, {_size(sum(map(_bytes, caches)))} in {root}")
    return 0


def verify(root: Path, names: Sequence[str] = ()) -> int:
    """Compare every shard with its checksum and name those that are damaged; 1 when there are any."""
    caches, strange = find_caches(root)
    chosen = _choose(root, caches, strange, names)
    n_read = n_damaged = 0
    for cache in chosen:
        for k in range(cache.n_shards):
            n_read += cache.has(k)
            if damage := _damage(cache, k):
                n_damaged += 1
                print(damage)
    wrong = {name: reason for name, reason in strange.items() if not names or name in names}
    for name, reason in wrong.items():
        print(f"{name}: {reason}")
    print(f"{len(chosen)} caches, {n_read} shards read, {n_damaged} damaged")
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
    """Remove what killed runs left; damaged shards too with ``damaged``, and whole caches by name or age.

    Without ``yes`` it only prints what it would remove.
    """
    caches, strange = find_caches(root)
    whole = _choose(root, caches, strange, names) if names else []
    if unused_days is not None:
        latest = time.time() - unused_days * 86400
        whole += [cache for cache in caches if cache not in whole and _last_use(cache) < latest]
    verb = "removed" if yes else "would remove"
    n = 0
    for cache in caches:
        if cache in whole:
            size = _size(_bytes(cache))
            if not yes or _remove(cache):
                n += 1
                print(f"{verb} {cache.folder.name}, {size}")
            continue
        for path in cache.strays():
            n += 1
            print(f"{verb} {path.relative_to(root)}, left by a run that was killed")
            if yes:
                path.unlink(missing_ok=True)
        for k in range(cache.n_shards) if damaged else ():
            if cache.has(k) and (damage := _damage(cache, k)):
                n += 1
                print(f"{verb} {damage}")
                if yes:
                    with cache.lock(k):
                        if _damage(cache, k):  # still: no run has recorded it again meanwhile
                            cache.discard(k)
    print("Nothing to remove." if n == 0 else "Done." if yes else "Nothing was removed. Add --yes to remove it.")
    return 0


def _choose(
    root: Path, caches: list[TrajectoryCache], strange: dict[str, str], names: Sequence[str]
) -> list[TrajectoryCache]:
    by_name = {cache.folder.name: cache for cache in caches}
    for name in names:
        if name in strange:
            raise UserError(f"{name}: {strange[name]}. What is in it is not known to be ours: remove it by hand.")
        if name not in by_name:
            raise UserError(f"{name}: no such cache in {root}. There are: {', '.join(by_name) or 'none'}.")
    return [by_name[name] for name in dict.fromkeys(names)] if names else caches


def _damage(cache: TrajectoryCache, k: int) -> str | None:
    try:
        cache.verify(k)
    except DamagedShardError as damage:
        return str(damage)
    except FileNotFoundError:
        return None  # another process removed it meanwhile
    return None


def _remove(cache: TrajectoryCache) -> bool:
    """Remove a cache's own files and its folder, unless a run has it open; whether it was removed."""
    for k in range(cache.n_shards):
        if not _is_free(cache, k):
            print(f"{cache.folder.name} is left alone: a run is recording shard {k} of it.")
            return False
    with cache.if_unused() as is_unused:
        if not is_unused:
            print(f"{cache.folder.name} is left alone: a run is reading it.")
            return False
        _remove_files(cache)
    return True


def _remove_files(cache: TrajectoryCache) -> None:
    for k in range(cache.n_shards):
        with cache.lock(k):
            cache.discard(k)
    for path in cache.strays():
        path.unlink(missing_ok=True)
    locks = cache.folder / LOCKS
    for path in [*locks.glob("shard-*.lock"), *locks.glob("manifest.lock")]:
        path.unlink(missing_ok=True)
    (cache.folder / MANIFEST).unlink(missing_ok=True)  # the last: until then the rest can be pruned again
    for folder in (locks, cache.folder):
        with suppress(FileNotFoundError):
            try:
                folder.rmdir()
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
                print(f"{folder} is kept: there are files in it that are not the cache's.")


def _is_free(cache: TrajectoryCache, k: int) -> bool:
    with cache.lock_if_free(k) as is_free:
        return is_free


def _bytes(cache: TrajectoryCache) -> int:
    sizes = []
    for k in range(cache.n_shards):
        try:
            found = os.lstat(cache.path(k))
        except FileNotFoundError:
            continue
        sizes.append(found.st_size if stat.S_ISREG(found.st_mode) else 0)
    return sum(sizes)


def _last_use(cache: TrajectoryCache) -> float:
    return os.lstat(cache.folder / MANIFEST).st_mtime  # each run that opens a cache touches it


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
