"""Any source in, the same source out: keyed, filtered and with its validation split.

Order: ids become keys and must be unique; then ``min_duration`` and ``max_duration`` (a recording of unknown length is
kept); then ``limit``, the first ones; then ``val_fraction`` of what is left.
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
    """A :class:`Source` over another one. A ``val_fraction`` of 0 keeps the source's own splits and stays lazy."""

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
        self._limit, self._shortest, self._longest = limit, min_duration, max_duration
        self._val_fraction, self._seed = val_fraction, seed
        self._problem_log = ProblemLog(max_listed=1)  # a rewritten key is no fault: one tells how
        self._note: list[str] = []

    @property
    def problems(self) -> list[str]:
        return [*self._source.problems, *self._problem_log.sentences(), *self._note]

    def utterances(self) -> Iterator[Utterance]:
        self._problem_log.clear()
        self._note.clear()
        chosen = self._chosen()
        return self._with_validation(list(chosen)) if self._val_fraction else chosen

    def read(self, uris: Sequence[str]) -> Iterator[tuple[str, bytes | Exception]]:
        return self._source.read(uris)

    def _chosen(self) -> Iterator[Utterance]:
        count = 0
        for utterance in self._keyed(self._source.utterances()):
            seconds = utterance.samples / SAMPLING_RATE
            if utterance.samples and (
                (self._shortest is not None and seconds < self._shortest)
                or (self._longest is not None and seconds > self._longest)
            ):
                continue
            yield utterance
            count += 1
            if count == self._limit:
                return

    def _keyed(self, utterances: Iterable[Utterance]) -> Iterator[Utterance]:
        seen: dict[str, tuple[int, str]] = {}
        for number, utterance in enumerate(utterances, 1):
            if not utterance.id:
                raise UserError(f"utterance {number} of the source ('{utterance.audio}') has an empty key: name it")
            key = encode_key(utterance.id)
            if key in seen:
                first, audio = seen[key]
                raise UserError(
                    f"key '{utterance.id}' stands twice in the source, at utterance {first} ('{audio}') and at "
                    f"utterance {number} ('{utterance.audio}'): keep one, or narrow source.splits or source.path"
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
            self._note.append(
                f"all {len(utterances)} utterances have one speaker: the validation split is by utterance and shares it"
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
    """The groups (speakers) whose utterances together come closest to ``fraction`` of all, in a seeded random order.

    At least one group on each side where there are two. The order hangs on the seed and the names alone: a corpus
    that grows moves few speakers to the other side.
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
