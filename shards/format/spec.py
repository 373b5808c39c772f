"""The feature spec, which identifies features, and its hash, the feature id.

Serializes the settings that change the bytes of a feature as canonical JSON and hashes it with sha256. Batch size,
device, worker count, shard size and paths do not change features: they are provenance (``CACHE.json``), not identity.
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

SCHEMA_VERSION = 2
MAX_CHANNELS = 65_536
MAX_CODEBOOK = 65_536  # entries: a code is stored as uint16

WindowMode = Literal["full30", "tight", "clip"]
Codec = Literal["f16", "bf16", "int8", "fp8", "u16"]


class FeatureSpec(BaseModel):
    """Everything that changes the bytes of a feature.

    Attributes:
        schema_version: version of the cache format (``docs/format.md``).
        family: encoder architecture, such as ``whisper``.
        tensors: sha256 over names, shapes and float32 values of the encoder's tensors.
        frontend: settings that turn samples into encoder input (for Whisper, the log-mel settings); with codec ``u16``
            also ``codebook_size``.
        layer: 0 … n; n is the encoder's output after its final norm.
        channels: values per frame; with codec ``u16`` the number of codebooks.
        hop: audio samples per frame (Whisper: 320, 20 ms at 16 kHz).
        sampling_rate: Hz.
        window: ``full30`` pads each window to 30 s; ``tight`` limits the context to the utterance plus ``margin``,
            rounded up to a multiple of 5 s; ``clip`` encodes the audio without padding, for encoders that accept any
            length.
        margin: seconds of silence kept after the utterance by window ``tight``; 0 otherwise.
        overlap: seconds shared by neighboring windows of long audio.
        trim: ``valid`` keeps ceil(samples / hop) frames, ``none`` keeps the padded window.
        dtype: floating-point type of the encoder pass.
        codec: storage codec (``shards/format/codec.py``).
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
            raise ValueError("margin is only supported with window tight")
        return self

    @model_validator(mode="after")
    def _codes_have_a_range(self) -> FeatureSpec:
        size = self.frontend.get("codebook_size")
        if self.codec == "u16" and (type(size) is not int or not 1 <= size <= MAX_CODEBOOK):
            raise ValueError(f"codec u16 needs frontend.codebook_size, an integer from 1 to {MAX_CODEBOOK}")
        return self

    @property
    def codebook_size(self) -> int:
        """Number of values that a code can have; 0: the features are floats."""
        return int(self.frontend["codebook_size"] or 0) if self.codec == "u16" else 0

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
        """Return the spec as JSON with sorted keys and no spaces, the text that is hashed."""
        return canonical_json(self.model_dump())

    def differences(self, other: FeatureSpec) -> list[str]:
        """Return ``field: mine, not theirs`` for every field that differs; empty if the ids are equal."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in type(self).model_fields)
        return [f"{name}: {mine}, not {theirs}" for name, mine, theirs in pairs if mine != theirs]

    @classmethod
    def parse(cls, tree: Any, where: str) -> FeatureSpec:
        """Validate a decoded JSON object that was read from ``where``.

        Raises:
            UserError: it has another format version, or is not a feature spec.
        """
        version = tree.get("schema_version") if isinstance(tree, dict) else None
        if isinstance(version, int) and version != SCHEMA_VERSION:
            fix = "update earshard" if version > SCHEMA_VERSION else "extract again with `make extract`"
            raise UserError(f"{where} has cache format {version}, this earshard reads {SCHEMA_VERSION}: {fix}")
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise UserError(
                f"{where} does not contain a valid feature spec: {first_validation_error(error)}; run `make verify`"
            ) from None


def canonical_json(tree: Any) -> str:
    """Return JSON with sorted keys and without spaces or NaN, so that equal values have equal texts."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
