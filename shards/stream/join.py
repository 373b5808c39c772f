"""Joins caches of the same corpus: features of the same utterances from several layers or several encoders.

The caches must have the same number of frames per utterance (an extraction with ``encoder.layers: [2, 4, 6]`` creates
three such caches). :class:`JoinedCaches` holds the utterances that all of them contain.

    joined = join([Cache.open(path) for path in paths])
    stream = FeatureStream([joined.caches[0]], config, seed, rows=joined.rows[:, 0])
    for batch in stream:
        layers = joined.layers(batch)  # one tensor [B, T, C] per cache; the first is batch.features

Utterances are matched by key; labels are those of the first cache. The audio of an utterance must be identical in all
caches, which is checked with ``audio_id`` of the manifests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.errors import UserError
from shards.format.codec import Array, decoded_dtype
from shards.read.cache import Cache

if TYPE_CHECKING:
    import torch

    from shards.stream.batch import Batch


@dataclass(frozen=True)
class JoinedCaches:
    """The result of :func:`join`. ``rows[i, c]`` is the row of utterance ``i`` in ``caches[c]``, in order of the first.

    ``num_missing`` utterances of the first cache are missing in another cache (because they failed there).
    """

    caches: tuple[Cache, ...]
    rows: NDArray[np.int64]
    num_missing: int

    def __len__(self) -> int:
        return len(self.rows)

    def features(self, index: int) -> list[Array]:
        """Return utterance ``index`` [frames, channels] from each cache, see :meth:`Cache.features`."""
        return [cache.features(row) for cache, row in zip(self.caches, self.rows[index].tolist(), strict=True)]

    def layers(self, batch: Batch) -> list[torch.Tensor]:
        """Return the features of a batch of the first cache from every cache: [B, T, channels] each, zero-padded.

        The tensors are float16 for codec f16, int32 for codes, otherwise float32. The first is ``batch.features``.

        Raises:
            KeyError: the batch contains an utterance that is not joined. Pass ``rows=joined.rows[:, 0]`` to the stream.
        """
        import torch

        chosen = [self._index_of_row[row] for row in batch.rows]
        found = [batch.features]
        for cache, rows in zip(self.caches[1:], self.rows.T[1:], strict=True):
            dtype = decoded_dtype(cache.spec.codec, half=True)
            out = np.zeros((*batch.features.shape[:2], cache.spec.channels), dtype)
            lengths = batch.lengths.tolist()
            for slot, place, frames, variant in zip(out, chosen, lengths, batch.variants, strict=True):
                cache.read_into(int(rows[place]), slot[:frames], variant)
            found.append(torch.from_numpy(out))
        return found

    @cached_property
    def _index_of_row(self) -> dict[int, int]:
        return {row: place for place, row in enumerate(self.rows[:, 0].tolist())}


def join(caches: Sequence[Cache]) -> JoinedCaches:
    """Match the utterances of ``caches`` by key.

    Raises:
        UserError: ``caches`` is empty or contains a cache twice, an utterance differs in audio or number of frames, or
            the caches have no utterance in common.
    """
    if not caches:
        raise UserError("no caches to join: pass one or more cache folders")
    if len({cache.manifest_id for cache in caches}) < len(caches):
        raise UserError(f"one of {_names(caches)} occurs twice, or is a copy of another: pass each cache once")
    first = caches[0]
    columns = [{name: cache.column(name).to_pylist() for name in ("key", "audio_id")} for cache in caches]
    # Several rows of a label set may share the features of a key: any of them will do.
    places = [{key: row for row, key in enumerate(column["key"])} for column in columns[1:]]
    rows = np.array(
        [
            [row, *(place[key] for place in places)]
            for row, key in enumerate(columns[0]["key"])
            if all(key in place for place in places)
        ],
        dtype=np.int64,
    ).reshape(-1, len(caches))
    if not len(rows):
        raise UserError(f"{_names(caches)} have no utterance in common: join caches of one corpus")
    for other, column, mine in zip(caches[1:], columns[1:], rows.T[1:], strict=True):
        for row, theirs in zip(rows[:, 0].tolist(), mine.tolist(), strict=True):
            key, audio = columns[0]["key"][row], columns[0]["audio_id"][row]
            if column["audio_id"][theirs] != audio:
                raise UserError(f"'{key}' has other audio in '{other.path}' than in '{first.path}': extract one again")
        differ = first.frames[rows[:, 0]] != other.frames[mine]
        if differ.any():
            row = int(rows[differ.argmax(), 0])
            raise UserError(
                f"'{columns[0]['key'][row]}' has {first.frames[row]} frames in '{first.path}' and "
                f"{other.frames[mine[differ.argmax()]]} in '{other.path}': join caches of the same frame rate and trim"
            )
        if first.variants is not None and _variant_ids(first, rows[:, 0]) != _variant_ids(other, mine):
            raise UserError(
                f"'{other.path}' has other variants than '{first.path}', and an epoch reads the same ones of both: "
                "extract both with the same augment"
            )
    return JoinedCaches(tuple(caches), rows, len(first) - len(rows))


def _variant_ids(cache: Cache, items: NDArray[np.int64]) -> list[tuple[int, int, bytes]]:
    """Return item, number and audio id of each variant of ``items``."""
    if cache.variants is None:
        return []
    owners, places = cache.variants.of(items)
    ids = cache.features_table.column("audio_id").take(pa.array(cache.variants.rows[places])).to_pylist()
    return list(zip(owners.tolist(), cache.variants.numbers[places].tolist(), ids, strict=True))


def _names(caches: Sequence[Cache]) -> str:
    return ", ".join(f"'{cache.path}'" for cache in caches)
