"""Pickles of weights: plain tensors are read, everything else is one line of ours."""

import io
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from mobilellm.errors import UserError
from mobilellm.interop.pickled import read_pickle

NAMED = {"a.weight": torch.randn(4, 3), "b.weight": torch.arange(3.0)}


def saved(folder: Path, value: Any, **settings: Any) -> Path:
    torch.save(value, folder / "pytorch_model.bin", **settings)
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_tables_of_tensors_are_read(tmp_path: Path, archive: bool, kind: type) -> None:
    named = kind(NAMED)
    named["tied"] = named["a.weight"]
    named["parameter"] = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    named["view"] = torch.arange(12.0).view(4, 3)[1:3]
    path = saved(tmp_path, named, _use_new_zipfile_serialization=archive)
    found = read_pickle(path)
    assert found.keys() == named.keys()
    assert all(torch.equal(found[name], named[name]) for name in named)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(1).expand(10**6, 10**6), "larger than what is stored of it"),
        (torch.ones(4, device="meta"), "holds more than tensors"),
        (torch.ones(4, 4).to_sparse(), "holds more than tensors"),
        (3, "no tensor"),
        ({"x": torch.ones(2)}, "no tensor"),
    ],
)
def test_what_is_no_plain_tensor_is_refused(tmp_path: Path, value: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read_pickle(saved(tmp_path, NAMED | {"x": value}))
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)  # no advice of torch's to load it all the same


class Evil:
    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> Any:
        return Path.touch, (self.touched,)


@pytest.mark.parametrize("archive", [True, False])
def test_code_is_named_and_not_run(tmp_path: Path, archive: bool) -> None:
    path = saved(tmp_path, {"x": Evil(tmp_path / "ran")}, _use_new_zipfile_serialization=archive)
    with pytest.raises(UserError, match=r"not opened \(it names 'pathlib Path.touch|getattr'"):
        read_pickle(path)
    assert not (tmp_path / "ran").exists()


def test_an_archive_unpacks_to_no_more_than_it_is(tmp_path: Path) -> None:
    path, out = saved(tmp_path, NAMED), io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            data = bytes(64 << 20) if record.filename.endswith("data/0") else old.read(record)
            new.writestr(record.filename, data)
    path.write_bytes(out.getvalue())
    with pytest.raises(UserError, match="unpacks to more than the file holds"):
        read_pickle(path)
