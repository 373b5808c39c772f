"""Padded batches of held-out utterances of similar length, divided among the ranks.

Takes utterances and, for each text, the utterance whose audio it is paired with. Applies a function to every batch and
returns all results on every rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from shards.stream.batch import decode_stored, pad_stored
from shards.stream.concat import ConcatCache
from train.config.model import TextConfig
from train.data.caches import Utterances
from train.data.padding import pad
from train.data.text import AS_STORED, apply_text_rules
from train.distributed.device import to_device
from train.distributed.group import ProcessGroup
from train.evaluation.languages import text_languages
from train.evaluation.utterance_table import cache_ids
from train.lms.base import LanguageModel
from train.model.prompt import PromptRow

Features = npt.NDArray[Any]
BatchFunction = Callable[[list[int], Tensor, Tensor], Any]
CPU = torch.device("cpu")


class Stopped(Exception):
    """The caller's ``stop`` returned True before the evaluation was complete."""


class UtteranceReader:
    """Reads a set of utterances in batches.

    ``keys``, ``texts``, ``tasks``, ``languages`` (codes), ``frames`` (counts) and ``rows`` (what selects the
    instructions) hold one entry per utterance, in the order of ``utterances``. ``lm`` is the model that reads the
    batches: features arrive on its device, and ranks may share it. Without it they stay on the CPU.
    """

    def __init__(
        self,
        utterances: Utterances,
        batch_size: int,
        max_frames: int | None,
        stop: Callable[[], bool],
        group: ProcessGroup,
        text: TextConfig = AS_STORED,
        language: str | None = None,
        lm: LanguageModel | None = None,
    ) -> None:
        columns = utterances.columns("key", "text", "frames", "task", "prompt", "language")
        self.keys, self.frames, self.tasks = columns["key"], columns["frames"], columns["task"]
        self.rows = list(map(PromptRow, self.keys, self.tasks, columns["prompt"]))
        self.texts = [apply_text_rules(each, text) for each in columns["text"]]
        self.languages = text_languages(columns["language"], self.texts, language)
        self.index_of_row = {int(row): index for index, row in enumerate(utterances.rows)}
        self.utterances, self.batch_size, self.max_frames = utterances, batch_size, max_frames
        self.stop, self.group, self.lm = stop, group, lm
        self.device = CPU if lm is None else lm.device
        on_cpu = self.device.type == "cpu"
        self._stored = None if utterances.layers is not None or on_cpu else ConcatCache(utterances.caches)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the features of utterances, padded to [B, T, C], and their mask, bool [B, T] on the CPU.

        For a GPU, features of one layer travel as they are stored, are decoded there and stay there.
        """
        if self._stored is None:
            return pad([self.utterances.features(index) for index in indices])
        rows = self._stored.read_stored(self.utterances.rows[list(indices)])
        codes, scales = pad_stored(rows, self._stored.spec.codec)
        lengths = torch.tensor([len(row.payload) for row in rows])
        mask = torch.arange(codes.shape[1]) < lengths[:, None]
        scales = None if scales is None else to_device(scales, self.device)
        return decode_stored(to_device(codes, self.device), scales), mask

    def map_batches(
        self,
        audio_indices: Sequence[int],
        text_indices: Sequence[int],
        function: BatchFunction,
        get_features: Callable[[int], Features] | None = None,
        *,
        what: str = "held out",
    ) -> list[Any]:
        """Call ``function(text_indices, features, mask)`` for every batch; return the results in batch order.

        Text ``text_indices[i]`` is paired with the audio of utterance ``audio_indices[i]``. Each rank processes its
        share of the batches; every rank gets all results.

        Args:
            audio_indices, text_indices: indices of utterances, of equal length.
            function: receives the batch's text indices (B of them), its features [B, T, C] and their mask [B, T]
                (True = a frame). Its result must be JSON-serializable.
            get_features: returns the features [frames, channels] for an audio index; by default those of the utterance.
            what: name on the progress bar.

        Raises:
            Stopped: ``stop()`` returned True on any rank.
        """

        def run_batch(batch: list[int]) -> Any:
            audio = [audio_indices[i] for i in batch]
            padded = self.read(audio) if get_features is None else pad([get_features(index) for index in audio])
            return function([text_indices[i] for i in batch], *padded)

        return self.map_items(self._batches(audio_indices), run_batch, what)

    def map_items(self, items: Sequence[Any], function: Callable[[Any], Any], what: str) -> list[Any]:
        """Call ``function(item)`` for every item; return the results in the order of ``items``.

        On a terminal, rank 0 shows a progress bar named ``what`` if it takes longer than a second.

        Each rank processes its share of the items; every rank gets all results, which must be JSON-serializable.

        Raises:
            Stopped: ``stop()`` returned True on any rank.
        """
        done, stopped = [], False
        hidden = None if self.group.rank == 0 else True  # None: on a terminal only
        own = items[self.group.rank :: self.group.world_size]
        together = nullcontext() if self.lm is None else self.lm.passes_together(self.group)
        with self.group.rank_loss_explains_errors(), together:
            for item in tqdm(own, f"evaluate: {what}", leave=False, delay=1, dynamic_ncols=True, disable=hidden):
                stopped = self.stop()
                if stopped:  # the other ranks learn of it in all_gather
                    break
                done.append(function(item))
        shares = self.group.all_gather(None if stopped else done)
        if any(part is None for part in shares):
            raise Stopped
        rounds = zip_longest(*shares)  # item i was processed by rank i % world_size
        return [result for results in rounds for result in results if result is not None]

    def _batches(self, audio_indices: Sequence[int]) -> list[list[int]]:
        """Positions in ``audio_indices``, grouped into batches of similar length."""
        batches: list[list[int]] = [[]]
        for i in sorted(range(len(audio_indices)), key=lambda i: (self.frames[audio_indices[i]], i)):
            longest = self.frames[audio_indices[i]]  # lengths ascend
            too_wide = self.max_frames is not None and longest * (len(batches[-1]) + 1) > self.max_frames
            if batches[-1] and (len(batches[-1]) == self.batch_size or too_wide):
                batches.append([])
            batches[-1].append(i)
        return batches


def other_audio(reader: UtteranceReader) -> list[int | None]:
    """Pair each text with the audio of another utterance, one of the same task with another text.

    Returns:
        For each utterance the index of the utterance whose audio replaces its own; None if there is no such pairing.
    """
    by_task: dict[str, list[int]] = defaultdict(list)
    for index, task in enumerate(reader.tasks):
        by_task[task].append(index)
    pairs: list[int | None] = [None] * len(reader)
    for indices in by_task.values():
        found = derangement([reader.texts[index] for index in indices])
        if found is not None:
            others = [indices[position] for position in found]
            for index, other in zip(indices, _of_other_audio(reader, indices, others), strict=True):
                pairs[index] = other
    return pairs


def _of_other_audio(reader: UtteranceReader, indices: Sequence[int], others: list[int]) -> list[int | None]:
    """Swap the ``others`` of ``indices`` that have the same audio, in rows with another prompt; None where that fails.

    Texts that differ belong to different audio unless a key has several rows of one task.
    """
    audio = list(zip(cache_ids(reader.utterances), reader.keys, strict=True))

    def fits(index: int, other: int) -> bool:
        return audio[index] != audio[other] and reader.texts[index] != reader.texts[other]

    found: list[int | None] = list(others)
    for i, index in enumerate(indices):
        if fits(index, others[i]):
            continue
        swap = (j for j, other in enumerate(others) if fits(index, other) and fits(indices[j], others[i]))
        j = next(swap, None)
        if j is None:
            found[i] = None
        else:
            others[i], others[j] = others[j], others[i]
            found[i], found[j] = others[i], others[j]
    return found


def derangement(texts: Sequence[str], seed: int = 0) -> list[int] | None:
    """Pair each text with another utterance's audio: a permutation that never pairs two equal texts.

    Utterances are put in a seeded order with equal texts adjacent, and the order is rotated by the size of the largest
    group of equal texts. This finds a solution whenever one exists.

    Returns:
        For each utterance the index of the utterance whose audio replaces its own; None if no such permutation exists.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index in np.random.default_rng(seed).permutation(len(texts)).tolist():
        groups[texts[index]].append(index)
    largest = max(map(len, groups.values()), default=0)
    if 2 * largest > len(texts) or not texts:
        return None
    order = [index for group in groups.values() for index in group]
    other = [0] * len(texts)
    for position, index in enumerate(order):
        other[index] = order[(position + largest) % len(order)]
    return other
