"""A quantized model as GGUF: the file holds the grid's own integers and scales."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.model.shapes import WIDTH_64

from mobilellm.errors import UserError
from mobilellm.families.names import gguf_name, reordered
from mobilellm.interop.folder import save_checkpoint
from mobilellm.interop.load import load
from mobilellm.model.network import Network
from mobilellm.model.weights import to_named
from mobilellm.quantize.methods import quantized_network
from mobilellm.workflows.convert import convert


def saved(
    folder: Path, scheme: str = "int4", embedding: str = "int8", **changes: Any
) -> tuple[Path, Network]:
    torch.manual_seed(0)
    network = Network(dataclasses.replace(WIDTH_64, **changes)).eval()
    quantized = quantized_network(network, scheme, "search", embedding)
    folder.mkdir()
    save_checkpoint(folder, network, None, {})
    quantized.save(folder, network.config)
    return folder, network


def tensors(path: Path) -> dict[str, Any]:
    import gguf

    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("scheme", "of_blocks"), [("int4", "Q4_0"), ("int8", "Q8_0"), ("w8a8", "Q8_0")]
)
def test_llama_cpp_s_own_dequantization_gives_the_very_numbers(
    tmp_path: Path, scheme: str, of_blocks: str, tied: bool
) -> None:
    import gguf

    folder, network = saved(tmp_path / "q", scheme, tie_word_embeddings=tied)
    result = convert(folder, tmp_path / "q.gguf", "gguf")
    assert (result.precision, result.largest_difference, result.notes) == (of_blocks, 0.0, [])
    found = tensors(tmp_path / "q.gguf")
    for name, wanted in to_named(network.config, dict(network.named_parameters())).items():
        tensor = found[gguf_name(name)]
        of_vocabulary = name in ("model.embed_tokens.weight", "lm_head.weight")
        kind = "F32" if wanted.ndim == 1 else "Q8_0" if of_vocabulary else of_blocks
        assert tensor.tensor_type.name == kind, name
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        expected = reordered(network.config, name, wanted, to="neighbors").numpy()
        assert np.array_equal(values, expected), name


def test_the_bytes_of_a_block_are_llama_cpp_s(tmp_path: Path) -> None:
    """Where a block's largest number is at -8, llama.cpp's own rounding has the same bytes."""
    import gguf

    from mobilellm.interop.gguf_blocks import q4_0, q8_0
    from mobilellm.quantize.grid import GridWeight

    torch.manual_seed(1)
    integers = torch.randint(-7, 8, (5, 64), dtype=torch.int8)
    integers[:, ::32] = -8
    weight = GridWeight(integers=integers, scales=torch.tensor([[0.5, 0.25]] * 5), bits=4)
    values = weight.dequantized().numpy()
    assert np.array_equal(
        q4_0(weight), gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_0)
    )
    integers = torch.randint(-126, 127, (5, 64), dtype=torch.int8)
    integers[:, ::32] = 127
    weight = GridWeight(integers=integers, scales=torch.full((5, 1), 0.5), bits=8)
    values = weight.dequantized().numpy()
    assert np.array_equal(
        q8_0(weight), gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    )


def test_four_bits_fit_into_eight_and_into_float(tmp_path: Path) -> None:
    folder, network = saved(tmp_path / "q")
    for precision in ("Q8_0", "F32"):
        result = convert(folder, tmp_path / f"{precision}.gguf", "gguf", precision=precision)
        assert result.largest_difference == 0.0
        read = dict(load(tmp_path / f"{precision}.gguf").network.named_parameters())
        for name, parameter in network.named_parameters():
            assert torch.equal(read[name], parameter), name


def test_eight_bits_are_not_rounded_once_more(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "q", "int8")
    with pytest.raises(UserError, match="quantized to 8 bits already; write Q8_0"):
        convert(folder, tmp_path / "q.gguf", "gguf", precision="Q4_0")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_what_quantizing_left_alone_stays_exact(tmp_path: Path) -> None:
    folder, network = saved(tmp_path / "q", embedding="float")
    result = convert(folder, tmp_path / "q.gguf", "gguf")
    assert result.notes == ["token_embd.weight is F32: quantizing left it as it is"]
    assert result.largest_difference == 0.0
    assert torch.equal(
        load(tmp_path / "q.gguf").network.embed_tokens.weight, network.embed_tokens.weight
    )


def test_rows_that_blocks_do_not_fit_stay_exact(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "q", "int8", intermediate_size=100)
    result = convert(folder, tmp_path / "q.gguf", "gguf")
    assert "blk.0.ffn_down.weight is F32: its rows of 100 do not divide by 32" in result.notes
    assert result.largest_difference == 0.0


def test_a_shared_block_is_written_for_each_application_and_that_is_said(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "q", layer_repeats=2)
    result = convert(folder, tmp_path / "q.gguf", "gguf")
    assert result.largest_difference == 0.0
    assert any(
        "gguf cannot store one once that is applied 2 times" in note for note in result.notes
    )
    found = tensors(tmp_path / "q.gguf")
    first, second = (found[f"blk.{i}.attn_q.weight"].data for i in (0, 1))
    assert np.array_equal(first, second)


def test_a_file_that_reads_back_otherwise_never_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mobilellm.interop.gguf_writer as module

    folder, _ = saved(tmp_path / "q")
    honest = module.BLOCKS["Q4_0"]

    def one_bit_off(weight: Any) -> np.ndarray:
        rows = honest(weight)
        rows[0, 2] ^= 1
        return rows

    monkeypatch.setitem(module.BLOCKS, "Q4_0", one_bit_off)
    with pytest.raises(UserError, match="reads back with logits that differ"):
        convert(folder, tmp_path / "q.gguf", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
