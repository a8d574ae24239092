"""Whether a model's tokenizer, as read here, gives the ids of the tool that its format is for.

    check = check_tokenizer(Path("model.gguf"))
    check.tool, check.texts, check.differences      # "llama.cpp", 26, []

A GGUF file is compared with llama.cpp, a folder with tokenizer.json with transformers, and one with
a tokenizer.model alone with SentencePiece.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilellm.errors import UserError, first_line
from mobilellm.interop import gguf_reader
from mobilellm.interop.load import recognize
from mobilellm.runtimes import llama_cpp
from mobilellm.runtimes.llama_cpp_tokens import llama_cpp_tokens
from mobilellm.tokenizer.tokenizer import Tokenizer
from mobilellm.workflows.token_probe import compare_ids, probes


@dataclass(frozen=True, kw_only=True)
class TokenCheck:
    """How the ids of the probe texts compare."""

    tool: str
    """Whose ids they were compared with."""
    texts: int
    """How many were tried."""
    differences: list[str]
    """A line for each text with other ids."""


def check_tokenizer(path: Path) -> TokenCheck:
    """Compare the tokenizer of the model at `path`. `UserError` where it has none that can be read,
    or where the tool is not installed."""
    reader, where = recognize(path)
    tokenizer = reader.read_tokenizer(where)
    if tokenizer is None:
        raise UserError(f"{path}: has no tokenizer to check")
    if gguf_reader.recognizes(where):
        llama_cpp.RUNTIME.require()
        with llama_cpp_tokens(where) as encode:
            return _compared(
                "llama.cpp", tokenizer, lambda text, parse: encode(text, parse_special=parse)
            )
    if (where / "tokenizer.json").is_file():
        theirs = _tool("transformers", lambda lib: lib.AutoTokenizer.from_pretrained(where))

        def ids(text: str, parse: bool) -> list[int]:
            # transformers always takes a special token that a text spells out for that token.
            if not parse:
                return tokenizer.encode(text)
            return list(theirs.encode(text, add_special_tokens=False))

        return _compared("transformers", tokenizer, ids)
    if (file := where / "tokenizer.model").is_file():
        processor = _tool(
            "sentencepiece", lambda lib: lib.SentencePieceProcessor(model_file=str(file))
        )

        def pieces(text: str, parse: bool) -> list[int]:
            return tokenizer.encode(text, parse_special=True) if parse else processor.encode(text)

        return _compared("sentencepiece", tokenizer, pieces)
    raise UserError(
        f"{path}: no other tool reads such a tokenizer, so that there is nothing to try"
    )


def _tool(package: str, opened: Callable[[Any], Any]) -> Any:
    """What a package makes of the files. `UserError` when it is missing, or refuses them."""
    try:
        library = __import__(package)
    except ImportError:
        raise UserError(
            f"{package} is not installed, with whose ids the tokenizer is compared",
            hint=f"pip install {package}",
        ) from None
    try:
        return opened(library)
    except Exception as error:  # of whatever kind: it is the package's answer
        raise UserError(f"{package} cannot read the tokenizer ({first_line(error)})") from None


def _compared(
    tool: str, tokenizer: Tokenizer, theirs: Callable[[str, bool], list[int]]
) -> TokenCheck:
    found = compare_ids(tokenizer, theirs)
    lines = [f"{one.what}: {one.before} here, {one.after} there" for one in found]
    return TokenCheck(tool=tool, texts=len(probes(tokenizer)), differences=lines)
