"""A stand-in of the hub on this machine: the parts of its HTTP interface that an upload of small files asks for."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """repos: private or not, by name; files: what was uploaded, by 'repo/path'; owner: who may write."""

    daemon_threads = True

    def __init__(self, owner: str = "me") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.owner = owner
        self.repos: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, code: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def allowed(self, repo: str) -> bool:
        if self.headers.get("Authorization") != "Bearer hf_good":
            self.answer(401, {"error": "Invalid credentials"})
        elif not repo.startswith(f"{self.server.owner}/"):
            self.answer(403, {"error": "You don't have the rights"})
        else:
            return True
        return False

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            if self.allowed(f"{self.server.owner}/x"):
                self.answer(200, {"name": self.server.owner, "type": "user"})
            return
        repo = "/".join(self.path.split("/")[3:5]).partition("?")[0]
        if repo not in self.server.repos:
            self.answer(404, {"error": "Repository not found"})
        else:
            known = {"id": repo, "private": self.server.repos[repo], "siblings": [], "sha": "0" * 40, "tags": []}
            self.answer(200, known)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or self.server.owner}/{asked['name']}"
            if not self.allowed(repo):
                return
            there = repo in self.server.repos
            private = asked.get("private", asked.get("visibility") == "private")
            self.server.repos.setdefault(repo, bool(private))
            self.answer(409 if there else 200, {"url": f"{self.server.address}/{repo}", "error": "exists"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif "/commit/" in self.path:
            repo = "/".join(self.path.split("/")[3:5])
            if not self.allowed(repo):
                return
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.files[f"{repo}/{value['path']}"] = base64.b64decode(value["content"])
            url = f"{self.server.address}/{repo}/commit/{'0' * 40}"
            self.answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": url, "hookOutput": ""})
        else:
            self.answer(404, {"error": f"not here: {self.path}"})


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()
