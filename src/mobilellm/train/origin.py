"""The model that a run starts from: read, compared with the data's tokenizer, its vocabulary grown
where it must be.

origin = read_origin(Path("smollm2.gguf"), data)
origin.weights.config, origin.facts["path"]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilellm.data.dataset import Data
from mobilellm.errors import UserError
from mobilellm.interop.load import load
from mobilellm.model.network import Network
from mobilellm.model.weights import grow_vocabulary, to_named
from mobilellm.tokenizer.special_tokens import is_reserved
from mobilellm.tokenizer.tokenizer import Tokenizer
from mobilellm.train.inputs import Weights
from mobilellm.weights.assemble import assemble

# Texts that two tokenizers with one vocabulary must cut alike: words, spaces, digits, scripts,
# code, line breaks.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces, 12345 and 3.14159\n\tdef f(x):\n        return x ** 2",
    "Größe, naïve café, Ελληνικά, русский, 日本語, 한국어, 😀",
)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Given weights, and where they are from."""

    weights: Weights
    """Fit for the data: as many rows as its tokenizer has tokens."""
    facts: dict[str, Any]
    """For environment.json: the path, what the files say of their origin, and rows added."""
    loaded: Network
    """As it was read, without the rows added."""

    def network(self) -> Network:
        """The network of these weights, on the CPU, which is not trained."""
        network = self.loaded
        if self.facts["added_rows"]:
            assert self.weights.named is not None
            network = assemble(self.weights.config, self.weights.named, self.facts["path"])
        return network.eval().requires_grad_(False)


def read_origin(path: Path, data: Data, where: str = "") -> Origin:
    """Read the model at `path` for a training on `data`; errors call it `where`.

    The data's tokenizer must be the model's, or the model's with more tokens after its own.
    `UserError` when it is another, or the model has none to compare.
    """
    loaded = load(path)
    config = loaded.config
    where = where or f"start.from = {str(path)!r}"
    tokenizer = data.tokenizer()
    own = loaded.require_tokenizer(where)  # without it nothing says that the data fit the model
    if own.sha256 != tokenizer.sha256:
        _check_tokens(own, tokenizer, where)
    rows = max(data.vocab_size, config.vocab_size)  # a model may have more rows than tokens
    named = to_named(config, dict(loaded.network.named_parameters()))
    grown, named = grow_vocabulary(config, named, rows)
    facts = {"path": str(path), "origin": loaded.origin, "added_rows": rows - config.vocab_size}
    return Origin(weights=Weights(config=grown, named=named), facts=facts, loaded=loaded.network)


def _check_tokens(own: Tokenizer, other: Tokenizer, where: str) -> None:
    """`UserError` unless `other`, the data's tokenizer, has every token of `own` under its id, but
    for names in the place of reserved ones, and cuts text alike."""
    hint = "prepare the data with the model's own tokenizer: `mobilellm prepare --tokenizer`"
    for token in range(own.vocab_size):
        mine, theirs = own.fast.id_to_token(token), other.fast.id_to_token(token)
        if mine != theirs and not is_reserved(mine):
            raise UserError(
                f"{where}: the data were made with another tokenizer (token {token} is {theirs!r} "
                f"there, {mine!r} in the model)",
                hint=hint,
            )
    for text in PROBES:
        if own.encode(text) != other.encode(text):
            raise UserError(
                f"{where}: the data's tokenizer has the model's tokens, but cuts text otherwise",
                hint=hint,
            )
