"""Fixtures of the tests of this room."""

from __future__ import annotations

import pytest
from tests.conftest import without_data

from mobilellm.errors import UserError
from mobilellm.export.npm_client import read_pins
from mobilellm.export.npm_packages import package_files


def fetched(*names: str) -> None:
    """Skip where npm packages can neither be read nor fetched; fail there with CI=true."""
    try:
        for name in names:
            package_files(name)
    except UserError as error:
        without_data(str(error))


@pytest.fixture(scope="session")
def wllama() -> None:
    """The engine of a page that is one file."""
    fetched(*[name for name in read_pins() if name.startswith("@wllama/")])


@pytest.fixture(scope="session")
def transformers_js() -> None:
    """The engine of a page that is a folder."""
    fetched(*[name for name in read_pins() if not name.startswith("@wllama/")])
