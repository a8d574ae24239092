"""Text of others stays text, whichever leaf of whichever input of a page carries a script."""

import copy
import html
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.report.pages import ENVIRONMENT, make_run, metrics, parsed, result

from mobilellm.report import frame
from mobilellm.report.comparison_page import write_comparison
from mobilellm.report.data_page import write_data_page
from mobilellm.report.lab_page import write_lab_page
from mobilellm.report.profile_page import write_profile_page
from mobilellm.report.run_page import write_report
from mobilellm.report.score_table import measured_row, published_rows
from mobilellm.report.scores_page import page as scores_page

HOSTILE = (
    "\"'></td></pre></title></style></script><script>alert(1)</script>"
    "<img src=x onerror=alert(2)>{{ 7 * 7 }}<b onclick='alert(3)'>"
)
NAME = HOSTILE.replace("/", "|")  # of files: no slash in it
FIGURES: dict[str, Any] = {
    "kind": "shards",
    "fingerprint": "0123456789abcdef",
    "tokenizer": {"name": "t", "vocab_size": 300, "bos_id": 0, "eos_id": 1},
    "splits": {
        split: {"documents": 3, "tokens": 4, "bytes": 5, "bytes_per_token": 1.2}
        for split in ("train", "held_out")
    },
    "sources": [
        {"name": "s", "documents": 3, "tokens": 4, "bytes": 5, "bytes_per_token": 1.2,
         "weight": 0.5, "share": 1.0},
    ],
    "lengths": [{"from": 1, "below": 2, "documents": 2}, {"from": 4, "below": 8, "documents": 1}],
    "length": {"least": 1, "mean": 2.5, "most": 7},
    "vocabulary": {"used": 3, "never_used": 297, "entropy_bits": 1.5},
    "frequent": [{"id": 5, "piece": "p", "text": "p", "count": 2, "share": 0.5}],
    "samples": [
        {"source": "s", "tokens": 4, "text": "a text", "cut": True},
        {"source": "s", "tokens": 4, "text": "a", "cut": False,
         "pieces": [{"text": "a", "trained": True}, {"text": "b", "trained": False}]},
    ],
    "cleaning": {
        "documents_read": 5,
        "documents_kept": 3,
        "dropped": {
            "step": {
                "documents": 2,
                "reasons": {"too short": 2},
                "examples": [{"where": "f:1", "why": "too short", "text": "ab"}],
            }
        },
    },
}  # fmt: skip

FIGURE = {"median": 2.0, "lowest": 1.0, "highest": 3.0}
PROFILE: dict[str, Any] = {
    "format": "mobilellm device profile",
    "made_by": "x",
    "date": "today",
    "machine": {"device": "d", "memory_bytes": 5, "cache_bytes": {"L2": 1024}},
    "settings": {"prompt": 8, "generate": 4, "repeats": 2, "threads": 1},
    "bandwidth": {"read": FIGURE},
    "interrupted": True,
    "rows": [
        {"name": "n", "runtime": "r", "bytes": 5, "bandwidth_share": 0.5, "error": None,
         "figures": {"load_ms": FIGURE, "decode_tokens_per_second": FIGURE},
         "operators": [{"phase": "decode", "name": "o", "ms": 1.5, "share": 0.5, "calls": 3}]},
        {"name": "n", "runtime": "r", "bytes": 5, "figures": {}, "error": "why"},
    ],
}  # fmt: skip

DIFFERENCE = {"mean": -0.01, "low": -0.02, "high": 0.01, "seeds": 2, "in_noise": True}
SHAPE = {
    "layers": 2, "executed_layers": 4, "hidden_size": 8, "intermediate_size": 24, "heads": 2,
    "kv_heads": 1, "parameters": 1000, "tokens": 500, "flops": 7,
}  # fmt: skip
LAB: dict[str, Any] = {
    "title": "t", "about": "a", "equal": "parameters", "compare": "base", "device": "d",
    "date": "today", "seeds": 2, "metrics": [{"key": "k", "name": "bits", "better": "lower"}],
    "rows": [
        {"name": "base", "facts": SHAPE, "seconds": 60.0, "published": 1.5,
         "published_difference": None,
         "metrics": {"k": {"mean": 2.0, "deviation": 0.1, "values": {}, "difference": None}}},
        {"name": "other", "facts": SHAPE, "seconds": None, "published": 1.0,
         "published_difference": -0.5,
         "metrics": {"k": {"mean": 2.0, "deviation": None, "values": {},
                           "difference": DIFFERENCE}}},
    ],
    "published": {"source": "s", "column": "c", "better": "higher", "cells": 3,
                  "correlation": 0.5, "by_seed": [0.5, 1.0]},
    "optima": {"axis": "a", "rows": {"base": 0.5}, "by_seed": {"base": [0.5, 1.0]}, "ratio": 2.0},
    "left_out": {"row": "why"}, "noise": {"deviation": 0.1, "smallest_difference": 0.2},
    "failed": [{"cell": "other", "seed": 1, "why": "w"}], "done": 3, "runs": 4, "seconds": 60.0,
}  # fmt: skip


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in a value that is neither list nor dictionary."""
    pairs = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else None
    )
    if pairs is None:
        yield path
    else:
        for key, part in pairs:
            yield from leaves(part, (*path, key))


def poisoned(value: Any, paths: list[tuple[Any, ...]], poison: Any = HOSTILE) -> Any:
    """A copy of a value with `poison` at some of its leaves."""
    value = copy.deepcopy(value)
    for path in paths:
        part = value
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = poison
    return value


def with_hostile_keys(value: Any) -> Any:
    """A copy in which every dictionary has one more key, and that is hostile too."""
    if isinstance(value, dict):
        found = {key: with_hostile_keys(part) for key, part in value.items()}
        return found | {HOSTILE: copy.deepcopy(next(iter(found.values()), 1))}
    return [with_hostile_keys(part) for part in value] if isinstance(value, list) else value


def variants(value: Any) -> Iterator[Any]:
    """Poisoned everywhere, at each single leaf, and in the keys; and null in place of each leaf."""
    found = list(leaves(value))
    yield poisoned(value, found)
    yield with_hostile_keys(value)
    yield from (poisoned(value, [path]) for path in found)
    yield from (poisoned(value, [path], None) for path in found)


def assert_harmless(page: str) -> None:
    checker = parsed(page)
    assert not checker.open
    assert not [fault for fault in checker.faults if fault.startswith("</")]
    assert not {"img", "iframe", "object", "link", "base", "form"} & set(checker.tags)
    assert not {name for name in checker.attributes if name.startswith(("on", "src", "href"))}
    assert checker.scripts == [str(frame.environment().globals["script"])]


def run_pages(folder: Path, **parts: Any) -> list[str]:
    """The run's page and the comparison with it, of a run with the given parts."""
    run = make_run(folder / NAME, **{"rows": metrics(3), "result": result()} | parts)
    other = make_run(folder / "other", metrics(3), recipe=f"[{HOSTILE}]\na = {HOSTILE}\n")
    write_comparison([run, other], folder / "page.html")
    return [write_report(run).read_text(), (folder / "page.html").read_text()]


def data_page(folder: Path, figures: Any) -> list[str]:
    write_data_page(folder / "page.html", NAME, figures)
    return [(folder / "page.html").read_text()]


def profile_page(folder: Path, profile: Any) -> list[str]:
    write_profile_page(folder / "page.html", profile)
    return [(folder / "page.html").read_text()]


def lab_page(folder: Path, table: Any) -> list[str]:
    curves = {NAME: [[(1.0, 3.0), (2.0, 2.5)], [(1.0, 3.2), (2.0, 2.4)]], "other": []}
    write_lab_page(folder / "page.html", table, curves)
    return [(folder / "page.html").read_text()]


INPUTS: dict[str, tuple[Any, Callable[[Path, Any], list[str]]]] = {
    "result": (result(), lambda folder, value: run_pages(folder, result=value)),
    "metrics": (metrics(3), lambda folder, value: run_pages(folder, rows=value)),
    "environment": (ENVIRONMENT, lambda folder, value: run_pages(folder, environment=value)),
    "recipe": (
        ["[train]", "steps = 5", "x"],
        lambda folder, value: run_pages(folder, recipe="\n".join(map(str, value))),
    ),
    "data": (FIGURES, data_page),
    "profile": (PROFILE, profile_page),
    "lab": (LAB, lab_page),
}


@pytest.mark.parametrize("name", INPUTS)
def test_no_tag_of_theirs_is_in_any_page(tmp_path: Path, name: str) -> None:
    value, pages = INPUTS[name]
    for variant in variants(value):
        for page in pages(tmp_path, variant):
            assert_harmless(page)


def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    value = result()
    pages = run_pages(tmp_path, result=poisoned(value, list(leaves(value))))
    assert HOSTILE in parsed(pages[0]).text
    assert parsed(pages[0]).text.count(HOSTILE) > 25
    assert HOSTILE in parsed(data_page(tmp_path, poisoned(FIGURES, list(leaves(FIGURES))))[0]).text
    page = profile_page(tmp_path, poisoned(PROFILE, list(leaves(PROFILE))))[0]
    assert parsed(page).text.count(HOSTILE) > 10


def test_no_tag_of_theirs_is_in_the_page_of_scores() -> None:
    score = {"acc": 0.5, "acc_stderr": 0.1, "split": HOSTILE, "count": HOSTILE}
    facts = {"protocol": HOSTILE, "harness": HOSTILE}
    row = measured_row(HOSTILE, {HOSTILE: score | facts, "average": {"acc": 0.5} | facts})
    page = scores_page([row, *published_rows()], HOSTILE)
    assert_harmless(page)
    assert parsed(page).text.count(HOSTILE) > 3


def test_the_frame_lets_nothing_in_but_its_own_script(tmp_path: Path) -> None:
    pages = [*run_pages(tmp_path), *data_page(tmp_path, FIGURES), *profile_page(tmp_path, PROFILE)]
    pages += lab_page(tmp_path, LAB)
    for page in [*pages, scores_page([])]:
        (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules["default-src"] == "'none'"
        assert rules["style-src"] == "'unsafe-inline'"
        assert rules["img-src"] == "data:"
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", rules["script-src"])
        assert page.index("Content-Security-Policy") < page.index("<title>")


def test_the_charts_data_survive_the_escaping(tmp_path: Path) -> None:
    pages = run_pages(tmp_path)
    charts = re.findall(r'data-lines="([^"]*)"', pages[1])
    names = [line[0] for line in json.loads(html.unescape(charts[0]))["lines"]]
    assert names == [NAME, "other"]
