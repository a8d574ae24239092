"""What a device has and held in memory."""

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mobilellm.hardware.description import describe
from mobilellm.hardware.device_memory import (
    is_out_of_memory,
    peak_memory,
    total_memory,
    use_huge_pages,
)

CPU = torch.device("cpu")


def test_the_peak_is_this_processs_own_and_below_what_the_machine_has() -> None:
    ballast = bytearray(700 << 20)
    ballast[:: 1 << 12] = b"x" * len(ballast[:: 1 << 12])
    mine = peak_memory(CPU)
    assert 700 << 20 < mine < total_memory(CPU)
    code = (
        "import torch; from mobilellm.hardware.device_memory import peak_memory;"
        "print(peak_memory(torch.device('cpu')))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < mine - (200 << 20)


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"), True),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_errors_that_mean_too_little_memory(error: RuntimeError, answer: bool) -> None:
    assert is_out_of_memory(error) is answer


def test_a_description_names_the_machine_and_the_versions() -> None:
    found = describe(CPU)
    assert found["torch"] == torch.__version__
    assert found["device"]
    assert found["threads"] == torch.get_num_threads()
    assert found["command"] is sys.argv


def test_large_tensors_come_to_lie_on_large_pages() -> None:
    """Their numbers and addresses stay."""
    smaps = Path("/proc/self/smaps")
    if not smaps.is_file() or tuple(map(int, platform.release().split(".")[:2])) < (6, 1):
        pytest.skip("a system without them")

    def large() -> int:
        return sum(map(int, re.findall(r"AnonHugePages: +(\d+) kB", smaps.read_text())))

    tensors = [torch.arange(4_000_000), torch.ones(3), torch.empty(0)]
    addresses = [t.data_ptr() for t in tensors]
    use_huge_pages(tensors)
    assert [t.data_ptr() for t in tensors] == addresses
    assert torch.equal(tensors[0], torch.arange(4_000_000))
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    if "[never]" not in setting:
        assert large() >= 28 * 1024
