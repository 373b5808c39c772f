"""What makes two features the same features: the feature spec and its hash, the feature id.

In: the settings that change the bytes of a feature. Out: one canonical JSON text and its sha256. Batch size, device,
worker count, shard size and paths change no feature: they are provenance (``CACHE.json``), never identity.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from shards.errors import UserError, first_validation_error

SCHEMA_VERSION = 1
MAX_CHANNELS = 65_536

WindowMode = Literal["full30", "tight", "clip"]
Codec = Literal["f16", "bf16", "int8", "fp8"]


class FeatureSpec(BaseModel):
    """Everything that changes the bytes of a feature.

    Attributes:
        schema_version: version of the cache format (``docs/format.md``).
        family: encoder architecture, such as ``whisper``.
        tensors: sha256 over names, shapes and float32 values of the encoder's tensors.
        frontend: what turns samples into the encoder's input (for Whisper the log-mel settings).
        layer: 0 … n; n is the encoder's output after its final norm.
        channels: width of a frame.
        hop: samples of audio a frame stands for (Whisper: 320, 20 ms at 16 kHz).
        sampling_rate: Hz.
        window: ``full30`` pads each window to 30 s, ``tight`` cuts the context to the utterance and ``margin``, rounded
            up to a multiple of 5 s; ``clip`` is the audio alone, for encoders that take any length.
        margin: seconds of silence that a tight context keeps after the utterance; 0 with full30.
        overlap: seconds that neighbouring windows of long audio share.
        trim: ``valid`` keeps ceil(samples / hop) frames, ``none`` keeps the padded window.
        dtype: arithmetic of the encoder pass.
        codec: how a frame is stored (``shards/format/codec.py``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    family: str
    tensors: str = Field(pattern="^[0-9a-f]{64}$")
    frontend: dict[str, int | float | str | bool | None]
    layer: int = Field(ge=0, le=1000)
    channels: int = Field(ge=1, le=MAX_CHANNELS)
    hop: int = Field(ge=1, le=1_000_000)
    sampling_rate: int = Field(ge=1, le=1_000_000)
    window: WindowMode
    margin: float = Field(default=0.0, ge=0, le=30)
    overlap: float = Field(ge=0)
    trim: Literal["valid", "none"]
    dtype: Literal["float32", "bfloat16", "float16"]
    codec: Codec

    @model_validator(mode="after")
    def _margin_is_of_tight(self) -> FeatureSpec:
        if self.margin and self.window != "tight":
            raise ValueError("a margin belongs to window tight")
        return self

    @model_serializer(mode="wrap")
    def _without_margin_of_zero(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree: dict[str, Any] = serialize(self)
        if not self.margin:
            del tree["margin"]
        return tree

    @cached_property
    def feature_id(self) -> str:
        """64 hex digits: sha256 of :meth:`canonical`."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    def canonical(self) -> str:
        """The spec as JSON with sorted keys and no spaces: the text that is hashed."""
        return canonical_json(self.model_dump())

    def differences(self, other: FeatureSpec) -> list[str]:
        """``field: mine, theirs`` for every field that differs; empty when the ids are equal."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in type(self).model_fields)
        return [f"{name}: {mine}, not {theirs}" for name, mine, theirs in pairs if mine != theirs]

    @classmethod
    def parse(cls, tree: Any, where: str) -> FeatureSpec:
        """Validate a decoded JSON object read from ``where``; raises UserError."""
        version = tree.get("schema_version") if isinstance(tree, dict) else None
        if isinstance(version, int) and version != SCHEMA_VERSION:
            fix = "update earshard" if version > SCHEMA_VERSION else "extract again"
            raise UserError(f"{where} is of cache format {version} and this earshard reads {SCHEMA_VERSION}: {fix}")
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise UserError(
                f"{where} holds no feature spec: {first_validation_error(error)}; run `make verify` on the cache"
            ) from None


def canonical_json(tree: Any) -> str:
    """JSON with sorted keys, no spaces, no NaN: one text for one value."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
