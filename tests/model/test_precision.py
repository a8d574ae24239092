"""The one home of the products' precision: what it sets, and that no other module decides by
name."""

import ast
import json
from pathlib import Path

import pytest
import torch

import mobilellm
from mobilellm.errors import UserError
from mobilellm.hardware import probes
from mobilellm.model.precision import Precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "dtype", "size"), [("fp32", torch.float32, 4), ("bf16", torch.bfloat16, 2)]
)
def test_products_run_in_the_type_that_the_name_says(
    name: str, dtype: torch.dtype, size: int
) -> None:
    precision = Precision(name)
    assert (precision.dtype, precision.bytes) == (dtype, size)
    x = torch.ones(2, 2)
    with precision.autocast(CPU):
        assert (x @ x).dtype == dtype
    assert (x @ x).dtype == torch.float32


def test_a_precision_is_written_as_recipes_have_it() -> None:
    assert [f"{p}" for p in Precision] == [str(p) for p in Precision] == ["fp32", "bf16"]
    assert json.dumps(list(Precision)) == '["fp32", "bf16"]'


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"bf61.*") as found:
        Precision("bf61")
    assert "bf16" in f"{found.value} {found.value.hint}"


@pytest.mark.parametrize(("fast", "wanted"), [(True, Precision.BF16), (False, Precision.FP32)])
def test_what_is_fast_is_asked_of_the_device(
    monkeypatch: pytest.MonkeyPatch, fast: bool, wanted: Precision
) -> None:
    asked = []
    monkeypatch.setattr(probes, "bf16_is_fast", lambda device: asked.append(device) or fast)
    assert Precision.fast_on(CPU) is wanted
    assert asked == [CPU]


def test_no_module_compares_with_the_name_of_a_precision() -> None:
    names = {p.value for p in Precision}
    for path in Path(mobilellm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                found = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)} & names
                assert not found, f"{path}:{node.lineno} compares with {found}"
