"""The published tables, and ours set into them."""

import csv
import io
from pathlib import Path

import pytest
from tests.conftest import without_data

from mobilellm.report.published import COLUMNS, GROUPS, Published, published
from mobilellm.report.score_table import (
    as_csv,
    groups,
    markdown,
    measured_row,
    published_rows,
    set_in,
)
from mobilellm.report.scores_page import page, write_tables

SCORES = {
    "arc_easy": {"acc": 0.5, "acc_stderr": 0.01, "acc_norm": 0.4321, "acc_norm_stderr": 0.012},
    "boolq": {"acc": 0.61, "acc_stderr": 0.009, "altered": "boolq.jsonl: altered"},
}
FACTS = {"protocol": "harness", "harness": "0.4.13", "split": "test", "count": 200}


def measured() -> dict[str, dict[str, object]]:
    average = {
        "average": {"acc": 0.55, "acc_norm": 0.5211, "protocol": "harness", "harness": "0.4.13"}
    }
    return {name: score | FACTS for name, score in SCORES.items()} | average


@pytest.mark.parametrize("row", published(), ids=lambda row: row.model)
def test_each_published_average_is_that_of_its_row(row: Published) -> None:
    assert sum(row.values.values()) / 8 == pytest.approx(
        row.average, abs=0.1001
    )  # of rounded parts, itself rounded


def test_the_rows_are_all_there_under_the_right_columns() -> None:
    rows = published()
    assert [sum(row.group == group and row.own for row in rows) for group in GROUPS] == [
        2,
        2,
        1,
        1,
        1,
    ]
    assert sum(not row.own for row in rows) == 33
    assert len({row.model for row in rows}) == len(rows)
    # ARC's challenge set is the harder one for every model, PIQA the easier: columns in another
    # order would break this.
    assert all(
        row.values["arc_challenge"] < row.values["arc_easy"] < row.values["piqa"] for row in rows
    )
    assert list(COLUMNS.values()) == [
        "ARC-e",
        "ARC-c",
        "BoolQ",
        "PIQA",
        "SIQA",
        "HellaSwag",
        "OBQA",
        "WinoGrande",
    ]


def test_the_rows_equal_the_originals_text(shared: Path) -> None:
    original = shared.parent / "reference/mobilellm-readme.txt"
    if not original.is_file():
        without_data("no copy of the original's text")
    lines = {
        line.split()[0].lower(): line.split()[1:]
        for line in original.read_text().splitlines()
        if len(line.split()) == 10
    }
    for row in published():
        if "README" in row.source:
            assert [float(n) for n in lines[row.model.lower()]] == [
                *row.values.values(),
                row.average,
            ]


def test_a_measured_row_says_how_it_was_measured() -> None:
    row = measured_row("mine", measured())
    assert row.values == {"arc_easy": pytest.approx(43.21), "boolq": pytest.approx(61.0)}
    assert row.average == pytest.approx(52.11)
    for word in (
        "measured here",
        "protocol harness",
        "lm-eval 0.4.13",
        "arc_easy test[200]",
        "boolq ALTERED",
    ):
        assert word in row.source


@pytest.mark.parametrize(
    ("parameters", "group"),
    [
        (1_000_000, "125M"),
        (134_515_008, "125M"),
        # The nearest as a ratio: borders are geometric means (209M, 458M, 775M, 1.22B), below the
        # arithmetic ones (237M, 475M, 800M, 1.25B).
        (208_000_000, "125M"),
        (211_000_000, "350M"),
        (361_821_120, "350M"),
        (457_000_000, "350M"),
        (460_000_000, "600M"),
        (773_000_000, "600M"),
        (776_000_000, "1B"),
        (1_100_000_000, "1B"),
        (1_235_000_000, "1.5B"),
        (3_000_000_000, "1.5B"),
    ],
)
def test_a_measured_row_stands_first_of_those_of_the_nearest_size(
    parameters: int, group: str
) -> None:
    first = {name: members[0].model for name, members in groups(published_rows())}
    rows = set_in([measured_row("mine", measured(), parameters)], published_rows())
    assert [(name, row.model) for name, members in groups(rows) for row in members[:1]] == [
        (name, "mine" if name == group else first[name]) for name in GROUPS
    ]
    assert sum(row.measured for row in rows) == 1


def test_markdown_csv_and_page_hold_every_row(tmp_path: Path) -> None:
    rows = set_in([measured_row("<mine>", measured(), 120_000_000)], published_rows())
    text = markdown(rows)
    (own,) = (line for line in text.splitlines() if "<mine>" in line)
    assert [part.strip() for part in own.split("|")][2:5] == ["43.2 ±1.2", "", "61.0 ±0.9"]
    assert own.rstrip(" |").endswith("measured here (1)")
    assert " 52.1 of 2 |" in own  # not the published rows' eight
    assert "\n1. measured here: protocol harness, lm-eval 0.4.13" in text
    assert (
        text.index("**125M**")
        < text.index("<mine>")
        < text.index("OPT-125M")
        < text.index("**1.5B**")
    )
    table = text.split("**350M**")[0].split("\n\n")[1].splitlines()
    assert len({len(line) for line in table}) == 1  # aligned
    assert "**measured here**" in markdown([measured_row("<mine>", measured())])
    table = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert len(table) == 41
    assert table[0]["arc_easy_stderr"] == "1.2"
    assert table[1]["source"] == "published: facebookresearch/MobileLLM README"
    shown = page(rows)
    assert "&lt;mine&gt;" in shown
    assert "<mine>" not in shown
    assert '<line x1="42.0" x2="44.4"' in shown
    assert shown.count("<tr") == 41 + 5
    assert shown.count('class="here"') == 1
    write_tables(tmp_path, rows)
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "table.csv", "table.html"}
