"""The plan: which utterance goes to which shard, fixed before the first frame is computed.

In: a source. Out: a table of ``UTTERANCE_SCHEMA`` and the source's fingerprint. Utterances are shuffled once, here, so
that a shard read in order is already mixed; a source that is slow to read out of order (an archive, a stream) keeps its
own order and shards hold neighbours.
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

MEMBER_OVERHEAD = 2600  # bytes: three tar headers, paddings, the npy header and a typical JSON


def list_utterances(source: Source) -> list[Utterance]:
    """Every utterance of ``source``, in its own order; UserError when there is none or a key stands twice."""
    utterances = list(tqdm(source.utterances(), desc=f"listing {source.name}", unit=" utt", delay=1.0))
    if not utterances:
        problems = f" ({'; '.join(source.problems)})" if source.problems else ""
        raise UserError(f"source '{source.name}' holds no utterance{problems}: check source.path, splits and durations")
    return utterances


def corpus_fingerprint(utterances: Iterable[Utterance], version: str) -> str:
    """64 hex digits: sha256 over key, id, samples, text, speaker and split of every utterance, in key order.

    The folder that the audio stands in does not count, so a copied corpus has the same fingerprint. ``version`` is the
    source's: a synthesiser of another version makes another corpus.
    """
    digest = hashlib.sha256(version.encode() + b"\n")
    for u in sorted(utterances, key=lambda u: u.key):
        digest.update(canonical_json([u.key, u.id, u.samples, u.text, u.speaker, u.split]).encode() + b"\n")
    return digest.hexdigest()


def count_frames(samples: int, hop: int, padded_frames: int | None) -> int:
    """Frames that an utterance will have: ceil(samples / hop), or the padded window when nothing is trimmed."""
    frames = -(-samples // hop)
    return max(frames, padded_frames) if padded_frames else frames


def count_windows(table: pa.Table, encoder: Encoder, overlap: float) -> int:
    """Windows that the planned utterances make, by their planned lengths; ``overlap`` in seconds."""
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
    """Assign utterances to shards of about ``shard_mb`` MB each.

    Args:
        shuffle: False keeps the source's order.
        frame_bytes: channels × bytes a stored value.
        padded: frames of an untrimmed window, None when frames are trimmed to the audio.
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
        # the next shard begins where its even share of the bytes begins, or where the utterances left only just suffice
        due = filled + size / 2 >= (shard + 1) * total / shards or len(order) - index <= shards - shard - 1
        if row and shard < shards - 1 and due:
            shard, row = shard + 1, 0
        for name in ("key", "id", "audio", "samples", "text", "speaker", "split"):
            columns[name].append(getattr(utterance, name))
        columns["shard"].append(shard)
        columns["row"].append(row)
        filled, row = filled + size, row + 1
    return pa.table(columns, schema=UTTERANCE_SCHEMA)
