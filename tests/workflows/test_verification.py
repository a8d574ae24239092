"""A result that is not what it was written from does not appear."""

import dataclasses
import shutil
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.interop.networks import checkpoint, network

from mobilellm.cli import main
from mobilellm.errors import UserError
from mobilellm.export.targets import TARGETS
from mobilellm.interop.folder import save_checkpoint
from mobilellm.interop.writer import ModelToWrite, Writer
from mobilellm.runtimes import ours
from mobilellm.runtimes.table import RUNTIMES
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe
from mobilellm.workflows import convert as module
from mobilellm.workflows import verification
from mobilellm.workflows.convert import ConvertResult, convert
from mobilellm.workflows.token_probe import TEXTS, compare_tokens


@pytest.fixture(scope="module")
def tokenizer(sample_text: str) -> Tokenizer:
    return train_bpe([sample_text[:30_000]], 300)


Write = Callable[[Path, ModelToWrite], list[str]]


def plain_write(path: Path, model: ModelToWrite) -> list[str]:
    save_checkpoint(path, model.network, model.tokenizer, model.origin)
    return []


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a target "program" that our own runtime runs, written by the function that is given."""

    def make(write: Write = plain_write, number_type: str = "F32", **changes: object) -> None:
        writer = Writer(
            what="a program",
            suffix="",
            keeps_repeats=True,
            number_types=(number_type,),
            write=write,
            takes_context=True,
            usual_context=64,
            runtime="tried",
        )
        runtime = dataclasses.replace(ours.RUNTIME, name="tried", **changes)
        monkeypatch.setitem(TARGETS, "program", writer)
        monkeypatch.setitem(RUNTIMES, "tried", runtime)

    return make


def converted(
    tmp_path: Path, tokenizer: Tokenizer | None = None, **options: object
) -> ConvertResult:
    source = tmp_path / "in"
    if not source.exists():
        checkpoint(source, network(), tokenizer)
    return convert(source, tmp_path / "out", "program", **options)  # type: ignore[arg-type]


def test_a_program_is_run_and_measured(
    tmp_path: Path, tokenizer: Tokenizer, program: Callable[..., None]
) -> None:
    program()
    result = converted(tmp_path, tokenizer)
    assert result.runtime == "tried"
    assert result.largest_difference < 1e-5
    assert 0 <= result.kl < 1e-6
    assert result.loss_after == pytest.approx(result.loss_before, abs=1e-5)
    # A random network knows nothing: about log(320) nats.
    assert 5 < result.loss_before < 7
    assert result.context == 64
    width = 2 * network().config.kv_slots * network().config.num_key_value_heads
    megabytes = 64 * width * network().config.head_dim * 4 / 1e6
    assert result.notes == [
        f"context: 64 tokens, whose keys and values take {megabytes:,.1f} MB of memory"
    ]


def changed(path: Path, model: ModelToWrite) -> list[str]:
    weight = model.network.layers[1].mlp.down_proj.weight.data
    with torch.no_grad():
        kept = weight.clone()
        weight += 0.01 * torch.randn_like(weight)
        plain_write(path, model)
        weight.copy_(kept)
    return []


def far_away(path: Path, model: ModelToWrite) -> list[str]:
    weight = model.network.norm.weight.data
    kept = weight.clone()
    weight.mul_(-20)
    plain_write(path, model)
    weight.copy_(kept)
    return []


def without_tokenizer(path: Path, model: ModelToWrite) -> list[str]:
    return plain_write(path, dataclasses.replace(model, tokenizer=None))


def other_tokenizer(path: Path, model: ModelToWrite) -> list[str]:
    other = train_bpe(["other words altogether"] * 3, 280)
    return plain_write(path, dataclasses.replace(model, tokenizer=other))


@pytest.mark.parametrize(
    ("write", "number_type", "message"),
    [
        (changed, "F32", "logits that differ by"),
        (far_away, "INT4", "nats away"),
        (without_tokenizer, "F32", "without its tokenizer"),
        (other_tokenizer, "F32", "tokenizer is another one"),
    ],
)
def test_another_result_is_refused(
    tmp_path: Path,
    tokenizer: Tokenizer,
    program: Callable[..., None],
    write: Write,
    number_type: str,
    message: str,
) -> None:
    program(write, number_type)
    with pytest.raises(UserError, match=message):
        converted(tmp_path, tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    converted(tmp_path, tokenizer, verify=False)
    assert (tmp_path / "out").is_dir()


class Forgetful(ours.NetworkSession):
    """Wrong in one of the ways to feed it: where `wrong(tokens given, tokens held)` says so."""

    wrong: Callable[[int, int], bool]

    @torch.inference_mode()
    def feed(self, ids: Sequence[int]) -> np.ndarray:
        held = 0 if self.cache is None else self.cache.length
        if self.wrong(len(ids), held) and self.cache is not None:
            self.cache.store[:, :, :, :, :held] = 0
        return super().feed(ids)


@pytest.mark.parametrize("wrong", [lambda n, held: n > 1 and held > 0, lambda n, held: held == 31])
def test_chunks_and_single_tokens_are_tried(
    tmp_path: Path, program: Callable[..., None], wrong: Callable[[int, int], bool]
) -> None:
    def opened(path: Path, context: int | None, threads: int | None) -> Forgetful:
        session = Forgetful(module.load(path).network, context)
        session.wrong = wrong
        return session

    program(open=opened)
    with pytest.raises(UserError, match="logits that differ"):
        converted(tmp_path)


def test_a_missing_runtime_is_named_before_anything_is_written(
    tmp_path: Path, program: Callable[..., None]
) -> None:
    program(package="not_there_at_all", extra="some")
    with pytest.raises(UserError, match=r"mobilellm\[some\].*--no-verify"):
        converted(tmp_path)
    result = converted(tmp_path, verify=False)
    assert (result.largest_difference, result.kl, result.runtime) == (None, None, None)


def test_a_full_disk_is_seen_before_writing(
    tmp_path: Path, program: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    program()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=r"takes at least \d+ MB, the disk has 0 MB free"):
        converted(tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_verb_says_how_well_it_came_out(
    tmp_path: Path,
    tokenizer: Tokenizer,
    program: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mobilellm.cli.convert import Convert

    program()
    source = checkpoint(tmp_path / "in", network(), tokenizer)
    assert Convert(source=source, out=tmp_path / "out", to="program", context=48).run() == 0
    printed = capsys.readouterr().out
    assert "- context: 48 tokens" in printed
    assert "run by tried: logits differ by at most" in printed
    assert "divergence from what was written" in printed
    assert "loss on a short text" in printed


def test_a_context_that_no_target_has_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", network())
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(source), str(tmp_path / "out"), "--to", "hf", "--context", "8"])
    assert ended.value.code == 2


def test_probes_tell_tokenizers_apart(tokenizer: Tokenizer, sample_text: str) -> None:
    from tokenizers import normalizers

    assert compare_tokens(tokenizer, tokenizer) == []
    again = train_bpe([sample_text[:30_000]], 300)
    assert compare_tokens(tokenizer, again) == []
    again.fast.normalizer = normalizers.Strip()
    differing = {d.what for d in compare_tokens(tokenizer, again)}
    assert repr(" leading space") in differing
    assert repr(TEXTS[0]) not in differing
    again.fast.normalizer = None
    again.fast.encode_special_tokens = False
    assert "<|endoftext|>" in str(compare_tokens(tokenizer, again)[0])
    again.eos_id = 5
    assert compare_tokens(tokenizer, again)[0].what == "eos_id"


def test_a_file_may_be_as_far_off_as_float32_itself_and_no_further(
    tmp_path: Path, program: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64: with a bound of nothing, only our own rounding excuses a difference."""
    monkeypatch.setattr(verification, "EXACT", 0.0)
    program()
    assert converted(tmp_path).largest_difference > 0
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(verification, "NOISE", 0.01)
    with pytest.raises(UserError, match="not written"):
        converted(tmp_path)
