"""The schemes: how many bits the weights have, and in what activations enter a product.

    SCHEMES["int4"].bits          # 4
    SCHEMES["w8a8"].activations   # "int8"

Nothing heavy is imported, so that the command line takes its choices from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activations = Literal["float", "int8"]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to quantize a model."""

    what: str
    """In a few words, for help and tables."""
    bits: int
    """Of the matrices of the blocks: 4 (a scale for each 32 inputs) or 8 (a scale a row)."""
    activations: Activations
    """Whether activations are rounded to int8, each token with a scale of its own, before they
    enter a product."""


SCHEMES = {
    "int4": Scheme(what="4-bit blocks, groups of 32", bits=4, activations="float"),
    "8da4w": Scheme(what="4-bit blocks and 8-bit activations", bits=4, activations="int8"),
    "int8": Scheme(what="8-bit blocks, a scale a row", bits=8, activations="float"),
    "w8a8": Scheme(what="8-bit blocks and 8-bit activations", bits=8, activations="int8"),
}
METHODS = ("round", "search", "gptq")
"""Ways to choose scales and integers of weights that are given."""
EMBEDDINGS = ("int8", "float")
"""What becomes of the embedding and the output layer."""
