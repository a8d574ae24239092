"""What is in prepared data: tokens, lengths, sources, frequent tokens, documents as they will be
read.

figures = statistics(open_dataset(Path("data/book")))
figures["splits"]["train"]["tokens"], figures["sources"], figures["lengths"]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mobilellm.data.byte_lengths import byte_lengths
from mobilellm.data.dataset import Data, SampleFolder
from mobilellm.data.manifest import SPLITS
from mobilellm.data.order import derive_key, permute
from mobilellm.data.stream import TokenStream
from mobilellm.tokenizer.tokenizer import Tokenizer

STEP = 1 << 22  # tokens looked at at once
SAMPLES = 5  # documents that are decoded
SHOWN = 400  # tokens of each


def statistics(
    data: Data,
    *,
    top: int = 50,
    seed: int = 0,
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Figures of both splits, in plain values. Reads all tokens once, in constant memory.

    Lengths of documents are in tokens, EOS included; `lengths` counts them by powers of two:
    `documents` with at least `from` and less than `below` tokens. `splits` give tokens,
    documents, bytes of text and bytes a token; `sources` the same for each of the training
    split; `frequent` the `top` tokens with their counts and text; `samples` documents drawn by
    `seed`.
    """
    tokenizer = data.tokenizer()
    sizes = byte_lengths(tokenizer)
    added = (
        int(sizes[tokenizer.encode("a")].sum()) - 1
    )  # the space that SentencePiece puts before each text
    streams = {
        (split, source): data.tokens(split, source) for split in SPLITS for source in data.sources()
    }
    total = sum(len(stream) for stream in streams.values())
    counts = np.zeros(data.vocab_size, dtype=np.int64)
    lengths = np.zeros(64, dtype=np.int64)
    least, most, documents, done = 1 << 62, 0, 0, 0
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for (split, source), stream in streams.items():
        own = np.zeros(data.vocab_size, dtype=np.int64)
        for start in range(0, len(stream), STEP):
            piece = stream.read(start, STEP)
            own += np.bincount(piece, minlength=data.vocab_size)[: data.vocab_size]
            done += len(piece)
            progress(done, total)
        number = 0
        for part in stream.document_lengths():
            number += len(part)
            if split == "train" and len(part):
                lengths += np.bincount(
                    np.frexp(np.maximum(part, 1).astype(np.float64))[1] - 1, minlength=64
                )
                least, most = min(least, int(part.min())), max(most, int(part.max()))
        size = int((own * sizes).sum()) - added * number
        found[split, source] = {
            "documents": number,
            "tokens": len(stream),
            "bytes": size,
            "bytes_per_token": size / max(1, len(stream)),
        }
        if split == "train":
            counts += own
            documents += number
    weights = getattr(data, "manifest", {}).get("sources", [])
    given = {source["name"]: source.get("weight") for source in weights}
    tokens = int(counts.sum())
    order = np.argsort(-counts, kind="stable")[:top]
    splits = {
        split: {
            key: sum(entry[key] for (part, _), entry in found.items() if part == split)
            for key in ("documents", "tokens", "bytes")
        }
        for split in SPLITS
    }
    return {
        "kind": "samples" if isinstance(data, SampleFolder) else "shards",
        "fingerprint": data.fingerprint,
        "tokenizer": {
            "name": tokenizer.name,
            "vocab_size": data.vocab_size,
            "bos_id": data.bos_id,
            "eos_id": data.eos_id,
        },
        "splits": {
            split: entry | {"bytes_per_token": entry["bytes"] / max(1, entry["tokens"])}
            for split, entry in splits.items()
        },
        "sources": [
            {
                "name": name,
                **found["train", name],
                "weight": given.get(name),
                "share": found["train", name]["tokens"] / max(1, tokens),
            }
            for name in data.sources()
        ],
        "lengths": [
            {"from": 1 << i, "below": 2 << i, "documents": int(n)}
            for i, n in enumerate(lengths)
            if n
        ],
        "length": {
            "least": least if documents else 0,
            "mean": tokens / max(1, documents),
            "most": most,
        },
        "vocabulary": {
            "used": int((counts > 0).sum()),
            "never_used": int((counts == 0).sum()),
            "entropy_bits": float(-(p := counts[counts > 0] / max(1, tokens)) @ np.log2(p))
            if tokens
            else 0.0,
        },
        "frequent": [
            {
                "id": int(i),
                "piece": tokenizer.token(int(i)),
                "text": tokenizer.decode([int(i)]),
                "count": int(counts[i]),
                "share": int(counts[i]) / max(1, tokens),
            }
            for i in order
            if counts[i]
        ],
        "samples": [
            sample
            for name in data.sources()
            for sample in _samples(data, streams["train", name], name, seed)
        ],
    }


def _samples(data: Data, stream: TokenStream, source: str, seed: int) -> list[dict[str, Any]]:
    """A few documents of a source, decoded."""
    bounds = stream.some_documents(
        SAMPLES, lambda n: permute(np.arange(min(SAMPLES, n)), n, derive_key(seed, source))
    )
    tokenizer = data.tokenizer()
    return [
        {
            "source": source,
            "tokens": end - start,
            "text": tokenizer.decode(
                stream.read(start, min(SHOWN, end - start)).tolist(), skip_special_tokens=True
            ),
            "cut": end - start > SHOWN,
            **({"pieces": _pieces(tokenizer, stream, start, end)} if stream.masked else {}),
        }
        for start, end in bounds
    ]


def _pieces(
    tokenizer: Tokenizer, stream: TokenStream, start: int, end: int
) -> list[dict[str, Any]]:
    """The first tokens of a document, each with its text and whether it is trained on. Tokens that
    make one character together are one piece."""
    count = min(SHOWN, end - start)
    ids, bits = stream.read(start, count).tolist(), stream.trained(start, count).tolist()
    found: list[dict[str, Any]] = []
    begin, before = 0, ""
    for i in range(len(ids)):
        text = tokenizer.decode(ids[: i + 1])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and i + 1 < len(ids) and i - begin < 3:
            continue
        found.append({"text": text[len(before) :], "trained": bool(bits[i])})
        begin, before = i + 1, text
    return found
