"""A Hugging Face hub on 127.0.0.1, as small as huggingface_hub lets it be, for HF_ENDPOINT."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves `repos`, {"org/name": {"file": bytes}}; use as a context manager.

    `gated` repositories list their files and refuse them; `private` ones want `token`. `requests` logs "METHOD path".
    `status` other than 200 is the answer to everything.
    """

    def __init__(self, repos: dict[str, dict[str, bytes]], gated=(), private=(), token: str = "hf_good"):
        self.repos, self.gated, self.private, self.token = repos, set(gated), set(private), token
        self.requests: list[str] = []
        self.status = 200

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fetched(self) -> list[str]:
        """The names of the files that were fetched, not only asked about."""
        return [path.partition("/resolve/")[2].partition("/")[2] for path in self.requests if path.startswith("GET /")
                and "/resolve/" in path]  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b'{"error": "refused"}', X_Error_Code=code, X_Error_Message="refused")

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.status != 200:
            return self.refuse(self.hub.status, "ServerError")
        allowed = self.headers.get("authorization") == f"Bearer {self.hub.token}"
        parts = path.strip("/").split("/")
        repo = "/".join(parts[2:4]) if path.startswith("/api/models/") else "/".join(parts[:2])
        if repo not in self.hub.repos or (repo in self.hub.private and not allowed):
            return self.refuse(401, "RepoNotFound")
        files = self.hub.repos[repo]
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in files]
            info = {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
            return self.send(200, json.dumps(info).encode(), Content_Type="application/json")
        name = "/".join(parts[4:])
        if repo in self.hub.gated and not allowed:
            return self.refuse(403, "GatedRepo")
        if name not in files:
            return self.refuse(404, "EntryNotFound")
        etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
        self.send(200, files[name], ETag=etag, X_Repo_Commit=COMMIT, Content_Type="application/octet-stream")
