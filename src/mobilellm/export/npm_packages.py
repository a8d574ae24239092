"""The files of pinned npm packages: from the wheel, else the user's cache, else fetched once.

    files = package_files("@wllama/wllama", "LICENCE", "esm/index.min.js")
    files["LICENCE"]            # bytes

An archive is read as it is, its checksum first; nothing is unpacked onto the disk.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from mobilellm.errors import UserError
from mobilellm.export.npm_client import NpmError, Pin, fetch, file_name, is_intact, read_pins
from mobilellm.files import cache_folder, disk_errors

IN_WHEEL = Path(__file__).with_name("engines")  # where the build of a wheel puts archives
MAX_MEMBER_BYTES = 64 << 20  # the largest file that is used has 27 MB


def package_files(name: str, *members: str) -> dict[str, bytes]:
    """These files of a package, by their paths in it.

    `UserError` when the package cannot be had, or has not got such a file.
    """
    pin = read_pins()[name]
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(_archive(name, pin)), mode="r:gz") as archive:
        for entry in archive:
            member = entry.name.partition("/")[2]
            if member not in members or not entry.isfile():
                continue
            if entry.size > MAX_MEMBER_BYTES:
                raise UserError(f"{name}: its {member} has {entry.size} bytes")
            stream = archive.extractfile(entry)
            assert stream is not None
            found[member] = stream.read()
            if len(found) == len(members):
                break
    missing = [member for member in members if member not in found]
    if missing:
        raise UserError(f"{name} {pin.version}: has no {missing[0]}")
    return found


def _archive(name: str, pin: Pin) -> bytes:
    """The archive's bytes, which are those that were pinned."""
    cache = cache_folder() / "npm"
    for folder in (IN_WHEEL, cache):
        path = folder / file_name(name, pin)
        if path.is_file() and path.stat().st_size == pin.bytes:
            data = path.read_bytes()
            if is_intact(data, pin):
                return data
    try:
        with disk_errors(cache):
            return fetch(name, pin, cache).read_bytes()
    except NpmError as error:
        raise UserError(str(error), hint=error.hint) from None
