"""The settings of the parts of a model: which projector, which language model, which prompt.

In: mappings from a YAML file. Out: frozen models that ``train/projectors.py``, ``train/lms/`` and ``train/prompt.py``
read. ``train/config.py`` holds them as its keys ``projector``, ``lm`` and ``prompt``. Nothing here imports torch, so
that ``--help`` and a refusal of a bad key cost nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from shards.config import Config

Norm = Literal["none", "rms", "layer"]
AUDIO_MARK = "<|audio|>"


class MlpConfig(Config):
    """concat ``stack`` frames -> [norm] -> ``hidden`` -> GELU -> width -> [norm]. The defaults are W1's projector."""

    kind: Literal["mlp"] = "mlp"
    stack: int = Field(default=1, ge=1)  # frames concatenated into one soft token; the tail is zero-padded
    hidden: int | None = Field(default=None, ge=1)  # None: the LM's width
    bias: bool = False
    input_norm: Literal["none", "layer"] = "none"  # over the concatenated frames
    norm: Norm = "none"  # over the soft tokens; its gain starts at the RMS of the LM's embeddings


class ResidualConfig(Config):
    """tiny-audio's projector: concat ``stack`` frames -> width -> RMSNorm -> ``blocks`` × (residual MLP, RMSNorm)."""

    kind: Literal["residual"] = "residual"
    stack: int = Field(default=4, ge=1)
    blocks: int = Field(default=2, ge=1)
    hidden: int | None = Field(default=None, ge=1)  # None: 4 × the LM's width
    dropout: float = Field(default=0.0, ge=0, lt=1)
    norm: Norm = "none"  # none: the last block ends as tiny-audio's does, in an RMSNorm of gain 1


KINDS: dict[str, type[MlpConfig] | type[ResidualConfig]] = {"mlp": MlpConfig, "residual": ResidualConfig}


def _choose(value: Any) -> Any:
    """The model of ``value["kind"]`` (``mlp`` when not told), so that an error names the keys of that kind alone."""
    if isinstance(value, Config):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"it must be a mapping with the key 'kind' ({', '.join(KINDS)}) and that kind's own keys")
    kind = value.get("kind", "mlp")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"there is no projector kind {kind!r}; the kinds are {', '.join(KINDS)}")
    model = KINDS[kind]
    for key in value:
        if key not in model.model_fields:
            raise ValueError(f"unknown key '{key}'; the {kind} projector takes {', '.join(model.model_fields)}")
    return model.model_validate(value)


ProjectorConfig = Annotated[
    MlpConfig | ResidualConfig,
    BeforeValidator(_choose),
    WithJsonSchema({"oneOf": [m.model_json_schema() for m in KINDS.values()]}),
]


class LmConfig(Config):
    """Which language model. Frozen unless ``train``: then its parameters get gradients beside the projector's."""

    model: str = "wheel:smollm2-135m-instruct"  # a model reference, or nanochat:d<depth> (random initialisation)
    train: bool = False


class PromptConfig(Config):
    """``template``: ``plain``, ``slam``, ``chat`` or a string with ``<|audio|>`` and, if wanted, ``{instruction}``."""

    template: str = "plain"
    instruction: str = "Transcribe the speech."
