"""The JSON files of a cache: sealed so that a changed byte shows, and read without believing them.

In: a JSON object, or the path of a file. Out: canonical JSON with its own sha256 inside; the object of a file whose
seal is whole; :class:`ShardRecord` and :class:`CacheInfo`, the fields that a check relies on, of the right types.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from shards.files import open_file
from shards.format.spec import FeatureSpec, canonical_json

RELEASED = b'{"claim":null}\n'  # what stands in a bucket where a claim was given back, or a record revoked
MAX_JSON = 16 << 20  # a larger record or CACHE.json is no file of ours; small JSON values take 30 times their text


class RecordError(ValueError):
    """A JSON or parquet file of a cache is not as it was written: one phrase."""


def seal(tree: dict[str, Any]) -> bytes:
    """Canonical JSON of ``tree`` with a ``sha256`` of itself, one line."""
    digest = hashlib.sha256(canonical_json(tree).encode()).hexdigest()
    return (canonical_json({**tree, "sha256": digest}) + "\n").encode()


def unseal(path: Path) -> dict[str, Any]:
    """Read what :func:`seal` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        RecordError: it cannot be read, is too large, not JSON, not canonical, or its sha256 does not match.
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
    """The object that :func:`seal` made ``data`` of; RecordError, which calls it ``name``, when it is not whole."""
    if len(data) > MAX_JSON:
        raise RecordError(f"{name} is larger than {MAX_JSON >> 20} MiB")
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        raise RecordError(f"{name} is not JSON") from None
    if not isinstance(tree, dict):
        raise RecordError(f"{name} holds no JSON object")
    tree.pop("sha256", None)
    try:
        whole = seal(tree) == data
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise RecordError(f"{name} does not match its own sha256")
    return tree


def is_claim(data: bytes) -> bool:
    """Whether an object of a bucket is a claim, held or released (``shards/commit/bucket/claims.py``)."""
    return "claim" in _object(data)


def is_released(data: bytes) -> bool:
    """Whether an object of a bucket holds a claim that nobody holds: it counts as absent."""
    return _object(data).get("claim", "") is None


def _object(data: bytes) -> dict[str, Any]:
    """The JSON object that ``data`` is, or an empty one."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class FileInfo(_Part):
    """Size and content of a file of the cache."""

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


class CacheInfo(_Part):
    """``CACHE.json``."""

    schema_version: int
    feature_id: str
    spec: dict[str, Any]
    plan_id: str
    manifest_id: str
    files: dict[str, FileInfo]
    counts: dict[str, int]


def utterance_json(row: dict[str, Any], spec: FeatureSpec) -> bytes:
    """The ``<key>.json`` member: what a plain WebDataset reader sees beside the features."""
    about = {
        "key": row["key"],
        "id": row["id"],
        "text": row["text"],
        "speaker": row["speaker"],
        "split": row["split"],
        "duration": row["samples"] / spec.sampling_rate,
        "samples": row["samples"],
        "frames": row["frames"],
        "channels": spec.channels,
        "codec": spec.codec,
        "layer": spec.layer,
        "feature_id": spec.feature_id,
    }
    return json.dumps(about, ensure_ascii=False).encode()
