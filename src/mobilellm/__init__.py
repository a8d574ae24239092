"""mobilellm: from text to a language model that runs on a phone.

The command line is `mobilellm VERB`. From Python:

    import mobilellm

    model = mobilellm.load("runs/demo")
    print(model.generate("ROMEO:", max_new_tokens=50))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mobilellm.version import __version__

__all__ = [
    "Loaded",
    "ModelConfig",
    "Network",
    "Sampling",
    "Tokenizer",
    "UserError",
    "__version__",
    "load",
]

if TYPE_CHECKING:
    from mobilellm.errors import UserError
    from mobilellm.interop.loaded import Loaded
    from mobilellm.model.config import ModelConfig
    from mobilellm.model.generation import Sampling
    from mobilellm.model.network import Network
    from mobilellm.tokenizer.tokenizer import Tokenizer

_HOMES = {
    "Loaded": "interop.loaded",
    "ModelConfig": "model.config",
    "Network": "model.network",
    "Sampling": "model.generation",
    "Tokenizer": "tokenizer.tokenizer",
    "UserError": "errors",
}


def __getattr__(name: str) -> Any:
    """Public names, imported when first asked for: importing the package costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mobilellm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"mobilellm.{_HOMES[name]}"), name)


def load(path: str, **options: Any) -> Loaded:
    """A model from a run, a checkpoint, a Hugging Face folder, a GGUF or a llama2.c file.

    It is on the CPU in float32. Options are those of `mobilellm.interop.load.load`:
    shared_kv, fold, tokenizer. `UserError` says what is wrong.
    """
    from pathlib import Path

    from mobilellm.interop.load import load as load_model

    return load_model(Path(path), **options)
