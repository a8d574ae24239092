"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What is tested is what a CPU computes; benchmarks/gpu_check.py compares a GPU with that. With
# MOBILELLM_TEST_GPU=1 runs of training take the GPU that there is.
if os.environ.get("MOBILELLM_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
from tests.export.browser import CHROMIUM, Browser
from tests.sentencepiece_files import sentencepiece_file

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("MOBILELLM_SHARED", ROOT.parent / "shared"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that ask for the data beside the checkout, so that they can be left out by
    name."""
    for item in items:
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.shared)


def without_data(what: str) -> NoReturn:
    """Skip for want of data, but fail where CI=true: there a skip that nobody reads hides a fault.

    A machine of CI that has no such data says so: `pytest -m "not shared"`.
    """
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} (CI=true: set MOBILELLM_SHARED, or run -m 'not shared')")
    pytest.skip(what)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium, where there is one."""
    if CHROMIUM is None:
        without_data("no chromium on PATH")
    with Browser() as found:
        yield found


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data that lies beside a checkout, where it does."""
    if not (SHARED / "data").is_dir():
        without_data("no shared data beside this checkout")
    return SHARED / "data"


@pytest.fixture(scope="session")
def sample_text() -> str:
    """Tiny Shakespeare."""
    import gzip

    return gzip.decompress(
        (ROOT / "src/mobilellm/sample/tiny_shakespeare.txt.gz").read_bytes()
    ).decode()


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    """A token folder of 60,000 characters with a vocabulary of 300."""
    from mobilellm.prepare.prepare import prepare
    from mobilellm.prepare.sources import Source

    folder = tmp_path_factory.mktemp("small")
    (folder / "text.txt").write_text(sample_text[:60_000])
    prepare([Source("text", [folder / "text.txt"])], folder / "data", vocab_size=300, held_out=0.1)
    return folder / "data"


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    """A SentencePiece model of Llama's kind with 600 pieces."""
    folder = tmp_path_factory.mktemp("sp")
    settings = {"character_coverage": 1.0, "split_digits": True}
    content = sentencepiece_file(sample_text[:200_000], **settings)
    (folder / "tokenizer.model").write_bytes(content)
    return folder / "tokenizer.model"
