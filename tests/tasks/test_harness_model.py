"""The engine behind lm-eval's own interface and command line."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.rows import write_rows
from tests.tasks.harness_peer import CONTEXT, PAIRS

import mobilellm
from mobilellm.errors import UserError
from mobilellm.interop.folder import save_checkpoint
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.tasks.requests import OwnEncoder, encode
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe
from mobilellm.workflows.subjects import register_with_harness


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    torch.manual_seed(4)
    path = tmp_path_factory.mktemp("model")
    config = ModelConfig.preset(
        "1M",
        vocab_size=400,
        num_hidden_layers=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
    )
    save_checkpoint(path, Network(config), train_bpe([sample_text[:40_000]], 400), {})
    return path


def instances(kind: str, arguments: list[tuple[object, ...]]) -> list[object]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=("t", i, 1))
        for i, each in enumerate(arguments)
    ]


def test_the_registered_model_answers_as_the_hugging_face_backend(
    folder: Path, sample_text: str
) -> None:
    from lm_eval.api.registry import get_model
    from lm_eval.models.huggingface import HFLM

    register_with_harness()
    ours = get_model("mobilellm")(pretrained=str(folder))
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)
    for mine, other in zip(
        ours.loglikelihood(instances("loglikelihood", PAIRS)),
        theirs.loglikelihood(instances("loglikelihood", PAIRS)),
        strict=True,
    ):
        assert mine[0] == pytest.approx(other[0], abs=1e-3)
        assert mine[1] == other[1]
    texts = [(sample_text[:900],), ("short",), (sample_text[2000:2300],)]
    rolling = instances("loglikelihood_rolling", texts)
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(
        theirs.loglikelihood_rolling(rolling), abs=2e-3
    )
    for until in (["e"], ["\n", " the"], ["never said at all"]):
        asked = instances(
            "generate_until",
            [("First Citizen:", {"until": until, "max_gen_toks": 12, "do_sample": False})],
        )
        assert ours.generate_until(asked) == theirs.generate_until(asked)


@pytest.mark.parametrize("context", ["Question: what?", "<s>Question: what?", "one</s>two ", ""])
def test_special_tokens_that_a_text_spells_out_are_tokens_as_in_the_harness(
    tmp_path: Path, sentencepiece_model: Path, context: str
) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    ours = Tokenizer.load(sentencepiece_model)
    ours.save(tmp_path)
    shape = {"vocab_size": 600, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2))
    theirs = HFLM(
        pretrained=model,
        tokenizer=AutoTokenizer.from_pretrained(tmp_path),
        backend="causal",
        device="cpu",
    )
    for continuation in (" yes", "</s>", " a<s>b", "<s> no"):
        (mine,) = encode([(context, continuation)], OwnEncoder(ours), 256)
        if context:
            before, after = theirs._encode_pair(context, continuation)
        else:
            after = theirs.tok_encode(continuation, add_special_tokens=False)
            before, after = ([1], after) if after[0] != 1 else ([1], after[1:])
        assert (list(mine.tokens), mine.scored) == (before + after, len(after)), continuation


CHATS = {
    "kept": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "stripped": "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}",
}


@pytest.mark.parametrize("kind", list(CHATS))
@pytest.mark.parametrize("last", ["Answer:", "Answer: ", " is it? "])
def test_conversations_are_rendered_as_by_the_harnesss_backend(
    tmp_path: Path, folder: Path, kind: str, last: str
) -> None:
    from lm_eval.api.registry import get_model
    from lm_eval.models.huggingface import HFLM

    chat = tmp_path / "chat"
    shutil.copytree(folder, chat)
    (chat / "chat_template.jinja").write_text(CHATS[kind])
    register_with_harness()
    ours = get_model("mobilellm")(pretrained=str(chat))
    theirs = HFLM(pretrained=str(chat), device="cpu", dtype="float32", batch_size=2)
    assert ours.chat_template(True) == theirs.chat_template(True) == CHATS[kind]
    assert ours.chat_template(False) is None
    messages = [{"role": "user", "content": "What is it? "}, {"role": "assistant", "content": last}]
    for some, prompt in ((messages[:1], True), (messages, False)):
        assert ours.apply_chat_template(some, prompt) == theirs.apply_chat_template(some, prompt)


def test_a_model_without_a_chat_template_says_so(folder: Path) -> None:
    from lm_eval.api.registry import get_model

    register_with_harness()
    ours = get_model("mobilellm")(pretrained=str(folder))
    with pytest.raises(UserError, match="no chat template"):
        ours.chat_template(True)


@pytest.mark.long
def test_the_harnesss_command_line_knows_the_model(
    folder: Path, sample_text: str, tmp_path: Path
) -> None:
    """A task of one's own, so that nothing is downloaded."""
    rows = [
        {"q": sample_text[i : i + 30], "a": [" one", " two three"], "right": i % 2}
        for i in range(0, 70, 7)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{tmp_path}/rows.jsonl\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: q\ndoc_to_target: "
        "right\ndoc_to_choice: a\n"
    )
    command = [
        sys.executable,
        "-c",
        "from mobilellm.cli.eval import harness_main; harness_main()",
        "--tasks",
        "own",
    ]
    command += [
        "--model",
        "mobilellm",
        "--model_args",
        f"pretrained={folder}",
        "--include_path",
        str(tmp_path),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|own" in done.stdout
    assert "|acc" in done.stdout.replace(" ", "")


def test_only_public_modules_of_the_harness_are_imported() -> None:
    package = Path(mobilellm.__file__).parent
    names = {
        node.module or ""
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
    }
    harness = {name for name in names if name.split(".")[0] == "lm_eval"}
    assert {"lm_eval.api.model", "lm_eval.utils"} <= harness
    private = {
        name
        for name in harness
        if any(part.startswith("_") and not part.endswith("__") for part in name.split("."))
    }
    assert private == set()


def test_the_harness_shows_no_bars_and_keeps_those_of_others(
    shared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tqdm import tqdm

    from mobilellm.tasks.harness_run import items
    from mobilellm.tasks.harness_tasks import load_tasks

    (task,) = load_tasks(["openbookqa"], shared / "eval").values()
    assert len(items(task, 3)) == 3
    assert capfd.readouterr().err == ""
    list(tqdm(range(2)))
    assert "2/2" in capfd.readouterr().err
