"""One small random model of each baseline family scores the same through our engine and the
harness's own backend."""

import copy
from pathlib import Path

import pytest
import torch
from tests.tasks.harness_peer import PAIRS, agree, harness_results, items_of

from mobilellm.errors import UserError
from mobilellm.tasks.engine import Engine
from mobilellm.tasks.requests import encode
from mobilellm.tasks.transformers_backend import load_transformers
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe

SIZES = {
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 24,
    },
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 64,
        "window_size": 16,
        "attention_types": [[["global", "local"], 1]],
    },
    "gpt_neox": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "qwen2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    },
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 64,
        "attention_bias": True,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}


@pytest.fixture(scope="module")
def tokenizer(sample_text: str) -> Tokenizer:
    return train_bpe([sample_text[:40_000]], 400)


def model_of(kind: str, tokenizer: Tokenizer, folder: Path) -> Path:
    """A random model of a family with weights large enough for choices to differ."""
    import transformers

    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=48,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **SIZES[kind],
    )
    transformers.AutoModelForCausalLM.from_config(config).eval().save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.mark.parametrize("kind", [kind for kind in SIZES if kind != "mamba"])
@pytest.mark.parametrize("batch_tokens", [150, 4000])
def test_every_family_scores_as_in_the_harness(
    kind: str, batch_tokens: int, tokenizer: Tokenizer, sample_text: str, tmp_path: Path
) -> None:
    backend, encoder = load_transformers(model_of(kind, tokenizer, tmp_path))
    assert backend.shares
    drawn, keys = items_of(sample_text, 20, 7)
    pairs = (
        PAIRS + drawn if kind != "bloom" else drawn
    )  # without a limit of its own the harness gives BLOOM 2048
    requests = encode(pairs, encoder, backend.max_length)
    found = Engine(backend, batch_tokens).score(
        requests, [*range(len(drawn) - len(pairs), 0), *keys]
    )
    agree(found, harness_results(tmp_path, pairs))


def test_a_model_without_a_cache_to_share_reads_everything(
    tokenizer: Tokenizer, sample_text: str, tmp_path: Path
) -> None:
    backend, encoder = load_transformers(model_of("mamba", tokenizer, tmp_path))
    assert not backend.shares
    drawn, keys = items_of(sample_text, 6, 8)
    found = Engine(backend).score(encode(drawn, encoder, backend.max_length), keys)
    agree(found, harness_results(tmp_path, drawn))


def test_missing_weights_are_an_error_and_not_drawn_at_random(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = model_of("opt", tokenizer, tmp_path)
    weights = load_file(folder / "model.safetensors")
    lost = sorted(name for name in weights if "fc1" in name)[0]
    save_file(
        {name: tensor for name, tensor in weights.items() if name != lost},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match=r"1 weights of a opt model are missing \(.*fc1"):
        load_transformers(folder)


def test_mobillama_has_one_feed_forward_for_all_layers(
    tokenizer: Tokenizer, sample_text: str, tmp_path: Path
) -> None:
    import transformers
    from safetensors.torch import save_model

    from mobilellm.files import read_json, write_json
    from mobilellm.interop.load import load
    from mobilellm.tasks.engine import NetworkBackend
    from mobilellm.tasks.requests import OwnEncoder

    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=48,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
    )
    peer, folder = transformers.LlamaForCausalLM(config).eval(), tmp_path / "mobillama"
    for layer in peer.model.layers:
        layer.mlp = peer.model.layers[0].mlp
    config.save_pretrained(folder)
    tokenizer.save(folder)
    save_model(peer, str(folder / "model.safetensors"))  # which stores a shared tensor once
    with pytest.raises(UserError, match="mlp"):
        load(folder)
    values = read_json(folder / "config.json")
    write_json(
        folder / "config.json",
        values | {"auto_map": {"AutoModelForCausalLM": "modelling_mobillama.LlamaForCausalLM"}},
    )
    loaded = load(folder)
    assert loaded.tokenizer is not None
    drawn, keys = items_of(sample_text, 10, 9)
    engine = Engine(NetworkBackend(loaded.network))
    found = engine.score(encode(drawn, OwnEncoder(loaded.tokenizer), 48), keys)
    # The harness cannot run the folder without running its code: it gets the same network written
    # out.
    for layer in peer.model.layers:
        layer.mlp = copy.deepcopy(layer.mlp)
    plain = tmp_path / "plain"
    peer.save_pretrained(plain)
    tokenizer.save(plain)
    agree(found, harness_results(plain, drawn))


def test_what_transformers_cannot_read_is_one_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    with pytest.raises(UserError, match="has no tokenizer"):
        load_transformers(tmp_path)
    tokenizer.save(tmp_path)
    with pytest.raises(UserError, match="type opt that transformers cannot read"):
        load_transformers(tmp_path)
