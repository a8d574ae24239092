"""A model made ready to be scored on tasks, whatever kind it is.

subject = open_subject("demo", Path("runs/demo"), Precision.FP32, batch_tokens=2048)
"""

from __future__ import annotations

from pathlib import Path

from mobilellm.errors import UserError
from mobilellm.files import read_json
from mobilellm.interop.load import load, source_hash
from mobilellm.model.costs import ModelCosts
from mobilellm.model.precision import Precision
from mobilellm.tasks.campaign import Subject
from mobilellm.tasks.engine import Backend, Engine, NetworkBackend
from mobilellm.tasks.requests import Encoder, OwnEncoder


def open_subject(
    name: str, path: Path, precision: Precision, batch_tokens: int, recheck: bool = False
) -> Subject:
    """A model ready to be scored: through our own network where it is of that kind, else through
    transformers. With `recheck` its choices are held to those of float32."""
    backend: Backend
    exact: NetworkBackend | None = None
    encoder: Encoder
    try:
        loaded = load(path, release=True)
    except UserError as refusal:
        foreign = foreign_kind(path)
        if foreign is None:
            raise
        if precision is not Precision.FP32:
            raise UserError(
                f"{path}: a model of type {foreign} is computed in fp32",
                hint="leave out --precision",
            ) from refusal
        from mobilellm.tasks.transformers_backend import load_transformers

        foreign_backend, encoder = load_transformers(path)
        backend = foreign_backend
        count = sum(parameter.numel() for parameter in foreign_backend.model.parameters())
    else:
        network, encoder = loaded.as_run, OwnEncoder(loaded.require_tokenizer(path))
        backend = NetworkBackend(network, precision)
        exact = NetworkBackend(network) if recheck else None
        count = ModelCosts.of(network.config).parameters["total"]
    digest = source_hash(path)[:24]
    return Subject(
        name=name,
        engine=Engine(backend, batch_tokens),
        encoder=encoder,
        fingerprint=f"{digest}-{precision}",
        parameters=count,
        exact=(Engine(exact, batch_tokens), f"{digest}-{exact.precision}") if exact else None,
    )


def foreign_kind(path: Path) -> str | None:
    """The model_type of a Hugging Face folder that is not ours, or None."""
    if not (path / "config.json").is_file():
        return None
    values = read_json(path / "config.json", limit=16 << 20)
    kind = values.get("model_type") if isinstance(values, dict) else None
    return str(kind) if kind not in (None, "mobilellm") else None


def register_with_harness() -> None:
    """Make "mobilellm" a model name of lm-eval, with the arguments pretrained (a path),
    batch_tokens and precision."""
    from lm_eval.api.registry import model_registry, register_model

    from mobilellm.tasks.harness_model import EngineModel

    class Model(EngineModel):
        """Loads what `pretrained` names."""

        def __init__(
            self,
            pretrained: str,
            batch_tokens: int = 2048,
            precision: str = "fp32",
            **unused: object,
        ) -> None:
            loaded = load(Path(pretrained))
            tokenizer = loaded.require_tokenizer(pretrained)
            backend = NetworkBackend(loaded.as_run, Precision(precision))
            super().__init__(
                Engine(backend, int(batch_tokens)),
                OwnEncoder(tokenizer),
                network=loaded.network,
                tokenizer=tokenizer,
            )

    if "mobilellm" not in model_registry.keys():  # noqa: SIM118 - a registry, not a dict
        register_model("mobilellm")(Model)
