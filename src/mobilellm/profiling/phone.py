"""An Android phone by way of `adb`: files pushed, programs run, everything removed afterwards.

    with Phone.connect(serial="") as phone:
        phone.push(Path("m.gguf"), "model.gguf")
        text = phone.run(["./llama-bench", "-m", "model.gguf"])

A command for the phone's shell is put together from words, each quoted, and what is pushed gets a
name of ours, so that no file name is ever read as a command. What the phone prints is text.
"""

from __future__ import annotations

import contextlib
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilellm.errors import UserError
from mobilellm.profiling.device_profile import one_line

FOLDER = "/data/local/tmp"
"""Where the shell's user may write and run programs on every Android."""
PROPERTIES = {
    "device": "ro.product.model",
    "maker": "ro.product.manufacturer",
    "processor": "ro.soc.model",
    "android": "ro.build.version.release",
}


class PhoneError(Exception):
    """A command on the phone that failed, with its last line."""


@dataclass(frozen=True)
class Phone:
    """A phone, and the folder on it that is ours."""

    adb: str
    serial: str
    folder: str

    @classmethod
    @contextlib.contextmanager
    def connect(cls, serial: str = "") -> Iterator[Phone]:
        """The phone with that serial number, or the only one; our folder on it is removed at the
        end, however that comes. `UserError` without adb, or without such a phone."""
        adb = shutil.which("adb")
        if adb is None:
            raise UserError("adb is not on the PATH", hint="install Android's platform-tools (adb)")
        phone = cls(adb, serial, f"{FOLDER}/mobilellm-{secrets.token_hex(6)}")
        try:
            state = phone.call("get-state").strip()
        except PhoneError as error:
            raise UserError(
                f"adb: {error}", hint="connect one phone with USB debugging, or give its --serial"
            ) from None
        if state != "device":
            raise UserError(f"adb: the phone is in state {one_line(state)!r}", hint="unlock it")
        try:
            phone.shell(["mkdir", phone.folder])
            yield phone
        except PhoneError as error:
            raise UserError(f"adb: {error}") from None
        finally:
            with contextlib.suppress(PhoneError):
                phone.shell(["rm", "-rf", phone.folder])

    def call(self, *arguments: str) -> str:
        """What adb prints; `PhoneError` with its last line when it fails. No shell reads these
        arguments."""
        chosen = ["-s", self.serial] if self.serial else []
        done = subprocess.run(
            [self.adb, *chosen, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        text = done.stdout.decode(errors="replace")
        if done.returncode:
            lines = text.strip().splitlines() or [f"ended with status {done.returncode}"]
            raise PhoneError(one_line(lines[-1]))
        return text

    def shell(self, words: Sequence[str]) -> str:
        """What a command on the phone prints, each word as it stands."""
        return self.call("shell", shlex.join(words))

    def run(self, words: Sequence[str]) -> str:
        """What a program prints that lies in our folder, run there with the libraries there."""
        place = shlex.quote(self.folder)
        return self.call("shell", f"cd {place} && LD_LIBRARY_PATH={place} {shlex.join(words)}")

    def push(self, file: Path, name: str, program: bool = False) -> None:
        """Copy a file into our folder, under a name of ours."""
        target = f"{self.folder}/{name}"
        self.call("push", str(file.resolve()), target)
        if program:
            self.shell(["chmod", "755", target])

    def remove(self, name: str) -> None:
        """Remove a file or folder within ours."""
        self.shell(["rm", "-rf", f"{self.folder}/{name}"])

    def facts(self) -> dict[str, Any]:
        """What it is, as far as it tells."""
        found: dict[str, Any] = {}
        for key, name in PROPERTIES.items():
            with contextlib.suppress(PhoneError):
                if value := one_line(self.shell(["getprop", name]).strip()):
                    found[key] = value
        with contextlib.suppress(PhoneError, ValueError):
            found["processors"] = int(self.shell(["nproc"]))
        return found
