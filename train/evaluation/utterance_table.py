"""Counts per evaluated utterance: ``utterances.parquet`` in a run folder.

The table has one row per utterance, in the order of the held-out rows. A cell is null if the evaluation did not compute
it; an utterance that was not decoded has no error counts. ``bootstrap.paired_difference`` compares two runs that were
evaluated on the same utterances by these rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import UserError
from shards.files import atomic_write, translate_os_errors
from shards.format.schemas import parquet_bytes
from train.data.caches import Utterances
from train.evaluation.languages import ENGLISH

UTTERANCES = "utterances.parquet"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("cache", pa.string()),  # manifest id
        ("frames", pa.int32()),
        ("tokens", pa.int32()),  # number of targets: those of the text and EOS
        ("nats", pa.float64()),  # summed over all targets, with the utterance's own audio
        ("nats_shuffled", pa.float64()),  # with the audio of the utterance whose key is in ``heard``
        ("heard", pa.string()),
        ("nats_silent", pa.float64()),  # with as many frames of silence
        ("nats_text_only", pa.float64()),  # without soft tokens
        ("reference", pa.string()),
        ("hypothesis", pa.string()),
        ("words", pa.int32()),  # in the normalized reference
        ("word_insertions", pa.int32()),
        ("word_deletions", pa.int32()),
        ("word_substitutions", pa.int32()),
        ("characters", pa.int32()),
        ("character_insertions", pa.int32()),
        ("character_deletions", pa.int32()),
        ("character_substitutions", pa.int32()),
    ]
)


LABEL_COLUMNS = [("task", pa.string()), ("prompt", pa.string())]  # only if one of them is not empty
LANGUAGE_COLUMN = [("language", pa.string())]  # only if one is not English
SCHEMAS = [
    pa.schema([*SCHEMA, *labels, *language]) for labels in ([], LABEL_COLUMNS) for language in ([], LANGUAGE_COLUMN)
]
LABELLED_SCHEMA = SCHEMAS[2]


def utterance_table(columns: Mapping[str, Any]) -> pa.Table:
    """Return a table with one of SCHEMAS; columns that are missing from ``columns`` are null.

    Raises:
        ValueError: ``columns`` has a name that is in none of them.
    """
    count = len(columns["key"])
    labelled = any(any(columns.get(name, ())) for name, _ in LABEL_COLUMNS)
    foreign = any(code != ENGLISH for code in columns.get("language", ()))
    schema = SCHEMAS[2 * labelled + foreign]
    unknown = columns.keys() - set(SCHEMAS[-1].names)
    if unknown:
        raise ValueError(f"unknown columns: {sorted(unknown)}")
    arrays = [pa.array(columns.get(field.name, [None] * count), field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def write_utterances(folder: Path, table: pa.Table) -> Path:
    """Write ``utterances.parquet`` into ``folder`` atomically; return its path."""
    path = folder / UTTERANCES
    with translate_os_errors("writing the utterance table", path):
        atomic_write(path, parquet_bytes(table), str(os.getpid()))
    return path


def read_utterances(folder: Path) -> pa.Table:
    """Read ``utterances.parquet`` from a run folder.

    Raises:
        UserError: the file is missing or corrupt, or another version of earshard wrote it.
    """
    path = folder / UTTERANCES
    hint = f"run `python -m train evaluate {folder}`"
    try:
        table = pq.read_table(path).replace_schema_metadata(None)
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist: {hint}") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"'{path}' cannot be read ({type(error).__name__}): {hint}") from None
    if not any(table.schema.equals(schema) for schema in SCHEMAS):
        raise UserError(f"'{path}' has other columns than this version of earshard writes: {hint}")
    return table


def cache_ids(utterances: Utterances) -> list[str]:
    """Return for each utterance the manifest id of its cache."""
    ends = np.cumsum([len(cache) for cache in utterances.caches])
    cache_indices = np.searchsorted(ends, utterances.rows, side="right")
    return [utterances.caches[index].manifest_id for index in cache_indices.tolist()]
