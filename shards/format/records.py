"""The JSON files of a cache. A seal, the sha256 of the content inside the file, detects any changed byte.

:func:`seal` writes canonical JSON with its sha256; :func:`unseal` reads a file and verifies it. :class:`ShardRecord`
and :class:`CacheInfo` validate the fields that checks rely on.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shards.files import MAX_JSON_BYTES, open_file
from shards.format.spec import FeatureSpec, canonical_json

RELEASED = b'{"claim":null}\n'  # replaces a released claim or a revoked record in a bucket
MAX_JSON = MAX_JSON_BYTES
MAX_GENERATIONS = 1000  # a cache with more should be compacted


class RecordError(ValueError):
    """A JSON or parquet file of a cache is corrupt. The message is one phrase."""


def seal(tree: dict[str, Any]) -> bytes:
    """Return ``tree`` as one line of canonical JSON that includes its own ``sha256``."""
    digest = hashlib.sha256(canonical_json(tree).encode()).hexdigest()
    return (canonical_json({**tree, "sha256": digest}) + "\n").encode()


def unseal(path: Path) -> dict[str, Any]:
    """Read a file that :func:`seal` wrote.

    Raises:
        FileNotFoundError: the file does not exist.
        RecordError: it cannot be read, is too large, not JSON or not canonical, or its sha256 does not match.
    """
    try:
        with io.BufferedReader(open_file(path)) as file:
            data = file.read(MAX_JSON + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RecordError(f"{path.name} cannot be read: {error.strerror}") from None
    return unseal_bytes(data, path.name)


def unseal_bytes(data: bytes, name: str) -> dict[str, Any]:
    """Return the object that :func:`seal` encoded as ``data``.

    Raises:
        RecordError: ``data`` is corrupt. The message calls it ``name``.
    """
    if len(data) > MAX_JSON:
        raise RecordError(f"{name} is larger than {MAX_JSON >> 20} MiB")
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        raise RecordError(f"{name} is not JSON") from None
    if not isinstance(tree, dict):
        raise RecordError(f"{name} does not contain a JSON object")
    tree.pop("sha256", None)
    try:
        whole = seal(tree) == data
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise RecordError(f"{name} does not match its own sha256")
    return tree


def is_claim(data: bytes) -> bool:
    """Return whether an object in a bucket is a claim, held or released (``shards/commit/bucket/claims.py``)."""
    return "claim" in _object(data)


def is_released(data: bytes) -> bool:
    """Return whether an object in a bucket is a released claim, which counts as absent."""
    return _object(data).get("claim", "") is None


def _object(data: bytes) -> dict[str, Any]:
    """Parse ``data`` as a JSON object; returns ``{}`` if it is not one."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class FileInfo(_Part):
    """Size in bytes and sha256 of a file."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class FailureRecord(_Part):
    """An utterance that has no features."""

    key: str
    stage: str
    error: str
    attempt: int


class ShardRecord(_Part):
    """``shards/000042.json``."""

    schema_version: int
    shard: int
    feature_id: str
    plan_id: str
    tar: FileInfo
    parquet: FileInfo
    rows: int
    frames: int
    failures: list[FailureRecord]


class GenerationFiles(_Part):
    """The tables of a generation: ``plans/000.parquet``, ``manifests/000.parquet`` and ``failures/000.parquet``."""

    plan: FileInfo
    manifest: FileInfo
    failures: FileInfo


class Generation(_Part):
    """One entry of ``generations`` in ``CACHE.json``: the shards that one extraction appended."""

    plan_id: str
    manifest_id: str
    first_shard: int = Field(ge=0)
    shards: int = Field(ge=0)
    files: GenerationFiles
    counts: dict[str, int]
    provenance: dict[str, Any]


class CacheInfo(_Part):
    """``CACHE.json``."""

    schema_version: int
    feature_id: str
    spec: dict[str, Any]
    generations: list[Generation] = Field(min_length=1, max_length=MAX_GENERATIONS)
    counts: dict[str, int]

    @model_validator(mode="after")
    def _shards_without_gaps(self) -> CacheInfo:
        first = 0
        for number, generation in enumerate(self.generations):
            if generation.first_shard != first:
                raise ValueError(f"generation {number} starts at shard {generation.first_shard}, expected {first}")
            first += generation.shards
        if self.counts.get("shards") != first:
            raise ValueError(f"counts.shards is {self.counts.get('shards')}, the generations have {first}")
        return self

    @property
    def manifest_id(self) -> str:
        """The id of the newest generation, which covers all earlier ones."""
        return self.generations[-1].manifest_id


def utterance_json(row: dict[str, Any], labels: Mapping[str, Any], spec: FeatureSpec) -> bytes:
    """Return the ``<key>.json`` member: what a plain WebDataset reader sees next to the features.

    Args:
        row: the manifest row.
        labels: ``text``, ``speaker`` and ``split`` at the time of the extraction.
    """
    fields = {
        "key": row["key"],
        "id": row["id"],
        "text": labels.get("text", ""),
        "speaker": labels.get("speaker", ""),
        "split": labels.get("split", ""),
        "duration": row["samples"] / spec.sampling_rate,
        "samples": row["samples"],
        "frames": row["frames"],
        "channels": spec.channels,
        "codec": spec.codec,
        "layer": spec.layer,
        "feature_id": spec.feature_id,
    }
    return json.dumps(fields, ensure_ascii=False).encode()
