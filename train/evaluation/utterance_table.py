"""The counts of every judged utterance: ``utterances.parquet`` in a run's folder.

In: the columns that an evaluation filled. Out: one row an utterance, in the order of the held-out rows; a cell is empty
where the evaluation did not ask (what was not decoded has no errors). Two runs that judged the same utterances are
compared by these rows (``intervals.paired_difference``).
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

UTTERANCES = "utterances.parquet"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("cache", pa.string()),  # manifest id
        ("frames", pa.int32()),
        ("tokens", pa.int32()),  # targets: the text's and eos
        ("nats", pa.float64()),  # of all targets, hearing the utterance itself
        ("nats_shuffled", pa.float64()),  # hearing the audio of the utterance that ``heard`` names
        ("heard", pa.string()),
        ("nats_silent", pa.float64()),  # hearing as many frames of silence
        ("nats_text_only", pa.float64()),  # with nothing where the audio would stand
        ("reference", pa.string()),
        ("hypothesis", pa.string()),
        ("words", pa.int32()),  # of the normalised reference
        ("word_insertions", pa.int32()),
        ("word_deletions", pa.int32()),
        ("word_substitutions", pa.int32()),
        ("characters", pa.int32()),
        ("character_insertions", pa.int32()),
        ("character_deletions", pa.int32()),
        ("character_substitutions", pa.int32()),
    ]
)


def utterance_table(columns: Mapping[str, Any]) -> pa.Table:
    """``columns`` by name in the order of SCHEMA; those that are absent are empty."""
    count = len(columns["key"])
    unknown = columns.keys() - set(SCHEMA.names)
    if unknown:
        raise ValueError(f"no such columns: {sorted(unknown)}")
    arrays = [pa.array(columns.get(field.name, [None] * count), field.type) for field in SCHEMA]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def write_utterances(folder: Path, table: pa.Table) -> Path:
    """``utterances.parquet`` in ``folder``, at once; returns its path."""
    path = folder / UTTERANCES
    with translate_os_errors("writing the utterances' figures", path):
        atomic_write(path, parquet_bytes(table), str(os.getpid()))
    return path


def read_utterances(folder: Path) -> pa.Table:
    """The table of a run's folder.

    Raises:
        UserError: it is missing, damaged, or of another version of earshard.
    """
    path = folder / UTTERANCES
    hint = f"judge the run by python -m train evaluate {folder}"
    try:
        table = pq.read_table(path).replace_schema_metadata(None)
    except FileNotFoundError:
        raise UserError(f"'{path}' is missing: {hint}") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"'{path}' cannot be read ({type(error).__name__}): {hint}") from None
    if not table.schema.equals(SCHEMA):
        raise UserError(f"'{path}' has other columns than this earshard writes: {hint}")
    return table


def cache_ids(utterances: Utterances) -> list[str]:
    """The manifest id of the cache that each utterance is from."""
    edges = np.cumsum([len(cache) for cache in utterances.caches])
    which = np.searchsorted(edges, utterances.rows, side="right")
    return [utterances.caches[index].manifest_id for index in which.tolist()]
