"""`mobilellm serve`: the files of a folder for a browser, on this machine alone unless asked.

    mobilellm serve runs/demo

A page that is a folder (`convert --to web` of what is too large for one file) needs it: a browser
fetches nothing from file://, and gives threads to WebAssembly only with two headers.
"""

from __future__ import annotations

import ipaddress
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from mobilellm.errors import UserError
from mobilellm.terminal.output import say


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
        from mobilellm.workflows.page_server import Handler, Server

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
