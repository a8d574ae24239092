"""Every runtime keeps to one protocol."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mobilellm.errors import UserError
from mobilellm.interop.folder import save_checkpoint
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.runtimes.remembering import RememberingSession
from mobilellm.runtimes.table import open_session, runtime_for


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, Network]:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=16,
    )
    network = Network(config).eval()
    save_checkpoint(tmp_path, network, None, {})
    return tmp_path, network


def test_chunks_and_single_tokens_give_the_logits_of_the_whole(model: tuple[Path, Network]) -> None:
    path, network = model
    ids = [1, 5, 9, 2, 7]
    with torch.inference_mode():
        expected = network(torch.tensor([ids]))[0, -1].numpy()
    with open_session(path) as session:
        for parts in ([ids], [ids[:2], ids[2:]], [[i] for i in ids]):
            session.reset()
            for part in parts:
                logits = session.feed(part)
            assert np.abs(logits - expected).max() < 1e-5
        assert session.rewind(9) == 5
        session.feed([8, 8])
        assert session.rewind(2) == 2  # what stood behind is read anew
        assert np.abs(session.feed(ids[2:]) - expected).max() < 1e-5


def test_what_is_broken_off_is_forgotten(
    model: tuple[Path, Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_session(model[0]) as inner:
        session = RememberingSession(inner)
        session.feed([1, 2])

        def broken_off(ids: list[int]) -> np.ndarray:
            feed(ids[:1])
            raise KeyboardInterrupt

        feed = inner.feed
        monkeypatch.setattr(inner, "feed", broken_off)
        with pytest.raises(KeyboardInterrupt):
            session.feed([3, 4])
        monkeypatch.undo()
        assert session.fresh([1, 2, 3]) == [1, 2, 3]
        logits = session.feed([1, 2, 3])
        inner.reset()
        assert np.array_equal(logits, inner.feed([1, 2, 3]))


@pytest.mark.parametrize("window", [None, 4])
def test_of_a_prompt_is_read_what_is_new(window: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kinds = None if window is None else ["sliding_attention"] * 6
    config = ModelConfig.preset("1M", vocab_size=96, sliding_window=window, layer_types=kinds)
    save_checkpoint(tmp_path, Network(config).eval(), None, {})
    with open_session(tmp_path) as inner:
        session = RememberingSession(inner)
        for prompt, new in (([1, 2, 3, 4], 4), ([1, 2, 3, 4, 5], 1), ([1, 2, 7], 1), ([1, 2], 1)):
            fresh = session.fresh(prompt)
            # A window that is full has lost what stood before it, so that all is read again.
            all_again = window and prompt == [1, 2, 7]
            assert fresh == prompt[-(len(prompt) if all_again else new) :]
            logits = session.feed(fresh)
            assert session.held == prompt
            inner.reset()
            expected = inner.feed(prompt)
            assert np.abs(logits - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "no tokens"), ([96], "outside"), ([-1], "negative"), ([1] * 17, "exceed")],
)
def test_a_wrong_sequence_is_one_line(
    model: tuple[Path, Network], ids: list[int], message: str
) -> None:
    with open_session(model[0]) as session, pytest.raises(UserError, match=message):
        session.feed(ids)


def test_a_runtime_that_does_not_fit_is_refused(model: tuple[Path, Network]) -> None:
    with pytest.raises(UserError, match="unknown runtime"):
        runtime_for(model[0], "mobilelm")
    with pytest.raises(UserError, match="no such file"):
        runtime_for(model[0] / "absent")
