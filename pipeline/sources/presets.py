"""Presets for known corpora: kind of source, column names, splits and, for a folder of tables, the file names.

A preset sets the keys ``kind``, ``columns`` and ``splits`` of a ``SourceConfig``, as in
``source.preset=common_voice source.path=…/en``. Each reads one published form:

- Common Voice: the folder of one language, with ``<split>.tsv`` and ``clips/*.mp3``. See
  ``lhotse/recipes/commonvoice.py`` and
  https://docs.pytorch.org/audio/stable/generated/torchaudio.datasets.COMMONVOICE.html
- VoxPopuli: ``transcribed_data/<language>``, with ``asr_<split>.tsv`` and ``<year>/<id>.ogg``, as written by
  ``voxpopuli/get_asr_data.py`` of https://github.com/facebookresearch/voxpopuli
- FLEURS: parquet files of https://huggingface.co/datasets/google/fleurs. The key is the name of the audio file, because
  ``id`` is the number of a sentence, which several people read.
- MLS: parquet files of https://huggingface.co/datasets/facebook/multilingual_librispeech. ``9_hours`` and ``1_hours``
  are parts of ``train``, so they are read only if ``splits`` names them.
- GigaSpeech: parquet files of https://huggingface.co/datasets/speechcolab/gigaspeech. ``speaker`` ("N/A") is not read.
- AISHELL-1: parquet files of https://huggingface.co/datasets/TwinkStart/AISHELL-1, the test set.
- WenetSpeech: parquet files of https://huggingface.co/datasets/TwinkStart/WenetSpeech, both test sets.

Other forms of the last five have no named columns (FLEURS's TSV, ``transcripts.txt`` of MLS, ``GigaSpeech.json``,
``aishell_transcript_v0.8.txt``, ``WenetSpeech.json``). ``lhotse prepare`` converts them to manifests for kind manifest;
read the training sets of AISHELL-1 and WenetSpeech that way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.sources.columns import Columns

PresetName = Literal["common_voice", "fleurs", "voxpopuli", "mls", "gigaspeech", "aishell", "wenetspeech"]


@dataclass(frozen=True)
class Tables:
    """A folder with one TSV file per split. The files have no quoting: quotation marks are part of the text.

    Attributes:
        name: File name of a split, with ``{split}``.
        audio: Path of a recording relative to the folder, with ``{audio}`` for the value of the audio column.
    """

    name: str
    audio: str


@dataclass(frozen=True)
class Preset:
    """Settings of a known corpus.

    Attributes:
        kind: Kind of source.
        columns: Column of each field, as in ``source.columns``.
        splits: Splits to read if ``source.splits`` is empty. Empty: all.
        tables: Layout of a folder of tables; None for other kinds.
    """

    kind: Literal["manifest", "parquet"]
    columns: Mapping[str, str] = field(default_factory=dict)
    splits: tuple[str, ...] = ()
    tables: Tables | None = None

    def apply(self, source: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys of ``source``, with those of the preset where it sets none."""
        given = source.get("columns") or {}
        if isinstance(given, Columns):
            given = given.model_dump()
        if isinstance(given, Mapping):  # anything else is refused by validation
            given = {**self.columns, **{name: column for name, column in given.items() if column is not None}}
        splits = source.get("splits") or list(self.splits)
        return {"kind": self.kind, **source, "columns": given, "splits": splits}


_TRAIN_DEV_TEST = ("train", "dev", "test")
PRESETS: Mapping[str, Preset] = {
    "common_voice": Preset(
        "manifest",
        {"audio": "path", "text": "sentence", "speaker": "client_id"},
        _TRAIN_DEV_TEST,
        Tables("{split}.tsv", "clips/{audio}"),
    ),
    "voxpopuli": Preset(
        "manifest",
        {"audio": "id", "key": "id", "text": "normalized_text", "speaker": "speaker_id"},
        _TRAIN_DEV_TEST,
        Tables("asr_{split}.tsv", "{audio:.4}/{audio}.ogg"),
    ),
    "fleurs": Preset("parquet", {"text": "transcription", "key": ""}),
    "mls": Preset("parquet", {"text": "transcript"}, _TRAIN_DEV_TEST),
    "gigaspeech": Preset("parquet", {"key": "segment_id"}),
    "aishell": Preset("parquet", {"key": "name"}),
    "wenetspeech": Preset("parquet", {"key": "sid"}),
}
