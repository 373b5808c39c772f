"""The plan: which utterance goes to which shard, fixed before the first frame is computed.

The plan is a table with ``UTTERANCE_SCHEMA``. Utterances are shuffled once, here, so that a shard read in order is
already mixed. Sources that are slow to read out of order (archives, streams) keep their own order, and their shards
hold consecutive utterances.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from pipeline.encoders.base import Encoder
from pipeline.sources import Source, Utterance
from shards.errors import UserError
from shards.format.layout import UTTERANCE_SCHEMA
from shards.format.spec import canonical_json

MEMBER_OVERHEAD = 2600  # bytes: three tar headers, padding, the npy header and a typical JSON file


def list_utterances(source: Source) -> list[Utterance]:
    """Return every utterance of ``source`` in its order. Raises UserError if there is none."""
    utterances = list(tqdm(source.utterances(), desc=f"listing {source.name}", unit=" utt", delay=1.0))
    if not utterances:
        problems = f" ({'; '.join(source.problems)})" if source.problems else ""
        raise UserError(
            f"source '{source.name}' has no utterances{problems}: check source.path, source.splits and the durations"
        )
    return utterances


def corpus_fingerprint(utterances: Iterable[Utterance], version: str) -> str:
    """Return the sha256 (64 hex digits) over key, id, samples, text, speaker and split of all utterances, in key order.

    The location of the audio is not included, so a copied corpus has the same fingerprint. ``version`` is that of the
    source: another version of a synthesizer produces another corpus.
    """
    digest = hashlib.sha256(version.encode() + b"\n")
    for u in sorted(utterances, key=lambda u: u.key):
        digest.update(canonical_json([u.key, u.id, u.samples, u.text, u.speaker, u.split]).encode() + b"\n")
    return digest.hexdigest()


def count_frames(samples: int, hop: int, padded_frames: int | None) -> int:
    """Return the frames of an utterance: ceil(samples / hop), but at least ``padded_frames`` if that is given."""
    frames = -(-samples // hop)
    return max(frames, padded_frames) if padded_frames else frames


def count_windows(table: pa.Table, encoder: Encoder, overlap: float) -> int:
    """Return the number of encoder windows of the planned utterances; ``overlap`` is in seconds."""
    step = encoder.window_samples - round(overlap * encoder.sampling_rate)
    more = np.maximum(0, table["samples"].to_numpy() - encoder.window_samples)
    return int(len(table) + (-(-more // step)).sum())


def make_plan(
    utterances: Sequence[Utterance],
    *,
    shuffle: bool,
    seed: int,
    frame_bytes: int,
    hop: int,
    padded_frames: int | None,
    shard_mb: float,
) -> pa.Table:
    """Assign utterances to shards of about ``shard_mb`` MB each; return a table with ``UTTERANCE_SCHEMA``.

    Args:
        utterances: all utterances of the source.
        shuffle: False keeps the source's order.
        seed: seed of the shuffle.
        frame_bytes: channels × bytes per stored value.
        hop: samples per frame.
        padded_frames: frames of an untrimmed window; None when frames are trimmed to the audio.
        shard_mb: target size of a shard in megabytes (10⁶ bytes).
    """
    order = list(utterances)
    if shuffle:
        order.sort(key=lambda u: u.key)
        random.Random(seed).shuffle(order)
    sizes = [count_frames(u.samples, hop, padded_frames) * frame_bytes + MEMBER_OVERHEAD for u in order]
    total = sum(sizes)
    shards = max(1, min(len(order), round(total / (shard_mb * 1e6)) or 1))
    columns: dict[str, list[object]] = {name: [] for name in UTTERANCE_SCHEMA.names}
    shard, row, filled = 0, 0, 0
    for index, (utterance, size) in enumerate(zip(order, sizes, strict=True)):
        # start the next shard at its even share of the bytes, or when each remaining shard needs a remaining utterance
        due = filled + size / 2 >= (shard + 1) * total / shards or len(order) - index <= shards - shard - 1
        if row and shard < shards - 1 and due:
            shard, row = shard + 1, 0
        for name in ("key", "id", "audio", "samples", "text", "speaker", "split"):
            columns[name].append(getattr(utterance, name))
        columns["shard"].append(shard)
        columns["row"].append(row)
        filled, row = filled + size, row + 1
    return pa.table(columns, schema=UTTERANCE_SCHEMA)
