"""The compiled one-token step against the network itself, and what runs where it cannot be had."""

import copy
import os

import numpy as np
import pytest
import torch

from mobilellm.decoding import decoder as module
from mobilellm.decoding import library
from mobilellm.decoding.decoder import Decoder, decoder_of
from mobilellm.model.cache import KVCache
from mobilellm.model.config import ModelConfig
from mobilellm.model.generation import generate
from mobilellm.model.network import Network, RMSNorm
from mobilellm.quantize.activations import rounded_activations
from mobilellm.quantize.methods import quantized_network
from mobilellm.quantize.packed import pack
from mobilellm.quantize.quantized import Quantized
from mobilellm.runtimes.ours import NetworkSession

WIDTHS = {
    "vocab_size": 203,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KINDS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "one key head": {"num_key_value_heads": 1},
    "narrow heads": {"head_dim": 18, "qk_norm": True},
    "wide heads": {"head_dim": 80},
    "no whole vectors": {"hidden_size": 36, "intermediate_size": 50, "head_dim": 10},
    "norm without a gain": {"qk_norm": True, "qk_norm_gain": False},
    "own": {"layer_repeats": 2},
    "first": {"layer_repeats": 3, "shared_kv": "first"},
    "all over": {"layer_repeats": 2, "layer_order": "all_over"},
    "reverse": {"layer_repeats": 2, "layer_order": "reverse"},
    "windows": {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
}
IDS = [(7 * i * i + 3 * i + 5) % 203 for i in range(40)]


@pytest.fixture(autouse=True)
def compiler() -> None:
    if library.library() is None:
        pytest.skip(library.fault())


def network_of(**changes: object) -> Network:
    torch.manual_seed(0)
    network = Network(ModelConfig(**WIDTHS | changes)).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1.0, 0.3)
            else:
                parameter.normal_(0.0, 1.5 * parameter.shape[1] ** -0.5)
    return network


def steps(network: Network, prompt: int, threads: int = 2) -> torch.Tensor:
    """Logits behind each token after the first `prompt` ones, token by token."""
    decoder = decoder_of(network, threads)
    assert decoder is not None
    cache = KVCache(network.config, 1, len(IDS), like=network.norm.weight)
    found = []
    with torch.inference_mode():
        if prompt:
            network.hidden(torch.tensor([IDS[:prompt]]), cache)
        for token in IDS[prompt:]:
            found.append(torch.from_numpy(decoder.step(cache, token)))
    assert cache.length == len(IDS)
    return torch.stack(found)


def whole(network: Network) -> torch.Tensor:
    with torch.inference_mode():
        return network(torch.tensor([IDS]))[0]


def close(found: torch.Tensor, expected: torch.Tensor, of_spread: float = 2e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=of_spread * float(expected.std()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_that_of_the_network(kind: str) -> None:
    network = network_of(**KINDS[kind])
    expected = whole(network)
    for prompt, threads in ((0, 1), (23, 2), (23, 3)):
        close(steps(network, prompt, threads), expected[prompt:])


def test_threads_change_no_bit() -> None:
    network = network_of()
    assert torch.equal(steps(network, 9, 1), steps(network, 9, 3))


def test_threads_may_come_and_go_between_tokens() -> None:
    network = network_of()
    expected = torch.from_numpy(_logits(network, [1] * 300))
    assert torch.equal(torch.from_numpy(_logits(network, [1, 4, 1, 2, 3, 1] * 50)), expected)


def _logits(network: Network, threads: list[int]) -> np.ndarray:
    """Logits behind the last of as many tokens, each with so many threads."""
    decoder = decoder_of(network, max(threads))
    assert decoder is not None
    cache = KVCache(network.config, 1, 64, like=network.norm.weight)
    for number, one in enumerate(threads):
        cache.length %= 64
        decoder.pace.current = one
        logits = decoder.step(cache, number % 200)
    return logits


@pytest.mark.parametrize("kind", ["tied", "untied", "own", "first", "windows"])
@pytest.mark.parametrize("scheme", ["int4", "8da4w", "int8", "w8a8"])
def test_integers_give_the_numbers_of_the_grid(kind: str, scheme: str) -> None:
    """A packed network computes a prompt as the dequantized one does, to the bit. A rounded
    activation at the edge of two steps falls to either side, whoever computes it."""
    network = network_of(**KINDS[kind])
    quantized = quantized_network(network, scheme=scheme, method="round", embedding="int8")
    rounded_activations(network, quantized)
    expected = whole(network)
    held = copy.deepcopy(network)
    assert pack(held, quantized) == []
    assert sum(p.numel() for name, p in held.named_parameters() if "norm" not in name) == 0
    assert torch.equal(whole(held), expected)
    found = steps(held, 23)
    if scheme in ("int4", "int8"):
        close(found, expected[23:])
    else:
        assert (found - expected[23:]).std() < 0.1 * expected.std()


def test_rounded_activations_are_rounded() -> None:
    """The step of a scheme with 8-bit activations is nearer to the rounded network than to the
    plain one."""
    network = network_of()
    plain = copy.deepcopy(network)
    quantized = quantized_network(network, scheme="w8a8", method="round", embedding="int8")
    plain.load_state_dict(network.state_dict())
    rounded_activations(network, quantized)
    expected, unrounded = whole(network)[:1], whole(plain)[:1]
    pack(network, quantized)
    found = steps(network, 0)[:1]
    assert (found - expected).abs().max() < 0.05 * (found - unrounded).abs().max()


def test_bf16_weights_are_held_as_bf16() -> None:
    network = network_of(tie_word_embeddings=False)
    rounded = copy.deepcopy(network)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.copy_(parameter.bfloat16().float())
    pack(network, None, half=True)
    assert {b.dtype for name, b in network.named_buffers() if "numbers" in name} == {torch.bfloat16}
    assert torch.equal(whole(network), whole(rounded))
    close(steps(network, 23), whole(rounded)[23:])


def test_cached_generation_is_uncached_generation() -> None:
    """Greedy tokens by steps are those of the whole network computed anew for each."""
    network = network_of(layer_repeats=2)
    decoder = decoder_of(network)
    assert decoder is not None
    found = list(generate(network, IDS[:9], 20, *_greedy(), step=decoder.step))
    line = IDS[:9]
    for _ in range(20):
        with torch.inference_mode():
            line.append(int(network(torch.tensor([line]))[0, -1].argmax()))
    assert found == line[9:] == list(network.generate(IDS[:9], 20, *_greedy()))


def _greedy() -> tuple[object, list[int]]:
    from mobilellm.model.generation import Sampling

    return Sampling(), []


def test_a_decoder_follows_its_weights_and_takes_several_caches() -> None:
    network = network_of()
    decoder = decoder_of(network)
    assert decoder is not None
    for _ in range(2):
        for length in (1, 5):  # a longer cache, and one that comes after another
            cache = KVCache(network.config, 1, length, like=network.norm.weight)
            for token in IDS[:length]:
                logits = torch.from_numpy(decoder.step(cache, token))
            close(logits, whole(network)[length - 1])
        with torch.no_grad():
            network.layers[1].mlp.down_proj.weight.mul_(-1.5)


def test_a_forked_process_has_threads_of_its_own() -> None:
    network = network_of()
    decoder = decoder_of(network, 2)
    assert decoder is not None
    cache = KVCache(network.config, 1, 4, like=network.norm.weight)
    first = decoder.step(cache, 5)
    child = os.fork()
    if child == 0:
        cache.length = 0
        os._exit(0 if (decoder.step(cache, 5) == first).all() else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_what_the_step_does_not_know_is_left_to_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Other(RMSNorm):
        pass

    network = network_of()
    network.norm = Other(64, 1e-5)
    assert decoder_of(network) is None
    assert decoder_of(network_of().double()) is None
    monkeypatch.setattr(module, "library", lambda: None)
    session = NetworkSession(network_of())
    assert session.decoder is None
    logits = [session.feed([token]) for token in IDS]
    close(torch.from_numpy(logits[-1]), whole(network_of())[-1])


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_torchs_kernels_run_where_there_is_no_compiler(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their products are in bf16, so that logits agree to bf16's 8 bits; a prompt is exact."""
    monkeypatch.setattr(module, "library", lambda: None)
    network = network_of(vocab_size=208)
    quantized: Quantized = quantized_network(network, scheme, "round", "int8")
    expected = whole(network)
    assert pack(network, quantized, kernels=True) == []
    assert torch.equal(whole(network), expected)
    session = NetworkSession(network)
    session.feed(IDS[:23])
    found = torch.stack([torch.from_numpy(session.feed([token])) for token in IDS[23:]])
    assert 0 < (found - expected[23:]).std() < 0.03 * expected.std()


def test_matrices_that_torchs_kernel_does_not_take_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "library", lambda: None)
    network = network_of(num_attention_heads=16, num_key_value_heads=1, head_dim=2)  # 36 rows
    quantized = quantized_network(network, "int4", "round", "int8")
    expected = whole(network)[:1]
    unfit = pack(network, quantized, kernels=True)
    assert unfit == ["layers.0.self_attn.qkv_proj", "layers.1.self_attn.qkv_proj"]
    found = torch.from_numpy(NetworkSession(network).feed(IDS[:1]))
    assert (found - expected[0]).std() < 0.03 * expected.std()


def test_the_description_is_as_long_as_in_c() -> None:
    """A field that is on one side alone would shift all that follow."""
    sizes = {"Matrix": module._Matrix, "Block": module._Block, "Network": module._Network}
    assert {name: module.ctypes.sizeof(kind) for name, kind in sizes.items()} == {
        "Matrix": 48,
        "Block": 4 * 8 + 4 * 48,
        "Network": 7 * 8 + 8 + 8 + 2 * 48 + 2 * 8,
    }
    assert isinstance(decoder_of(network_of()), Decoder)
