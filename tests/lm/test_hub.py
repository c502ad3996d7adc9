import socket
import threading
import time

import datasets.config
import httpx
import pytest
from huggingface_hub import constants, errors, get_session

from rsdyn.errors import UserError
from rsdyn.lm.hub import explain_hub_error, hub_offline, hub_reachable


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for scheme in ("http", "https", "all", "no"):
        for key in (f"{scheme}_proxy", f"{scheme}_proxy".upper()):
            monkeypatch.delenv(key, raising=False)


@pytest.fixture
def listener():
    """A port of this machine that takes connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed():
    """A port of this machine that refuses them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return port


def test_probe_honours_the_endpoint(monkeypatch, listener, closed):
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener}/hf")
    assert hub_reachable() is True
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed}")
    assert hub_reachable() is False


@pytest.mark.parametrize("scheme", ["https_proxy", "ALL_PROXY"])
def test_probe_goes_to_the_proxy(monkeypatch, listener, closed, scheme):
    monkeypatch.setattr(constants, "ENDPOINT", f"https://127.0.0.1:{closed}")
    monkeypatch.setenv(scheme, f"http://user:word@127.0.0.1:{listener}")
    assert hub_reachable() is True
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert hub_reachable() is False


def test_default_address(monkeypatch):
    asked = []

    def connect(address, timeout):
        asked.append((address, timeout))
        raise OSError

    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr(socket, "create_connection", connect)
    assert hub_reachable() is False
    assert asked == [(("huggingface.co", 443), 2.0)]


def test_offline_setting_asks_nobody(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("connected"))
    assert hub_reachable() is False


def test_a_name_server_that_hangs(monkeypatch):
    release = threading.Event()

    def connect(*args, **kwargs):
        release.wait(30)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", connect)
    start = time.monotonic()
    assert hub_reachable(timeout=0.3) is False
    assert time.monotonic() - start < 2
    release.set()


def test_hub_offline_forbids_requests_and_gives_them_back():
    with hub_offline():
        assert datasets.config.HF_HUB_OFFLINE
    with pytest.raises(errors.OfflineModeIsEnabled), hub_offline():
        get_session().get("https://huggingface.co/api/models/x")
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def refused(kind, status=404):
    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/x"))
    return kind("the server's words\nmore of them", response=response)


def wrapped(error, outer=OSError):
    """As transformers and datasets do: another type, the cause inside."""
    try:
        raise outer("We could not load this.") from error
    except outer as caught:
        return caught


# What the Hub says of a repository that is not there, and of one that is gated, each in its own class.
ABSENT = (
    "404 Client Error. Repository Not Found for url: https://huggingface.co/x. Please make sure you specified the "
    "correct `repo_id`. If you are trying to access a private or gated repo, make sure you are authenticated."
)


def absent():
    response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co/x"))
    return errors.RepositoryNotFoundError(ABSENT, response=response)


CASES = [
    (absent(), ["name=meta/m", "no such {what}", "spelling"]),
    (refused(errors.GatedRepoError, 401), ["name=meta/m", "gated", "HF_TOKEN"]),
    (refused(errors.RepositoryNotFoundError, 401), ["name=meta/m", "no such {what}", "HF_TOKEN"]),
    (refused(errors.RevisionNotFoundError), ["revision=v7", "meta/m"]),
    (refused(errors.RemoteEntryNotFoundError), ["name=meta/m", "lacks a file", "the server's words"]),
    (errors.LocalEntryNotFoundError("no"), ["name=meta/m", "network is out of reach", "revision v7", "{local}"]),
    (errors.OfflineModeIsEnabled("no"), ["name=meta/m", "network is out of reach", "{local}"]),
    (httpx.ConnectError("no"), ["network is out of reach"]),
    (httpx.ReadTimeout("no"), ["network is out of reach"]),
    (TimeoutError(), ["network is out of reach"]),
    (errors.HFValidationError("no"), ["name=meta/m", "not a Hub name", "{local}"]),
    (refused(errors.HfHubHTTPError, 503), ["name=meta/m", "the server's words"]),
    (
        RuntimeError("Dataset scripts are no longer supported"),
        ["name=meta/m", "scripts are no longer supported"],
    ),
]


@pytest.mark.parametrize("kind", ["lm", "data"])
@pytest.mark.parametrize(("error", "says"), CASES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("wrap", [False, True])
def test_messages(kind, error, says, wrap):
    found = explain_hub_error(wrapped(error) if wrap else error, kind=kind, name="meta/m", revision="v7")
    assert isinstance(found, UserError)
    message = str(found)
    words = {
        "kind": kind,
        "what": "model" if kind == "lm" else "dataset",
        "local": "name=<" if kind == "lm" else "path=<",
    }
    assert all(say.format(**words) in message for say in says), message
    assert "\n" not in message
