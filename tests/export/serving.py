"""A page's folder on the server that our commands name, and what a page asks beyond it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.export.browser import Page

from mobilellm.workflows.page_server import Handler, Server


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder; its address."""
    server = Server(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def asked_elsewhere(page: Page, address: str) -> list[str]:
    """Every address that a page asked for and that is not its own server's."""
    return [asked for asked in page.requests if not asked.startswith((address, "data:", "blob:"))]
