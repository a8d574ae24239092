"""A server for the files of one folder, on this machine: no listings, nothing outside.

`mobilellm serve` runs it until Ctrl-C.
"""

from __future__ import annotations

import ipaddress
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".wasm": "application/wasm",
}
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Handler(SimpleHTTPRequestHandler):
    """Files within one folder: no listings, nothing that a link leads out of it."""

    server_version = "mobilellm"
    sys_version = ""
    extensions_map = TYPES

    def guess_type(self, path: Any) -> str:
        """What a browser is told that the file is."""
        return TYPES.get(Path(path).suffix.lower(), "application/octet-stream")

    def send_head(self) -> Any:
        """The file asked for, opened; 404 for what is not within the folder, 403 for a page of
        elsewhere that reaches this machine by a name of its own."""
        host = self.headers.get("Host", "").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if is_loopback(self.connection.getsockname()[0]) and name not in LOOPBACK_NAMES:
            self.send_error(403, "not a name of this machine")
            return None
        if not self.is_within():
            self.send_error(404)
            return None
        return super().send_head()

    def is_within(self) -> bool:
        """Whether a file of the folder is asked for."""
        try:
            root = Path(self.directory).resolve()
            path = Path(self.translate_path(self.path)).resolve()
            if path.is_dir() and self.path.partition("?")[0].endswith("/"):
                path = (path / "index.html").resolve()
            return path.is_relative_to(root) and path.is_file()
        except (OSError, ValueError):  # a name that no file can have
            return False

    def end_headers(self) -> None:
        """The headers of every answer."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not printed."""


class Server(ThreadingHTTPServer):
    """A thread a request."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves in the middle of an answer is nothing to tell."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    return ipaddress.ip_address(host).is_loopback
