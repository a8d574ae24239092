"""Where bytes lie: a file of this machine, or an address that fsspec reaches.

    place = place_of("https://example.org/wiki.jsonl.gz")       # an Address; a Path for a file
    with open_bytes(place) as file:
        file.read(1 << 20)

A connection that breaks is made again and goes on from the byte where it broke. fsspec, and what
it needs for each kind of address, are asked for only where an address is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from mobilellm.errors import MissingPackageError, UserError, first_line

ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
HINT = "pip install 'mobilellm[data]'"
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
}
"""What an address of a kind needs beside the extra `data`."""
ATTEMPTS = 6  # to read on where a connection broke
WAIT = 0.25  # seconds before the second attempt; each further one waits twice as long
BUFFER = 1 << 20  # bytes asked for at a time
CONNECT, SILENCE = 20, 60  # seconds that a server may take to answer, and to send something
TELLING = (
    "ETag", "etag", "LastModified", "last_modified", "mtime", "updated", "created", "generation",
    "md5Hash", "blob_id", "version_id", "VersionId",
)  # fmt: skip
"""What a store may say of a file that changes when its content does."""


@dataclass(frozen=True, order=True)
class Address:
    """A file or folder that fsspec reaches, by its whole address."""

    url: str

    @property
    def scheme(self) -> str:
        """ "s3" for "s3://bucket/wiki.jsonl"."""
        return self.url.split("://", 1)[0].lower()

    @property
    def name(self) -> str:
        """The last part, without what an HTTP address asks behind a "?"."""
        path = self.url.split("://", 1)[1]
        if self.scheme in ("http", "https"):
            path = re.split(r"[?#]", path)[0]
        return PurePosixPath(path).name

    @property
    def suffix(self) -> str:
        """As of a Path."""
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        """As of a Path."""
        return PurePosixPath(self.name).stem

    def __str__(self) -> str:
        return self.url


Place = Path | Address


@dataclass(frozen=True)
class Status:
    """What tells whether a file is still the same."""

    size: int
    """Bytes; 0 where a server does not say."""
    modified: int
    """Nanoseconds of a file's last change; of an address 60 bits of what its store says of it."""


def place_of(text: str | Path) -> Place:
    """The place that an argument names. "file:///data" is a Path."""
    if isinstance(text, Path):
        return text
    found = ADDRESS.match(text)
    if found is None:
        return Path(text)
    if found[1].lower() == "file":
        return Path(text[found.end() :])
    return Address(text)


def open_bytes(place: Place) -> IO[bytes]:
    """Open for reading from the start. `OSError` for a file, `UserError` for an address, that
    cannot be read."""
    if isinstance(place, Path):
        return open(place, "rb")
    return cast(IO[bytes], io.BufferedReader(_Resuming(place), BUFFER))


def status_of(place: Place) -> Status:
    """Size and time of change. `OSError` for a file, `UserError` for an address, without any."""
    if isinstance(place, Path):
        found = place.stat()
        return Status(found.st_size, found.st_mtime_ns)
    return _status(_information(place))


def is_file(place: Place) -> bool:
    """Whether there is such a file."""
    if isinstance(place, Path):
        return place.is_file()
    return _information(place, missing=True).get("type") == "file"


def is_folder(place: Place) -> bool:
    """Whether there is such a folder."""
    if isinstance(place, Path):
        return place.is_dir()
    if place.scheme in ("http", "https") and not place.url.endswith("/"):
        return False
    return _information(place, missing=True).get("type") == "directory"


def files_under(folder: Address) -> list[tuple[str, Address]]:
    """(path within the folder, address) of every file under a folder, sorted."""
    system, path = _reached(folder)
    base = str(path).rstrip("/") + "/"
    found = _asked(folder, lambda: system.find(path))
    return sorted((str(one).removeprefix(base), _full(system, one)) for one in found)


def matching(pattern: Address) -> list[Address]:
    """The files that fit a pattern, sorted."""
    system, path = _reached(pattern)
    found = _asked(pattern, lambda: system.glob(path, detail=True))
    return sorted(_full(system, name) for name, about in found.items() if about["type"] == "file")


def sha256_of(place: Place) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open_bytes(place) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _full(system: Any, path: Any) -> Address:
    return Address(str(system.unstrip_protocol(path)))


def _reached(address: Address) -> tuple[Any, Any]:
    """(fsspec's file system, path in it) of an address."""
    try:
        import fsspec
    except ImportError:
        raise MissingPackageError(f"{address}: needs the package fsspec", hint=HINT) from None
    options: dict[str, Any] = {"use_listings_cache": False}
    try:
        if address.scheme in ("http", "https"):
            import aiohttp

            wait = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=SILENCE)
            options["client_kwargs"] = {"timeout": wait}
        return cast(tuple[Any, Any], fsspec.core.url_to_fs(address.url, **options))
    except ImportError as error:
        package = PACKAGES.get(address.scheme)
        raise MissingPackageError(
            f"{address}: addresses of {address.scheme}:// need a package that is not installed "
            f"({first_line(error)})",
            hint=f"pip install {package}" if package else HINT,
        ) from None
    except ValueError as error:
        raise UserError(f"{address}: no address that is known ({first_line(error)})") from None
    except Exception as error:  # of whatever the file system needs: names, accounts, networks
        raise _unreached(address, error) from None


def _asked(address: Address, question: Any) -> Any:
    """The answer of a store, asked again where the connection breaks."""
    for attempt in range(ATTEMPTS):
        try:
            return question()
        except Exception as raised:
            error = _cause(raised)
            if _is_final(error) or attempt + 1 == ATTEMPTS or (attempt and not _broke(error)):
                raise _unreached(address, error) from None
            time.sleep(WAIT * 2**attempt)
    raise AssertionError("unreachable")


def _information(address: Address, missing: bool = False) -> dict[str, Any]:
    """What the store says of a file. With `missing`, nothing for one that is not there."""
    system, path = _reached(address)

    def ask() -> dict[str, Any]:
        try:
            return dict(system.info(path))
        except FileNotFoundError as error:
            if not missing or not isinstance(_cause(error), FileNotFoundError):
                raise
            return {}

    return cast(dict[str, Any], _asked(address, ask))


def _status(about: dict[str, Any]) -> Status:
    told = repr([(key, str(about[key])) for key in TELLING if about.get(key)])
    size = about.get("size")
    stamp = hashlib.sha256(f"{size} {told}".encode()).digest()
    return Status(int(size or 0), int.from_bytes(stamp[:8], "big") >> 4)


def _cause(error: Exception) -> Exception:
    """What happened: fsspec calls every file that it cannot ask about one that is not there."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    return error if getattr(cause, "status", None) in (404, 410) else cause


def _broke(error: Exception) -> bool:
    """Whether a connection that stood is gone; not, that none comes about."""
    return "Connect" not in type(error).__name__ or "ConnectionReset" in type(error).__name__


def _is_final(error: Exception) -> bool:
    """Whether another attempt would end the same way."""
    answered = getattr(error, "status", None)
    return isinstance(
        error, (FileNotFoundError, PermissionError, NotImplementedError, ImportError, UserError)
    ) or (isinstance(answered, int) and 400 <= answered < 500 and answered not in (408, 429))


def _unreached(address: Address, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    if isinstance(error, FileNotFoundError):
        return UserError(f"{address}: no such file or folder")
    why = first_line(error)
    return UserError(
        f"{address}: cannot be reached ({type(error).__name__}"
        + (f": {why})" if why != type(error).__name__ else ")"),
        hint="is the address right, is there a network, and may you read it?",
    )


class _Resuming(io.RawIOBase):
    """A file at an address, which is opened again at the same byte where its connection broke."""

    def __init__(self, address: Address) -> None:
        super().__init__()
        self.address = address
        self.system, self.path = _reached(address)
        self.about = _information(address)
        self.status = _status(self.about)
        self.size = self.about.get("size")
        self.position = 0
        self.file: Any = None
        self.read_to = 0
        """Where `file` stands."""

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Whether parts can be asked for; a stream of unknown size goes forward alone."""
        return self.size is not None

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte; nothing is read for it."""
        if self.size is None:
            raise UserError(f"{self.address}: its server gives no size and no parts of the file")
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: int(self.size)}[whence]
        self.position = max(0, start + offset)
        return self.position

    def tell(self) -> int:
        """Where the next byte is read."""
        return self.position

    def readinto(self, buffer: Any) -> int:
        """Read up to as many bytes as the buffer has. `UserError` once it cannot go on."""
        if self.size is not None and self.position >= self.size:
            return 0
        for attempt in range(ATTEMPTS):
            try:
                self._open()
                data: bytes = self.file.read(len(buffer))
                if not data and self.size is not None:
                    raise ConnectionResetError(
                        f"it ended after {self.position} of {self.size} bytes"
                    )
                break
            except Exception as raised:
                self._drop()
                error = _cause(raised)
                if _is_final(error) or attempt + 1 == ATTEMPTS:
                    raise _unreached(self.address, error) from None
                time.sleep(WAIT * 2**attempt)
        buffer[: len(data)] = data
        self.position += len(data)
        self.read_to = self.position
        return len(data)

    def _open(self) -> None:
        """Stand at `position`. `UserError` when the file is another one by now."""
        if self.file is None:
            if self.position and status_of(self.address) != self.status:
                raise UserError(f"{self.address}: changed while it was read", hint="run again")
            self.file, self.read_to = self.system.open(self.path, "rb"), 0
        if self.read_to == self.position:
            return
        try:
            self.file.seek(self.position)
        except (ValueError, OSError, NotImplementedError):  # it gives no parts: read up to there
            if self.read_to > self.position:
                self._drop()
                self.file, self.read_to = self.system.open(self.path, "rb"), 0
            while self.read_to < self.position:
                passed = len(self.file.read(min(BUFFER, self.position - self.read_to)))
                if not passed:
                    raise ConnectionResetError("it ended before where it broke") from None
                self.read_to += passed
        self.read_to = self.position

    def _drop(self) -> None:
        if self.file is not None:
            with contextlib.suppress(Exception):  # it is broken already
                self.file.close()
        self.file = None

    def close(self) -> None:
        """Close the connection."""
        self._drop()
        super().close()
