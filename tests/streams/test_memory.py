"""However far a file unpacks, little of it is held: measured in processes of their own."""

import bz2
import gzip
import lzma
import struct
import subprocess
import sys
from pathlib import Path

import pytest

READ = """
import sys
from pathlib import Path
from mobilellm.readers.reader import ReadSettings, Span
from mobilellm.readers.table import records

found = [
    (sum(map(len, record.pieces())), record.fault and record.fault.what)
    for record in records(Path(sys.argv[1]), Span(), ReadSettings())
]
print(len(found), sum(length for length, _ in found), [fault for _, fault in found if fault])
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""
MIB = 1 << 20

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="no /proc to see memory in"
)


def read(path: Path) -> tuple[str, int]:
    """What a process of its own reads of a file, and the MiB that it holds at most."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True
    )
    said, memory = done.stdout.splitlines()
    return said, int(memory) // 1024


def zstd(beginning: bytes, blocks: int, end: bytes) -> bytes:
    """A frame with blocks of 128 KiB of one letter, of four bytes each."""

    def raw(data: bytes, last: int = 0) -> bytes:
        return (len(data) << 3 | last).to_bytes(3, "little") + data

    repeated = struct.pack("<I", 131072 << 3 | 2)[:3] + b"a"
    return b"\x28\xb5\x2f\xfd\x00\x38" + raw(beginning) + repeated * blocks + raw(end, 1)


CASES = {
    "text.txt.zst": (lambda: zstd(b"", 4000, b""), "1 524288000 []"),
    "line.jsonl.zst": (
        lambda: zstd(b'{"text": "', 4000, b'"}\n{"text": "b"}\n'),
        "a line of more than 134217728 bytes",
    ),
    "values.json.zst": (lambda: zstd(b'[{"text": "', 4000, b'"}]'), "a value of more than"),
    "table.csv.zst": (lambda: zstd(b"text\n", 4000, b"\n"), "a row of more than"),
    "text.txt.xz": (lambda: lzma.compress(b"a" * (300 * MIB), preset=0), "1 314572800 []"),
    "text.txt.bz2": (lambda: bz2.compress(b"a" * (90 * MIB), 1) * 4, "1 377487360 []"),
    "line.jsonl.gz": (
        lambda: gzip.compress(b'{"text": "' + b"ab " * (100 * MIB) + b'"}\n', 1),
        "a line of more than 134217728 bytes",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_little_of_what_unpacks_far_is_held(tmp_path: Path, name: str) -> None:
    """Of half a gigabyte, at most as much as one line, row or value may have."""
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    made, words = CASES[name]
    (tmp_path / name).write_bytes(made())
    said, memory = read(tmp_path / name)
    assert words in said
    assert memory < 420


def test_the_values_of_a_dictionary_are_not_written_out_at_once(tmp_path: Path) -> None:
    """Sixty-four rows of one value of 21 MB; the file has five kilobytes."""
    pa = pytest.importorskip("pyarrow")
    dictionary = pa.array(["word " * (21 * MIB // 5), "a"])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 64 + [1] * 500), dictionary)
    pytest.importorskip("pyarrow.parquet").write_table(
        pa.table({"text": column}),
        tmp_path / "a.parquet",
        compression="zstd",
        dictionary_pagesize_limit=1 << 30,
    )
    assert (tmp_path / "a.parquet").stat().st_size < 5000
    said, memory = read(tmp_path / "a.parquet")
    assert said.startswith("564 ")
    assert memory < 420


@pytest.mark.long
def test_a_text_of_one_letter_is_refused_in_a_line(tmp_path: Path) -> None:
    """16 KB that unpack to 512 MB: read, trained on, and refused where it would be tokenized."""
    pytest.importorskip("zstandard")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt.zst").write_bytes(zstd(b"", 4000, b""))
    for i in range(30):
        (tmp_path / f"in/b{i}.txt").write_text("hello world " * 500)
    script = (
        "import re, sys\nfrom mobilellm import cli\n"
        "try:\n    cli.main(sys.argv[1:])\n"
        "finally:\n    status = open('/proc/self/status').read()\n"
        "    print(int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) // 1024)"
    )
    for more, status in (((), 2), (("--on-bad", "skip"), 0)):
        done = subprocess.run(
            [sys.executable, "-c", script, "prepare", "in", "--out", "out", "--vocab-size", "300",
             "--held-out", "0.2", "--workers", "1", *more],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        # MiB: one and a half times the text's 500, and 512.
        assert int(done.stdout.splitlines()[-1]) < 1262, done.stdout
        if status:
            (line,) = done.stderr.splitlines()
            assert line.startswith("mobilellm: in/a.txt.zst: ")
            assert "characters without a place to cut" in line
        else:
            assert "1 skipped (1 bad)" in done.stdout
