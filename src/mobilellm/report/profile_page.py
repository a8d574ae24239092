"""The page of a device profile: bars for what users wait for, and all figures with their spread.

write_profile_page(Path("profile.html"), profile)      # of mobilellm.profiling.device_profile
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mobilellm.report.chart import EMPTY, bar_chart
from mobilellm.report.figures import MISSING, fixed, grouped, is_finite, percent, ratio
from mobilellm.report.frame import write_page
from mobilellm.report.run_files import mapping

# Key of a figure, title of its bars, unit, what it is divided by, format.
BARS = (
    ("decode_tokens_per_second", "Tokens written a second", 1, ",.1f"),
    ("prefill_tokens_per_second", "Tokens of the prompt a second", 1, ",.0f"),
    ("first_token_ms", "Milliseconds to the first token", 1, ",.1f"),
    ("load_ms", "Milliseconds to load", 1, ",.1f"),
    ("peak_memory_bytes", "Most memory, MiB", 1 << 20, ",.0f"),
    ("joules_per_token", "Joules a token written", 1, ",.3f"),
)
COLUMNS = (
    ("load_ms", "load, ms", 1, 1),
    ("initialize_ms", "initialize, ms", 1, 1),
    ("first_token_ms", "first token, ms", 1, 1),
    ("prefill_tokens_per_second", "prefill, tokens/s", 1, 0),
    ("decode_tokens_per_second", "decode, tokens/s", 1, 1),
    ("token_ms_p50", "a token, ms, median", 1, 2),
    ("token_ms_p90", "a token, ms, 9 of 10 below", 1, 2),
    ("peak_memory_bytes", "memory, MiB", 1 << 20, 0),
    ("joules_per_token", "energy a token, J", 1, 3),
)


def write_profile_page(path: Path, profile: Mapping[str, Any]) -> None:
    """Write the page. All names are text of others, which the template escapes."""
    rows = [mapping(row) for row in profile["rows"]]
    measured = [row for row in rows if row.get("error") is None]
    settings, machine = mapping(profile["settings"]), mapping(profile["machine"])
    write_page(
        path,
        "profile.html.j2",
        kind="mobilellm profile",
        title=machine.get("device", "a device"),
        profile=profile,
        settings=settings,
        bars=[bars(measured, *bar) for bar in BARS],
        head=["file", "runtime", "size, MB", *(name for _, name, _, _ in COLUMNS), "of the bound"],
        table=[cells(row) for row in measured],
        failed=[
            [row.get("name"), row.get("runtime"), row["error"]]
            for row in rows
            if row.get("error") is not None
        ],
        operators=[row for row in measured if row.get("operators")],
        facts=facts(profile, machine, settings),
    )


def median(row: Mapping[str, Any], key: str) -> Any:
    """The median of a figure, or None."""
    return mapping(mapping(row.get("figures")).get(key)).get("median")


def bars(rows: list[Mapping[str, Any]], key: str, title: str, unit: float, form: str) -> Markup:
    """Bars of one figure; empty where no file has it."""
    found = [
        (f"{row.get('name')} in {row.get('runtime')}", ratio(median(row, key), unit), True)
        for row in rows
        if is_finite(median(row, key))
    ]
    return bar_chart(found, title, form) if found else EMPTY


def cells(row: Mapping[str, Any]) -> list[str]:
    """A line of the table: medians, with lowest and highest where they differ."""
    found = [str(row.get("name")), str(row.get("runtime")), fixed(ratio(row.get("bytes"), 1e6), 1)]
    for key, _, unit, digits in COLUMNS:
        figure = mapping(mapping(row.get("figures")).get(key))
        values = [ratio(figure.get(end), unit) for end in ("median", "lowest", "highest")]
        if not figure:
            found.append(MISSING)
            continue
        middle, low, high = (fixed(value, digits) for value in values)
        found.append(middle if low == high else f"{middle} ({low} to {high})")
    share = row.get("bandwidth_share")
    return [*found, MISSING if share is None else percent(share, 0)]


def facts(
    profile: Mapping[str, Any], machine: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[tuple[str, object]]:
    """The machine, and how it was measured."""
    found: list[tuple[str, object]] = [
        ("prompt", f"{settings.get('prompt')} tokens"),
        ("written", f"{settings.get('generate')} tokens, the likeliest each time"),
        ("repeats", f"{settings.get('repeats')}, all files in turns, each in a process of its own"),
        ("threads", settings.get("threads")),
        ("measured", profile.get("date")),
        ("by", profile.get("made_by")),
    ]
    for name, way in mapping(profile.get("bandwidth")).items():
        rate = ratio(mapping(way).get("median"), 1e9)
        found.append((f"memory, {name}", f"{fixed(rate, 1)} GB/s"))
    for key, value in machine.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {grouped(number)}" for name, number in value.items())
        found.append((key.replace("_", " "), value))
    return found
