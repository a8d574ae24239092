"""`mobilellm serve`: what a browser gets, what it does not, and how it ends."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mobilellm.cli.serve import Serve
from mobilellm.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    (root / "secret.txt").write_text("secret")
    found = root / "page"
    (found / "sub").mkdir(parents=True)
    (found / "index.html").write_text("<p>hello")
    for name in ("a.js", "a.mjs", "a.wasm", "a.json", "a.onnx", "sub/b.css"):
        (found / name).write_bytes(name.encode())
    (found / "link.txt").symlink_to(root / "secret.txt")
    return found


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tuple[str, int]]:
    command = [sys.executable, "-m", "mobilellm", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        address = urlsplit(process.stdout.readline().strip())
        assert address.hostname == "127.0.0.1"
        assert address.port
        yield address.hostname, address.port
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=10)
        assert process.returncode == 0
        assert "Traceback" not in err


def get(server: tuple[str, int], path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(*server, timeout=10)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()


def test_files_come_with_their_types_and_the_headers_that_threads_need(
    server: tuple[str, int],
) -> None:
    for path, kind in {
        "/": "text/html; charset=utf-8",
        "/a.js": "text/javascript; charset=utf-8",
        "/a.mjs?x=1": "text/javascript; charset=utf-8",
        "/a.wasm": "application/wasm",
        "/a.json": "application/json",
        "/a.onnx": "application/octet-stream",
        "/sub/b.css": "text/css; charset=utf-8",
    }.items():
        status, headers, _ = get(server, path)
        assert (status, headers["content-type"]) == (200, kind)
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["cross-origin-embedder-policy"] == "require-corp"
        assert headers["x-content-type-options"] == "nosniff"
    assert get(server, "/")[2] == b"<p>hello"


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt", "/..%2fsecret.txt", "/%2e%2e/secret.txt", "//../secret.txt", "/link.txt",
        "/sub/", "/sub", "/nothing", "/sub/../../secret.txt", "/..%5csecret.txt", "/%00",
    ],
)  # fmt: skip
def test_nothing_outside_the_folder_and_no_listing(server: tuple[str, int], path: str) -> None:
    status, _, body = get(server, path)
    assert status == 404
    assert b"secret.txt" not in body
    assert body != b"secret"


def test_a_page_of_elsewhere_cannot_reach_it_by_a_name_of_its_own(
    server: tuple[str, int],
) -> None:
    assert get(server, "/", Host="attacker.example:80")[0] == 403
    assert get(server, "/", Host=f"localhost:{server[1]}")[0] == 200


def test_only_reading_is_answered(server: tuple[str, int]) -> None:
    connection = http.client.HTTPConnection(*server, timeout=10)
    connection.request("POST", "/", b"x")
    assert connection.getresponse().status == 501


def test_bad_settings_are_named(folder: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        Serve(folder=folder / "nowhere").run()
    with pytest.raises(UserError, match=r"index\.html: a file; a page that is one file opens"):
        Serve(folder=folder / "index.html").run()
    with pytest.raises(UserError, match="--port 70000: must be"):
        Serve(folder=folder, port=70_000).run()
    with pytest.raises(UserError, match="--host example: not an address"):
        Serve(folder=folder, host="example").run()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"port {port} on 127\.0\.0\.1: .*in use; give another"
        ):
            Serve(folder=folder, port=port).run()
