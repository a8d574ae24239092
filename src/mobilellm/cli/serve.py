"""`mobilellm serve`: the files of a folder for a browser, on this machine alone unless asked.

    mobilellm serve runs/demo

A page that is a folder (`convert --to web` of what is too large for one file) needs it: a browser
fetches nothing from file://, and gives threads to WebAssembly only with two headers.
"""

from __future__ import annotations

import ipaddress
import signal
import sys
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import tyro

from mobilellm.errors import UserError
from mobilellm.terminal.output import say

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


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a folder to a browser on this machine, until Ctrl-C.

    Example: mobilellm serve runs/demo
    """

    folder: tyro.conf.Positional[Path]
    """A folder with an index.html (`convert --to web`), or any other, whose pages are then named in
    the address."""
    port: int = 8000
    """Where it listens; 0 takes a free one."""
    host: str = "127.0.0.1"
    """Address it listens on. The default is reached from this machine alone; 0.0.0.0 is reached
    from the network, by a phone too, without any protection."""

    def run(self) -> int:
        """Serve until Ctrl-C, or a signal to end."""
        if not self.folder.is_dir():
            file = self.folder.is_file()
            raise UserError(
                f"{self.folder}: {'a file' if file else 'no such folder'}",
                hint="a page that is one file opens without a server" if file else "",
            )
        if not 0 <= self.port <= 65_535:
            raise UserError(f"--port {self.port}: must be from 0 to 65535")
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError:
            raise UserError(
                f"--host {self.host}: not an address", hint="give 127.0.0.1, or 0.0.0.0"
            ) from None
        if address.version == 6:
            raise UserError(f"--host {self.host}: only IPv4 is served", hint="give 127.0.0.1")
        try:
            server = Server((self.host, self.port), partial(Handler, directory=str(self.folder)))
        except OSError as error:
            raise UserError(
                f"port {self.port} on {self.host}: {error.strerror}",
                hint="give another --port; 0 takes a free one",
            ) from None
        page = "" if (self.folder / "index.html").is_file() else self._first_page()
        print(f"http://{self.host}:{server.server_port}/{page}", flush=True)
        if not address.is_loopback:
            say("reached from the network: whoever gets here may read the folder")
        say("Ctrl-C ends it")
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
        finally:
            server.server_close()
        return 0

    def _first_page(self) -> str:
        """The name of the folder's only page; nothing where it has several, or none."""
        pages = [path.name for path in self.folder.glob("*.html")]
        return pages[0] if len(pages) == 1 else ""
