"""Activations on 256 steps, as onnxruntime and the other runtimes have them."""

import dataclasses

import numpy as np
import pytest
import torch
from tests.model.shapes import WIDTH_64
from tests.quantize.test_methods import made

from mobilellm.quantize.activations import RoundedNorm, fake_int8, rounded_activations
from mobilellm.quantize.methods import quantized_network

IDS = torch.arange(20)[None] * 37 % WIDTH_64.vocab_size


def test_a_token_is_rounded_as_onnxruntime_rounds_it() -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
        ],
        "token",
        [helper.make_tensor_value_info("x", kind.FLOAT, [None])],
        [helper.make_tensor_value_info("y", kind.FLOAT, [None])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    torch.manual_seed(0)
    x = torch.randn(6, 64) * torch.tensor([0.01, 1, 1, 30, 1, 1])[:, None]
    x[1], x[2], x[5] = x[1].abs(), -x[2].abs(), 0.0
    found = fake_int8(x)
    for row, ours in zip(x.numpy(), found.numpy(), strict=True):
        (theirs,) = session.run(None, {"x": row})
        assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(row).max()
    assert len(found[0].unique()) > 20


@pytest.mark.parametrize("shape", ["plain", "untied", "first"])
@torch.no_grad()
def test_every_product_on_the_grid_sees_rounded_inputs(shape: str) -> None:
    changes = {
        "plain": {},
        "untied": {"tie_word_embeddings": False},
        "first": {"layer_repeats": 2, "shared_kv": "first"},
    }[shape]
    network = made(**changes)
    for parameter in network.parameters():
        parameter.mul_(4)
    quantized = quantized_network(network, "w8a8", "round")
    exact = network(IDS)
    names = [name for name, _ in network.named_parameters()]
    plain = rounded_activations(network, dataclasses.replace(quantized, scheme="int8"))
    assert torch.equal(plain(IDS), exact)
    # By hand: the inputs of every module, rounded by hooks, and the last norm's result.
    by_hand = made(**changes)
    by_hand.load_state_dict(network.state_dict())
    for name, module in by_hand.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda module, given: (fake_int8(given[0]),))
            module.first = lambda x, rows, old=module.first: old(fake_int8(x), rows)
    by_hand.norm.register_forward_hook(lambda module, given, result: fake_int8(result))
    rounded = rounded_activations(network, quantized)
    assert rounded is network
    assert [name for name, _ in network.named_parameters()] == names
    found = rounded(IDS)
    assert torch.equal(found, by_hand(IDS))
    assert 1e-4 < float((found - exact).abs().max()) < float(exact.std())
    # Asked for twice, it is done once.
    assert torch.equal(rounded_activations(network, quantized)(IDS), found)


def test_a_float_output_layer_is_left_alone() -> None:
    network = made()
    quantized = quantized_network(network, "8da4w", "round", embedding="float")
    assert not isinstance(rounded_activations(network, quantized).norm, RoundedNorm)
