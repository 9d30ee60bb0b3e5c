"""`remend report --watch`: the page of a run under way, served on this machine alone.

remend report --watch runs/first
"""

from __future__ import annotations

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from markupsafe import escape

from remend.errors import RemendError
from remend.files.reading import MISSHAPEN
from remend.files.run_directory import RunDirectory
from remend.report.running import REFRESH, page_now
from remend.report.writing import html

LOOPBACK = "127.0.0.1"


class Watcher(ThreadingHTTPServer):
    """Answers / with the run's page as it is now, on a free port of the loopback interface."""

    daemon_threads = True

    def __init__(self, run: Path) -> None:
        self.run = run
        super().__init__((LOOPBACK, 0), _Handler)

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: Watcher

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not told on the terminal."""

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0]
        if self.path != "/" or host not in (LOOPBACK, "localhost"):  # another name is another site's page, asking
            self.send_error(404)
            return
        try:
            text = html(page_now(self.server.run))
        except (RemendError, OSError, *MISSHAPEN) as error:
            text = (
                f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="{REFRESH}">'
                f"<p>The run's files can't be read now: {escape(error)}. This page tries again.</p>"
            )
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)


def watch(run: str | Path, say: Callable[[str], None]) -> None:
    """Serve a run's page until Ctrl-C. The run itself is not touched, and nothing is written.

    Args:
        run: a recovery's directory, complete or not.
        say: is given the address, and a last line.

    Raises:
        InputError: the directory holds no run (yet).
    """
    place = RunDirectory.open(Path(run)).path
    with Watcher(place) as server:
        say(f"{server.address}  Ctrl-C ends it; the run goes on")
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            say("no longer served")
