"""`mobilellm profile`: how fast files run here, all runtimes in turns."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mobilellm.errors import UserError
from mobilellm.terminal.output import print_json, progress, put, say

if TYPE_CHECKING:
    from mobilellm.profiling.device_profile import DeviceProfile


PHONE_THREADS = 4
"""The fast processors that most phones have."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Load, first token, tokens a second, memory and share of the memory bound of model files.

    Each file runs in every installed runtime that is for it, each repeat in a process of its own,
    all in turns. With --out the figures are kept as a device profile, with a page.

    Example: mobilellm profile demo.gguf runs/demo --out profile
    """

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Runs, checkpoints, GGUF files, ONNX files or folders, and ExecuTorch .pte files."""
    prompt: int = 512
    """Tokens of the prompt."""
    generate: int = 128
    """Tokens written after it, one after the other."""
    repeats: int = 5
    """How often each is measured; medians are printed."""
    threads: int = 0
    """Threads of every runtime; 0 is all processors that this process may use, and 4 on a phone."""
    runtime: tuple[str, ...] = ()
    """Runtimes to use, where several are for a file; all but our own network, which runs what no
    other does, when left out."""
    operators: bool = False
    """Measure once more where the time goes, by operator, where the runtime tells."""
    adb: bool = False
    """Measure on an Android phone by adb, with the programs of --runners (llama-bench, llama_main,
    onnxruntime_perf_test). Tried against a stand-in for adb alone, not on a phone."""
    serial: str = ""
    """Serial number of the phone, where several are connected."""
    runners: Path | None = None
    """A folder with these programs, built for the phone, and their shared libraries."""
    out: Path | None = None
    """A folder for profile.json and profile.html."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Measure and print: 0, 1 when a file failed while others ran, 130 after Ctrl-C."""
        if not self.files:
            raise UserError(
                "no file given", hint="give a run, a GGUF file, an ONNX folder or a .pte file"
            )
        found = self.on_phone() if self.adb else self.here()
        self.show(found)
        if found["interrupted"]:
            say("mobilellm: interrupted: the repeats that were finished are shown")
            return 130
        return 1 if any(row["error"] is not None for row in found["rows"]) else 0

    def here(self) -> DeviceProfile:
        """The figures of this machine."""
        from mobilellm.profiling.profile import profile

        if self.serial or self.runners:
            raise UserError("--serial and --runners are for a phone", hint="give --adb, too")
        with progress("measuring") as update:
            return profile(
                self.files,
                prompt=self.prompt,
                generate=self.generate,
                repeats=self.repeats,
                threads=self.threads or None,
                runtimes=self.runtime,
                operators=self.operators,
                say=say,
                progress=update,
            )

    def on_phone(self) -> DeviceProfile:
        """The figures of a phone."""
        from mobilellm.profiling.phone_profile import profile_phone

        if self.runners is None:
            raise UserError(
                "--adb: no programs for the phone",
                hint="give --runners FOLDER with llama-bench, llama_main or onnxruntime_perf_test",
            )
        if self.runtime or self.operators:
            raise UserError("--runtime and --operators are not for a phone", hint="leave them out")
        return profile_phone(
            self.files,
            runners=self.runners,
            serial=self.serial,
            prompt=self.prompt,
            generate=self.generate,
            repeats=self.repeats,
            threads=self.threads or PHONE_THREADS,
            say=say,
        )

    def show(self, found: DeviceProfile) -> None:
        """Write the files that were asked for, and print."""
        from mobilellm.profiling.device_profile import write_profile
        from mobilellm.report.profile_page import write_profile_page
        from mobilellm.terminal.profile_table import profile_lines

        if self.out is not None:
            write_profile(self.out / "profile.json", found)
            write_profile_page(self.out / "profile.html", found)
        if self.json:
            print_json(found)
            return
        put("\n".join(profile_lines(found, shutil.get_terminal_size().columns)))
        if self.out is not None:
            put(f"\n{self.out / 'profile.json'}\n{self.out / 'profile.html'}")
