"""A Hugging Face Hub of one's own, on a port of this machine: what its clients ask of it over HTTP, and no more.

``serve(repos)`` answers for models kept in folders, at the revisions given, with the Hub's own error codes: so the
clients' real code runs, and their real errors are met.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


def commit_of(folder: Path) -> str:
    """Forty hexadecimal digits for a folder, as a commit has."""
    return hashlib.sha1(str(folder).encode()).hexdigest()


@dataclass
class Repo:
    """A model on the Hub: a folder for each revision, and whether its files are for those who accepted its terms."""

    revisions: Mapping[str, Path]
    gated: bool = False
    seen: list[str] = field(default_factory=list)


@contextmanager
def serve(repos: Mapping[str, Repo]) -> Iterator[str]:
    """Answer as the Hub for these repositories while the context lasts; gives the address for ``HF_ENDPOINT``."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def log_message(self, *args: object) -> None:
            pass

        def reply(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def refuse(self, status: int, code: str) -> None:
            self.reply(status, b'{"error":"refused"}', {"X-Error-Code": code, "X-Error-Message": "refused"})

        def answer(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            is_api = parts[:2] == ["api", "models"]
            parts = parts[2:] if is_api else parts
            name, rest = "/".join(parts[:2]), parts[2:]
            repo = repos.get(name)
            if repo is None:
                return self.refuse(401, "RepoNotFound")
            repo.seen.append(f"{self.command} {self.path}")
            revision = rest[1] if len(rest) > 1 else "main"
            folders = {**repo.revisions, **{commit_of(folder): folder for folder in repo.revisions.values()}}
            folder = folders.get(revision)
            if folder is None:
                return self.refuse(404, "RevisionNotFound")
            commit = commit_of(folder)
            files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
            if is_api and rest[:1] in ([], ["revision"]):
                siblings = [{"rfilename": file, "size": path.stat().st_size} for file, path in files.items()]
                body = {"_id": "1", "id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []}
                return self.reply(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
            if is_api and rest[:1] == ["tree"] and len(rest) == 2:
                tree = [{"type": "file", "path": f, "size": p.stat().st_size, "oid": commit} for f, p in files.items()]
                return self.reply(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
            if is_api or rest[:1] != ["resolve"]:
                return self.refuse(404, "EntryNotFound")
            if repo.gated:
                return self.refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
            path = files.get("/".join(rest[2:]))
            if path is None:
                return self.refuse(404, "EntryNotFound")
            body = path.read_bytes()
            etag = hashlib.sha256(body).hexdigest()
            return self.reply(200, body, {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
