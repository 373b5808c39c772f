"""What an extraction is told: the keys of ``configs/extract/*.yaml`` and of ``key=value`` on the command line."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.sources import SourceConfig
from shards.commit.claims import LEASE
from shards.config.base import Config
from shards.format.spec import Codec, Window


class EncoderConfig(Config):
    """The frozen encoder. ``model`` is a reference or a list tried in order; none = the default order of weights.py."""

    model: str | list[str] | None = None  # a reference, or several tried in order (pipeline/weights/resolve.py)
    layers: list[int] | None = None  # 0 … n; negative counts from the end; none = the last
    # what the encoder computes in; part of the identity, so name it: auto depends on the machine
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"  # cpu, cuda, cuda:1 …; auto: a GPU where there is one
    batch_size: int | None = Field(default=None, ge=1)  # windows in a pass on a GPU; none = as many as fit, at most 32
    compile: Literal["auto", "always", "never"] = "auto"  # torch.compile on a GPU; auto: where the job is long enough


class ExtractConfig(Config):
    """One source × one encoder: a cache for each layer."""

    root: str = "caches"  # folder or URL (s3://bucket/caches) under which caches are made
    scratch: str | None = None  # where shards on their way to a URL are made; none: the folder for temporary files
    source: SourceConfig
    encoder: EncoderConfig = EncoderConfig()
    limit: int | None = Field(default=None, ge=1)  # utterances; the smaller of this and source.limit
    # full30, or tight: contexts cut to the utterance, faster on short clips and other features; none: full30 for a
    # Whisper, clip (the audio alone) for encoders that take any length
    window: Window | None = None
    margin: float = Field(default=2.0, ge=0, le=30)  # seconds of silence that a tight context keeps after the utterance
    overlap: float = Field(default=4.0, ge=0, le=20)  # seconds that neighbouring windows of long audio share
    trim: Literal["valid", "none"] = "valid"  # valid: the frames of the audio; none: padded windows stay whole
    codec: Codec = "f16"  # how features are stored (docs/format.md); int8 halves the disk
    shard_mb: float = Field(default=256, gt=0)  # megabytes of a shard
    # threads or processes that decode audio; none = two beside an encoder on the CPU, else most of the cores of a GPU
    workers: int | None = Field(default=None, ge=1)
    decode_in: Literal["auto", "thread", "process"] = "auto"  # auto: processes where they pay (pipeline/decode/pool.py)
    processes: int | None = Field(default=None, ge=1)  # with an encoder each, on this machine; none = one for each GPU
    max_failures: float = Field(default=0.01, ge=0)  # below 1 a fraction of the utterances, else a count
    lease: float = Field(default=LEASE, gt=0)  # seconds without a sign of life before a shard's owner counts as dead
