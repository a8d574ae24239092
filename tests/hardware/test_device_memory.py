"""What a device has and held in memory."""

import subprocess
import sys

import pytest
import torch

from mobilellm.hardware.description import describe
from mobilellm.hardware.device_memory import is_out_of_memory, peak_memory, total_memory

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
