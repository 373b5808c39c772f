"""Extraction settings: the keys of ``configs/extract/*.yaml`` and of ``key=value`` on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.sources import SourceConfig
from pipeline.variants import VariantsConfig
from shards.commit.claims import LEASE
from shards.config.base import Config
from shards.format.spec import Codec, WindowMode


class EncoderConfig(Config):
    """The frozen speech encoder."""

    model: str | list[str] | None = None
    """Model reference, or a list of references that are tried in order: `path:/folder`, `hf:owner/name[@revision]`,
    `modelscope:owner/name[@revision]`, `wheel:whisper-base`, or a class of your own, `my_module:MyEncoder`
    (`docs/encoders.md`). null: `modelscope:$WHISPER_MS_ID` if that is set, then
    `hf:openai/whisper-base`, then `wheel:whisper-base`."""
    layers: list[int] | None = None
    """Layers to store, one cache per layer. 0 is the input of the first layer; negative numbers count from the end.
    null: the last layer, after the final norm."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype of the encoder. It is part of the feature id. auto depends on the device; set a dtype to get the
    same features on every machine."""
    codebooks: int | None = Field(default=None, ge=1)
    """Codebooks of a codec (Mimi, EnCodec, DAC) whose codes are stored: the first ones. It is part of the feature id.
    null: all, and of EnCodec those of its lowest bandwidth."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1` … auto: a GPU if one is available."""
    batch_size: int | None = Field(default=None, ge=1)
    """Windows per forward pass on a GPU. null: as many as fit into its memory, at most 32."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Whether to use torch.compile on a GPU. auto: only if the job is long enough to recover the minute that
    compilation takes."""


class ExtractConfig(Config):
    """One source and one encoder; produces one cache per layer."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"workers": "decode_workers", "lease": "lease_seconds"}

    root: str = "caches"
    """Folder or URL (`s3://bucket/caches`) under which caches are created."""
    scratch: str | None = None
    """Local folder for shards before they are uploaded to a URL. null: the system's temporary folder."""
    source: SourceConfig
    encoder: EncoderConfig = EncoderConfig()
    reuse: list[str] = Field(default_factory=list)
    """Caches, folders or URLs, whose features are copied where the audio and the feature id are equal. The caches below
    `root` are always used, unless it is a URL."""
    limit: int | None = Field(default=None, ge=1)
    """Maximum number of utterances. The smaller of this and `source.limit` applies."""
    window: WindowMode | None = None
    """Context of the encoder. full30: audio padded to 30 s, as in Whisper's training. tight: audio plus `margin`;
    faster on short clips, but the features differ. clip: the audio alone, for encoders that accept any length. null:
    full30 for Whisper, clip for the others."""
    margin: float = Field(default=2.0, ge=0, le=30)
    """Seconds of silence appended to the utterance in a tight window."""
    overlap: float = Field(default=4.0, ge=0, le=20)
    """Seconds shared by adjacent windows of audio that is longer than one window."""
    trim: Literal["valid", "none"] = "valid"
    """valid: store only the frames of the audio. none: store the whole padded window."""
    codec: Codec = "f16"
    """Storage format of the features (`docs/format.md`). int8 needs half the disk space of f16. u16 is for the
    codes of a codec (Mimi, EnCodec, DAC), and only for these."""
    augment: VariantsConfig = VariantsConfig()
    shard_mb: float = Field(default=256, gt=0)
    """Target size of a shard, in megabytes."""
    decode_workers: int | None = Field(default=None, ge=1)
    """Threads that decode audio. null: two for an encoder on a CPU, most of the cores for one on a GPU."""
    processes: int | None = Field(default=None, ge=1)
    """Processes on this machine, each with its own encoder. null: one per GPU, or one without a GPU."""
    max_failures: float = Field(default=0.01, ge=0)
    """Number of utterances that may fail before the extraction stops. Values below 1 are a fraction of all
    utterances."""
    lease_seconds: float = Field(default=LEASE, gt=0)
    """Seconds without a heartbeat after which another worker may take over a shard."""

    @model_validator(mode="before")
    @classmethod
    def _without_decode_in(cls, tree: Any) -> Any:
        """Ignore ``decode_in``, a key that earlier versions recorded in every cache."""
        return {key: value for key, value in tree.items() if key != "decode_in"} if isinstance(tree, dict) else tree
