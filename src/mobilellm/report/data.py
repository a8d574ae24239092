"""The page about prepared data: figures, the histogram of document lengths, sources, frequent tokens, sample documents.

write_data_page(Path("data.html"), statistics)      # the dictionary that mobilellm.data.stats.statistics gives
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mobilellm.files import write_file
from mobilellm.report.chart import bar_chart, short
from mobilellm.report.style import SCRIPT, STYLE


def write_data_page(path: Path, name: str, figures: dict[str, Any]) -> None:
    """Write the page. All text in it is escaped: documents are whatever was prepared."""
    sections = [
        ("", _tiles(figures)),
        ("Document lengths", histogram(figures["lengths"])),
        ("Sources", _sources(figures["sources"])),
        ("Cleaning", _cleaning(figures.get("cleaning"))),
        ("Most frequent tokens", _frequent(figures["frequent"])),
        ("Sample documents", _samples(figures["samples"])),
    ]
    body = "".join(
        f"<section>{f'<h2>{title}</h2>' if title else ''}{part}</section>"
        for title, part in sections
        if part
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(name)} - mobilellm data</title><style>{STYLE}</style></head><body><main>"
        f"<header><p>mobilellm data</p><h1>{html.escape(name)}</h1><p>tokenizer {html.escape(str(figures['tokenizer']['name']))}, "
        f"fingerprint {html.escape(figures['fingerprint'][:16])}</p></header>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )
    write_file(path, page.encode("utf-8", "replace"))


def _tiles(figures: dict[str, Any]) -> str:
    train, held_out, length = (
        figures["splits"]["train"],
        figures["splits"]["held_out"],
        figures["length"],
    )
    tiles = [
        (short(train["tokens"]), "tokens to train on", f"{held_out['tokens']:,} held out"),
        (short(train["documents"]), "documents", f"{held_out['documents']:,} held out"),
        (f"{train['bytes_per_token']:.2f}", "bytes a token", f"{train['bytes']:,} bytes of text"),
        (
            f"{length['mean']:,.0f}",
            "tokens a document",
            f"{length['least']:,} to {length['most']:,}",
        ),
        (
            f"{figures['vocabulary']['entropy_bits']:.2f}",
            "bits of entropy a token",
            "of token frequencies alone",
        ),
        (
            f"{figures['vocabulary']['used']:,}",
            "tokens used",
            f"of a vocabulary of {figures['tokenizer']['vocab_size']:,}",
        ),
    ]
    cells = "".join(
        f"<div><strong>{a}</strong><span>{b}</span><small>{c}</small></div>" for a, b, c in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def histogram(lengths: list[dict[str, int]]) -> str:
    """Documents by length, in doublings."""
    if not lengths:
        return ""
    first, last = lengths[0]["from"], lengths[-1]["from"]
    known = {row["from"]: row["documents"] for row in lengths}
    rows, size = [], first
    while size <= last:
        rows.append(
            (f"{size:,} to {2 * size - 1:,}" if size > 1 else "1", float(known.get(size, 0)), False)
        )
        size *= 2
    return bar_chart(rows, "Training documents by their length in tokens").replace(
        ".000</td>", "</td>"
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f"<table><tr>{''.join(f'<th>{html.escape(name)}</th>' for name in head)}</tr>{cells}</table>"
        if cells
        else ""
    )


def _sources(sources: list[dict[str, Any]]) -> str:
    return _table(
        ("source", "documents", "tokens", "share", "bytes a token", "weight"),
        (
            (
                source["name"], f"{source['documents']:,}", f"{source['tokens']:,}", f"{source['share']:.1%}",
                f"{source['bytes_per_token']:.2f}", "by tokens" if source["weight"] is None else f"{source['weight']:g}",
            )
            for source in sources
        ),
    )  # fmt: skip


def _cleaning(report: dict[str, Any] | None) -> str:
    if not report:
        return ""
    parts = [
        f"<p>{report['documents_read']:,} documents read, {report['documents_kept']:,} kept.</p>"
    ]
    for step, entry in report["dropped"].items():
        if entry["documents"]:
            rows = (
                (example["where"], example["why"], example["text"]) for example in entry["examples"]
            )
            reasons = ", ".join(
                f"{name} {count:,}" for name, count in entry["reasons"].items() if name
            )
            why = f" ({html.escape(reasons)})" if reasons else ""
            table = _table(("document", "why", "begins"), rows)
            parts.append(
                f"<details><summary>{html.escape(step)}: {entry['documents']:,} dropped{why}</summary>{table}</details>"
            )
    return "".join(parts)


def _frequent(frequent: list[dict[str, Any]]) -> str:
    return _table(
        ("id", "token", "count", "share"),
        (
            (str(row["id"]), repr(row["piece"]), f"{row['count']:,}", f"{row['share']:.2%}")
            for row in frequent
        ),
    )


def _samples(samples: list[dict[str, Any]]) -> str:
    return "".join(
        f'<figure class="sample"><blockquote>{html.escape(sample["text"])}{" ..." if sample["cut"] else ""}</blockquote>'
        f"<figcaption>{html.escape(sample['source'])}, {sample['tokens']:,} tokens</figcaption></figure>"
        for sample in samples
    )
