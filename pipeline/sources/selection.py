"""Wrap a source: add keys, filter the utterances, and split off a validation set.

The steps, in order: ids become keys, which must be unique; ``min_duration`` and ``max_duration`` apply (recordings of
unknown length are kept); ``limit`` keeps the first utterances; ``val_fraction`` of the remaining ones become ``val``.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from pipeline.audio import SAMPLING_RATE
from pipeline.sources.base import MAX_KEY, ProblemLog, Source, Utterance, encode_key
from shards.errors import UserError


class FilteredSource(Source):
    """A :class:`Source` that wraps another one. With ``val_fraction`` 0 it keeps the corpus's splits and stays lazy."""

    def __init__(
        self,
        source: Source,
        *,
        name: str,
        limit: int | None = None,
        min_duration: float | None = None,
        max_duration: float | None = None,
        val_fraction: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.name, self.sequential, self.root, self.version = name, source.sequential, source.root, source.version
        self.speaker_split = source.speaker_split
        self._source = source
        self._limit, self._min_duration, self._max_duration = limit, min_duration, max_duration
        self._val_fraction, self._seed = val_fraction, seed
        self._problem_log = ProblemLog(max_listed=1)  # rewritten keys are not errors: one example is enough
        self._notes: list[str] = []

    @property
    def problems(self) -> list[str]:
        return [*self._source.problems, *self._problem_log.sentences(), *self._notes]

    def utterances(self) -> Iterator[Utterance]:
        self._problem_log.clear()
        self._notes.clear()
        filtered = self._filtered()
        return self._with_validation(list(filtered)) if self._val_fraction else filtered

    def read(self, uris: Sequence[str]) -> Iterator[tuple[str, bytes | Exception]]:
        return self._source.read(uris)

    def _filtered(self) -> Iterator[Utterance]:
        count = 0
        for utterance in self._with_keys(self._source.utterances()):
            seconds = utterance.samples / SAMPLING_RATE
            if utterance.samples and (
                (self._min_duration is not None and seconds < self._min_duration)
                or (self._max_duration is not None and seconds > self._max_duration)
            ):
                continue
            yield utterance
            count += 1
            if count == self._limit:
                return

    def _with_keys(self, utterances: Iterable[Utterance]) -> Iterator[Utterance]:
        seen: dict[str, tuple[int, str]] = {}
        for number, utterance in enumerate(utterances, 1):
            if not utterance.id:
                raise UserError(
                    f"utterance {number} of the source ('{utterance.audio}') has an empty key: set its key or id"
                )
            key = encode_key(utterance.id)
            if key in seen:
                first, audio = seen[key]
                raise UserError(
                    f"duplicate key '{utterance.id}' in the source, at utterance {first} ('{audio}') and utterance "
                    f"{number} ('{utterance.audio}'): keep one, or narrow source.splits or source.path"
                )
            seen[key] = (number, utterance.audio)
            if key != utterance.id:
                self._problem_log.add(
                    f"keys rewritten to letters, digits, - and _, at most {MAX_KEY} (the id column keeps the original)",
                    f"'{utterance.id}' to '{key}'",
                )
            yield replace(utterance, key=key)

    def _with_validation(self, utterances: list[Utterance]) -> Iterator[Utterance]:
        groups = Counter(self._group(utterance) for utterance in utterances)
        by_speaker = len(groups) > 1 or len(utterances) < 2
        if not by_speaker:
            self._notes.append(
                f"all {len(utterances)} utterances have one speaker: the split is by utterance, so train and val "
                "share the speaker"
            )
            groups = Counter(utterance.key for utterance in utterances)
        chosen = validation_groups(groups, self._val_fraction, self._seed)
        for utterance in utterances:
            group = self._group(utterance) if by_speaker else utterance.key
            yield replace(utterance, split="val" if group in chosen else "train")

    def _group(self, utterance: Utterance) -> str:
        if utterance.speaker and self.speaker_split:
            return f"speaker {utterance.speaker}"
        return f"utterance {utterance.key}"


def validation_groups(groups: Counter[str], fraction: float, seed: int) -> set[str]:
    """Choose the groups (speakers) of the validation split, in a seeded random order.

    The utterances of the chosen groups come close to ``fraction`` of all. With two or more groups, each side gets at
    least one. The order depends only on the seed and the names, so few speakers change sides when a corpus grows.

    Args:
        groups: Number of utterances per group.
        fraction: Fraction of the utterances, between 0 and 1.
        seed: Seed of the order.
    """
    ranked = sorted(
        groups, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode("utf-8", "surrogatepass")).digest()
    )
    if len(ranked) < 2:
        return set()
    target = fraction * sum(groups.values())
    chosen: set[str] = set()
    count = 0
    for group in ranked:
        if len(chosen) == len(ranked) - 1:
            break
        if abs(count + groups[group] - target) < abs(count - target):
            chosen.add(group)
            count += groups[group]
    return chosen or {min(ranked, key=lambda group: groups[group])}
