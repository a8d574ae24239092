"""The network against transformers, the original's reference tensors, and itself with a cache."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from mobilellm.errors import UserError
from mobilellm.model.cache import KVCache
from mobilellm.model.config import ModelConfig
from mobilellm.model.generation import Sampling, _nucleus, draw
from mobilellm.model.network import Network
from mobilellm.model.weights import load_weights, stacks, to_named

SCALED = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
}
SHAPES = [
    {"num_attention_heads": 3, "num_key_value_heads": 1},
    {"num_attention_heads": 6, "num_key_value_heads": 2},
    {"num_attention_heads": 4, "num_key_value_heads": 4},
    {"num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": False},
    {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    {"num_attention_heads": 6, "num_key_value_heads": 2, "qk_norm": True},
]


def random_network(config: ModelConfig) -> Network:
    """Weights large enough that an error would show, norms away from one."""
    torch.manual_seed(1)
    network = Network(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.08)
    return network.eval()


def llama(network: Network):
    """transformers' network with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    values = network.config.to_dict()
    scaling = values.pop("rope_scaling")
    theta = values.pop("rope_theta")
    rope = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    kind = (
        (Qwen3ForCausalLM, Qwen3Config)
        if network.config.qk_norm
        else (LlamaForCausalLM, LlamaConfig)
    )
    theirs = kind[0](kind[1](**values, rope_parameters=rope)).eval()
    named = to_named(network.config, dict(network.named_parameters()))
    missing, unexpected = theirs.load_state_dict(named, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return theirs


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers_with_and_without_cache(shape: dict) -> None:
    network = random_network(ModelConfig(**SCALED | shape))
    ids = torch.randint(0, 320, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, ours = llama(network)(ids).logits, network(ids)
        cache = KVCache(network.config, 2, 100, like=network.embed_tokens.weight)
        cuts = [0, 40, 57, *range(58, 101)]
        stepped = torch.cat(
            [network(ids[:, a:b], cache) for a, b in itertools.pairwise(cuts)], dim=1
        )
    scale = theirs.std()
    assert (ours - theirs).abs().max() < 1e-5 * max(1, scale)
    assert (stepped - theirs).abs().max() < 1e-5 * max(1, scale)


@pytest.mark.parametrize("repeats", [2, 3])
@pytest.mark.parametrize("shared_kv", ["own", "first"])
def test_cache_equals_no_cache_when_layers_are_shared(repeats: int, shared_kv: str) -> None:
    shape = {"num_attention_heads": 6, "num_key_value_heads": 2}
    network = random_network(
        ModelConfig(**SCALED, **shape, layer_repeats=repeats, shared_kv=shared_kv)
    )
    ids = torch.randint(0, 320, (2, 60))
    with torch.no_grad():
        cache = KVCache(network.config, 2, 60, like=network.embed_tokens.weight)
        stepped = torch.cat(
            [
                network(ids[:, :30], cache),
                *(network(ids[:, i : i + 1], cache) for i in range(30, 60)),
            ],
            dim=1,
        )
        assert (network(ids) - stepped).abs().max() < 2e-5
    assert cache.store.shape[1] == 3 * (repeats if shared_kv == "own" else 1)


def test_the_two_kinds_of_sharing_are_different_networks() -> None:
    shape = {"num_attention_heads": 6, "num_key_value_heads": 2, "layer_repeats": 2}
    own, first = (
        random_network(ModelConfig(**SCALED, **shape, shared_kv=kind)) for kind in ("own", "first")
    )
    ids = torch.randint(0, 320, (1, 20))
    with torch.no_grad():
        assert (own(ids) - first(ids)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("plain", {}),
        ("layer_sharing", {"layer_repeats": 2, "shared_kv": "own"}),
        ("layer_sharing_cache", {"layer_repeats": 2, "shared_kv": "first"}),
    ],
)
def test_reference_tensors_of_the_original(case: str, changes: dict) -> None:
    """Logits, loss and gradients that the original's own code gave on random weights."""
    from safetensors.torch import load_file

    folder = Path(__file__).parent.parent / "parity"
    meta, expected = (
        json.loads((folder / "meta.json").read_text()),
        load_file(folder / "expected.safetensors"),
    )
    config = ModelConfig.from_dict({**meta["config"], "tie_word_embeddings": True, **changes})
    network = Network(config)
    load_weights(network, load_file(folder / "weights.safetensors"))
    ids = expected["input_ids"]
    logits = network(ids)
    assert (logits - expected[f"{case}.logits"]).abs().max() < 1e-5
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    loss = network.loss(ids, targets)
    assert loss.item() == pytest.approx(meta["cases"][case]["loss"], abs=2e-6)
    loss.backward()
    gradients = to_named(config, {name: p.grad for name, p in network.named_parameters()})
    compared = [key for key in expected if key.startswith(f"{case}.grad.")]
    assert len(compared) == 5
    for key in compared:
        gradient, wanted = gradients[key.removeprefix(f"{case}.grad.")], expected[key]
        assert (gradient - wanted).abs().max() < 1e-5 * wanted.abs().max() + 1e-8, key


def test_names_on_disk_round_trip() -> None:
    network = random_network(ModelConfig(**SCALED, num_attention_heads=6, num_key_value_heads=2))
    copy = Network(network.config)
    load_weights(copy, to_named(network.config, dict(network.named_parameters())))
    for (name, ours), (_, theirs) in zip(
        network.named_parameters(), copy.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert set(stacks(network.config)) == {name for name, _ in network.named_parameters()}


def test_every_wrong_tensor_is_named() -> None:
    network = random_network(ModelConfig(**SCALED, num_attention_heads=6, num_key_value_heads=2))
    named = to_named(network.config, dict(network.named_parameters()))
    named["extra"] = named.pop("model.norm.weight")
    named["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    with pytest.raises(UserError) as caught:
        load_weights(network, named, "file")
    for word in (
        "missing model.norm.weight",
        "unexpected extra",
        "model.layers.1.mlp.up_proj.weight (3, 3) instead of (256, 96)",
    ):
        assert word in str(caught.value)


def test_greedy_generation_equals_transformers() -> None:
    network = random_network(ModelConfig(**SCALED, num_attention_heads=6, num_key_value_heads=2))
    prompt = [5, 17, 200]
    theirs = llama(network).generate(
        torch.tensor([prompt]),
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert list(network.generate(prompt, 40)) == theirs[0, 3:].tolist()


def test_generation_stops_at_eos_and_is_seeded() -> None:
    network = random_network(ModelConfig(**SCALED, num_attention_heads=6, num_key_value_heads=2))
    warm = Sampling(temperature=1.0, seed=3)
    tokens = list(network.generate([1], 30, warm))
    assert tokens == list(network.generate([1], 30, warm))
    assert tokens != list(network.generate([1], 30, Sampling(temperature=1.0, seed=4)))
    first = tokens.index(tokens[10])
    assert list(network.generate([1], 30, warm, stop=[tokens[10]])) == tokens[:first]


def test_sampling_cuts_match_transformers() -> None:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 3
    cut = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(10)(None, logits / 0.7))
    allowed = set(torch.isfinite(cut[0]).nonzero().flatten().tolist())
    generator = torch.Generator().manual_seed(1)
    drawn = {
        draw(logits[0], Sampling(temperature=0.7, top_k=10, top_p=0.8), generator)
        for _ in range(500)
    }
    assert drawn == allowed


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"temperature": float("nan")}]
)
def test_bad_sampling_is_refused(bad: dict) -> None:
    with pytest.raises(UserError):
        Sampling(**bad)


def test_a_prompt_that_does_not_fit_is_refused() -> None:
    network = random_network(ModelConfig(**SCALED, num_attention_heads=6, num_key_value_heads=2))
    with pytest.raises(UserError, match="exceed the model's context of 128"):
        list(network.generate([1] * 100, 29))
    with pytest.raises(UserError, match="outside the vocabulary"):
        list(network.generate([320], 1))
    with pytest.raises(UserError, match="empty"):
        list(network.generate([], 1))


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("mass", [0.1, 0.5, 0.95, 0.9999])
def test_top_p_keeps_what_sorting_all_tokens_would(spread: float, mass: float) -> None:
    """Also where they are more than the few that are looked at first."""
    for size in (50, 5000):
        torch.manual_seed(size)
        logits = torch.randn(size, dtype=torch.float64) * spread
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(0)
        expected = order[probabilities.cumsum(0) - probabilities < mass]
        found = _nucleus(logits, mass)
        assert set(found.isfinite().nonzero().flatten().tolist()) == set(expected.tolist())
        assert torch.equal(found[expected], logits[expected])
