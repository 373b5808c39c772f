"""The rows that an extraction plans: the utterances of a listing and, with ``augment``, their variants."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.extract.listing import spool
from pipeline.variants import VariantsConfig, draw_change
from shards.errors import UserError
from shards.format.audio_id import AUDIO_ID_BYTES, UNKNOWN_AUDIO, variant_id
from shards.format.codec import SCALED
from shards.format.schemas import PLAN_SCHEMA
from shards.format.tar import MAX_NAME
from shards.format.variants import are_variants, split_key, variant_key, variant_numbers

COLUMNS = ["key", "id", "audio", "samples", "audio_id"]
_SCHEMA = pa.schema([PLAN_SCHEMA.field(name) for name in COLUMNS])


def add_variants(
    listing: pa.Table, audio_ids: pa.FixedSizeBinaryArray, config: VariantsConfig, codec: str, folder: Path
) -> tuple[pa.Table, pa.FixedSizeBinaryArray]:
    """Return the rows to plan, ``config.variants`` for each utterance and next to each other, and their audio ids.

    Row ``i * config.variants + v`` is variant v of utterance i. The length of a variant follows from its audio id; one
    of an unknown recording has the recording's.

    Args:
        listing: all utterances of the source (``pipeline/extract/listing.py``).
        audio_ids: their audio ids; zeros where unknown.
        codec: codec of the features.
        folder: where the unnamed file with the rows is created.

    Raises:
        UserError: a key is too long for a number behind it.
    """
    if config.variants == 1:
        return listing, audio_ids
    longest = variant_key("", config.variants - 1) + (".scale.npy" if codec in SCALED else ".json")
    too_long = pc.greater(pc.binary_length(listing["key"]), MAX_NAME - len(longest))
    if pc.any(too_long).as_py():
        key = listing["key"][pc.index(too_long, True).as_py()]
        raise UserError(
            f"'{key}' is too long a key for variants in codec {codec}: set codec=f16, shorten the ids of the source, "
            "or remove augment"
        )
    rows = spool(_batches(listing.append_column("audio_id", audio_ids), config), folder, _SCHEMA)
    return rows.drop_columns("audio_id"), rows["audio_id"].combine_chunks()


def _batches(listing: pa.Table, config: VariantsConfig) -> Iterator[pa.RecordBatch]:
    count, recipe = config.variants, config.recipe
    for batch in listing.select(COLUMNS).to_batches(max_chunksize=8192):
        repeated = batch.take(pa.array(np.repeat(np.arange(len(batch)), count)))
        numbers = np.tile(np.arange(count), len(batch)).tolist()
        keys, samples, ids = [], [], []
        columns = (repeated[name].to_pylist() for name in ("key", "samples", "audio_id"))
        for number, key, length, known in zip(numbers, *columns, strict=True):
            own = variant_id(known, number, recipe)
            keys.append(variant_key(key, number))
            ids.append(own)
            changed = number and own != UNKNOWN_AUDIO and length
            samples.append(draw_change(own, config).num_samples(length) if changed else length)
        arrays = [keys, repeated["id"], repeated["audio"], samples, pa.array(ids, pa.binary(AUDIO_ID_BYTES))]
        yield pa.record_batch(arrays, schema=_SCHEMA)


def require_same_recipe(planned: pa.Table, bases: pa.Table, config: VariantsConfig, where: str) -> None:
    """Check that an unfinished generation was planned with the recipe of this configuration.

    Args:
        planned: ``key`` and ``audio_id`` of the generation.
        bases: ``key`` and ``audio_id`` of the utterances of the source.
        where: the plan in messages.

    Raises:
        UserError: no planned variant has the audio id that this recipe gives it.
    """
    variants = planned.filter(pa.array(are_variants(planned["key"])))
    if not len(variants):
        return
    pairs = list(zip(*(variants[name].to_pylist() for name in ("key", "audio_id")), strict=True))
    wanted = pa.array({split_key(key)[0] for key, _ in pairs}, pa.string())
    found = bases.filter(pc.is_in(bases["key"], value_set=wanted))
    recordings = dict(zip(found["key"].to_pylist(), found["audio_id"].to_pylist(), strict=True))
    for key, planned_id in pairs:
        base, number = split_key(key)
        own = variant_id(recordings.get(base, UNKNOWN_AUDIO), number, config.recipe)
        if config.variants > 1 and planned_id in (own, UNKNOWN_AUDIO):
            return
    raise UserError(
        f"'{where}' is unfinished and has variants of another augment: finish it with the configuration that began it, "
        "or delete that file to abandon it"
    )


def beyond(keys: pa.Array, variants: int) -> int:
    """Return how many ``keys`` are those of a variant that a configuration with ``variants`` does not make."""
    return int((variant_numbers(keys.filter(pa.array(are_variants(keys)))) >= variants).sum())
