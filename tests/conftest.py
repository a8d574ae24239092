"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("MOBILELLM_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data that lies beside a checkout, where it does."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no shared data beside this checkout")
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
    from mobilellm.prepare.documents import Source
    from mobilellm.prepare.prepare import prepare

    folder = tmp_path_factory.mktemp("small")
    (folder / "text.txt").write_text(sample_text[:60_000])
    prepare([Source("text", [folder / "text.txt"])], folder / "data", vocab_size=300, held_out=0.1)
    return folder / "data"
