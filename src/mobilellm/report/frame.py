"""The one frame of all pages: Jinja2 with everything escaped, one stylesheet, nothing from outside.

    write_page(Path("page.html"), "run.html.j2", title="demo", ...)

Every expression in a template is escaped, but for `Markup` that the charts made from escaped parts.
The frame's Content-Security-Policy lets a page load nothing, and run no script but our own, which
is named by its hash: should text of others ever end up in a page unescaped, it stays without
effect.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, PackageLoader
from markupsafe import Markup

from mobilellm.files import write_file
from mobilellm.report import figures


def plain(value: Any) -> str:
    """A value of the environment as one line: lists with spaces between, None as "none"."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)


def minutes(seconds: Any) -> str:
    """Seconds as "2.5 minutes"."""
    return f"{figures.fixed(figures.ratio(seconds, 60), 1)} minutes"


@functools.cache
def environment() -> Environment:
    """The templates with their filters. What a file leaves out is empty, it raises nothing."""
    loader = PackageLoader("mobilellm.report", "templates")
    made = Environment(
        loader=loader,
        autoescape=True,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    script, style = (loader.get_source(made, name)[0] for name in ("script.js", "style.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made.globals |= {
        "script": Markup(script),
        "style": Markup(style),
        "policy": Markup(
            "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
            f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        ),
    }
    made.filters |= {
        "fixed": figures.fixed,
        "grouped": figures.grouped,
        "percent": figures.percent,
        "count": figures.count,
        "ratio": figures.ratio,
        "tables": figures.tables,
        "minutes": minutes,
        "plain": plain,
        "repr": repr,
    }
    return made


def page(template: str, **values: Any) -> str:
    """The whole page."""
    return environment().get_template(template).render(values)


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page. Text that UTF-8 cannot hold (lone surrogates) becomes question marks."""
    write_file(path, page(template, **values).encode("utf-8", "replace"))
