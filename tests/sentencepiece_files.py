"""SentencePiece models that tests train with SentencePiece itself."""

from __future__ import annotations

import io


def sentencepiece_file(text: str, **settings: object) -> bytes:
    """The file of a BPE of Llama's kind, or as SentencePiece's trainer takes the `settings`."""
    import sentencepiece

    model = io.BytesIO()
    usual = {
        "vocab_size": 600, "model_type": "bpe", "byte_fallback": True,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=model, **(usual | settings)
    )
    return model.getvalue()
