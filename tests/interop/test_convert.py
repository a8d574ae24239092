"""Every format out and in again, on random and on real weights, and what is damaged or contradictory refused."""

import contextlib
import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mobilellm.errors import UserError
from mobilellm.interop import gguf_reader, llama2c
from mobilellm.interop.checkpoint import load, save_checkpoint
from mobilellm.interop.convert import convert
from mobilellm.interop.huggingface import plain
from mobilellm.interop.sharing import folded, unrolled
from mobilellm.model.config import ModelConfig, preset_names
from mobilellm.model.network import Network
from mobilellm.model.weights import to_named
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe

IDS = torch.arange(40)[None] * 37 % 300


def network(**changes) -> Network:
    """A small random network, norms away from one."""
    values = {"vocab_size": 320, "num_hidden_layers": 2, "max_position_embeddings": 128} | changes
    torch.manual_seed(0)
    found = Network(ModelConfig.preset("1M", **values))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.05)
    return found.eval()


@pytest.fixture(scope="module")
def tokenizer(sample_text: str) -> Tokenizer:
    return train_bpe([sample_text[:30_000]], 300)


def checkpoint(folder: Path, model: Network, tokenizer: Tokenizer | None = None) -> Path:
    folder.mkdir()
    save_checkpoint(folder, model, tokenizer, {"made_by": "a test"})
    return folder


def logits(model: Network) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)


SHAPES = [
    {},
    {"tie_word_embeddings": False},
    {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 96, "head_dim": 32, "intermediate_size": 256},
    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                         "original_max_position_embeddings": 32}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
]  # fmt: skip


@pytest.mark.parametrize("to", ["hf", "gguf", "llama2c", "mobilellm"])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_comes_back_equal(
    tmp_path: Path, tokenizer: Tokenizer, to: str, shape: dict
) -> None:
    model = network(**shape)
    source, out = checkpoint(tmp_path / "in", model, tokenizer), tmp_path / "out"
    if to == "llama2c" and "rope_scaling" in shape:
        with pytest.raises(UserError, match="rope_scaling"):
            convert(source, out, to)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
        return
    out = out.with_suffix({"gguf": ".gguf", "llama2c": ".bin"}.get(to, ""))
    result = convert(source, out, to)
    assert result.largest_difference is not None
    assert result.largest_difference < 1e-5
    again = load(out)
    for name, parameter in again.network.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name
    if to != "llama2c":
        assert again.tokenizer is not None
        assert again.tokenizer.encode("First Citizen: 2 words") == tokenizer.encode(
            "First Citizen: 2 words"
        )
        assert again.tokenizer.eos_id == tokenizer.eos_id


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_scaled_down_loads_in_transformers(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    config = ModelConfig.preset(name)
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    model = network(
        hidden_size=heads * 8, num_attention_heads=heads, num_key_value_heads=shared, head_dim=8, intermediate_size=64,
        layer_repeats=config.layer_repeats, shared_kv="own",
    )  # fmt: skip
    convert(checkpoint(tmp_path / "in", model), tmp_path / "out", "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        assert (theirs(IDS).logits - logits(model)).abs().max() < 1e-5
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


def test_layer_sharing_goes_out_unrolled_and_comes_back_folded(tmp_path: Path) -> None:
    for repeats in (2, 3):
        model = network(layer_repeats=repeats)
        source = checkpoint(tmp_path / f"in{repeats}", model)
        convert(source, tmp_path / f"hf{repeats}", "hf")
        flat, back = load(tmp_path / f"hf{repeats}"), load(tmp_path / f"hf{repeats}", fold=True)
        assert flat.config.num_hidden_layers == 2 * repeats
        assert (back.config.num_hidden_layers, back.config.layer_repeats) == (2, repeats)
        for other in (flat, back):
            assert (logits(other.network) - logits(model)).abs().max() < 1e-5


def test_folding_takes_only_equal_neighbours() -> None:
    model = network(num_hidden_layers=4)
    assert folded(model) is model
    flat = unrolled(network(layer_repeats=2))
    with torch.no_grad():
        flat.layers[3].mlp.down_proj.weight[0, 0] += 1e-3
    assert folded(flat).config.layer_repeats == 1


def test_shared_keys_and_values_have_no_plain_equal(tmp_path: Path) -> None:
    model = network(layer_repeats=2, shared_kv="first")
    source = checkpoint(tmp_path / "in", model)
    for to in ("hf", "gguf", "llama2c"):
        with pytest.raises(UserError, match="no equal among plain Llama"):
            convert(source, tmp_path / "out.gguf", to)
    result = convert(source, tmp_path / "out", "hf", approximate=True)
    assert any("approximate" in note for note in result.notes)
    assert result.largest_difference > 1e-2
    assert (
        logits(plain(model, approximate=True)) - logits(load(tmp_path / "out").network)
    ).abs().max() < 1e-6
    convert(source, tmp_path / "kept", "mobilellm")
    assert load(tmp_path / "kept").config == model.config


class TestOriginal:
    """Checkpoints of the original repository: a private tie, and layer sharing of a kind that is not said."""

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
        from mobilellm.data.shards import TokenFolder
        from mobilellm.evaluate.sharing import measure_sharing
        from mobilellm.train.recipe import (
            DataSection,
            ModelSection,
            OptimizerSection,
            Recipe,
            TrainSection,
        )
        from mobilellm.train.start import train

        data = TokenFolder.open(small_data)
        held_out = data.tokens("heldout")
        text = data.tokenizer().decode(held_out.read(0, len(held_out) - 1).tolist())
        for kind in ("own", "first"):
            recipe = Recipe(
                model=ModelSection(
                    preset="1M", num_hidden_layers=2, layer_repeats=2, shared_kv=kind
                ),
                data=DataSection(path=str(small_data), sequence_length=64),
                train=TrainSection(steps=80, batch_tokens=1024, precision="fp32", compile="off"),
                optimizer=OptimizerSection(name="muon", warmup_steps=10, learning_rate=5e-3),
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
            {"_name_or_path": "x", "is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {}},
            {"pretraining_tp": 1, "use_cache": True, "torch_dtype": "bfloat16", "attention_dropout": 0.0, "mlp_bias": False},
            {"rope_scaling": None, "dtype": "float32", "transformers_version": "5.0.0"},
        ],
    )  # fmt: skip
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
    from transformers import LlamaConfig, LlamaForCausalLM

    for tied in (True, False):
        config = LlamaConfig(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied)  # fmt: skip
        theirs = LlamaForCausalLM(config).eval()
        theirs.save_pretrained(tmp_path / str(tied))
        with torch.no_grad():
            assert (
                theirs(IDS).logits - logits(load(tmp_path / str(tied)).network)
            ).abs().max() < 1e-5


@pytest.mark.parametrize("precision", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_quantized_gguf_is_near_and_says_how_near(
    tmp_path: Path, tokenizer: Tokenizer, precision: str
) -> None:
    model = network()
    result = convert(
        checkpoint(tmp_path / "in", model, tokenizer),
        tmp_path / "out.gguf",
        "gguf",
        precision=precision,
    )
    bound = {"F16": 0.01, "BF16": 0.1, "Q8_0": 0.2, "Q4_0": 3.0}[precision]
    assert 0 < result.largest_difference < bound * result.logit_std
    types = load(tmp_path / "out.gguf").origin["tensor_types"]
    assert types == {"F32": 5, precision: 15}
    size = (tmp_path / "out.gguf").stat().st_size
    bits = {"F16": 16, "BF16": 16, "Q8_0": 8.5, "Q4_0": 4.5}[precision]
    assert size < sum(p.numel() for p in model.parameters()) * bits / 8 + 40_000


def test_rows_that_blocks_do_not_fit_stay_f16_and_are_named(tmp_path: Path) -> None:
    result = convert(
        checkpoint(tmp_path / "in", network(intermediate_size=172)),
        tmp_path / "out.gguf",
        "gguf",
        precision="Q8_0",
    )
    assert any("blk.0.ffn_down.weight is F16: its rows of 172" in note for note in result.notes)


def test_the_result_records_where_it_came_from(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", network())
    result = convert(source, tmp_path / "out", "hf")
    origin = json.loads((tmp_path / "out/mobilellm.json").read_text())
    assert origin["source_sha256"] == result.source_sha256
    assert origin["came_from"] == {"made_by": "a test"}
    assert origin["settings"]["to"] == "hf"
    assert load(tmp_path / "out").origin == origin


def test_an_existing_target_is_refused_and_nothing_half_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(tmp_path / "in", network())
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        convert(source, tmp_path / "out", "hf")
    (tmp_path / "out").rmdir()
    import mobilellm.interop.convert as module

    monkeypatch.setattr(
        module,
        "load",
        lambda path, **_: (
            load(source) if path == source else (_ for _ in ()).throw(UserError("no"))
        ),
    )
    for name, to in (("out", "hf"), ("out.gguf", "gguf"), ("out.bin", "llama2c")):
        with pytest.raises(UserError, match="no"):
            convert(source, tmp_path / name, to)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


class TestStories:
    """The real llama2.c model of 260 thousand parameters."""

    STORY = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, "
        "red ball. She wanted to play with it, but it was too high.\nLily's mom said, \"Lily, let's go to the park.\" Lily was "
        "sad and didn't know"
    )

    @pytest.fixture
    def model(self, shared: Path) -> Path:
        return shared / "models/stories260K/stories260K.bin"

    def test_the_empty_prompt_gives_the_well_known_story(self, model: Path) -> None:
        text = load(model).generate("", max_new_tokens=150)
        assert text.startswith(self.STORY)

    def test_out_and_back_is_byte_identical(self, model: Path, tmp_path: Path) -> None:
        convert(model, tmp_path / "hf", "hf")
        convert(tmp_path / "hf", tmp_path / "back.bin", "llama2c")
        assert (tmp_path / "back.bin").read_bytes() == model.read_bytes()
        tokens = llama2c.tokenizer_bytes(load(tmp_path / "hf").tokenizer)
        assert tokens == (model.parent / "tok512.bin").read_bytes()

    def test_version_1_holds_the_same(self, model: Path, tmp_path: Path) -> None:
        convert(model, tmp_path / "v1.bin", "llama2c", llama2c_version=1)
        assert torch.equal(logits(load(tmp_path / "v1.bin").network), logits(load(model).network))

    def test_through_gguf_the_story_is_the_same(self, model: Path, tmp_path: Path) -> None:
        convert(model, tmp_path / "m.gguf", "gguf")
        assert load(tmp_path / "m.gguf").generate("", max_new_tokens=150).startswith(self.STORY)


@pytest.fixture(scope="module")
def small_files(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> dict[str, Path]:
    """One small file of each format, from one network."""
    folder = tmp_path_factory.mktemp("files")
    model = network(
        vocab_size=300, num_hidden_layers=1, hidden_size=32, intermediate_size=32, head_dim=8
    )
    source = checkpoint(folder / "hf", model, train_bpe([sample_text[:5000]], 300))
    for name, to, options in (("m.gguf", "gguf", {}), ("q.gguf", "gguf", {"precision": "Q4_0"}), ("m.bin", "llama2c", {}),
                              ("v1.bin", "llama2c", {"llama2c_version": 1})):  # fmt: skip
        convert(source, folder / name, to, **options)
    torch.save(load_file(source / "model.safetensors"), folder / "pytorch_model.bin")
    return {p.name: p for p in folder.iterdir()}


@pytest.mark.parametrize("name", ["m.gguf", "q.gguf", "m.bin", "v1.bin"])
@pytest.mark.parametrize("change", ["empty", "truncated", "cut", "padded", "magic"])
def test_files_of_the_wrong_length_or_kind(
    small_files: dict[str, Path], tmp_path: Path, name: str, change: str
) -> None:
    content = small_files[name].read_bytes()
    changed = {
        "empty": b"", "truncated": content[:-1], "cut": content[:100], "padded": content + b"\0" * 4096,
        "magic": b"XXXX" + content[4:],
    }[change]  # fmt: skip
    path = tmp_path / name
    path.write_bytes(changed)
    if name.endswith("gguf") and change == "padded":
        load(path)  # GGUF allows what follows the data
        return
    with pytest.raises(UserError) as caught:
        load(path)
    assert "\n" not in str(caught.value)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
@pytest.mark.parametrize(
    "name",
    ["m.gguf", "q.gguf", "m.bin", "v1.bin", "hf", "config", "pytorch_model.bin", "tokenizer"],
)
def test_mutated_files_load_or_are_a_users_error(
    small_files: dict[str, Path], tmp_path: Path, name: str, data: st.DataObject
) -> None:
    """No crash, no hang, and no memory asked for because a header says so."""
    path = tmp_path / "fuzz"
    if path.is_dir():
        shutil.rmtree(path)
    files = {
        "hf": "model.safetensors",
        "config": "config.json",
        "pytorch_model.bin": "pytorch_model.bin",
        "tokenizer": "tokenizer.json",
    }
    if name in files:
        shutil.copytree(small_files["hf"], path)
        if name == "pytorch_model.bin":
            (path / "model.safetensors").unlink()
            shutil.copy(small_files[name], path / name)
        target = path / files[name]
        opened = path
    else:
        path.mkdir()
        target = opened = path / name
        shutil.copy(small_files[name], target)
    content = bytearray(target.read_bytes())
    header = min(len(content), 4096)  # where the structure is
    for _ in range(data.draw(st.integers(1, 6))):
        where = data.draw(st.integers(0, header - 1))
        kind = data.draw(st.sampled_from(["byte", "huge", "cut", "insert", "delete"]))
        if kind == "byte":
            content[where] = data.draw(st.integers(0, 255))
        elif kind == "huge":
            content[where : where + 8] = data.draw(
                st.sampled_from(
                    [b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\0" * 8, b"\0\0\0\0\1\0\0\0"]
                )
            )
        elif kind == "cut":
            del content[where:]
            break
        elif kind == "insert":
            content[where:where] = data.draw(st.binary(min_size=1, max_size=16))
        else:
            del content[where : where + 3]
        header = max(1, min(len(content), header))
        if not content:
            break
    target.write_bytes(bytes(content))
    with contextlib.suppress(UserError):
        load(opened)


def test_headers_cannot_ask_for_memory(small_files: dict[str, Path], tmp_path: Path) -> None:
    """Counts of 2^60 in every length field of the header are refused before anything is allocated."""
    import tracemalloc

    content = small_files["m.gguf"].read_bytes()
    rng = random.Random(0)
    tracemalloc.start()
    for _ in range(200):
        changed = bytearray(content)
        where = rng.randrange(4, 3000)
        changed[where : where + 8] = (1 << rng.randrange(30, 63)).to_bytes(8, "little")
        path = tmp_path / "x.gguf"
        path.write_bytes(changed)
        with contextlib.suppress(UserError):
            gguf_reader.load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6


def test_python_interface(tmp_path: Path, tokenizer: Tokenizer) -> None:
    import mobilellm

    model = mobilellm.load(str(checkpoint(tmp_path / "m", network(), tokenizer)))
    text = model.generate(
        "First", max_new_tokens=8, sampling=mobilellm.Sampling(temperature=0.8, seed=1)
    )
    assert isinstance(text, str)
    assert model.network(torch.tensor([model.tokenizer.encode("a b")])).shape[-1] == 320
    with pytest.raises(mobilellm.UserError):
        mobilellm.load(str(tmp_path / "none"))
    assert dataclasses.is_dataclass(mobilellm.ModelConfig)
    assert to_named(model.config, dict(model.network.named_parameters()))
