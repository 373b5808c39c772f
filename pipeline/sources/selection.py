"""Wrap a source: add keys, filter the utterances, and choose a validation set.

The steps, in order: ids become keys, which must be unique; ``min_duration`` and ``max_duration`` apply (recordings of
unknown length are kept); ``limit`` keeps the first utterances. These are lazy and keep 8 bytes per utterance. Once all
are listed, ``val_fraction`` of them become ``val`` (``pipeline/extract/listing.py``).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, compress, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.audio import SAMPLING_RATE
from pipeline.sources.base import MAX_KEY, ProblemLog, Source, Utterance, encode_key, translate_errors
from shards.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
_PREFIX = 8  # bytes of a group's digest that are kept per group; equal prefixes are compared in full


class FilteredSource(Source):
    """A :class:`Source` that wraps another one. ``val_fraction`` 0 keeps the corpus's splits."""

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
        self.speaker_split, self.hash_ahead = source.speaker_split, source.hash_ahead
        self._source = source
        self._limit, self._min_duration, self._max_duration = limit, min_duration, max_duration
        self._val_fraction, self._seed = val_fraction, seed
        self._problem_log = ProblemLog(max_listed=1)  # rewritten keys are not errors: one example is enough
        self._notes: list[str] = []

    @property
    def problems(self) -> list[str]:
        return [*self._source.problems, *self._problem_log.sentences(), *self._notes]

    def utterances(self) -> Iterator[Utterance]:
        """See :meth:`Source.utterances`. The splits are the corpus's own, see :meth:`validation_rows`.

        Raises:
            UserError: An id is empty, or two are equal. The second is raised at the latest when all utterances are
                made.
        """
        self._problem_log.clear()
        self._notes.clear()
        hashes = array("q")  # of the keys, also of utterances that are filtered out
        count = 0
        for number, utterance in enumerate(self._listed(), 1):
            key = self._key(utterance, number)
            hashes.append(hash(key))
            if number.bit_count() == 1:  # a long listing is stopped before it has taken twice as long as needed
                self._require_unique(hashes)
            if self._is_kept(utterance):
                yield replace(utterance, key=key)
                count += 1
                if count == self._limit:
                    break
        self._require_unique(hashes)

    def _listed(self) -> Iterator[Utterance]:
        with translate_errors(f"source '{self.name}'"):
            yield from self._source.utterances()

    def read(self, uris: Sequence[str]) -> Iterator[tuple[str, bytes | Exception]]:
        return self._source.read(uris)

    def file_of(self, uri: str) -> tuple[str, str] | None:
        return self._source.file_of(uri)

    def tokens(self, uris: Sequence[str]) -> list[str]:
        return self._source.tokens(uris)

    def validation_rows(self, keys: pa.ChunkedArray, speakers: pa.ChunkedArray) -> BoolArray | None:
        """See :meth:`Source.validation_rows`. Adds to :attr:`problems` if speakers cannot be kept apart."""
        if not self._val_fraction:
            return None
        known = speakers if self.speaker_split else None
        chosen, is_shared = choose_validation(keys, known, self._val_fraction, self._seed)
        if is_shared:
            self._notes.append(
                f"all {len(keys)} utterances have one speaker: the split is by utterance, so train and val "
                "share the speaker"
            )
        elif chosen.sum() > 2 * max(1, round(self._val_fraction * len(keys))):
            self._notes.append(
                f"{chosen.sum():,} of {len(keys):,} utterances are held out, more than twice what source.val_fraction="
                f"{self._val_fraction:g} asks for, because speakers are held out whole"
            )
        return chosen

    def _key(self, utterance: Utterance, number: int) -> str:
        if not utterance.id:
            raise UserError(
                f"utterance {number} of the source ('{utterance.audio}') has an empty key: set its key or id"
            )
        key = encode_key(utterance.id)
        if key != utterance.id:
            self._problem_log.add(
                f"keys rewritten to letters, digits, - and _, at most {MAX_KEY} (the id column keeps the original)",
                f"'{utterance.id}' to '{key}'",
            )
        return key

    def _is_kept(self, utterance: Utterance) -> bool:
        seconds = utterance.samples / SAMPLING_RATE
        return not utterance.samples or (
            (self._min_duration is None or seconds >= self._min_duration)
            and (self._max_duration is None or seconds <= self._max_duration)
        )

    def _require_unique(self, hashes: array[int]) -> None:
        """Raise UserError if a key repeats. Lists the source again if two hashes are equal, to compare the keys."""
        ordered = np.sort(np.frombuffer(hashes, np.int64))
        repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        if not repeated:
            return
        seen: dict[str, tuple[int, str]] = {}
        for number, utterance in enumerate(islice(self._listed(), len(hashes)), 1):
            key = encode_key(utterance.id)
            if key in seen:
                first, audio = seen[key]
                raise UserError(
                    f"duplicate key '{utterance.id}' in the source, at utterance {first} ('{audio}') and utterance "
                    f"{number} ('{utterance.audio}'): keep one, or narrow source.splits or source.path"
                )
            if hash(key) in repeated:
                seen[key] = (number, utterance.audio)


def choose_validation(
    keys: pa.ChunkedArray, speakers: pa.ChunkedArray | None, fraction: float, seed: int
) -> tuple[BoolArray, bool]:
    """Choose the validation split: whole groups, in a seeded random order. Keeps about 40 bytes per utterance.

    A group is the utterances of a speaker, or a single utterance of unknown speaker; if all utterances have the same
    speaker, each is a group. The utterances of the chosen groups come close to ``fraction`` of all. With two or more
    groups, each side gets at least one. The order depends only on the seed and the names, so few speakers change sides
    when a corpus grows.

    Args:
        keys: Keys of all utterances: string [utterances].
        speakers: Their speakers, "" if unknown: string [utterances]. None: as if all were unknown.
        fraction: Fraction of the utterances, between 0 and 1.
        seed: Seed of the order.

    Returns:
        Whether each utterance is chosen, bool [utterances], and whether both sides share the only speaker.
    """
    names: list[str] = []
    counts = np.empty(0, np.int64)
    alone = np.ones(len(keys), np.bool_)
    if speakers is not None:
        import pyarrow.compute as pc

        counted = pc.value_counts(speakers)
        names, counts = counted.field("values").to_pylist(), counted.field("counts").to_numpy()
        alone = pc.equal(speakers, "").to_numpy()
        if "" in names:
            counts = np.delete(counts, names.index(""))
            names.remove("")
    is_shared = len(keys) > 1 and len(names) == 1 and not alone.any()
    if is_shared:
        names, counts, alone = [], counts[:0], ~alone
    label = "{}" if is_shared else "utterance {}"
    singles = int(alone.sum())
    groups = chain((f"speaker {name}" for name in names), map(label.format, compress(_strings(keys), alone)))
    prefixes = np.fromiter(
        (int.from_bytes(_digest(group, seed)[:_PREFIX]) for group in groups), np.uint64, len(names) + singles
    )
    order = np.argsort(prefixes, kind="stable")
    ties = np.flatnonzero(np.diff(prefixes[order]) == 0)
    if len(ties):
        rows = np.flatnonzero(alone)

        def digest(group: int) -> bytes:
            single = group - len(names)
            return _digest(
                label.format(keys[int(rows[single])].as_py()) if single >= 0 else f"speaker {names[group]}", seed
            )

        for run in np.split(ties, np.flatnonzero(np.diff(ties) > 1) + 1):
            tied = slice(run[0], run[-1] + 2)
            order[tied] = sorted(order[tied].tolist(), key=digest)
    del prefixes
    sizes = np.concatenate([counts, np.ones(singles, np.int64)])
    chosen = _choose_groups(sizes, order, fraction * len(keys))
    mask = np.empty(len(keys), np.bool_)
    mask[alone] = chosen[len(names) :]
    if names:
        import pyarrow as pa

        codes = pc.index_in(speakers, value_set=pa.array(names, pa.string())).fill_null(0).to_numpy()
        mask[~alone] = chosen[codes[~alone]]
    return mask, is_shared


def _choose_groups(sizes: IntArray, order: npt.NDArray[np.intp], target: float) -> BoolArray:
    """Choose groups in ``order`` if they bring the sum of the chosen ``sizes`` closer to ``target``; bool [groups]."""
    chosen = np.zeros(len(sizes), np.bool_)
    number = count = 0
    for group in order:
        if number == len(sizes) - 1 or count >= target:
            break
        size = int(sizes[group])
        if abs(count + size - target) < abs(count - target):
            chosen[group] = True
            number, count = number + 1, count + size
    if not number and len(sizes) > 1:
        chosen[order[np.argmin(sizes[order])]] = True
    return chosen


def _digest(group: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{group}".encode("utf-8", "surrogatepass")).digest()


def _strings(column: pa.ChunkedArray) -> Iterator[Any]:
    """Yield the values of ``column``; only those of one chunk are Python objects at a time."""
    for chunk in column.chunks:
        yield from chunk.to_pylist()
