"""A run on several layers at once: caches of one corpus joined by key, their channels side by side.

In: for each corpus of a run the caches of its layers (``caches: [[…-L2-…, …-L4-…, …-L6-…]]``). Out: features
[frames, layers · channels] of each utterance that all of them hold, and the same of each batch of a stream over the
first caches. Order, held-out rows and state are those of the first caches, so nothing else of a run knows of layers; in
front of the projector a mixer (``train/projectors/mixer.py``) parts them again.
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
    """The joined caches of corpora that stand end to end; rows count through the first cache of each.

    Attributes:
        joined: one a corpus.
        held: bool [rows], whether all caches of its corpus hold the utterance.

    Raises:
        UserError: the caches of a corpus cannot be joined (``shards/stream/join.py``), its layers differ in channels,
        or two
            corpora differ in a layer.
    """

    def __init__(self, corpora: Sequence[Sequence[Cache]]) -> None:
        for caches in corpora:
            _require_compatible(caches, corpora[0])
        self.joined: list[JoinedCaches] = [join(caches) for caches in corpora]
        self.count = len(corpora[0])
        self.channels = corpora[0][0].spec.channels
        f16 = all(cache.spec.codec == "f16" for cache in corpora[0])
        self._dtype: type[np.floating[Any]] = np.float16 if f16 else np.float32
        self._offsets = np.cumsum([0, *(len(caches[0]) for caches in corpora)])
        # rows of the further caches by the first's row; -1 where one of them lacks the utterance
        self._rows = np.full((int(self._offsets[-1]), self.count), -1, dtype=np.int64)
        for offset, joined in zip(self._offsets.tolist(), self.joined, strict=False):
            self._rows[offset + joined.rows[:, 0]] = joined.rows
        self.in_all_layers: npt.NDArray[np.bool_] = self._rows[:, 0] >= 0

    def features(self, row: int) -> npt.NDArray[Any]:
        """[frames, layers · channels] of a row, float16 where every codec is f16, else float32."""
        first = self._caches(row)[0]
        out = np.empty((int(first.frames[self._rows[row, 0]]), self.count * self.channels), self._dtype)
        self._read(row, 0, out)
        return out

    def add_layers(self, batch: Batch) -> Batch:
        """``batch`` of the first caches with the channels of all layers: [B, T, layers · channels]."""
        import torch

        out = np.zeros((*batch.features.shape[:2], self.count * self.channels), self._dtype)
        out[..., : self.channels] = batch.features.numpy()
        for slot, row, frames in zip(out, batch.rows, batch.lengths.tolist(), strict=True):
            self._read(row, 1, slot[:frames])
        return replace(batch, features=torch.from_numpy(out))

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on, beside the first caches' ids."""
        return {
            "layers": [cache.feature_id for cache in self.joined[0].caches],
            "layers' manifest ids": [[cache.manifest_id for cache in joined.caches] for joined in self.joined],
        }

    def _read(self, row: int, start: int, out: npt.NDArray[Any]) -> None:
        """The layers from ``start`` on into their channels of ``out`` [frames, layers · channels]."""
        caches, rows = self._caches(row), self._rows[row].tolist()
        for place in range(start, self.count):
            caches[place].read_into(rows[place], out[:, place * self.channels : (place + 1) * self.channels])

    def _caches(self, row: int) -> tuple[Cache, ...]:
        place = int(np.searchsorted(self._offsets, row, side="right")) - 1
        if not 0 <= row < len(self._rows) or not self.in_all_layers[row]:
            raise IndexError(f"row {row} is not held by every layer")
        return self.joined[place].caches


def _require_compatible(caches: Sequence[Cache], wanted: Sequence[Cache]) -> None:
    for cache, model in zip(caches, wanted, strict=True):
        if cache.spec.channels != wanted[0].spec.channels:
            raise UserError(
                f"'{cache.path}' has {cache.spec.channels} channels and '{wanted[0].path}' {wanted[0].spec.channels}: "
                "a mix is of layers of one width"
            )
        if cache.feature_id != model.feature_id:
            fields = "; ".join(cache.spec.differences(model.spec))
            raise UserError(
                f"'{cache.path}' holds other features than '{model.path}' ({fields}): name the layers of each corpus "
                "in the same order, of one encoder, window, dtype and codec"
            )
