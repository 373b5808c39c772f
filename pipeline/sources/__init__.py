"""Sources of utterances: a ``SourceConfig`` describes one, and it lists utterances lazily and reads their audio.

Each kind has its own module: ``librispeech`` (OpenSLR folders or archives), ``parquet`` (the
``openslr/librispeech_asr`` layout, local or from a hub), ``manifest`` (JSONL, CSV, NeMo, lhotse), and ``tones`` and
``speech`` (synthesized on demand). ``columns.py`` maps the column names of a table, and ``presets.py`` contains the
mappings of known corpora. All kinds support ``limit``, ``min_duration``, ``max_duration`` and ``val_fraction``
(``selection.py``).

    python -m pipeline extract --config configs/extract/librispeech.yaml source.path=… source.splits=[dev-clean]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.audio import MAX_HOURS
from pipeline.sources.base import Source, Utterance, decode_key, encode_key, safe_name, translate_errors
from pipeline.sources.columns import Columns
from pipeline.sources.presets import PRESETS, PresetName
from pipeline.sources.synthetic.grammar import MAX_SENTENCES
from shards.config.base import Config
from shards.errors import UserError

__all__ = ["Source", "SourceConfig", "Utterance", "decode_key", "encode_key", "open_source"]

_DEFAULT_NUM_SENTENCES = 400
_HUBS = ("hf:", "modelscope:")


class SourceConfig(Config):
    """The utterances to extract: where their audio and texts are."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"n": "num_sentences", "config": "config_name"}

    preset: PresetName | None = None
    """Known corpus: sets `kind`, `columns` and `splits` for the layout that `pipeline/sources/presets.py` describes.
    Keys that you set take precedence."""
    kind: Literal["librispeech", "parquet", "manifest", "tones", "speech"]
    """Format of the corpus. librispeech: OpenSLR folders or archives. parquet: Hugging Face parquet files. manifest: a
    JSONL, CSV, NeMo or lhotse manifest. tones, speech: synthetic audio."""
    path: str | None = None
    """File or folder of the corpus, or for kind parquet a dataset of a hub: `hf:owner/name[@revision]` is streamed,
    `modelscope:owner/name[@revision]` is downloaded. Synthetic kinds take none."""
    splits: list[str] = Field(default_factory=list)
    """Splits to read, such as `[dev-clean, test-clean]`. Empty: all."""
    limit: int | None = Field(default=None, ge=1)
    """Maximum number of utterances; the first ones are taken."""
    min_duration: float | None = Field(default=None, ge=0)
    """Shortest utterance, in seconds. Utterances of unknown duration are kept."""
    max_duration: float | None = Field(default=None, gt=0)
    """Longest utterance, in seconds. Utterances of unknown duration are kept."""
    max_hours: float = Field(default=MAX_HOURS, gt=0)
    """Longest recording that is decoded, in hours; a longer one is a failure. An hour takes 230 MB of memory."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the order of utterances, of the validation split, and of synthetic audio."""
    val_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the utterances that get the split `val`; the others get `train`. Whole speakers are held out where
    speakers are known. 0: keep the splits of the corpus."""
    name: str | None = None
    """Name of the corpus in the cache's path. null: derived from the corpus."""
    num_sentences: int = Field(default=_DEFAULT_NUM_SENTENCES, ge=1, le=MAX_SENTENCES)
    """Sentences to synthesize (speech only)."""
    config_name: str | None = None
    """Configuration of a dataset of a hub, such as `clean`. `modelscope:`: the folder of that name."""
    columns: Columns = Columns()

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, tree: Any) -> Any:
        name = tree.get("preset") if isinstance(tree, dict) else None
        preset = PRESETS.get(name) if isinstance(name, str) else None
        return preset.apply(tree) if preset else tree

    @model_validator(mode="after")
    def _check_kind(self) -> SourceConfig:
        is_synthetic = self.kind in ("tones", "speech")
        if is_synthetic and (self.path is not None or self.splits):
            raise ValueError(f"kind {self.kind} has no path and no splits: remove source.path and source.splits")
        if not is_synthetic and not self.path:
            raise ValueError(f"kind {self.kind} needs a path: set source.path")
        if self.num_sentences != _DEFAULT_NUM_SENTENCES and self.kind != "speech":
            raise ValueError(f"num_sentences is only for kind speech, not for {self.kind}: set source.limit")
        if self.config_name is not None and not (self.kind == "parquet" and str(self.path).startswith(_HUBS)):
            raise ValueError(
                "config_name is only for datasets of a hub: set source.kind=parquet and source.path=hf:OWNER/NAME or "
                "modelscope:OWNER/NAME"
            )
        if self.preset is not None and self.kind != PRESETS[self.preset].kind:
            raise ValueError(
                f"preset {self.preset} is of kind {PRESETS[self.preset].kind}, not {self.kind}: remove source.kind"
            )
        self._check_columns()
        if self.min_duration and self.max_duration and self.min_duration > self.max_duration:
            raise ValueError(f"min_duration {self.min_duration} is above max_duration {self.max_duration}")
        return self

    def _check_columns(self) -> None:
        columns = self.columns.mapped()
        if columns and self.kind not in ("manifest", "parquet"):
            raise ValueError(
                f"columns are only for kinds manifest and parquet, not for {self.kind}: remove source.columns"
            )
        if self.kind != "parquet":
            return
        from pipeline.sources.parquet import audio_column  # imports pyarrow, as the other imports inside functions

        audio = audio_column(self.columns)
        for field, column in columns.items():
            if field in ("split", "offset", "duration"):
                raise ValueError(
                    f"columns.{field} is only for kind manifest, not for parquet: remove source.columns.{field}"
                )
            if field != "audio" and column == audio:
                raise ValueError(
                    f"columns.{field} is '{audio}', which contains the recordings in parquet files: set "
                    f"source.columns.{field} to another column"
                )


def open_source(config: SourceConfig) -> Source:
    """Open the source that ``config`` describes, with its filters applied. Reads no files, only their names.

    A dataset on ModelScope is downloaded first.

    Raises:
        UserError: The path or a split does not exist, or the download failed. Errors inside files are raised by
            ``utterances``.
    """
    from pipeline.sources.selection import FilteredSource

    if "\0" in (config.path or ""):
        raise UserError("source.path has a NUL character: correct it")
    with translate_errors(f"source.path '{config.path}'"):
        source = _open_kind(config)
    source.max_hours = config.max_hours
    return FilteredSource(
        source,
        name=safe_name(config.name if config.name is not None else source.name, config.kind),
        limit=config.limit,
        min_duration=config.min_duration,
        max_duration=config.max_duration,
        val_fraction=config.val_fraction,
        seed=config.seed,
    )


def _open_kind(config: SourceConfig) -> Source:
    path = config.path or ""
    if config.kind == "librispeech":
        from pipeline.sources import librispeech

        return librispeech.open_librispeech(path, config.splits)
    if config.kind == "parquet":
        return open_parquet(path, config.splits, config.config_name, config.columns)
    if config.kind == "manifest":
        from pipeline.sources import manifest

        if config.preset:
            return manifest.TableFolder(path, config.splits, config.columns, config.preset)
        return manifest.Manifest(path, config.splits, config.columns)
    if config.kind == "tones":
        from pipeline.sources.synthetic import tones

        return tones.Tones(config.seed)
    from pipeline.sources.synthetic import speech

    return speech.Speech(config.num_sentences, config.seed)


def open_parquet(path: str, splits: Sequence[str], config_name: str | None, columns: Columns) -> Source:
    """Open local parquet files, or a dataset of a hub if ``path`` starts with the name of one; raises UserError."""
    if path.startswith(_HUBS):
        from pipeline.sources import hub

        scheme, _, dataset = path.partition(":")
        open_dataset = hub.HubStream if scheme == "hf" else hub.open_modelscope
        return open_dataset(dataset, config_name, splits, columns)
    from pipeline.sources.parquet import ParquetFiles

    return ParquetFiles(path, splits, columns)
