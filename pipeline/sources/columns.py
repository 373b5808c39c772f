"""Map the fields of an utterance to the columns of a table.

Takes ``source.columns``, such as ``{audio: path, text: sentence}``, and returns the columns that ``manifest.py``,
``parquet.py`` and ``hub.py`` read. A field that is not mapped keeps the default names of the kind of source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated

from pydantic import Field, model_validator

from shards.config.base import Config
from shards.errors import UserError

RequiredColumn = Annotated[str | None, Field(min_length=1)]


class Columns(Config):
    """Column names of a manifest or of parquet files that differ from the default ones. null: the default names.
    An empty name leaves an optional field out. Only `audio` and `key` may share a column, and only in a manifest.
    """

    audio: RequiredColumn = None
    """Path of the recording; in parquet, the recording itself. null: `audio`, `file`, `wav` or `audio_filepath`; in
    parquet `audio`."""
    text: RequiredColumn = None
    """Transcript. null: `text`."""
    speaker: str | None = None
    """Speaker. null: `speaker`; in parquet `speaker_id`."""
    key: str | None = None
    """Unique name of the utterance. null: `key` or `id`; in parquet `id`. If left out: from the audio file's name."""
    split: str | None = None
    """Split of the utterance (manifest only). null: `split`."""
    offset: str | None = None
    """Start of the utterance in its recording, in seconds (manifest only). null: `offset`."""
    duration: str | None = None
    """Length of the utterance, in seconds (manifest only). null: `duration`."""

    @model_validator(mode="after")
    def _check_shared_columns(self) -> Columns:
        fields: dict[str, list[str]] = {}
        for field, column in self.mapped().items():
            fields.setdefault(column, []).append(field)
        for column, sharing in fields.items():
            if len(sharing) > 1 and set(sharing) != {"audio", "key"}:
                raise ValueError(
                    f"column '{column}' is set for {' and '.join(sharing)}: only audio and key may share a column"
                )
        return self

    def mapped(self) -> dict[str, str]:
        """Return the column of each mapped field."""
        return {field: column for field in type(self).model_fields if (column := getattr(self, field))}

    def resolve(self, defaults: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
        """Return the columns that may contain each field of ``defaults``; the first one with a value is used."""
        given = {field: getattr(self, field) for field in defaults}
        return {
            field: names if given[field] is None else [column for column in [given[field]] if column]
            for field, names in defaults.items()
        }

    def require(self, headers: Iterable[Iterable[str]], location: str) -> None:
        """Check that the table has every mapped column.

        Args:
            headers: Column names of the table; if each row has its own names, those of every row.
            location: The table, for the message.

        Raises:
            UserError: A mapped column is in no header. The message names the present columns.
        """
        missing, present = self.mapped(), dict[str, None]()
        for header in headers:
            present |= dict.fromkeys(header)
            missing = {field: column for field, column in missing.items() if column not in present}
            if not missing:
                return
        for field, column in missing.items():
            close = get_close_matches(column, present, 1)
            raise UserError(
                f"no column '{column}' in '{location}', which has {', '.join(present) or 'none'}: correct "
                f"source.columns.{field}{f', did you mean {close[0]!r}?' if close else ''}"
            )
