"""The engine behind lm-eval's own interface and command line."""

from pathlib import Path

import pytest
import torch
from tests.evaluate.harness_peer import CONTEXT, PAIRS

from mobilellm.cli.eval import register_with_harness
from mobilellm.data.tokenizer import train_bpe
from mobilellm.interop.checkpoint import save_checkpoint
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    torch.manual_seed(4)
    path = tmp_path_factory.mktemp("model")
    config = ModelConfig.preset(
        "1M", vocab_size=400, num_hidden_layers=2, max_position_embeddings=CONTEXT, initializer_range=0.2, bos_token_id=None,
        eos_token_id=0,
    )  # fmt: skip
    save_checkpoint(path, Network(config), train_bpe([sample_text[:40_000]], 400), {})
    return path


def instances(kind: str, arguments: list[tuple[object, ...]]) -> list[object]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=("t", i, 1)) for i, each in enumerate(arguments)]


def test_the_registered_model_answers_as_the_hugging_face_backend(folder: Path, sample_text: str) -> None:
    from lm_eval.api.registry import get_model
    from lm_eval.models.huggingface import HFLM

    register_with_harness()
    ours = get_model("mobilellm")(pretrained=str(folder))
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)
    for mine, other in zip(
        ours.loglikelihood(instances("loglikelihood", PAIRS)), theirs.loglikelihood(instances("loglikelihood", PAIRS)), strict=True
    ):
        assert mine[0] == pytest.approx(other[0], abs=1e-3)
        assert mine[1] == other[1]
    texts = [(sample_text[:900],), ("short",), (sample_text[2000:2300],)]
    rolling = instances("loglikelihood_rolling", texts)
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), abs=2e-3)
    for until in (["e"], ["\n", " the"], ["never said at all"]):
        asked = instances("generate_until", [("First Citizen:", {"until": until, "max_gen_toks": 12, "do_sample": False})])
        assert ours.generate_until(asked) == theirs.generate_until(asked)
