"""Whether the Hugging Face Hub can be reached, and what its errors mean for the person at the keyboard."""

import re
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal
from urllib.parse import urlsplit

from safetensors import SafetensorError

from rsdyn.errors import UserError

# Addresses that gave no answer, and when: a run asks half a dozen times, and each may take the whole timeout.
_silent: dict[tuple[str, int], float] = {}
_ASK_AGAIN = 30.0  # seconds


def hub_reachable(timeout: float = 2.0) -> bool:
    """Whether a TCP connection to the Hub's endpoint, or to the proxy that leads to it, opens within `timeout` seconds.

    False at once where ``HF_HUB_OFFLINE`` is set. Without this probe a machine that has no network waits 23 to 46 s
    in the Hub's own retries. ``HF_ENDPOINT`` and the proxy variables are honoured.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    address = _first_hop(constants.ENDPOINT)
    if time.monotonic() - _silent.get(address, -_ASK_AGAIN) < _ASK_AGAIN:
        return False
    opened = threading.Event()
    done = threading.Event()

    def probe() -> None:
        try:
            socket.create_connection(address, timeout=timeout).close()
            opened.set()
        except OSError:
            pass
        finally:
            done.set()

    # In a thread, because the name look-up that comes before the connection knows no timeout of its own.
    threading.Thread(target=probe, name="rsdyn-hub-probe", daemon=True).start()
    done.wait(timeout)
    if not opened.is_set():
        _silent[address] = time.monotonic()
    return opened.is_set()


def _first_hop(endpoint: str) -> tuple[str, int]:
    """The host and port that a request to `endpoint` connects to first: its own, or the proxy's."""
    url = urlsplit(endpoint)
    host = url.hostname or "huggingface.co"
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(host):
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        defaults = {"https": 443, "socks5": 1080, "socks5h": 1080}
        return url.hostname or host, url.port or defaults.get(url.scheme, 80)
    return host, url.port or (80 if url.scheme == "http" else 443)


@contextmanager
def hub_offline() -> Iterator[None]:
    """Inside, the Hub's libraries answer from their local caches alone, as if ``HF_HUB_OFFLINE=1`` had been set."""
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def explain_hub_error(
    error: BaseException, *, kind: Literal["lm", "data"], name: str, revision: str | None = None
) -> UserError:
    """Turn an error of huggingface_hub, or of transformers or datasets around one, into one message with the cure.

    Looks through the whole chain of causes, because those libraries wrap. Returns the error, for ``raise ... from``.
    The arguments named are ``name`` and ``revision``, and for a text ``path``.
    """
    from huggingface_hub import errors

    what, page = ("model", name) if kind == "lm" else ("dataset", f"datasets/{name}")
    key = f"name={name}"
    local = "name=<folder of the model>" if kind == "lm" else "path=<file or folder>"
    chain = _chain(error)
    words = " ".join(str(link) for link in chain).lower()
    root = error
    while root.__cause__ is not None:
        root = root.__cause__

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    # datasets drops the cause of these three when it raises again, and only its own words are left.
    # What the Hub says of a repository that is not there speaks of "a private or gated repo" too.
    is_absent = has(errors.RepositoryNotFoundError) and not has(errors.GatedRepoError)
    if not is_absent and (has(errors.GatedRepoError) or "gated dataset" in words or "gated repo" in words):
        return UserError(
            f"{key}: this {what} is gated. Accept its terms at https://huggingface.co/{page} and set HF_TOKEN to a "
            f"token that may read it, or give a copy of your own with {local}."
        )
    if has(errors.RevisionNotFoundError) or ("revision '" in words and "doesn't exist" in words):
        return UserError(
            f"revision={revision}: {name} has no such branch, tag or commit. Those it has are listed at "
            f"https://huggingface.co/{page}/tree/main; leave `revision` out for the newest."
        )
    if has(errors.RepositoryNotFoundError) or "doesn't exist on the hub" in words:
        return UserError(
            f"{key}: the Hub has no such {what}, or it is private. Check the spelling (owner/name), or set HF_TOKEN "
            f"to a token that may read it; local files go by {local}."
        )
    if has(errors.HFValidationError):
        return UserError(f"{key} is not a Hub name (owner/name). Local files go by {local}.")
    if _is_network(chain, words):
        at = f" at revision {revision}" if revision else ""
        return UserError(
            f"{key}: the network is out of reach (or HF_HUB_OFFLINE is set), and the {what}{at} is not in the local "
            f"Hub cache. Connect once to fetch it, or give local files with {local}."
        )
    if has(errors.EntryNotFoundError):
        return UserError(
            f"{key}: the repository lacks a file that is needed ({first_line(root)}). Check that it is a {what}, "
            f"or choose another `revision`."
        )
    return UserError(f"{key}: the Hub could not give this {what} ({type(root).__name__}: {first_line(root)}).")


@contextmanager
def lm_errors(name: str, revision: str | None, *, is_folder: bool) -> Iterator[None]:
    """Turn whatever transformers, safetensors and the Hub raise inside into one message with the cure."""
    try:
        yield
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(f"name={name}: its weights cannot be read ({error}); copy or download them again.") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(
            f"name={name}: its weights have other shapes than its config.json asks for. The two belong to different "
            "models: copy or download the model again."
        ) from error
    except (OSError, ValueError, ImportError) as error:
        words = str(error)
        if "trust_remote_code" in words:
            raise UserError(
                f"name={name}: it needs Python code of its own, which is not run unless you ask. If you trust its "
                "authors, set trust_remote_code=true."
            ) from error
        if "does not recognize this architecture" in words or "Unrecognized model" in words:
            raise UserError(
                f"name={name}: its config.json names a kind of model (model_type) that transformers does not know. "
                "Check the file, or install a newer transformers."
            ) from error
        if "does not appear to have a file named" in words and "safetensors" in words:
            if not is_folder and _index_is_cached(name, revision):
                raise UserError(
                    f"name={name}: its download is incomplete ({first_line(error)}), and what is missing cannot be "
                    "fetched now. Connect once to finish it (unset HF_HUB_OFFLINE if it is set)."
                ) from error
            raise no_safetensors(name) from error
        if is_folder:
            raise UserError(
                f"name={name}: this folder could not be opened as a model ({type(error).__name__}: {one_line(error)})."
            ) from error
        raise explain_hub_error(error, kind="lm", name=name, revision=revision) from error


@contextmanager
def config_errors(name: str) -> Iterator[None]:
    """Turn whatever transformers makes of a wrong value in config.json into one message that names it."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (UserError, OSError, ImportError):
        raise
    except ValueError as error:
        if any(known in str(error) for known in ("trust_remote_code", "recognize", "Unrecognized")):
            raise
        raise _wrong_config(name, error) from error
    except (StrictDataclassError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise _wrong_config(name, error) from error


def _wrong_config(name: str, error: Exception) -> UserError:
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    return UserError(
        f"name={name}: its config.json holds a value that transformers refuses ({type(root).__name__}: "
        f"{one_line(root)}). Correct it there, such as 352 for 352.0, or leave the line out for its default."
    )


@contextmanager
def tokenizer_errors(name: str, key: Literal["name", "tokenizer"], *, is_folder: bool) -> Iterator[None]:
    """Turn what opening a tokenizer raises into one message: what is missing, and how to name another."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of every kind, from the tokenizers' own to a KeyError in tokenizer_config.json
        words = one_line(error)
        if "trust_remote_code" in words:
            raise UserError(
                f"{key}={name}: its tokenizer needs Python code of its own, which is not run unless you ask. If you "
                "trust its authors, set trust_remote_code=true."
            ) from error
        if not is_folder and _is_network(_chain(error), words.lower()):
            where = "tokenizer=<folder of a tokenizer>"
            raise UserError(
                f"{key}={name}: the network is out of reach (or HF_HUB_OFFLINE is set), and its tokenizer is not in "
                f"the local Hub cache. Connect once to fetch it, or give {where}."
            ) from error
        raise UserError(
            f"{key}={name}: no tokenizer can be opened there ({type(error).__name__}: {words}). Add its files "
            "(tokenizer.json, or what save_pretrained() of its tokenizer writes), or name the model or folder that has "
            "the tokenizer with `tokenizer`."
        ) from error


def _index_is_cached(name: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    files = ("model.safetensors.index.json", "model.safetensors")
    return any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in files)


def weights_size(name: str, commit: str) -> int:
    """Bytes of the safetensors files that transformers would fetch of a Hub model, asked of the Hub.

    Some repositories hold the weights a second time under other names (``consolidated.safetensors``), which are not
    fetched. Raises ``UserError`` when the Hub does not answer.
    """
    from huggingface_hub import HfApi

    with lm_errors(name, commit, is_folder=False):
        info = HfApi().model_info(name, revision=commit, files_metadata=True, timeout=10)
    ours = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
    return sum(file.size or 0 for file in info.siblings or () if ours.fullmatch(file.rfilename))


def no_safetensors(name: str) -> UserError:
    """The error for a Hub model whose weights are in a format that can run code when opened."""
    return UserError(
        f"name={name}: the repository has no safetensors files, and other formats can run code when opened. Choose "
        "an `revision` that has them (some have refs/pr/1), another model, a folder of your own that "
        "save_pretrained() wrote, or the path of a GGUF file that you downloaded."
    )


def _chain(error: BaseException) -> list[BaseException]:
    links: list[BaseException] = []
    queue: list[BaseException | None] = [error]
    while queue:
        link = queue.pop(0)
        if link is not None and link not in links:
            links.append(link)
            queue += [link.__cause__, link.__context__]
    return links


def _is_network(chain: list[BaseException], words: str) -> bool:
    from huggingface_hub import errors

    own = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError, socket.gaierror)
    # By name for the HTTP library, since huggingface_hub has changed it twice (requests, httpx, httpx2).
    names = ("ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "ProxyError", "RevisionResolutionError")
    return (
        any(isinstance(link, own) or type(link).__name__ in names for link in chain)
        or "couldn't reach" in words
        or "couldn't connect" in words
    )


def one_line(error: BaseException) -> str:
    """An error's whole message on one line, cut where it is very long."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 400 else f"{words[:400]}..."


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
