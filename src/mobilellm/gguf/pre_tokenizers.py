"""The ways to cut text before byte-level BPE that GGUF has a name for.

    named("qwen2").stages()           # for the tokenizers library
    recognized(stages)                # those of a tokenizer.json: their entry here, or None

GGUF cannot describe a way to cut text: llama.cpp has a list of names and the patterns of each,
which it applies one after another, every match and what lies between two matches a part of its own.
The patterns are llama.cpp's, in the tokenizers library's spelling; other spellings that cut the
same way are those of the models that the names come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
CONTRACTIONS_FOLDED = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN_REST = r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NOT_LOWER, NOT_UPPER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
OPENING = r"[^\r\n\p{L}\p{N}]?"
# Letters that have a case, as DeepSeek's tokenizer lists them: code points and their ranges.
CASED_RANGES = """
41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386
388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA
1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57
1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB
1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D
212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3
A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A
FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF
1E900-1E943
"""


def _character_class(ranges: str) -> str:
    """The inside of a character class."""
    return "".join(
        "-".join(chr(int(end, 16)) for end in each.split("-")) for each in ranges.split()
    )


CASED = _character_class(CASED_RANGES)
CHINESE = _character_class("4E00-9FA5 800-4E00 AC00-D7FF")
PUNCTUATION = _character_class("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F")


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """One way to cut text."""

    names: tuple[str, ...]
    """What llama.cpp calls it; the first is written."""
    patterns: tuple[str, ...]
    """Regular expressions, applied one after another."""
    spellings: tuple[tuple[str, ...], ...] = ()
    """Other patterns that cut text the same way, but for what `inexact` says."""
    inexact: str = ""
    """In what llama.cpp differs from the spellings; nothing where it does not."""
    ignore_merges: bool = False
    """Whether llama.cpp takes a part that is a piece as a whole, however its merges lead."""

    def stages(self) -> list[dict[str, Any]]:
        """The pre-tokenizer's stages, as a tokenizer.json has them."""
        if self.patterns == (GPT2,):
            return [_byte_level(use_regex=True)]
        if self.patterns == (r"\p{N}", GPT2):
            return [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)]
        cuts: list[dict[str, Any]] = [
            {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False}
            for each in self.patterns
        ]
        return [*cuts, _byte_level(use_regex=False)]


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


PRE_TOKENIZERS = (
    PreTokenizer(names=("gpt-2", "gpt2", "phi-2", "olmo", "mpt", "jais"), patterns=(GPT2,)),
    PreTokenizer(
        names=("smollm", "starcoder", "refact", "command-r", "codeshell"),
        patterns=(r"\p{N}", GPT2),
    ),
    PreTokenizer(
        names=("llama-bpe", "llama3", "llama-v3", "falcon3"),
        patterns=(rf"{CONTRACTIONS}|{WORD}|\p{{N}}{{1,3}}|{REST}",),
        spellings=((rf"{CONTRACTIONS_FOLDED}|{WORD}|\p{{N}}{{1,3}}|{REST}",),),
        ignore_merges=True,
    ),
    PreTokenizer(
        names=("qwen2", "stablelm2", "megrez", "deepseek-r1-qwen"),
        patterns=(rf"{CONTRACTIONS}|{WORD}|\p{{N}}|{REST}",),
        spellings=((rf"{CONTRACTIONS_FOLDED}|{WORD}|\p{{N}}|{REST}",),),
    ),
    PreTokenizer(
        names=("tekken",),
        patterns=(
            rf"{OPENING}{NOT_LOWER}*{NOT_UPPER}+|{OPENING}{NOT_LOWER}+{NOT_UPPER}*|{TEKKEN_REST}",
        ),
        spellings=(
            (rf"{OPENING}{UPPER}*{LOWER}+|{OPENING}{UPPER}+{LOWER}*|{TEKKEN_REST}",),
        ),
        inexact="llama.cpp cuts words at combining marks, which the tokenizer does not",
        ignore_merges=True,
    ),
    PreTokenizer(
        names=("deepseek-llm",),
        patterns=(
            r"[\r\n]",
            rf"\s?[{CASED}]+",
            rf"\s?[{PUNCTUATION}\u3001-\u3002]+",  # U+3000 is a space by then
            r"\s+\z",
            rf"[{CHINESE}]+",
            r"\p{N}+",
        ),
    ),
    # What llama.cpp takes where the file names none.
    PreTokenizer(
        names=("default",), patterns=(r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
    ),
)  # fmt: skip


def named(name: str) -> PreTokenizer | None:
    """The entry of a name of llama.cpp's, or None where it is not known here."""
    return next((each for each in PRE_TOKENIZERS if name in each.names), None)


def recognized(stages: list[dict[str, Any]]) -> tuple[PreTokenizer | None, list[str]]:
    """The entry that cuts text as these stages of a tokenizer.json do, or None, and in what it
    differs."""
    patterns: list[str] = []
    for i, stage in enumerate(stages):
        last = i == len(stages) - 1
        if stage["type"] == "ByteLevel" and last and not stage.get("add_prefix_space"):
            patterns += [GPT2] * bool(stage.get("use_regex", True))
        elif stage["type"] == "Digits" and not last:
            patterns.append(r"\p{N}" if stage.get("individual_digits") else r"\p{N}+")
        elif (
            stage["type"] == "Split"
            and not last
            and stage["behavior"] == "Isolated"
            and not stage.get("invert")
            and "Regex" in stage["pattern"]
        ):
            patterns.append(stage["pattern"]["Regex"])
        else:
            return None, []
    if not stages or stages[-1]["type"] != "ByteLevel":
        return None, []
    found = tuple(patterns)
    for each in PRE_TOKENIZERS:
        if found == each.patterns:
            return each, []
        if found in each.spellings:
            return each, [each.inexact] if each.inexact else []
    return None, []
