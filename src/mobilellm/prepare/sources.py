"""Named sources from the command line or a TOML file.

parse_sources(["book.txt", "wiki=data/wiki"], named=["code:0.3=src/**/*.md"],
listed=Path("sources.toml"))

[[source]]              # sources.toml; paths are relative to it name = "wiki" paths =
["wiki/*.jsonl.gz"] weight = 0.7
"""

from __future__ import annotations

import glob
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilellm.errors import UserError, unknown_name
from mobilellm.files import check_utf8
from mobilellm.readers.table import known_files, reader_of
from mobilellm.streams.places import (
    Address,
    Place,
    files_under,
    is_file,
    is_folder,
    matching,
    place_of,
)

NAME = re.compile(r"[\w-]+")
ABOUT_DATA = re.compile(
    r"(readme|licen[cs]e|copying|notice)([._-].*)?|(dataset_infos?|dataset_dict)\.json", re.I
)
"""Names of files that lie beside data and say something of it: no text, unless they are named."""
MAX_NAMED = 100  # files left out whose names are kept
SHOWN = 3  # of a kind, that a line names


@dataclass(frozen=True)
class Source:
    """A named set of files."""

    name: str
    """Letters, digits, "-" and "_"; no two sources share one."""
    paths: Sequence[Place]
    """Files, and folders that are walked for the known kinds."""
    weight: float | None = None
    """Share of the tokens when training, on any scale; none for as many as there are."""
    given: bool = False
    """Whether the name was chosen; then it holds also for samples that name another source."""

    def files(self) -> list[Place]:
        """Every file, sorted within each folder. `UserError` when there is none."""
        found: list[Place] = []
        for path in self.paths:
            if _is_folder(path):
                inside = [place for place, why in walk(path) if not why]
                if not inside:
                    raise UserError(f"{path}: holds no text", hint=known_files())
                found.extend(inside)
            elif (isinstance(path, Address) and path.suffix) or is_file(path):
                if reader_of(path) is None:
                    raise UserError(f"{path}: of a kind that is not read", hint=known_files())
                found.append(path)
            else:
                raise UserError(f"{path}: no such file or folder")
        return found


def walk(folder: Place) -> Iterator[tuple[Place, str]]:
    """(file, why it is left out) of every file under a folder, sorted; "" for those that are
    read."""
    for name, place, regular in _inside(folder):
        reader = reader_of(place)
        if any(part.startswith(".") for part in name.split("/")):
            yield place, "hidden"
        elif not regular:
            yield place, "no regular file, or a link to a folder"
        elif reader is None:
            yield place, "of a kind that is not read"
        elif ABOUT_DATA.fullmatch(place.name) and reader.name in ("text", "json"):
            yield place, "about the data, not text"
        else:
            yield place, ""


def _inside(folder: Place) -> Iterator[tuple[str, Place, bool]]:
    """(path within, file, whether it is a regular one) of all that is under a folder, sorted."""
    if isinstance(folder, Address):
        yield from ((name, place, True) for name, place in files_under(folder))
        return

    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    found: list[Path] = []
    for above, folders, names in os.walk(folder, onerror=unreadable):
        linked = (name for name in folders if Path(above, name).is_symlink())
        found.extend(Path(above, name) for name in (*names, *linked))
    for path in sorted(found):
        yield str(path.relative_to(folder)), path, path.is_file()


def _is_folder(path: Place) -> bool:
    """Whether a path is a folder. A store is not asked about an address that names a file."""
    return not (isinstance(path, Address) and path.suffix and reader_of(path)) and is_folder(path)


def left_out(sources: Sequence[Source], say: Callable[[str], None]) -> dict[str, Any]:
    """The files of all folders that are not read, for the manifest: how many for each reason, and
    the names of the first; nothing where there are none. Each reason is said in a line."""
    counts: dict[str, int] = {}
    first: list[list[str]] = []
    for source in sources:
        for path in source.paths:
            if not _is_folder(path):
                continue
            by_reason: dict[str, list[str]] = {}
            for place, why in walk(path):
                if why:
                    by_reason.setdefault(why, []).append(str(place))
            for why, names in by_reason.items():
                counts[why] = counts.get(why, 0) + len(names)
                first += [[name, why] for name in names]
                shown = ", ".join(name.removeprefix(f"{path}/") for name in names[:SHOWN])
                more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
                files = "1 file" if len(names) == 1 else f"{len(names):,} files"
                say(f"{path}: {files} left out, {why}: {shown}{more}")
    return (
        {"count": sum(counts.values()), "why": counts, "first": first[:MAX_NAMED]} if counts else {}
    )


def parse_sources(
    arguments: Sequence[str], named: Sequence[str] = (), listed: Path | None = None
) -> list[Source]:
    """Sources from PATH and NAME=PATH arguments, NAME[:WEIGHT]=GLOB options, and a TOML list;
    equal names join.

    A path may be a pattern ("data/**/*.jsonl.gz"). A bare path is named after its file.
    `UserError` when nothing is given or found.
    """
    found: dict[str, Source] = {}

    def add(name: str, paths: list[Place], weight: float | None, given: bool) -> None:
        for path in paths:
            check_utf8(path)
        before = found.get(name, Source(name, [], weight, given))
        if before.weight is not None and weight is not None and before.weight != weight:
            raise UserError(f"source {name!r} has two weights, {before.weight} and {weight}")
        weight = before.weight if weight is None else weight
        found[name] = Source(name, [*before.paths, *paths], weight, before.given or given)

    for argument in arguments:
        name, equals, path = argument.partition("=")
        given = bool(equals and NAME.fullmatch(name) and not Path(argument).exists())
        if not given:
            path = argument
            name = re.sub(r"[^\w-]+", "_", place_of(path).name.split(".")[0]) or "text"
        add(name, expand(path), None, given)
    for option in named:
        label, equals, path = option.partition("=")
        name, colon, number = label.partition(":")
        if not equals or not path or not NAME.fullmatch(name):
            raise UserError(
                f"--source {option}: must be NAME=PATH or NAME:WEIGHT=PATH",
                hint="as in --source wiki:0.7='wiki/*.jsonl.gz'",
            )
        add(name, expand(path), _weight(number, f"--source {option}") if colon else None, True)
    if listed is not None:
        for name, paths, weight in _read(listed):
            add(
                name,
                [path for pattern in paths for path in expand(_beside(listed, pattern))],
                weight,
                True,
            )
    if not found:
        raise UserError("no text given", hint="name files or folders")
    weighted = [source.name for source in found.values() if source.weight is not None]
    if weighted and len(weighted) < len(found):
        bare = next(name for name in found if name not in weighted)
        raise UserError(
            f"source {weighted[0]!r} has a weight and {bare!r} has none",
            hint="give every source one, or none",
        )
    return list(found.values())


def _beside(listed: Path, pattern: str) -> str:
    """A pattern of a list: an address, or relative to the list."""
    return pattern if isinstance(place_of(pattern), Address) else str(listed.parent / pattern)


def expand(pattern: str) -> list[Place]:
    """The files and folders that a path, an address or a pattern stands for, sorted. `UserError`
    for a pattern that nothing fits."""
    place = place_of(pattern)
    if isinstance(place, Address):
        # A "?" begins what an HTTP address asks for, it is no pattern.
        if not re.search(r"[*[]" if place.scheme in ("http", "https") else r"[*?[]", pattern):
            return [place]
        if not (fitting := matching(place)):
            raise UserError(f"{pattern}: no file fits this pattern")
        return list(fitting)
    pattern = str(place)
    if Path(pattern).exists() or not glob.has_magic(pattern):
        return [Path(pattern)]
    found = sorted(Path(path) for path in glob.glob(pattern, recursive=True))
    files = [path for path in found if path.is_file()] or found
    if not files:
        raise UserError(f"{pattern}: no file fits this pattern")
    return list(files)


def _weight(value: Any, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number <= 0:
        raise UserError(f"{where}: the weight is {value!r}, must be a number above 0")
    return number


def _read(path: Path) -> list[tuple[str, list[str], float | None]]:
    """(name, paths, weight) of each [[source]]."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML ({error})") from None
    entries = values.get("source")
    if set(values) != {"source"} or not isinstance(entries, list):
        raise UserError(
            f"{path}: must hold a list of [[source]] and nothing else (found "
            f"{', '.join(values) or 'nothing'})"
        )
    found = []
    for number, entry in enumerate(entries, 1):
        where = f"{path}: source {number}"
        if not isinstance(entry, dict):
            raise UserError(f"{where}: must be a table")
        for key in entry:
            if key not in ("name", "paths", "weight"):
                raise unknown_name("key", key, ("name", "paths", "weight"), where)
        name, paths = entry.get("name"), entry.get("paths")
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(
                f"{where}: its name is {name!r}", hint='use letters, digits, "-" and "_"'
            )
        if not isinstance(paths, list) or not paths or not all(isinstance(p, str) for p in paths):
            raise UserError(
                f"{where}: its paths are {paths!r}, must be a list of paths or patterns"
            )
        found.append((name, paths, _weight(entry["weight"], where) if "weight" in entry else None))
    return found
