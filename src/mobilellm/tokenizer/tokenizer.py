"""Tokenizers: trained here, or brought along as a tokenizer.json or a SentencePiece model.

    tokenizer = train_bpe(["some text"], vocab_size=512)
    tokenizer.decode(tokenizer.encode("some text"))
    Tokenizer.load(Path("folder"))

`encode` adds nothing: BOS and EOS are put where a document begins and ends, by whoever knows.
The text of a special token inside a document ("</s>") is text, never the token, unless whoever
encodes it says that it is markup (`parse_special`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import orjson

from mobilellm.damage import is_failure
from mobilellm.errors import UserError, first_line
from mobilellm.files import read_json, read_regular, write_file, write_json
from mobilellm.patterns.limits import LONG, check_spaces, is_risky, library_error, within_time
from mobilellm.schema import AtLeast, checked
from mobilellm.tokenizer.growth import check_growth

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
LONGEST_WORD = 256  # characters of a word that a vocabulary is trained on as a whole
LONG_WORD = re.compile(
    "|".join(
        rf"(?:{kind}){{{LONGEST_WORD + 1},}}" for kind in (r"[^\W\d_]", r"\d", r"[^\w\s]|_", r"\s")
    )
)
"""Letters, digits, spaces or none of these in a row: what byte-level BPE takes for one word."""
RESERVED = "<|reserved_{}|>"  # a row that a later special token takes over
MAX_RESERVED = 4096
TEMPLATE_FILE, NAMED_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
LARGEST_TEMPLATE = 1 << 20  # bytes of a chat template
LARGEST_FILE = 64 << 20  # bytes of tokenizer.json; the largest known have half of that
LARGEST_VOCABULARY = (
    1 << 22
)  # ids; one stray id of four billion would otherwise ask for a table of that many rows


class Tokenizer:
    """Text to token ids and back, with the two ids that delimit documents."""

    def __init__(
        self,
        fast: tokenizers.Tokenizer,
        *,
        name: str,
        bos_id: int | None,
        eos_id: int | None,
        chat_template: str | None = None,
        named_templates: Mapping[str, str] | None = None,
    ) -> None:
        """`named_templates` are chat templates beside the first one: "tool_use", for instance."""
        fast.encode_special_tokens = (
            True  # a document that spells out a special token does not get that token
        )
        fast.no_padding()
        fast.no_truncation()
        self.fast, self.name, self.bos_id, self.eos_id, self.chat_template = (
            fast,
            name,
            bos_id,
            eos_id,
            chat_template,
        )
        self.named_templates: dict[str, str] = dict(named_templates or {})
        self.vocab_size = 1 + max(fast.get_vocab(with_added_tokens=True).values(), default=-1)
        # Before the library writes itself out, which walks through every id up to the largest.
        if not 1 <= self.vocab_size <= LARGEST_VOCABULARY:
            raise UserError(
                f"tokenizer {name!r}: a vocabulary of {self.vocab_size}, must be from 1 to "
                f"{LARGEST_VOCABULARY}"
            )
        # Through our own JSON, so that the bytes, and with them the hash, do not depend on who
        # wrote the file.
        content = json.loads(fast.to_str())
        check_growth(content, f"tokenizer {name!r}")
        self._risky = is_risky(content)
        self._json = orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)
        self.sha256 = hashlib.sha256(self._json).hexdigest()
        # Whether a text by itself begins with BOS is what the file's own post-processor does.
        self.add_bos = bos_id is not None and self._ids(fast, ["a"], alone=True)[0][:1] == [bos_id]
        self._delimit()

    def _delimit(self) -> None:
        """See to it that a document which spells BOS or EOS does not get that token, also where the
        file does not mark it as special. transformers marks it, too; the file that is saved, and
        its hash, stay as they are."""
        from tokenizers import AddedToken

        added = self.fast.get_added_tokens_decoder()
        for token_id in {self.bos_id, self.eos_id} - {None}:
            token = added.get(token_id)
            if token is not None and not token.special:
                flags = {
                    name: getattr(token, name)
                    for name in ("single_word", "lstrip", "rstrip", "normalized")
                }
                self.fast.add_special_tokens([AddedToken(token.content, special=True, **flags)])

    @property
    def prefix_id(self) -> int | None:
        """The token put before a text by itself, so that its first token is predicted too: BOS
        where there is one, else EOS. None for a tokenizer without either."""
        return self.eos_id if self.bos_id is None else self.bos_id

    @functools.cached_property
    def parsing(self) -> tokenizers.Tokenizer:
        """The same tokenizer, for text in which a special token that is spelled out is that token:
        chat markup, prompts of the harness."""
        from tokenizers import Tokenizer as Fast

        return Fast.from_str(self.fast.to_str())

    def replaced(
        self, fast: tokenizers.Tokenizer | None = None, *, chat_template: str | None = None
    ) -> Tokenizer:
        """A copy with another of the library's tokenizers, or another chat template; its BOS and
        EOS keep their ids."""
        return Tokenizer(
            self._fresh() if fast is None else fast,
            name=self.name,
            bos_id=self.bos_id,
            eos_id=self.eos_id,
            chat_template=self.chat_template if chat_template is None else chat_template,
            named_templates=self.named_templates if chat_template is None else None,
        )

    def ending_with(self, token: str) -> Tokenizer:
        """A copy whose EOS is that token. `UserError` where the vocabulary lacks it."""
        found = self.fast.token_to_id(token)
        if found is None:
            raise UserError(
                f"tokenizer {self.name!r}: no token {token!r:.60} to end documents with",
                hint="--eos takes a token as the vocabulary spells it",
            )
        return Tokenizer(
            self._fresh(),
            name=self.name,
            bos_id=self.bos_id,
            eos_id=found,
            chat_template=self.chat_template,
            named_templates=self.named_templates,
        )

    def _fresh(self) -> tokenizers.Tokenizer:
        """The library's tokenizer as the file has it."""
        from tokenizers import Tokenizer as Fast

        return Fast.from_str(self._json.decode())

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of a text, nothing added. Arguments and `UserError` as for `encode_batch`."""
        return self.encode_batch([text], parse_special=parse_special)[0]

    def encode_batch(
        self, texts: list[str], *, parse_special: bool = False, alone: bool = False
    ) -> list[list[int]]:
        """Token ids of several texts, on all cores.

        With `parse_special` a special token that a text spells out is that token; else it is text.
        With `alone` a text gets what the tokenizer puts around a text by itself (BOS). `UserError`
        when the vocabulary has no token for some of it.
        """
        return self._ids(self.parsing if parse_special else self.fast, texts, alone=alone)

    def _ids(self, fast: tokenizers.Tokenizer, texts: list[str], *, alone: bool) -> list[list[int]]:
        """The library's ids, in bounded time where that is not sure."""

        def encode() -> list[list[int]]:
            encodings = fast.encode_batch_fast(texts, add_special_tokens=alone)
            return [encoding.ids for encoding in encodings]

        try:
            check_spaces(texts, self.name)
            characters = sum(map(len, texts))
            if self._risky or characters > LONG:
                return within_time(encode, characters, self.name, quiet=self._risky)
            return encode()
        except (TypeError, KeyboardInterrupt):
            raise  # not text, or half of a surrogate pair: the caller's mistake
        except BaseException as error:  # the library raises a bare Exception, and panics
            raise library_error(error, self.name) from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return str(self.fast.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token(self, token_id: int | None) -> str | None:
        """The piece of an id, as the vocabulary spells it."""
        return None if token_id is None else self.fast.id_to_token(token_id)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and the files beside it that make transformers' AutoTokenizer give
        the same ids and the same text of a conversation."""
        write_file(folder / "tokenizer.json", self._json)
        special = {
            "bos_token": self.token(self.bos_id),
            "eos_token": self.token(self.eos_id),
            "unk_token": getattr(self.fast.model, "unk_token", None),
        }
        special = {key: value for key, value in special.items() if value is not None}
        settings: dict[str, Any] = {
            # Any Llama class would rebuild the tokenizer its own way and change the ids.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1 << 30,
            "name_or_path": self.name,
        }
        if self.chat_template is not None:
            write_file(folder / TEMPLATE_FILE, self.chat_template.encode())
        for name, template in self.named_templates.items():
            write_file(folder / NAMED_TEMPLATES / f"{name}.jinja", template.encode())
        write_json(folder / "tokenizer_config.json", settings | special)
        write_json(folder / "special_tokens_map.json", special)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a folder with tokenizer.json or tokenizer.model, or one of these files.
        `UserError` when it cannot be."""
        if not path.exists():
            raise UserError(f"{path}: no such tokenizer")
        if path.is_dir():
            for name in ("tokenizer.json", "tokenizer.model"):
                if (path / name).is_file():
                    return cls.load(path / name)
            raise UserError(f"{path}: holds neither tokenizer.json nor tokenizer.model")
        if path.suffix != ".json":
            from mobilellm.tokenizer.sentencepiece import to_fast_tokenizer
            from mobilellm.tokenizer.sentencepiece_model import read_model

            model = read_model(path)
            settings = _settings(path.parent)
            ids = {"bos": model.bos_id, "eos": model.eos_id}
            if settings.get("add_bos_token") is False:
                model.bos_id = None  # known, and put before no text
            fast = to_fast_tokenizer(model, str(path))
            _add_tokens(fast, path.parent, len(model.pieces), model.add_dummy_prefix)
            for kind in ids:
                if f"{kind}_token" in settings:
                    ids[kind] = _special_id(fast, settings, kind)
            return cls(
                fast,
                name=_folder_name(path),
                bos_id=ids["bos"],
                eos_id=ids["eos"],
                **_templates(settings),
            )
        from tokenizers import Tokenizer as Fast

        data = read_regular(path, limit=LARGEST_FILE)
        try:
            fast = Fast.from_str(data.decode())
        except BaseException as error:
            # The library raises a bare Exception with the parser's message, and on some damage it
            # panics.
            if not is_failure(error):
                raise
            raise UserError(f"{path}: not a tokenizer.json ({first_line(error)})") from None
        settings = _settings(path.parent)
        ids = {kind: _special_id(fast, settings, kind) for kind in ("bos", "eos")}
        if not settings.keys() & {
            "bos_token",
            "eos_token",
            "bos_token_id",
            "eos_token_id",
        }:  # a file on its own
            ids["eos"] = fast.token_to_id(END_OF_TEXT)
        return cls(
            fast,
            name=str(settings.get("name_or_path") or _folder_name(path)),
            bos_id=ids["bos"],
            eos_id=ids["eos"],
            **_templates(settings),
        )


class AddedTokenEntry(TypedDict):
    """A token of tokenizer_config.json's added_tokens_decoder."""

    content: str


def _add_tokens(fast: tokenizers.Tokenizer, folder: Path, pieces: int, space_first: bool) -> None:
    """Add the tokens that the files beside a tokenizer.model name, under the ids given there.

    `pieces` is the size of the model's own vocabulary. `UserError` for an id that leaves a gap,
    and for a token that is not special where a space is put before a text: transformers then puts
    its space elsewhere.
    """
    from tokenizers import AddedToken

    wanted: dict[int, dict[str, Any]] = {}
    for name in ("added_tokens.json", "tokenizer_config.json"):
        where = folder / name
        values = read_json(where, limit=16 << 20) if where.is_file() else {}
        listed: dict[int, dict[str, Any]]
        if name == "added_tokens.json":
            ids = checked(values, dict[str, Annotated[int, AtLeast(0)]], str(where))
            listed = {i: {"content": token} for token, i in ids.items()}
        else:
            settings = checked(values, dict[str, Any], str(where))
            decoder = settings.get("added_tokens_decoder") or {}
            tokens = checked(decoder, dict[str, AddedTokenEntry], f"{where}: added_tokens_decoder")
            if not all(i.isascii() and i.isdecimal() and len(i) < 10 for i in tokens):
                raise UserError(f"{where}: added_tokens_decoder: a key that is no token id")
            listed = {int(i): dict(token) for i, token in tokens.items()}
        wanted |= listed
    for i, token in sorted(wanted.items()):
        content = token.get("content")
        if i < pieces:
            if fast.id_to_token(i) != content:
                raise UserError(f"{folder}: added token {content!r} has the id of another piece")
            continue
        special = bool(token.get("special", True))
        if space_first and not special:
            raise UserError(
                f"{folder}: added token {content!r} is not special, and a space is put before "
                "texts",
                hint="use a tokenizer.json",
            )
        flags = {name: bool(token.get(name)) for name in ("lstrip", "rstrip", "single_word")}
        added = AddedToken(content, special=special, normalized=False, **flags)
        (fast.add_special_tokens if special else fast.add_tokens)([added])
        if fast.token_to_id(content) != i:
            raise UserError(f"{folder}: added token {content!r} cannot have the id {i}")


def _folder_name(path: Path) -> str:
    """The name of the folder a file lies in, also for a path that does not spell it."""
    return path.absolute().parent.name


def _special_id(fast: tokenizers.Tokenizer, settings: dict[str, Any], kind: str) -> int | None:
    """The id of "bos" or "eos": of the token that is named, else the id that is (the first, of a
    list)."""
    token = settings.get(f"{kind}_token")
    token = token.get("content") if isinstance(token, dict) else token
    found = fast.token_to_id(token) if isinstance(token, str) else None
    if found is not None:
        return int(found)
    given = settings.get(f"{kind}_token_id")
    given = given[0] if isinstance(given, list) and given else given
    # `type`, since JSON's true is an int too; an id without a token is another model's
    return (
        given
        if type(given) is int and 0 <= given < 1 << 32 and fast.id_to_token(given) is not None
        else None
    )


def _settings(folder: Path) -> dict[str, Any]:
    """What the files beside a tokenizer say, the most telling last."""
    found: dict[str, Any] = {}
    for name in ("config.json", "special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            values = read_json(folder / name, limit=16 << 20)
            if isinstance(values, dict):
                keys = (
                    "bos_token",
                    "eos_token",
                    "bos_token_id",
                    "eos_token_id",
                    "add_bos_token",
                    "chat_template",
                    "name_or_path",
                )
                found.update({key: values[key] for key in keys if values.get(key) is not None})
    files = {"default": folder / TEMPLATE_FILE}  # where transformers has kept it since 4.52
    if (folder / NAMED_TEMPLATES).is_dir():
        files |= {path.stem: path for path in sorted((folder / NAMED_TEMPLATES).glob("*.jinja"))}
    for name, path in files.items():
        if not path.is_file():
            continue
        try:
            text = read_regular(path, limit=LARGEST_TEMPLATE).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
        before = templates_of(found.get("chat_template"))
        found["chat_template"] = {**before, name: text}
    return found


def templates_of(value: Any) -> dict[str, str]:
    """The templates of a `chat_template` in any of its forms: a text, which is "default", a list
    of objects with `name` and `template`, or name -> text. Names that are no file names are left
    out."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        value = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
    if not isinstance(value, dict):
        return {}
    return {
        name: text
        for name, text in value.items()
        if isinstance(name, str) and re.fullmatch(r"[\w-]{1,60}", name) and isinstance(text, str)
    }


def _templates(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Tokenizer` that hold its chat templates."""
    named = templates_of(settings.get("chat_template"))
    return {"chat_template": named.pop("default", None), "named_templates": named}


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    name: str = "byte-level BPE",
    reserved: int = 0,
    eos: str = END_OF_TEXT,
) -> Tokenizer:
    """Train a byte-level BPE; every text decodes to itself. `eos`, `<|endoftext|>`, has id 0.

    `reserved` rows, from id 1 on, are kept free for special tokens that come later. `UserError`
    when the vocabulary cannot hold all 256 bytes, the end-of-text token and these.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if not 0 <= reserved <= MAX_RESERVED:
        raise UserError(f"{reserved} reserved tokens: must be from 0 to {MAX_RESERVED}")
    if not 257 + reserved <= vocab_size <= 1 << 20:
        rows = f", {reserved} reserved tokens" if reserved else ""
        raise UserError(
            f"a vocabulary of {vocab_size}: must be from {257 + reserved} (all bytes{rows} and "
            f"the end-of-text token) to {1 << 20}"
        )
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos, *(RESERVED.format(i) for i in range(reserved))],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    fast.train_from_iterator(_without_long_words(texts), trainer)
    return Tokenizer(fast, name=name, bos_id=None, eos_id=fast.token_to_id(eos))


def _without_long_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut within each word of more than `LONGEST_WORD` characters.

    A merge walks every word that it occurs in from end to end, so that a text without spaces, which
    is one word, would cost its length for every token of the vocabulary.
    """
    for text in texts:
        if not re.search(rf"\s{{{LONGEST_WORD + 1}}}", text) and (
            len(max(text.split(), key=len, default="")) <= LONGEST_WORD
        ):
            yield text
            continue
        start = 0
        for word in LONG_WORD.finditer(text):
            for cut in range(word.start() + LONGEST_WORD, word.end(), LONGEST_WORD):
                yield text[start:cut]
                start = cut
        yield text[start:]
