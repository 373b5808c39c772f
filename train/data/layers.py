"""Several layers of one corpus: caches joined by key, with their channels concatenated.

Reads the caches of the layers of each corpus (``caches: [[…-L2-…, …-L4-…, …-L6-…]]``); returns features
[frames, layers · channels] of each utterance that all of them contain, and adds the other layers to the batches of a
stream over the first caches. Order, held-out rows and state are those of the first caches, so no other part of a run
handles layers; in front of the projector, a mixer (``train/projectors/mixer.py``) splits them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shards.errors import UserError
from shards.read.cache import Cache
from shards.stream.join import JoinedCaches, join

if TYPE_CHECKING:
    from shards.stream.batch import Batch


class LayeredCaches:
    """The joined caches of concatenated corpora; a row is an index into the first caches of all corpora.

    Attributes:
        joined: the joined caches, one per corpus.
        count: number of layers.
        channels: channels of each layer.
        in_all_layers: bool [rows], whether all caches of the corpus contain the utterance.

    Raises:
        UserError: a cache holds codes, the caches of a corpus cannot be joined (``shards/stream/join.py``), its layers
            differ in channels, or two corpora differ in a layer.
    """

    def __init__(self, corpora: Sequence[Sequence[Cache]]) -> None:
        for caches in corpora:
            for cache in caches:
                require_floats(cache, "mixed as a layer")
            _require_compatible(caches, corpora[0])
        self.joined: list[JoinedCaches] = [join(caches) for caches in corpora]
        self.count = len(corpora[0])
        self.channels = corpora[0][0].spec.channels
        f16 = all(cache.spec.codec == "f16" for cache in corpora[0])
        self._dtype: type[np.floating[Any]] = np.float16 if f16 else np.float32
        self._offsets = np.cumsum([0, *(len(caches[0]) for caches in corpora)])
        # row in each cache by row in the first; -1 if one of the caches lacks the utterance
        self._rows = np.full((int(self._offsets[-1]), self.count), -1, dtype=np.int64)
        for offset, joined in zip(self._offsets.tolist(), self.joined, strict=False):
            self._rows[offset + joined.rows[:, 0]] = joined.rows
        self.in_all_layers: npt.NDArray[np.bool_] = self._rows[:, 0] >= 0

    def features(self, row: int) -> npt.NDArray[Any]:
        """Return the features of a row, [frames, layers · channels]: float16 if every codec is f16, else float32.

        Raises:
            IndexError: ``row`` is out of range or missing from a layer.
        """
        first = self._caches(row)[0]
        out = np.empty((int(first.frames[self._rows[row, 0]]), self.count * self.channels), self._dtype)
        self._read(row, 0, out)
        return out

    def add_layers(self, batch: Batch) -> Batch:
        """Return ``batch`` of the first caches with the channels of all layers: [B, T, layers · channels]."""
        import torch

        out = np.zeros((*batch.features.shape[:2], self.count * self.channels), self._dtype)
        out[..., : self.channels] = batch.features.numpy()
        for slot, row, frames, variant in zip(out, batch.rows, batch.lengths.tolist(), batch.variants, strict=True):
            self._read(row, 1, slot[:frames], variant)
        return replace(batch, features=torch.from_numpy(out))

    def identity(self) -> dict[str, Any]:
        """Return the ids, besides those of the first caches, that must be unchanged when a run resumes."""
        return {
            "layers": [cache.feature_id for cache in self.joined[0].caches],
            "layers' manifest ids": [[cache.manifest_id for cache in joined.caches] for joined in self.joined],
        }

    def _read(self, row: int, start: int, out: npt.NDArray[Any], variant: int = 0) -> None:
        """Read the layers from index ``start`` on into their channels of ``out`` [frames, layers · channels]."""
        caches, rows = self._caches(row), self._rows[row].tolist()
        for layer in range(start, self.count):
            channels = slice(layer * self.channels, (layer + 1) * self.channels)
            caches[layer].read_into(rows[layer], out[:, channels], variant)

    def _caches(self, row: int) -> tuple[Cache, ...]:
        corpus = int(np.searchsorted(self._offsets, row, side="right")) - 1
        if not 0 <= row < len(self._rows) or not self.in_all_layers[row]:
            raise IndexError(f"row {row} is missing from at least one layer")
        return self.joined[corpus].caches


def require_floats(cache: Cache, use: str) -> None:
    """Raise UserError if ``cache`` holds the integer codes of a codec; ``use`` says what floats were wanted for."""
    if cache.spec.codebook_size:
        raise UserError(
            f"'{cache.location}' holds the integer codes of {cache.spec.family}, which cannot be {use}: name a cache "
            "of float features"
        )


def _require_compatible(caches: Sequence[Cache], wanted: Sequence[Cache]) -> None:
    for cache, reference in zip(caches, wanted, strict=True):
        if cache.spec.channels != wanted[0].spec.channels:
            raise UserError(
                f"'{cache.path}' has {cache.spec.channels} channels and '{wanted[0].path}' has "
                f"{wanted[0].spec.channels}: mixed layers must have the same number of channels"
            )
        if cache.feature_id != reference.feature_id:
            fields = "; ".join(cache.spec.differences(reference.spec))
            raise UserError(
                f"'{cache.path}' has different features from '{reference.path}' ({fields}): list the layers of each "
                "corpus in the same order, with the same encoder, window, dtype and codec"
            )
