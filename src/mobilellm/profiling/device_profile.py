"""A device profile: how fast files run on one machine, as JSON that others read.

    profile = read_profile(Path("profile/profile.json"))
    profile["rows"][0]["figures"]["decode_tokens_per_second"]["median"]

`profile` writes it; `read_profile` reads it. It says of which machine, with which threads and
versions, from which files (sha256) and when the figures are.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

from mobilellm.errors import MAX_LINE, UserError
from mobilellm.files import read_json, write_json
from mobilellm.printable import one_line as printable_line
from mobilellm.schema import AtLeast, checked

FORMAT, FORMAT_VERSION = "mobilellm device profile", 1
MAX_BYTES = 64 << 20
"""Of a profile that is read."""
FIGURES = {
    "load_ms": "ms from the file to a model that can run",
    "initialize_ms": "ms of the first run, of one token",
    "first_token_ms": "ms from the prompt to the first token",
    "prefill_tokens_per_second": "tokens of the prompt a second",
    "decode_tokens_per_second": "tokens written a second, one after the other",
    "token_ms_p50": "ms a token, median",
    "token_ms_p90": "ms a token, 9 of 10 are faster",
    "peak_memory_bytes": "most memory above what the process held before it opened the file",
    "joules_per_token": "energy of the processor's packages a token written",
}
"""What is measured of each file, and what it is."""


class Figure(TypedDict):
    """One measured quantity over the repeats."""

    median: Annotated[float, AtLeast(0)]
    lowest: Annotated[float, AtLeast(0)]
    highest: Annotated[float, AtLeast(0)]
    values: list[float]


class ProfileRow(TypedDict):
    """One file in one runtime."""

    name: str
    """As tables print it."""
    file: str
    """The path that was given."""
    runtime: str
    runtime_version: str | None
    bytes: Annotated[int, AtLeast(0)]
    """Of the file, or of the one that is run of a folder."""
    sha256: str
    model: dict[str, Any] | None
    """Shape of the network (profile_bytes.model_facts), where the file tells it."""
    figures: dict[str, Figure]
    """By the keys of FIGURES; empty for a row that failed."""
    bytes_per_token: Annotated[int | None, AtLeast(0)]
    """Weights and cache that a token reads, each once."""
    bandwidth_share: float | None
    """Of the bound that memory sets: bytes_per_token x decode_tokens_per_second / bandwidth."""
    operators: list[dict[str, Any]] | None
    """Where the time goes, where it was asked for and the runtime tells."""
    error: str | None
    """Why there are no figures."""


class DeviceProfile(TypedDict):
    """A whole profile, as it lies on disk."""

    format: str
    format_version: int
    made_by: str
    date: str
    """UTC, ISO 8601."""
    machine: dict[str, Any]
    settings: dict[str, Any]
    """prompt, generate, repeats, threads."""
    bandwidth: dict[str, Figure]
    """Bytes a second: "read" and "copy"; empty where it was not measured (a phone)."""
    interrupted: bool
    """Whether it was stopped before all repeats were done."""
    rows: list[ProfileRow]


def one_line(text: str) -> str:
    """Text of a process or device as one short line that a terminal shows and does not obey."""
    return printable_line(text.strip(), MAX_LINE)


def figure(values: Sequence[float]) -> Figure:
    """Median and spread of the repeats."""
    return {
        "median": statistics.median(values),
        "lowest": min(values),
        "highest": max(values),
        "values": list(values),
    }


def bound(profile: DeviceProfile) -> float | None:
    """Bytes a second that memory gives at most: the faster of the two ways, by its median."""
    return max((way["median"] for way in profile["bandwidth"].values()), default=None)


def write_profile(path: Path, profile: DeviceProfile) -> None:
    """Write a profile."""
    write_json(path, profile)


def read_profile(path: Path) -> DeviceProfile:
    """Read and check a profile. `UserError`, one line, for one that is damaged, is something else,
    or was written in another version of the format."""
    found = read_json(path, limit=MAX_BYTES)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path}: not a device profile", hint="make one with `mobilellm profile`")
    version = found.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: a device profile of format {str(version)[:20]}, {FORMAT_VERSION} is read",
            hint="measure again with this version of mobilellm",
        )
    return checked(found, DeviceProfile, str(path), hint="it is damaged: measure again")
