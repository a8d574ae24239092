"""docs/architecture.md says what is: its rooms, what they may import, and where things are."""

import re
from pathlib import Path

import pytest
from tests.test_layers import GROUND, MAY_IMPORT, PACKAGE

PAGE = (Path(__file__).resolve().parent.parent / "docs/architecture.md").read_text()
ROOMS = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
ALL_ABOVE = "all above"


def part(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    lines = [line for line in part(title).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def names(text: str) -> list[str]:
    return re.findall(r"`([\w./]+)`", text)


def test_every_room_stands_in_the_table_with_what_it_may_import() -> None:
    said = {}
    for room, _, imports in rows("The rooms"):
        above = set(said)
        (name,) = names(room)
        said[name] = above if imports == ALL_ABOVE else set(imports.split(", ")) - {""}
    assert said == {room: MAY_IMPORT[room] & ROOMS - {room} for room in said}
    assert set(said) == ROOMS


def test_the_modules_under_all_rooms_are_named() -> None:
    introduction = PAGE.split("\n## ")[0]
    assert set(names(introduction)) >= GROUND


def defined(path: Path, name: str) -> bool:
    """Whether a file defines `name` at its top level: a class, a function or a constant."""
    pattern = rf"^(class|def|async def) {name}\b|^{name}\b.*="
    return re.search(pattern, path.read_text(), flags=re.MULTILINE) is not None


CHANGES = rows("Which file for which change")


@pytest.mark.parametrize("change", CHANGES, ids=lambda row: row[0])
def test_the_file_for_a_change_exists_and_defines_what_it_is_said_to(change: list[str]) -> None:
    _, file, where = change
    (path,) = names(file)
    assert (PACKAGE / path).is_file()
    found = names(where)
    assert found
    for name in found:
        assert defined(PACKAGE / path, name), f"{path} does not define {name}"


def test_the_life_of_a_batch_passes_through_files_that_exist() -> None:
    steps = re.split(r"\n\d+\. ", part("The life of a batch"))[1:]
    assert len(steps) >= 10
    for step in steps:
        files = [name for name in names(step) if name.endswith(".py")]
        assert files
        for name in names(step):
            if name.endswith(".py"):
                assert (PACKAGE / name).is_file(), name
            elif "." not in name:
                assert any(defined(PACKAGE / file, name) for file in files), f"{name}: {step}"


def test_a_name_that_is_not_there_is_noticed() -> None:
    assert defined(PACKAGE / "model/network.py", "Network")
    assert not defined(PACKAGE / "model/network.py", "Netwrk")
    assert not defined(PACKAGE / "model/loss.py", "Network")
    assert len(CHANGES) > 25
