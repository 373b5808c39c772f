"""The shapes of a commit record and of ``CACHE.json``, for those who must not believe them.

In: a decoded JSON object whose seal was found whole. Out: the fields that a check relies on, of the right types; other
fields are left alone. pydantic's ValidationError for anything else.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class FileInfo(_Part):
    """Size and content of a file of the cache."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Failure(_Part):
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
    failures: list[Failure]


class CacheInfo(_Part):
    """``CACHE.json``."""

    schema_version: int
    feature_id: str
    spec: dict[str, Any]
    plan_id: str
    manifest_id: str
    files: dict[str, FileInfo]
    counts: dict[str, int]
