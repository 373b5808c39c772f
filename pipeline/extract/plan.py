"""The plan: which utterance goes to which shard, fixed before the first frame of a generation is computed.

A plan is a table with ``PLAN_SCHEMA``. Utterances are shuffled once, here, so that a shard read in order is already
mixed. Sources that are slow to read out of order (archives, streams) keep their own order, and their shards hold
consecutive utterances.

Everything is an array: no Python object is kept for an utterance (``bench/scale.py`` measures the memory).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.audio import SAMPLING_RATE
from pipeline.encoders.base import Encoder
from shards.format.schemas import PLAN_SCHEMA
from shards.labels.table import blocks
from shards.stream.sampler import random_words

MEMBER_OVERHEAD = 2600  # bytes: three tar headers, padding, the npy header and a typical JSON file

Ints = npt.NDArray[np.int64]


def count_frames(samples: Ints, hop: int, padded_frames: int | None) -> Ints:
    """Return the frames of each utterance: ceil(samples / hop), but at least ``padded_frames`` if that is given."""
    frames: Ints = -(-samples // hop)
    return np.maximum(frames, padded_frames) if padded_frames else frames


def count_windows(samples: Ints, encoder: Encoder, overlap: float) -> int:
    """Return the number of encoder windows of utterances of these lengths; ``overlap`` is in seconds."""
    step = encoder.window_samples - round(overlap * encoder.sampling_rate)
    more = np.maximum(0, samples - encoder.window_samples)
    return int(len(samples) + (-(-more // step)).sum())


def estimate_bytes(samples: Ints, hop: int, padded_frames: int | None, frame_bytes: int) -> Ints:
    """Return the approximate bytes of each utterance in a tar.

    Args:
        samples: int64 [utterances].
        hop: samples per frame.
        padded_frames: frames of an untrimmed window; None when frames are trimmed to the audio.
        frame_bytes: channels × bytes per stored value.
    """
    return count_frames(samples, hop, padded_frames) * frame_bytes + MEMBER_OVERHEAD


def plan_shards(sizes: Ints, shard_mb: float) -> npt.NDArray[np.int32]:
    """Return the shard of each utterance, from 0 without gaps: consecutive utterances, about equal bytes per shard.

    Args:
        sizes: bytes of each utterance, in order.
        shard_mb: target size of a shard in megabytes (10⁶ bytes).
    """
    total = int(sizes.sum())
    shards = max(1, min(len(sizes), round(total / (shard_mb * 1e6)) or 1))
    middle = np.cumsum(sizes) - sizes / 2
    shard = np.minimum((middle * shards / max(total, 1)).astype(np.int64), shards - 1)
    return np.unique(shard, return_inverse=True)[1].astype(np.int32)  # one large utterance can leave a shard empty


def at_rate(listing: pa.Table, rate: int) -> pa.Table:
    """Return ``listing``, whose column ``samples`` counts at 16 kHz, with samples at ``rate`` Hz."""
    if rate == SAMPLING_RATE:
        return listing
    samples = listing["samples"].to_numpy()
    scaled = pa.array((2 * samples * rate + SAMPLING_RATE) // (2 * SAMPLING_RATE))
    return listing.set_column(listing.schema.get_field_index("samples"), "samples", scaled)


def make_plan(
    listing: pa.Table,
    chosen: Ints,
    audio_ids: pa.FixedSizeBinaryArray,
    *,
    shuffle: bool,
    seed: int,
    frame_bytes: int,
    hop: int,
    padded_frames: int | None,
    shard_mb: float,
    first_shard: int = 0,
    variants: int = 1,
) -> Iterator[pa.Table]:
    """Assign utterances to shards of about ``shard_mb`` MB each; yield the plan (PLAN_SCHEMA) in parts.

    Args:
        listing: all utterances of the source (``pipeline/extract/variants.py``).
        chosen: rows of the listing to plan, ascending.
        audio_ids: the audio id of each row of the listing; zeros where it is unknown.
        shuffle: False keeps the source's order.
        seed: seed of the shuffle.
        frame_bytes, hop, padded_frames: see :func:`estimate_bytes`.
        shard_mb: see :func:`plan_shards`.
        first_shard: number of the first shard.
        variants: rows of each utterance, which are planned next to each other.
    """
    order = chosen
    if shuffle:  # by key first: the plan does not depend on the order in which the source lists its utterances
        first = np.unique(chosen // variants) * variants if variants > 1 else chosen
        by_key = first[_sort_order(listing["key"], first)]
        order = by_key[np.argsort(random_words(seed, 0, 0, 0, len(by_key)), kind="stable")]
        if variants > 1:
            rank = np.zeros(len(listing) // variants, dtype=np.int64)
            rank[order // variants] = np.arange(len(order))
            order = chosen[np.argsort(rank[chosen // variants], kind="stable")]
    samples = listing["samples"].to_numpy()[order]
    sizes = estimate_bytes(samples, hop, padded_frames, frame_bytes)
    if variants == 1:
        shard = plan_shards(sizes, shard_mb)
    else:  # a shard has all new variants of an utterance: they are read together, and a stream is not read again
        starts = np.flatnonzero(np.diff(order // variants, prepend=-1))
        shard = np.repeat(plan_shards(np.add.reduceat(sizes, starts), shard_mb), np.diff(starts, append=len(order)))
    row = np.arange(len(shard)) - np.searchsorted(shard, shard)
    start = 0
    for block in blocks(listing.select(["key", "id", "audio", "samples"]), order):
        part = slice(start, start + len(block))
        start = part.stop
        block = block.append_column("audio_id", audio_ids.take(pa.array(order[part])))
        block = block.append_column("shard", pa.array(shard[part] + first_shard, pa.int32()))
        yield block.append_column("row", pa.array(row[part], pa.int32())).cast(PLAN_SCHEMA)


def _sort_order(keys: pa.ChunkedArray, chosen: Ints) -> Ints:
    """Return the order that sorts the ``chosen`` rows by key."""
    order: Ints = pc.sort_indices(keys).to_numpy().view(np.int64)
    if len(chosen) == len(keys):
        return order  # chosen is ascending
    place = np.full(len(keys), -1)
    place[chosen] = np.arange(len(chosen))
    ranked = place[order]
    return ranked[ranked >= 0]


def find_new(
    keys: pa.ChunkedArray, audio_ids: pa.FixedSizeBinaryArray, planned: pa.Table, variants: int = 1
) -> tuple[npt.NDArray[np.bool_], int]:
    """Find the utterances that a cache does not hold: other keys, and keys whose audio has changed.

    Args:
        keys: keys of the listing.
        audio_ids: their audio ids; zeros where the audio cannot be read, which counts as unchanged.
        planned: ``key`` and ``audio_id`` of what the cache holds or has tried, one row per key.
        variants: rows of each utterance, the first of which is its recording.

    Returns:
        bool [listing]: whether an utterance is new; and of how many the recording has changed.
    """
    new = np.ones(len(keys), dtype=bool)
    if not len(planned):
        return new, 0
    rows = pc.index_in(planned["key"], value_set=keys.combine_chunks()).fill_null(-1).to_numpy()
    ids, start, changed = id_words(audio_ids), 0, 0
    for chunk in planned["audio_id"].chunks:  # no copies of all ids, which are most of the memory
        listed = rows[start : start + len(chunk)]
        known, start = listed >= 0, start + len(chunk)
        mine, theirs = ids[listed[known]], id_words(chunk)[known]
        new[listed[known]] = np.any(mine != theirs, axis=1) & np.any(mine != 0, axis=1)
        changed += int((new[listed[known]] & (listed[known] % variants == 0)).sum())
    return new, changed


def id_words(ids: pa.FixedSizeBinaryArray) -> npt.NDArray[np.uint64]:
    """Return audio ids as uint64 [rows, 4], without a copy."""
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    words = np.frombuffer(ids.buffers()[1] or b"", np.uint64)
    return words[4 * ids.offset : 4 * (ids.offset + len(ids))].reshape(-1, 4)
