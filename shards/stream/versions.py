"""Which version of an utterance an epoch reads: the utterance itself, or one of its variants.

A draw is a pure function of (seed, epoch, row): it does not depend on the world size, on the window or on what was read
before. Every version of an utterance is equally likely.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.stream.concat import ConcatCache
from shards.stream.sampler import VERSIONS, Rows, random_words

_STEP = np.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio


class VersionDraw:
    """Draws a version of each row of ``joined`` in each epoch.

    Args:
        seed: seed of the stream.
        most: variants with a number from here on are not drawn; None: all are.
    """

    def __init__(self, joined: ConcatCache, seed: int, most: int | None = None) -> None:
        self._joined, self._seed = joined, seed
        self._counts = joined.num_versions(most)
        self._words: tuple[int, np.uint64] | None = None  # of the epoch drawn last

    @property
    def most(self) -> int:
        """The largest number of versions that an utterance has."""
        return int(self._counts.max(initial=1))

    def __call__(self, epoch: int, rows: Rows) -> Rows:
        """Return the version of each of ``rows`` in ``epoch``, int64: 0 is the utterance itself."""
        if self._words is None or self._words[0] != epoch:
            self._words = epoch, random_words(self._seed, epoch, 0, VERSIONS, 1)[0]
        words = _mixed(self._words[1] + (rows.astype(np.uint64) + np.uint64(1)) * _STEP)
        return (words % self._counts[rows].astype(np.uint64)).astype(np.int64)

    def frames(self, epoch: int, rows: Rows) -> NDArray[np.int32]:
        """Return the frames of the versions of ``rows`` that ``epoch`` reads, int32."""
        return self._joined.version_frames(rows, self(epoch, rows))


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits of each word: the output function of SplitMix64 (Steele, Lea, Flood 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
