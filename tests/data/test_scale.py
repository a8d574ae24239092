"""A trillion tokens, in files that take no room: opened, sampled, and no more memory than for
little."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mobilellm.data.dataset import open_dataset
from mobilellm.data.loader import DataState, Loader
from mobilellm.data.manifest import fingerprint
from mobilellm.data.mixture import Mixture, Stage
from mobilellm.data.shard_file import ENDS, HEADER_BYTES, header

TRILLION, SHARD = 10**12, 1 << 30


def sparse(folder: Path, like: Path) -> Path:
    """A token folder of a trillion zeros, but for a mark at the end of each shard."""
    manifest = json.loads((like / "manifest.json").read_text())
    shutil.copytree(like / "tokenizer", folder / "tokenizer")
    dtype = np.dtype(manifest["dtype"])
    for split, tokens in (("train", TRILLION), ("held_out", 5000)):
        (folder / split).mkdir()
        shards = []
        for number, start in enumerate(range(0, tokens, SHARD)):
            count = min(SHARD, tokens - start)
            name = folder / split / f"text-{number:05d}.npy"
            for path, kind, n, last in (
                (name, dtype, count, number % 250 + 1),
                (name.with_suffix(".ends.npy"), ENDS, 1, count),
            ):
                with open(path, "wb") as file:
                    file.write(header(kind, n))
                    file.seek(HEADER_BYTES + (n - 1) * kind.itemsize)
                    file.write(np.array([last], dtype=kind).tobytes())
            shards.append(
                {
                    "file": f"{split}/{name.name}",
                    "source": "text",
                    "tokens": count,
                    "documents": 1,
                    "bytes": 4 * count,
                    "size": name.stat().st_size,
                    "sha256": "0" * 64,
                    "ends_size": HEADER_BYTES + 8,
                    "ends_sha256": "0" * 64,
                }
            )
        total = {key: sum(s[key] for s in shards) for key in ("documents", "tokens", "bytes")}
        manifest["splits"][split] = total | {"shards": shards}
    manifest["fingerprint"] = fingerprint(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def trillion(tmp_path: Path, small_data: Path) -> Path:
    try:
        return sparse(tmp_path / "sparse", small_data)
    except OSError as error:
        pytest.skip(f"this file system has no sparse files of that size ({error})")


def test_samples_anywhere_in_a_trillion_tokens(trillion: Path) -> None:
    data = open_dataset(trillion)
    stream = data.tokens("train")
    assert len(stream) == TRILLION
    for number in (0, 1, 500, 930):
        border = (number + 1) * SHARD
        assert stream.read(border - 3, 6).tolist() == [0, 0, number % 250 + 1, 0, 0, 0]
        assert stream.documents(border - 3, 6).tolist() == [0, 0, 0, 1, 1, 1]
    assert stream.read(TRILLION - 2, 10).tolist() == [0, 931 % 250 + 1]
    state = DataState(seed=0, epoch=0, samples=0, fingerprint=data.fingerprint)
    loader = Loader(stream, 2048, 8, state)
    assert loader.samples_per_epoch == TRILLION // 2048
    starts = np.concatenate(
        [loader.starts(0, np.arange(n, n + 1000)) for n in (0, 10**8, TRILLION // 2048 - 1000)]
    )
    assert len(set(starts.tolist())) == 3000
    assert np.ptp(starts) > 0.99 * TRILLION
    late = DataState(seed=0, epoch=3, samples=TRILLION // 2048 - 3, fingerprint=data.fingerprint)
    mixture = Mixture(
        {"text": stream},
        [Stage(until_tokens=None, weights={"text": 1})],
        2048,
        8,
        late,
        mask_documents=True,
    )
    batch, after = next(iter(mixture))
    assert batch.inputs.shape == (8, 2048)
    assert (after.epoch, after.samples) == (4, 5)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to see memory in")
def test_opening_takes_little_memory(trillion: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom mobilellm.data.dataset import open_dataset\n"
        "from mobilellm.data.loader import DataState, Loader\n"
        "s = open_dataset(Path(sys.argv[1])).tokens('train')\n"
        "b = iter(Loader(s, 2048, 64, DataState(seed=0, epoch=0, samples=0, fingerprint='')))\n"
        "[next(b) for _ in "
        "range(5)]\nprint(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(trillion)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 500_000  # KiB
