"""The Weights & Biases record of a run.

W&B is asked for nothing it could wait on: the mode is chosen here (`wandb_mode`), no call prompts, and all of its
files stay in the run folder. Every function that takes a ``logger`` does nothing when that is None, which is what
`make_wandb_logger` returns when tracking is off and in every process but rank zero. What is logged is in
`rsdyn.tracking.log` and `rsdyn.tracking.artifacts`.
"""

from __future__ import annotations

import configparser
import contextlib
import json
import netrc
import os
import socket
import threading
import urllib.parse
import urllib.request
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsdyn.errors import UserError
from rsdyn.files import plain
from rsdyn.ranks import is_rank_zero
from rsdyn.redaction import redact
from rsdyn.tracking.sending import sending

if TYPE_CHECKING:
    from rsdyn.tracking.logger import RunLogger

MODES = ("auto", "online", "offline", "disabled")
FINISH_TIMEOUT = 120.0  # seconds; a dead network delays the end of a run, never holds it
END = "the end of the run"
FATAL = '"level":"ERROR+4"'  # in W&B's log, one JSON object a line


class NotStarted(UserError):
    """W&B did not start; ``reason`` says why, in a few words."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def wandb_mode(mode: str, env: Mapping[str, str] | None = None, run_dir: str | Path | None = None) -> tuple[str, str]:
    """Choose how W&B runs, in at most about two seconds: ``(online | offline | disabled, one line for the log)``.

    ``mode`` is tracking.mode. ``auto`` follows ``WANDB_MODE`` or ``WANDB_DISABLED`` when one is set, else is online
    when a key is there (``WANDB_API_KEY`` or netrc) and the server answers a TCP probe within 2 s, else offline.
    ``run_dir`` completes the line's ``wandb sync`` command.

    Raises UserError for an unknown mode, and for ``online`` without a key, where wandb would prompt or raise.
    """
    env = os.environ if env is None else env
    source = f"mode={mode}"
    if mode not in MODES:
        raise UserError(f"{source} is not a mode of W&B: choose one of {', '.join(MODES)}.")
    if mode == "auto" and env.get("WANDB_MODE"):
        source = f"WANDB_MODE={env['WANDB_MODE']}"
        mode = {"dryrun": "offline", "run": "online"}.get(env["WANDB_MODE"], env["WANDB_MODE"])
        if mode not in MODES[1:]:
            raise UserError(f"{source} is not a mode that rsdyn knows: set it to online, offline or disabled.")
    if mode == "auto" and env.get("WANDB_DISABLED", "").strip().lower() in ("true", "1", "yes", "on"):
        mode, source = "disabled", f"WANDB_DISABLED={env['WANDB_DISABLED']}"
    if mode == "disabled":
        return mode, f"W&B: disabled ({source})"
    if mode == "offline":
        return mode, offline_because(source, run_dir)
    url = _base_url(env)
    key = _has_key(url, env)
    if mode == "online":
        if not key:
            raise UserError(
                f"{source} needs a key for {url} and there is none: set WANDB_API_KEY, run `wandb login`, "
                "or use mode=offline."
            )
        return mode, f"W&B: online ({source}), {url}"
    if not key:
        return "offline", offline_because("no API key", run_dir)
    if not _answers(url, env):
        return "offline", offline_because(f"no connection to {urllib.parse.urlsplit(url).hostname}", run_dir)
    return "online", f"W&B: online, {url}"


def offline_because(reason: str, run_dir: str | Path | None = None) -> str:
    """The line that says why W&B is offline, and how to upload later."""
    return f"W&B: offline ({reason}); to upload: wandb sync {run_dir or '<run folder>'}/wandb/offline-run-*"


PROJECT = "rsdyn"
FOLDERS = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR")  # which are in the run's own folder


def project_of(project: str | None, env: Mapping[str, str] | None = None) -> str:
    """The project of a run: the one that is set, else ``WANDB_PROJECT``, else ``rsdyn``."""
    return project or (os.environ if env is None else env).get("WANDB_PROJECT") or PROJECT


def described_by(
    env: Mapping[str, str], *, name: str, is_named: bool, job_type: str, group: str, tags: Sequence[str]
) -> dict[str, Any]:
    """What a run is called in W&B: as W&B's own variables say, and where they say nothing as given.

    ``WANDB_NAME`` gives way to a name that was set (``is_named``); ``WANDB_TAGS``, parted by commas, stand before
    ours. Notes (``WANDB_NOTES``) and the entity W&B reads by itself.
    """
    own = [tag.strip() for tag in env.get("WANDB_TAGS", "").split(",") if tag.strip()]
    return {
        "name": name if is_named else env.get("WANDB_NAME") or name,
        "job_type": env.get("WANDB_JOB_TYPE") or job_type,
        "group": env.get("WANDB_RUN_GROUP") or group,
        "tags": list(dict.fromkeys([*own, *tags])),
    }


def unused_folders(env: Mapping[str, str]) -> str | None:
    """A line on variables that would put W&B's files elsewhere: a run's folder holds all of it. None for none."""
    found = [f"{name}={env[name]}" for name in FOLDERS if env.get(name)]
    return f"W&B: its files are in the run folder; {', '.join(found)} is not used" if found else None


def _base_url(env: Mapping[str, str]) -> str:
    """Return the server's address: ``WANDB_BASE_URL``, else what ``wandb login --host`` saved, else W&B's own."""
    if env.get("WANDB_BASE_URL"):
        return env["WANDB_BASE_URL"].rstrip("/")
    home = Path(env.get("HOME") or Path.home())
    folder = Path(env.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb").expanduser()
    settings = configparser.ConfigParser(interpolation=None)
    try:
        settings.read(folder / "settings")
        return settings.get("default", "base_url").rstrip("/")
    except (OSError, UnicodeError, configparser.Error):
        return "https://api.wandb.ai"


def _has_key(url: str, env: Mapping[str, str]) -> bool:
    if env.get("WANDB_API_KEY", "").strip() or env.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    home = Path(env.get("HOME") or Path.home())
    for path in [Path(env["NETRC"]).expanduser()] if env.get("NETRC") else [home / ".netrc", home / "_netrc"]:
        try:
            login = netrc.netrc(str(path)).hosts.get(urllib.parse.urlsplit(url).hostname or "")
        except (OSError, UnicodeError, netrc.NetrcParseError):
            continue
        if login and login[2]:
            return True
    return False


def _answers(url: str, env: Mapping[str, str], seconds: float = 2.0) -> bool:
    """Tell whether the server (or the proxy on the way to it) accepts a connection within ``seconds``."""
    target = urllib.parse.urlsplit(url)
    proxy = env.get(f"{target.scheme}_proxy") or env.get(f"{target.scheme.upper()}_PROXY")
    skipped = {"no": env.get("no_proxy") or env.get("NO_PROXY") or ""}
    bypass = urllib.request.proxy_bypass_environment  # type: ignore[attr-defined]  # typeshed does not list it
    if proxy and not bypass(target.hostname or "", skipped):
        target = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    connected = threading.Event()

    def connect() -> None:
        try:
            port = target.port or (443 if target.scheme == "https" else 80)
            socket.create_connection((target.hostname or "", port), timeout=seconds).close()
            connected.set()
        except (OSError, ValueError):
            pass

    # In a thread, because the timeout of a socket does not cover the name lookup, which alone can take 10 s and more.
    prober = threading.Thread(target=connect, daemon=True)
    prober.start()
    prober.join(seconds)
    return connected.is_set()


def make_wandb_logger(
    *,
    mode: str,
    project: str,
    run_dir: str | Path,
    config: Mapping[str, Any],
    entity: str | None = None,
    name: str | None = None,
    job_type: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    run_id: str | None = None,
) -> RunLogger | None:
    """Start a W&B run inside ``run_dir`` and return Lightning's logger around it, or None (disabled, rank above zero).

    Hand it to the Trainer as ``logger or False``: for None, Lightning would make a logger of its own. ``config`` is
    plain containers and is redacted. W&B's own record of argv, of the console and of git stays off, since it redacts
    nothing: put `provenance` in ``config`` instead. ``WANDB_*_DIR`` point into ``run_dir`` until `finish`, so that
    tables and media are complete in the folder. A run that goes on gives its ``run_id`` again: online W&B resumes with
    it, offline each session has a folder of its own with that id in its name, and uploading them makes one run.

    Raises NotStarted, a UserError, when W&B does not start (a wrong key, no answer in 20 s, a service that died).
    """
    mode, _ = wandb_mode(mode)
    if mode == "disabled" or not is_rank_zero():
        return None
    import wandb

    from rsdyn.tracking.logger import RunLogger

    described = redact(plain(config))
    run_dir = Path(run_dir).absolute()
    files = run_dir / "wandb"
    variables = {
        "WANDB_DIR": str(run_dir),
        "WANDB_DATA_DIR": str(files / "data"),
        "WANDB_CACHE_DIR": str(files / "cache"),
        "WANDB_ARTIFACT_DIR": str(files / "artifacts"),
        "WANDB_SILENT": "true",  # the login speaks before the run's settings hold
    }
    before = {variable: os.environ.get(variable) for variable in variables}
    os.environ.update(variables)
    try:
        settings = wandb.Settings(
            init_timeout=20,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,  # online nothing else says that what was logged did not arrive
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            symlink=False,
            x_disable_meta=True,
            base_url=_base_url(os.environ),
        )
        run = wandb.init(
            mode=mode,  # type: ignore[arg-type]
            project=project,
            entity=entity,
            dir=str(run_dir),
            name=name,
            job_type=job_type,
            group=group[:128] if group else None,
            tags=[tag[:64] for tag in tags],  # wandb refuses longer ones
            config=described,
            settings=settings,
            reinit="finish_previous",
            id=run_id,
            resume=(os.environ.get("WANDB_RESUME") or "allow") if run_id else None,  # type: ignore[arg-type]
        )
    except Exception as error:  # W&B raises of every kind: its own errors, those of its service, of its settings
        _end_service()
        _restore(before)
        reason = redact(str(error).partition("\n")[0].rstrip(".") or type(error).__name__)
        cure = "Use mode=disabled."
        if mode == "online":
            cure = "Check the key and the network, or use mode=offline."
        raise NotStarted(f"W&B ({mode}) did not start: {reason}. {cure}", reason) from error

    # No two rules may match one name: wandb-core expands globs in a random order, whatever stands first. Axes and what
    # ends up in the summary by itself stay out of automatic panels and of the runs table.
    run.define_metric("depth", hidden=True, summary="none")
    run.define_metric("depth/*", step_metric="depth", step_sync=False, summary="none")
    run.define_metric("trainer/global_step", hidden=True, summary="none")
    run.define_metric("epoch", step_metric="trainer/global_step", hidden=True, summary="none")
    run.define_metric("train/*", step_metric="trainer/global_step", summary="none")
    run.define_metric("val/*", step_metric="trainer/global_step")
    run.define_metric("test/*", step_metric="trainer/global_step", hidden=True)  # one value each: for the table
    return RunLogger(run, project=project, save_dir=str(run_dir), variables=before)


def _end_service() -> None:
    """End W&B's process, which keeps the id of a run that did not start: the same run may now start offline."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):  # it has failed already, and that is being told
        wandb.teardown()


def _restore(before: Mapping[str, str | None]) -> None:
    for variable, value in before.items():
        if value is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = value


def update_config(logger: RunLogger | None, **more: Any) -> None:
    """Add to the run's config what became known after its start, such as the complete ``provenance``; redacted."""
    if logger is None:
        return
    more = redact(plain(more))
    with sending(logger, "the config"):
        logger.experiment.config.update(more, allow_val_change=True)


def _gave_up(log: Path) -> str | None:
    """Why W&B's process stopped sending, as when the run was deleted: silent, it says so in its own log alone."""
    with log.open(encoding="utf-8", errors="replace") as lines:
        fatal = next((line for line in lines if FATAL in line), None)
    return None if fatal is None else str(json.loads(fatal).get("msg"))


def finish(logger: RunLogger | None, exit_code: int = 0) -> None:
    """Close the run with its exit code, without which W&B would show it as running for ever; a second call is free.

    What W&B did not take, the end itself included, is one warning: it never hides the error that ended the run.
    """
    if logger is None or logger.variables is None:
        return
    before, logger.variables = logger.variables, None
    try:
        with sending(logger, END):
            try:
                logger.experiment.finish(exit_code=exit_code)
            except TimeoutError as error:
                raise TimeoutError(f"no answer within {FINISH_TIMEOUT:g} s") from error
            if reason := _gave_up(Path(logger.experiment.settings.log_internal)):
                raise ConnectionError(reason)
    finally:
        _restore(before)
    if logger.lost:
        reasons = "; ".join(f"{what} ({reason})" for what, reason in logger.lost.items())
        rest = ""
        if END in logger.lost:
            rest = (
                "; nor whatever it had not taken by then of losses, curves, charts, tables, figures, summary and "
                f"artifacts. To send them: wandb sync {logger.experiment.settings.sync_dir}"
            )
        warnings.warn(f"W&B did not get {reasons}{rest}. All results are in the run folder.", stacklevel=2)
