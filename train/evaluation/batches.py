"""Held-out utterances in padded batches of like lengths, each rank its share.

In: utterances, and which utterance hears whose audio. Out: the results of a function over the batches, on every rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from train.data.caches import Utterances, pad
from train.distributed.group import ProcessGroup

Features = npt.NDArray[Any]
BatchFunction = Callable[[list[int], Tensor, Tensor], Any]


class Stopped(Exception):
    """The caller's ``stop`` asked for an end before the evaluation was done."""


class UtteranceReader:
    """Reads chosen utterances; ``keys``, ``texts`` and ``frames`` are those of the utterances by their index."""

    def __init__(
        self,
        utterances: Utterances,
        batch_size: int,
        max_frames: int | None,
        stop: Callable[[], bool],
        group: ProcessGroup,
    ) -> None:
        columns = utterances.columns("key", "text", "frames")
        self.keys, self.texts, self.frames = columns["key"], columns["text"], columns["frames"]
        self.index_of_row = {int(row): index for index, row in enumerate(utterances.rows)}
        self.utterances, self.batch_size, self.max_frames = utterances, batch_size, max_frames
        self.stop, self.group = stop, group

    def __len__(self) -> int:
        return len(self.keys)

    def map_batches(
        self,
        audio_indices: Sequence[int],
        text_indices: Sequence[int],
        function: BatchFunction,
        get_features: Callable[[int], Features] | None = None,
    ) -> list[Any]:
        """``work(readers, features [B, T, C], mask [B, T])`` of every batch, in the order of the batches.

        Utterance ``readers[i]`` hears the audio of ``heard[i]``, or what ``audio`` gives for it. Each rank works on its
        share of the batches, and all get all results, which must be what JSON can hold.

        Raises:
            Stopped: ``stop()`` became true on any rank.
        """
        read = get_features or self.utterances.features

        def one(batch: list[int]) -> Any:
            return function([text_indices[i] for i in batch], *pad([read(audio_indices[i]) for i in batch]))

        return self.map_items(self._batches(audio_indices), one)

    def map_items(self, items: Sequence[Any], function: Callable[[Any], Any]) -> list[Any]:
        """``work(item)`` of every item, in their order; each rank does its share, and all get what JSON can hold of it.

        Raises:
            Stopped: ``stop()`` became true on any rank.
        """
        done, stopped = [], False
        for item in items[self.group.rank :: self.group.world_size]:
            stopped = self.stop()
            if stopped:  # the others learn it where they wait for this rank
                break
            done.append(function(item))
        shares = self.group.all_gather(None if stopped else done)
        if any(part is None for part in shares):
            raise Stopped
        turns = zip_longest(*shares)  # item i was the turn of rank i % world
        return [result for turn in turns for result in turn if result is not None]

    def _batches(self, audio_indices: Sequence[int]) -> list[list[int]]:
        """Places in ``heard`` of like lengths."""
        batches: list[list[int]] = [[]]
        for i in sorted(range(len(audio_indices)), key=lambda i: (self.frames[audio_indices[i]], i)):
            longest = self.frames[audio_indices[i]]  # the order ascends
            too_wide = self.max_frames is not None and longest * (len(batches[-1]) + 1) > self.max_frames
            if batches[-1] and (len(batches[-1]) == self.batch_size or too_wide):
                batches.append([])
            batches[-1].append(i)
        return batches


def derangement(texts: Sequence[str], seed: int = 0) -> list[int] | None:
    """For each utterance the one whose audio it hears instead: a permutation in which no text meets an equal text.

    Utterances are put in a seeded order with equal texts side by side, and the order is turned by the size of the
    largest group: that is a solution whenever there is one. None when there is none.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index in np.random.default_rng(seed).permutation(len(texts)).tolist():
        groups[texts[index]].append(index)
    largest = max(map(len, groups.values()), default=0)
    if 2 * largest > len(texts) or not texts:
        return None
    order = [index for group in groups.values() for index in group]
    other = [0] * len(texts)
    for place, index in enumerate(order):
        other[index] = order[(place + largest) % len(order)]
    return other
