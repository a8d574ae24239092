"""Addresses: a server on loopback that gives parts, gives none, breaks off, or is not there."""

import gzip
import hashlib
import http.server
import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mobilellm import cli
from mobilellm.data.token_folder import TokenFolder
from mobilellm.errors import MissingPackageError, UserError
from mobilellm.prepare.prepare import prepare
from mobilellm.prepare.sources import Source, parse_sources
from mobilellm.readers.reader import ReadSettings, Span
from mobilellm.readers.table import records
from mobilellm.streams import places
from mobilellm.streams.places import Address, open_bytes, place_of, sha256_of, status_of

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")
TEXTS = [f"Document {i} about ships and the sea, number {i * i}." for i in range(300)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


class Server(http.server.ThreadingHTTPServer):
    """What it is asked to do wrong, and what it was asked."""

    daemon_threads = True
    files: dict[str, bytes]
    ranges = True
    """Whether parts are given."""
    breaks: int
    """How many answers still break off in their middle."""
    asked: list[str]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are no news."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        content = self.server.files.get(self.path.split("?")[0])
        if content is None:
            self.send_error(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        tag = hashlib.sha256(content).hexdigest()
        part, status = content, 200
        if asked and self.server.ranges:
            first = int(asked[1])
            last = min(int(asked[2] or len(content) - 1), len(content) - 1)
            part, status = content[first : last + 1], 206
        self.send_response(status)
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", tag)
        self.end_headers()
        if not body:
            return
        self.server.asked.append(self.headers.get("Range") or "")
        if self.server.breaks > 0 and len(part) > 1000:
            self.server.breaks -= 1
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.wfile.write(part)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(places, "WAIT", 0.01)
    with Server(("127.0.0.1", 0), Handler) as made:
        made.files, made.breaks, made.asked = {}, 0, []
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        made.shutdown()


def address(server: Server, name: str) -> Address:
    found = place_of(f"http://127.0.0.1:{server.server_address[1]}/{name}")
    assert isinstance(found, Address)
    return found


def test_an_argument_is_a_path_or_an_address() -> None:
    assert place_of("a/b.txt") == Path("a/b.txt")
    assert place_of("C:/x") == Path("C:/x")
    assert place_of("file:///a/b.txt") == Path("/a/b.txt")
    found = place_of("https://example.org/a/wiki.jsonl.gz?download=true")
    assert isinstance(found, Address)
    assert (found.name, found.suffix, found.stem) == ("wiki.jsonl.gz", ".gz", "wiki.jsonl")
    assert str(place_of("s3://bucket/a?.txt")) == "s3://bucket/a?.txt"


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("breaks", [0, 3])
def test_a_broken_connection_goes_on_where_it_broke(
    server: Server, ranges: bool, breaks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(256)) * 20_000
    server.files["/a.bin"] = content
    server.ranges, server.breaks = ranges, breaks
    place = address(server, "a.bin")
    assert status_of(place).size == len(content)
    assert sha256_of(place) == hashlib.sha256(content).hexdigest()
    assert server.breaks == 0
    if ranges:
        assert any(asked.startswith("bytes=") and asked != "bytes=0-" for asked in server.asked)
        with open_bytes(place) as file:
            file.seek(-1000, 2)
            assert file.read() == content[-1000:]
            file.seek(12_345)
            assert file.read(10) == content[12_345:12_355]


def test_a_file_that_changes_while_the_connection_is_broken(server: Server) -> None:
    server.files["/a.bin"] = b"a" * 5_000_000
    with open_bytes(address(server, "a.bin")) as file:
        file.read(10)
        file.raw._drop()  # type: ignore[attr-defined]
        server.files["/a.bin"] = b"b" * 5_000_000
        with pytest.raises(UserError, match=r"a\.bin: changed while it was read"):
            file.read(3_000_000)


def test_a_connection_that_breaks_again_and_again_is_given_up(server: Server) -> None:
    server.files["/a.txt"] = b"word " * 100_000
    server.breaks = 1000
    with pytest.raises(UserError, match=r"a\.txt: cannot be reached \(") as caught:
        sha256_of(address(server, "a.txt"))
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_one_line(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = server.server_address[1]
    for given, words in (
        (f"http://127.0.0.1:{port}/none.jsonl", "no such file or folder"),
        ("http://127.0.0.1:9/a.jsonl", "cannot be reached (ClientConnectorError"),
        ("nothing://bucket/a.jsonl", "no address that is known"),
        ("s3://bucket/a.jsonl", "pip install s3fs"),
        ("gs://bucket/a.jsonl", "pip install gcsfs"),
        ("memory://nowhere/a.jsonl", "no such file or folder"),
    ):
        if "s3fs" in words or "gcsfs" in words:
            try:
                __import__(words.split()[-1])
                continue
            except ImportError:
                pass
        with pytest.raises(SystemExit) as caught:
            cli.main(["prepare", given, "--out", str(tmp_path / "d"), "--vocab-size", "300"])
        assert caught.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith(f"mobilellm: {given}: "), err
        assert words in err
        assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_fsspec_it_is_a_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingPackageError, match=r"needs the package fsspec.*mobilellm\[data\]"):
        status_of(Address("https://example.org/a.txt"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_prepared_from_an_address_and_from_a_file_it_is_the_same(
    server: Server, tmp_path: Path, name: str
) -> None:
    """Through connections that break, for each kind of file."""
    if name.endswith(".parquet"):
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(
            pa.table({"text": TEXTS}), tmp_path / name, row_group_size=100
        )
    else:
        (tmp_path / name).write_bytes(gzip.compress(LINES) if name.endswith(".gz") else LINES)
    server.files[f"/{name}"] = (tmp_path / name).read_bytes()
    server.breaks = 4
    url = f"a={address(server, name)}"
    made = [
        prepare(parse_sources([given]), tmp_path / out, vocab_size=300, held_out=0.1)
        for given, out in ((url, "remote"), (f"a={tmp_path / name}", "local"))
    ]
    assert made[0] == made[1]
    assert made[0]["sources"][0]["files"][0]["path"] == name
    for path in (tmp_path / "local").rglob("*.npy"):
        other = tmp_path / "remote" / path.relative_to(tmp_path / "local")
        assert path.read_bytes() == other.read_bytes()
    assert TokenFolder.open(tmp_path / "remote").fingerprint == made[1]["fingerprint"]


def test_folders_and_patterns_of_a_store(tmp_path: Path) -> None:
    """In fsspec's memory, which lists its files as s3 does."""
    import fsspec

    store = fsspec.filesystem("memory")
    for name, content in (
        ("a.jsonl", LINES), ("deep/b.json.gz", gzip.compress(LINES)), ("README.md", b"card"),
        (".cache/x.txt", b"hidden"), ("c.png", b"x"),
    ):  # fmt: skip
        store.pipe(f"/datain/{name}", content)
    try:
        said: list[str] = []
        manifest = prepare(
            [Source("s", [Address("memory://datain/")])],
            tmp_path / "d",
            vocab_size=300,
            held_out=0.1,
            say=said.append,
        )
        (source,) = manifest["sources"]
        assert [file["path"] for file in source["files"]] == ["a.jsonl", "b.json.gz"]
        assert source["documents"] == 2 * len(TEXTS)
        assert manifest["files_left_out"]["why"] == {
            "about the data, not text": 1,
            "hidden": 1,
            "of a kind that is not read": 1,
        }
        (found,) = parse_sources(["memory://datain/**/*.json.gz"])
        assert [str(path) for path in found.paths] == ["memory:///datain/deep/b.json.gz"]
        assert len(list(records(found.paths[0], Span(), ReadSettings()))) == len(TEXTS)
        with pytest.raises(UserError, match="no file fits this pattern"):
            parse_sources(["memory://datain/*.none"])
    finally:
        store.rm("/datain", recursive=True)


def test_a_text_is_scored_from_an_address(server: Server) -> None:
    from mobilellm.evaluate.held_out import read_text

    server.files["/a.txt.gz"] = gzip.compress(b"\xef\xbb\xbfwords to score")
    assert read_text(address(server, "a.txt.gz")) == "words to score"
