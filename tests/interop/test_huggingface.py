"""Hugging Face folders: the original repository's, transformers', and what is wrong with some."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.interop.networks import IDS, checkpoint, logits, network, transformers_llama

from mobilellm.errors import UserError
from mobilellm.interop.load import load
from mobilellm.tokenizer.tokenizer import train_bpe


class TestOriginal:
    """The original repository's checkpoints: a tie of their own, and sharing of an unnamed kind."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        model = network(layer_repeats=2)
        folder = checkpoint(tmp_path / "original", model)
        config = model.config.to_dict()
        config.update(
            tie_word_embeddings=False,
            share_embedding=True,
            layer_sharing=True,
            use_cache=False,
            model_type="mobilellm",
        )
        for key in ("layer_repeats", "shared_kv"):
            config.pop(key)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def test_the_tie_is_honoured_and_the_kind_has_to_be_told(self, folder: Path) -> None:
        with pytest.raises(UserError, match="--shared-kv own or --shared-kv first"):
            load(folder)
        own, first = load(folder, shared_kv="own"), load(folder, shared_kv="first")
        assert own.config.tie_word_embeddings
        assert (own.config.shared_kv, first.config.shared_kv) == ("own", "first")
        assert torch.equal(logits(own.network), logits(network(layer_repeats=2)))
        assert not torch.allclose(logits(own.network), logits(first.network))

    def test_a_head_that_contradicts_the_tie_is_refused(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors")
        load(folder, shared_kv="own")
        tensors["lm_head.weight"][5] += 1
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(UserError, match="differs from the embedding"):
            load(folder, shared_kv="own")

    def test_a_lost_embedding_is_refused(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        embedding = tensors.pop("model.embed_tokens.weight")
        save_file(tensors | {"lm_head.weight": embedding}, folder / "model.safetensors")
        with pytest.raises(UserError, match="only an lm_head"):
            load(folder, shared_kv="own")
        save_file(
            tensors | {"model.embed_tokens.weight": torch.zeros_like(embedding)},
            folder / "model.safetensors",
        )
        with pytest.raises(UserError, match="never initialized"):
            load(folder, shared_kv="own")

    def test_measuring_tells_what_weights_were_trained_for(
        self, tmp_path: Path, small_data: Path
    ) -> None:
        from mobilellm.data.token_folder import TokenFolder
        from mobilellm.evaluate.sharing_kind import measure_sharing
        from mobilellm.recipe.recipe import (
            DataSection,
            ModelSection,
            OptimizerSection,
            Recipe,
            TrainSection,
        )
        from mobilellm.train.start import train

        data = TokenFolder.open(small_data)
        held_out = data.tokens("held_out")
        text = data.tokenizer().decode(held_out.read(0, len(held_out) - 1).tolist())
        narrow = {
            "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2,
            "num_key_value_heads": 1, "num_hidden_layers": 2, "layer_repeats": 2,
        }  # fmt: skip
        for kind in ("own", "first"):
            recipe = Recipe(
                model=ModelSection(preset="1M", override=narrow | {"shared_kv": kind}),
                data=DataSection(path=str(small_data), sequence_length=64),
                train=TrainSection(steps=40, batch_tokens=512, precision="fp32", compile="off"),
                optimizer=OptimizerSection(name="muon", warmup_steps=5, learning_rate=5e-3),
            )
            loaded = load(train(tmp_path / kind, recipe).checkpoint)
            assert measure_sharing(loaded.network, loaded.tokenizer, text)["trained_for"] == kind


class TestHuggingFaceIn:
    """Folders as others write them."""

    def test_sharded_pickled_and_half_precision(self, tmp_path: Path) -> None:
        model = network(tie_word_embeddings=False)
        folder = checkpoint(tmp_path / "m", model)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        parts = {
            "model-00001-of-00002.safetensors": names[::2],
            "model-00002-of-00002.safetensors": names[1::2],
        }
        for file, part in parts.items():
            save_file({n: tensors[n] for n in part}, folder / file)
        index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert torch.equal(logits(load(folder).network), logits(model))
        (folder / "model-00002-of-00002.safetensors").rename(tmp_path / "away")
        with pytest.raises(UserError, match="missing, though"):
            load(folder)
        index["weight_map"]["x"] = "../away"
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="not an index"):
            load(folder)
        (folder / "model.safetensors.index.json").unlink()
        torch.save(
            {n: t.to(torch.bfloat16) for n, t in tensors.items()}, folder / "pytorch_model.bin"
        )
        half = load(folder).network
        assert half.embed_tokens.weight.dtype == torch.float32
        assert torch.equal(half.norm.weight, model.norm.weight.to(torch.bfloat16).float())

    def test_a_pickle_that_holds_code_is_not_run(self, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path / "m", network())
        (folder / "model.safetensors").unlink()

        class Evil:
            def __reduce__(self):
                return Path.touch, (tmp_path / "ran",)

        torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
        with pytest.raises(UserError, match="holds more than tensors"):
            load(folder)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"model_type": "qwen2"}, ["model_type 'qwen2'"]),
            ({"attention_bias": True}, ["attention_bias"]),
            ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["'dynamic'"]),
            ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, ["low_freq_factor"]),
            ({"quantization_config": {"bits": 4}}, ["quantized"]),
            ({"num_experts": 8}, ["num_experts"]),
            ({"num_hidden_layers": 3}, ["missing model.layers.2"]),
            ({"num_hidden_layers": 1}, ["unexpected model.layers.1"]),
            ({"intermediate_size": 353}, ["wrong shape", "(353, 128)"]),
            ({"vocab_size": 299}, ["wrong shape"]),
            ({"tie_word_embeddings": False}, ["missing lm_head.weight"]),
        ],
    )
    def test_what_does_not_fit_is_named(
        self, tmp_path: Path, changes: dict, words: list[str]
    ) -> None:
        folder = checkpoint(tmp_path / "m", network())
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError) as caught:
            load(folder)
        for word in words:
            assert word in str(caught.value)

    def test_broken_weights_are_named(self, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path / "m", network())
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(
            UserError, match=r"NaN or infinite weights in model\.layers\.1\.mlp\.up_proj\.weight"
        ):
            load(folder)

    def test_a_tokenizer_larger_than_the_embedding_is_refused(
        self, tmp_path: Path, sample_text: str
    ) -> None:
        folder = checkpoint(tmp_path / "m", network(), train_bpe([sample_text[:100_000]], 400))
        with pytest.raises(UserError, match="400 tokens, the embedding 320 rows"):
            load(folder)

    @pytest.mark.parametrize(
        "extra",
        [
            {"_name_or_path": "x", "is_llama_config": True, "rope_interleaved": False},
            {"transformers.js_config": {}, "pretraining_tp": 1, "use_cache": True},
            {"torch_dtype": "bfloat16", "attention_dropout": 0.0, "mlp_bias": False},
            {"rope_scaling": None, "dtype": "float32", "transformers_version": "5.0.0"},
        ],
    )
    def test_real_configurations_load(self, tmp_path: Path, extra: dict) -> None:
        """Keys as SmolLM2, TinyLlama and Llama 3.2 carry them."""
        folder = checkpoint(tmp_path / "m", network())
        config = json.loads((folder / "config.json").read_text()) | extra
        (folder / "config.json").write_text(json.dumps(config))
        assert torch.equal(logits(load(folder).network), logits(network()))


def test_absent_keys_mean_what_they_mean_to_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = checkpoint(tmp_path / "m", network(tie_word_embeddings=False))
    config = json.loads((folder / "config.json").read_text())
    for key in (
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_theta",
        "bos_token_id",
        "eos_token_id",
        "head_dim",
    ):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load(folder)
    assert (loaded.config.rms_norm_eps, loaded.config.tie_word_embeddings) == (1e-6, False)
    with torch.no_grad():
        assert (
            AutoModelForCausalLM.from_pretrained(folder)(IDS).logits - logits(loaded.network)
        ).abs().max() < 1e-5


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    for tied in (True, False):
        theirs = transformers_llama(tmp_path / str(tied), tie_word_embeddings=tied)
        with torch.no_grad():
            assert (
                theirs(IDS).logits - logits(load(tmp_path / str(tied)).network)
            ).abs().max() < 1e-5
