"""Files that are complete or absent: every write goes to a temporary name, is synced, then renamed.

write_file(path, b"...")                # a whole file
with new_folder(path) as staging: ...   # a whole folder; removed again when the block raises
check_file(path, size=8192, sha256=...) # what was read is what was written
with locked(path / ".lock", path, "is at work here"): ...  # one process at a time
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import orjson

from mobilellm.errors import UserError

PARTIAL = ".partial-"  # marks a name that is still being written


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush one file or folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write (no space, no permission, ...) into one
    line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else _native_code(error)
        reason = os.strerror(code) if code else ""
        if code in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(existing_parent(path)).free
            raise UserError(
                f"{path}: no space left while writing ({free / 2**20:.0f} MiB free)",
                hint="free some space and run again",
            ) from error
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"{path}: cannot write here ({reason})", hint="choose another place"
            ) from error
        if code in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY):
            raise UserError(
                f"{path}: cannot write here ({reason})", hint="choose another name"
            ) from error
        raise


def _native_code(error: Exception) -> int | None:
    """The system's error number behind an exception of a library written in Rust, which only
    spells it out."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None


def existing_parent(path: Path) -> Path:
    """`path` itself or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _partial_name(path: Path) -> Path:
    """A new name beside `path`.

    The tempfile module would make its files and folders readable by their owner alone; what is
    made under this name has the permissions that umask gives.
    """
    return path.with_name(f".{path.name}{PARTIAL}{secrets.token_hex(6)}")


def write_file(path: Path, data: bytes) -> None:
    """Write `data` under `path`: complete, or not at all."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _partial_name(path)
        try:
            with open(temporary, "xb") as file:  # with the permissions that umask gives
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline."""
    write_file(path, orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def read_json(path: Path, *, limit: int = 256 << 20) -> Any:
    """Read JSON of at most `limit` bytes; `UserError` when it is missing, no regular file, too
    large or broken."""
    try:
        return orjson.loads(read_regular(path, limit=limit))
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: broken JSON ({error})") from None


def read_regular(path: Path, *, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit`; `UserError` for what is missing, is a device,
    a pipe or a folder, or is larger."""
    try:
        # A pipe without a writer is not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"{path}: not a regular file")
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > limit:
        raise UserError(f"{path}: {path.stat().st_size} bytes, the limit is {limit}")
    return data


def check_utf8(path: object) -> None:
    """`UserError` for a path whose name is no UTF-8, which JSON cannot hold."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: its name is no UTF-8", hint="rename it") from None


MAX_NAME = 255  # bytes of one part of a path, on every file system in use


def plain_name(name: Any) -> bool:
    """Whether a name in a file of ours leads to a file inside its folder: relative, without parts
    that go up, and without characters that are part of no name of ours."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and "\\" not in name
        and all(
            part not in ("", ".", "..") and len(os.fsencode(part)) <= MAX_NAME
            for part in name.split("/")
        )
    )


def check_absent(path: Path) -> None:
    """`UserError` when there is something under the name of what is to be made."""
    if path.exists():
        raise UserError(f"{path}: exists already", hint="choose another name or remove it")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a staging folder beside `path`; when the block ends well it is synced and renamed to
    `path`.

    `UserError` when `path` exists already. When the block raises, the staging folder is removed.
    """
    check_absent(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = _partial_name(path)
        staging.mkdir()
        try:
            yield staging
            publish(staging, path)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def publish(staging: Path, path: Path) -> None:
    """Sync every file of a staging folder and give it its name."""
    for folder, _, names in os.walk(staging):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))
    os.rename(staging, path)
    sync(path.parent)


def sweep_partial(folder: Path, name: str = "") -> list[Path]:
    """Remove what killed writers left in `folder` (of the target `name`, or of any), and say
    what it was."""
    left = list(folder.glob(f".{name or '*'}{PARTIAL}*")) if folder.is_dir() else []
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return left


def check_file(path: Path, *, size: int, sha256: str) -> None:
    """`UserError` unless the file has this size (bytes) and SHA-256."""
    hint = "the file was damaged after it was written: restore it, or make it again"
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: missing", hint=hint) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", hint=hint) from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: not a regular file", hint=hint)
    found = status.st_size
    if found != size:
        raise UserError(f"{path}: {found} bytes where {size} were written", hint=hint)
    if sha256_file(path) != sha256:
        raise UserError(f"{path}: its checksum differs from the one recorded", hint=hint)


@contextlib.contextmanager
def locked(lock: Path, where: Path, doing: str = "", *, hint: str = "") -> Iterator[None]:
    """Hold the file `lock` for this process alone while the block runs; it is made when it is
    absent.

    With `doing` ("is training here") a lock that another process holds is a `UserError`, which
    says that about `where` and names the process. Without it this process waits until the other
    one is done. The file stays afterwards, since removing it would let two processes hold two
    files of one name; when a folder goes and takes its lock along, whoever waited for it tries
    again with a new file.

        with locked(run / ".lock", run, "is training here", hint="wait for it, or stop it"):
            ...
    """
    while True:
        with disk_errors(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = open(lock, "a+")  # noqa: SIM115  (held until the block ends)
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if doing else 0))
            except BlockingIOError:
                raise _held(file, where, doing, hint) from None
            except OSError as error:
                raise UserError(
                    f"{lock}: this file system cannot lock files ({error.strerror})",
                    hint="choose a folder on another one",
                ) from None
            if not _is_open_under(lock, file):  # its folder was removed between the lines above
                if doing:
                    raise _held(file, where, doing, hint)
                continue
            file.truncate(0)
            file.write(f"process {os.getpid()}\n")
            file.flush()
            yield
            return


def _held(file: IO[str], where: Path, doing: str, hint: str) -> UserError:
    file.seek(0)
    holder = file.read(100).strip()
    return UserError(
        f"{where}: another process{f' ({holder})' if holder else ''} {doing}", hint=hint
    )


def _is_open_under(path: Path, file: IO[str]) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def cache_folder() -> Path:
    """Where this user keeps what can be made again: `mobilellm` in $XDG_CACHE_HOME, else in
    ~/.cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "mobilellm"
