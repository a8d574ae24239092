"""A device profile on a terminal: a table where it fits, else a few lines for each file.

for line in profile_lines(profile, width=80):
    print(line)
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from mobilellm.printable import one_line
from mobilellm.profiling.device_profile import DeviceProfile, Figure, ProfileRow, bound
from mobilellm.report.figures import MISSING, fixed, percent
from mobilellm.terminal.output import aligned, size

MILLISECONDS = ("load_ms", "initialize_ms", "first_token_ms", "token_ms_p50", "token_ms_p90")
# Key, heading in the table, name in lines of a file of its own.
COLUMNS = (
    ("load_ms", "load", "load"),
    ("initialize_ms", "init", "initialize (first run)"),
    ("first_token_ms", "first", "first token"),
    ("prefill_tokens_per_second", "prefill", "prefill"),
    ("decode_tokens_per_second", "decode", "decode"),
    ("token_ms_p50", "p50", "a token, median"),
    ("token_ms_p90", "p90", "a token, 9 of 10 below"),
    ("peak_memory_bytes", "memory", "peak memory"),
    ("joules_per_token", "J", "energy a token"),
)
UNITS = {"load": "ms", "init": "ms", "first": "ms", "p50": "ms", "p90": "ms"} | {
    "prefill": "tok/s", "decode": "tok/s", "spread": "±", "memory": "peak", "J": "a token",
    "bound": "of it",
}  # fmt: skip


def profile_lines(profile: DeviceProfile, width: int) -> list[str]:
    """The whole profile in lines of at most `width` characters where names allow it."""
    settings, machine = profile["settings"], profile["machine"]
    head = (
        f"{machine.get('device', 'unknown device')}, {settings.get('threads')} threads, "
        f"{settings.get('prompt')} tokens of prompt, {settings.get('generate')} written, "
        f"median of {settings.get('repeats')}"
    )
    lines = [head]
    most = bound(profile)
    if most is not None:
        ways = ", ".join(
            f"{name} {fixed(way['median'] / 1e9, 1)}" for name, way in profile["bandwidth"].items()
        )
        lines.append(f"memory: {fixed(most / 1e9, 1)} GB/s measured in the same turns ({ways})")
    lines = [piece for line in lines for piece in _wrapped(line, width)]
    rows = [row for row in profile["rows"] if row["error"] is None]
    table = _table(rows)
    if table and max(map(len, table)) <= width:
        lines += ["", *table]
    else:
        for row in rows:
            lines += ["", *_block(row)]
    failed = [row for row in profile["rows"] if row["error"] is not None]
    if failed:
        lines.append("")
    for row in failed:
        lines += _wrapped(f"{row['name']} in {row['runtime']}: failed: {row['error']}", width)
    for row in rows:
        if row["operators"]:
            lines += ["", *_operators(row)]
    # Names of files and operators are text of others: a terminal shows and does not obey it.
    return [one_line(line) for line in lines]


def _table(rows: Sequence[ProfileRow]) -> list[str]:
    """A line a file under two of headings; empty without rows."""
    if not rows:
        return []
    keys = [column for column in COLUMNS if any(column[0] in row["figures"] for row in rows)]
    heads = [heading for _, heading, _ in keys]
    at = heads.index("decode") + 1 if "decode" in heads else len(heads)
    heads[at:at] = ["spread"]
    cells = [["file", "runtime", "size", *heads, "bound"]]
    cells.append(["", "", "", *(UNITS.get(head, "") for head in heads), UNITS["bound"]])
    for row in rows:
        found = [_median(row, key) for key, _, _ in keys]
        found[at:at] = [_spread(row["figures"].get("decode_tokens_per_second"))]
        share = row["bandwidth_share"]
        cells.append(
            [
                row["name"],
                row["runtime"],
                size(row["bytes"]),
                *found,
                MISSING if share is None else percent(share, 0),
            ]
        )
    return aligned(cells, left=2)


def _block(row: ProfileRow) -> list[str]:
    """A file's figures under each other, with the spread of the repeats."""
    lines = [row["name"], f"  {row['runtime']}, {size(row['bytes'])}"]
    for key, _, name in COLUMNS:
        found = row["figures"].get(key)
        if found is not None:
            low, high = (_written(key, found[end]) for end in ("lowest", "highest"))
            lines.append(f"  {name:23}{_median(row, key):>9} {_unit(key)} ({low} to {high})")
    if row["bandwidth_share"] is not None:
        share = percent(row["bandwidth_share"], 0)
        lines.append(f"  {'of the memory bound':23}{share:>9}")
    return lines


def _operators(row: ProfileRow) -> list[str]:
    """Where the time goes, a line an operator."""
    lines = [f"{row['name']} in {row['runtime']}: operators, ms a run"]
    for phase in ("prefill", "decode"):
        found = [entry for entry in row["operators"] or () if entry.get("phase") == phase]
        if found:
            lines.append(f"  {phase}")
        for entry in found:
            calls = f"{entry['calls']:g} x" if entry.get("calls") else ""
            share = percent(entry["share"], 0)
            lines.append(f"  {fixed(entry['ms'], 3):>10}  {share:>4}  {calls:>7}  {entry['name']}")
    return lines


def _median(row: ProfileRow, key: str) -> str:
    found = row["figures"].get(key)
    return MISSING if found is None else _written(key, found["median"])


def _written(key: str, value: float) -> str:
    """A value of a figure, without its unit."""
    if key == "peak_memory_bytes":
        return size(value)
    digits = 3 if key == "joules_per_token" else 2 if value < 10 else 1 if value < 1000 else 0
    return fixed(value, digits)


def _unit(key: str) -> str:
    if key in MILLISECONDS:
        return "ms"
    return {"peak_memory_bytes": "", "joules_per_token": "J"}.get(key, "tokens/s")


def _spread(found: Figure | None) -> str:
    """Half of the distance of the repeats over their median."""
    if found is None or not found["median"]:
        return MISSING
    return percent((found["highest"] - found["lowest"]) / 2 / found["median"], 0)


def _wrapped(line: str, width: int) -> list[str]:
    return textwrap.wrap(line, max(20, width), subsequent_indent="  ") or [""]
