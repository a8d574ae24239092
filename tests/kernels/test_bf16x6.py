"""Products by AMX: of float32 no less exact than its own, of bfloat16 summed in float32, at every
edge, beside torch's own use of the same units."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mobilellm.kernels import amx
from mobilellm.kernels.bf16x6 import fault, multiply

pytestmark = pytest.mark.skipif(bool(fault()), reason=fault())

# Edges of tiles, panels and blocks; both depths of a block; C within and past the caches.
SHAPES = [
    (1, 1, 1), (1, 64, 1), (2, 1, 3), (16, 32, 16), (33, 31, 15), (70, 50, 45), (5, 2000, 7),
    (32, 1025, 320), (300, 400, 1100), (600, 96, 512), (520, 1100, 560), (600, 96, 511),
]  # fmt: skip


def forms(t: Tensor) -> list[Tensor]:
    """The same numbers row after row and column after column."""
    return [t, t.t().contiguous().t()]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_as_exact_as_float32(shape: tuple[int, int, int]) -> None:
    M, K, N = shape
    torch.manual_seed(0)
    a, b = torch.randn(M, K), torch.randn(K, N)
    exact = a.double() @ b.double()
    bound = (a.double().abs() @ b.double().abs()) * 2**-22
    before = torch.randn(M, N)
    for x in forms(a):
        for y in forms(b):
            found = multiply(x, y)
            assert ((found - exact).abs() <= bound).all()
            assert (found - exact).norm() <= 3.5e-7 * exact.norm()
            to = before.clone()
            assert multiply(x, y, out=to, add=True) is to
            torch.testing.assert_close(to, (exact + before).float(), rtol=1e-5, atol=1e-4)
            to.fill_(float("nan"))  # what is not added to is not read
            assert torch.equal(multiply(x, y, out=to), found)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_bfloat16_are_summed_in_float32(shape: tuple[int, int, int]) -> None:
    M, K, N = shape
    torch.manual_seed(0)
    a, b = torch.randn(M, K).bfloat16(), torch.randn(K, N).bfloat16()
    exact = a.double() @ b.double()
    before = torch.randn(M, N)
    for x in forms(a):
        for y in forms(b):
            found = multiply(x, y)
            assert found.dtype == torch.float32
            assert (found - exact).norm() <= 1e-6 * exact.norm()
            to = before.clone()
            multiply(x, y, out=to, add=True)
            torch.testing.assert_close(to, (exact + before).float(), rtol=1e-5, atol=1e-4)


def test_numbers_of_all_sizes_keep_their_digits() -> None:
    """Each product of two numbers is right by itself, whatever stands beside it."""
    torch.manual_seed(0)
    a = torch.randn(64, 40) * torch.exp2(torch.randint(-40, 40, (64, 40)).float())
    b = torch.randn(40, 48) * torch.exp2(torch.randint(-40, 40, (40, 48)).float())
    exact, of_sizes = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert ((multiply(a, b) - exact).abs() <= of_sizes * 2**-22).all()


def test_views_that_skip_are_taken() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(40, 2 * 50)[:, ::2], torch.randn(50, 90)[:, 20:60]
    torch.testing.assert_close(multiply(a, b), a @ b, rtol=1e-5, atol=1e-5)
    row = torch.randn(1, 50).expand(7, 50)
    torch.testing.assert_close(multiply(row, b), row @ b, rtol=1e-5, atol=1e-5)


def test_nothing_to_sum_is_zero() -> None:
    assert torch.equal(multiply(torch.ones(3, 0), torch.ones(0, 2)), torch.zeros(3, 2))
    assert multiply(torch.ones(0, 3), torch.ones(3, 2)).shape == (0, 2)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_does_not_vanish(value: float) -> None:
    a, b, to = torch.ones(20, 40), torch.ones(40, 20), torch.ones(20, 20)
    a[3, 4] = b[5, 7] = to[11, 13] = value
    touched = torch.zeros(20, 20, dtype=torch.bool)
    touched[3] = touched[:, 7] = True
    found = multiply(a, b)
    assert torch.equal(found.isfinite(), ~touched)
    assert (found[~touched] == 40).all()
    touched[11, 13] = True
    multiply(a, b, out=to, add=True)
    assert torch.equal(to.isfinite(), ~touched)
    assert (to[~touched] == 41).all()


def test_what_does_not_fit_is_refused() -> None:
    a, b = torch.ones(3, 16), torch.ones(16, 6)
    for x, y in ((a, b[:8]), (a.double(), b), (a, b.double()), (a.bfloat16(), b), (a.half(),) * 2):
        with pytest.raises(RuntimeError, match="times"):
            multiply(x, y)
    for to in (torch.ones(6, 3), torch.ones(3, 6).double(), torch.ones(6, 3).t()):
        with pytest.raises(RuntimeError, match="into"):
            multiply(a, b, out=to)


def test_bits_do_not_depend_on_threads() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(300, 400), torch.randn(400, 300)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append((multiply(a, b), multiply(a.t().contiguous().t(), b)))
    finally:
        torch.set_num_threads(threads)
    for along, across in found[1:]:
        assert torch.equal(along, found[0][0])
        assert torch.equal(across, found[0][1])


def test_torchs_use_of_the_same_units_goes_on() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(200, 300), torch.randn(300, 100)
    half = a.bfloat16(), b.bfloat16()
    expected, ours = half[0] @ half[1], multiply(a, b)
    for _ in range(3):
        assert torch.equal(half[0] @ half[1], expected)
        assert torch.equal(multiply(a, b), ours)


def test_machines_without_it_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    amx.amx_library.cache_clear()
    monkeypatch.setattr(amx, "processor", lambda: "flags : avx2")
    try:
        assert fault() == "this processor has no AMX"
    finally:
        amx.amx_library.cache_clear()
