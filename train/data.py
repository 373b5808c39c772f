"""Which caches a run reads, which utterances it trains on, and which it is judged on.

In: the ``caches``, ``extract`` and ``val`` keys of a run. Out: opened caches, the joined rows to train on, and the
:class:`Utterances` held out. A joined row counts through the caches end to end, in the order of the config.
Who is held out is a pure function of the cache and the ``val`` keys: hashes of speakers, no random state.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.errors import UserError
from shards.filters import select
from shards.manifest import Layout
from shards.reader import Cache
from train.config import TrainConfig, ValConfig

if TYPE_CHECKING:
    import torch

Rows = npt.NDArray[np.int64]
VAL = "val"  # the split name that an extraction gives to what it holds out


class AbsentCache(UserError):
    """No complete cache stands where a pattern points; an extraction makes it."""


@dataclass(frozen=True)
class Utterances:
    """Chosen rows of caches joined end to end."""

    caches: Sequence[Cache]
    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def columns(self, *names: str) -> dict[str, list[Any]]:
        """Manifest columns of the chosen rows, in the order of ``rows``."""
        chunks = {name: [c for cache in self.caches for c in cache.manifest[name].chunks] for name in names}
        return {name: pa.chunked_array(chunks[name]).take(self.rows).to_pylist() for name in names}

    def features(self, index: int) -> npt.NDArray[Any]:
        """[frames, channels] of the ``index``-th chosen utterance, float16 or float32 as the reader gives it."""
        row = int(self.rows[index])
        for cache in self.caches:
            if row < len(cache):
                return cache.features(row)
            row -= len(cache)
        raise IndexError(index)

    def first(self, count: int | None) -> Utterances:
        """At most ``count`` of them: those whose keys' hashes are lowest, so a part of every speaker and shard."""
        if count is None or len(self) <= count:
            return self
        keys = self.columns("key")["key"]
        chosen = sorted(range(len(self)), key=lambda index: _hash(0, f"{keys[index]}\0{self.rows[index]}"))[:count]
        return Utterances(self.caches, self.rows[sorted(chosen)])


@dataclass(frozen=True)
class Data:
    """What a run trains on and what it is judged on."""

    caches: list[Cache]
    train_rows: Rows  # joined rows over ``caches``
    held_out: Utterances


def open_data(config: TrainConfig) -> Data:
    """Open the caches of a run and divide their rows.

    Raises:
        UserError: a cache is absent or ambiguous, caches differ in feature spec, or nothing is left to train on or,
            where the run evaluates, to be judged on.
    """
    caches = open_caches(config.caches, config.extract)
    held = [held_out_mask(cache, config.val) for cache in caches]
    train_rows = np.flatnonzero(~np.concatenate(held))
    if not len(train_rows):
        raise UserError(
            f"no utterance is left to train on in {_names(caches)}: all are held out; lower val.fraction or name "
            "another cache in caches"
        )
    if config.filter is not None:
        train_rows = np.intersect1d(train_rows, select(caches, config.filter), assume_unique=True)
        if not len(train_rows):
            raise UserError(
                f"no utterance of {_names(caches)} that is not held out passes '{config.filter}': widen filter"
            )
    if config.val.caches:
        judged = open_caches(config.val.caches, config.extract)
        same_features(judged[0], caches[0])
        held_out = Utterances(judged, np.arange(sum(len(cache) for cache in judged)))
    else:
        held_out = Utterances(caches, np.flatnonzero(np.concatenate(held)))
    if not len(held_out) and config.eval_every != 0:
        raise UserError(
            f"no utterance is held out in {_names(caches)}: set val.fraction=0.1, name a cache in val.caches, or train "
            "without evaluation by eval_every=0"
        )
    return Data(caches, train_rows, held_out.first(config.val.limit))


def judged_on(cache: Cache, config: TrainConfig, trained_on: Sequence[str]) -> Utterances:
    """What of ``cache`` a run may be judged on: its held-out rows if its manifest id is in ``trained_on``, else all.

    A cache that the run named in ``val.caches`` is judged whole, as during the run.
    """
    rows = np.arange(len(cache))
    if cache.manifest_id in trained_on:
        named = [find_cache(pattern) for pattern in config.val.caches]
        if not any(path is not None and _same_folder(path, cache.path) for path in named):
            rows = np.flatnonzero(held_out_mask(cache, config.val))
    if not len(rows):
        raise UserError(f"the run trained on every utterance of '{cache.path}': name another cache with --cache")
    return Utterances([cache], rows).first(config.val.limit)


def same_features(found: Cache, wanted: Cache) -> None:
    """UserError with the fields that differ, unless both caches are of one feature spec."""
    if found.feature_id != wanted.feature_id:
        fields = "; ".join(found.spec.differences(wanted.spec))
        raise UserError(
            f"'{found.path}' holds other features than '{wanted.path}' ({fields}): "
            "extract it with the same encoder, layer, window, dtype and codec"
        )


def open_caches(patterns: Sequence[str], extract: Sequence[str] = ()) -> list[Cache]:
    """Open the one cache of each pattern; all must be of one feature spec and none may come twice."""
    caches: list[Cache] = []
    for index, pattern in enumerate(patterns):
        path = find_cache(pattern)
        if path is None:
            raise AbsentCache(f"there is no complete cache at '{pattern}': {_mend(patterns, extract, index)}")
        cache = Cache.open(path)
        if any(_same_folder(cache.path, other.path) for other in caches):
            raise UserError(f"caches names '{path}' twice: its utterances would count double; name it once")
        if caches:
            same_features(cache, caches[0])
        caches.append(cache)
    return caches


def find_cache(pattern: str) -> str | None:
    """The one complete cache that ``pattern`` (a folder, a glob pattern or a URL) means; None when there is none.

    Raises:
        UserError: several match, or the pattern is a URL's.
    """
    if "://" in pattern:
        if "*" in pattern:
            raise UserError(
                f"'{pattern}' is a pattern on a server, which cannot be listed: name the cache's own folder"
            )
        return pattern
    pattern = os.path.expanduser(pattern)
    if _is_complete(pattern):
        return pattern
    found = sorted(path for path in glob.glob(pattern) if _is_complete(path))
    if len(found) > 1:
        raise UserError(f"'{pattern}' matches {len(found)} caches ({', '.join(found)}): name one, or delete the stale")
    return found[0] if found else None


def pad(arrays: Sequence[npt.NDArray[Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Arrays [T_i, C] as one tensor [B, T, C] with zeros behind, and the mask bool [B, T] of what is theirs."""
    import torch

    features = np.zeros((len(arrays), max(map(len, arrays)), arrays[0].shape[1]), dtype=arrays[0].dtype)
    mask = np.zeros(features.shape[:2], dtype=bool)
    for row, array in enumerate(arrays):
        features[row, : len(array)] = array
        mask[row, : len(array)] = True
    return torch.from_numpy(features), torch.from_numpy(mask)


def needed(config: TrainConfig) -> list[str]:
    """The extraction configs to run because a cache they make is absent; empty when all caches stand.

    ``extract`` pairs with ``caches`` where both are equally long; otherwise any absent cache needs all of ``extract``.

    Raises:
        UserError: a cache is absent and ``extract`` names nothing that makes it.
    """
    paired = len(config.extract) == len(config.caches)
    files: list[str] = []
    for index, pattern in enumerate([*config.caches, *config.val.caches]):
        if find_cache(pattern) is not None:
            continue
        if not config.extract:
            raise AbsentCache(f"there is no complete cache at '{pattern}': {_mend(config.caches, (), index)}")
        if pattern in config.caches and paired:
            files.append(config.extract[config.caches.index(pattern)])
        else:
            files.extend(config.extract)
    return list(dict.fromkeys(files))


def held_out_mask(cache: Cache, val: ValConfig) -> npt.NDArray[np.bool_]:
    """bool [utterances]: rows of ``cache`` that are never trained on.

    Rows of the split ``val``, and, unless ``val.caches`` says what to judge on, rows of further speakers in the order
    of a seeded hash until ``val.fraction`` of the cache is held out. Where fewer than two speakers are known the key
    stands for the speaker.
    """
    table = cache.manifest
    mask = np.array([split == VAL for split in table["split"].to_pylist()], dtype=bool)
    wanted = 0 if val.caches else round(val.fraction * len(table))
    if mask.sum() >= wanted:
        return mask
    speakers, keys = table["speaker"].to_pylist(), table["key"].to_pylist()
    if len(set(speakers) - {""}) < 2:
        speakers = keys
    speakers = [speaker or f"\0{key}" for speaker, key in zip(speakers, keys, strict=True)]
    seen = {speaker for speaker, is_held in zip(speakers, mask, strict=True) if is_held}
    groups: dict[str, list[int]] = {}
    for row, speaker in enumerate(speakers):
        if not mask[row]:
            groups.setdefault(speaker, []).append(row)
    # a speaker of whom rows are held out already comes first
    for speaker in sorted(groups, key=lambda name: (name not in seen, _hash(val.seed, name))):
        rows = groups[speaker]
        if mask.sum() + len(rows) <= wanted:
            mask[rows] = True
    if not mask.any():  # every speaker has more rows than wanted: hold out the one with the fewest
        mask[min(groups.values(), key=len)] = True
    return mask


def _is_complete(path: str) -> bool:
    return Layout(Path(path)).cache.is_file()


def _hash(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{text}".encode()).digest()


def _same_folder(one: str | Path, other: str | Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _names(caches: Sequence[Cache]) -> str:
    return ", ".join(f"'{cache.location}'" for cache in caches)


def _mend(patterns: Sequence[str], extract: Sequence[str], index: int) -> str:
    if not extract:
        return "make it with `make extract CONFIG=configs/extract/….yaml`, or correct the path in caches"
    files = [extract[index]] if len(extract) == len(patterns) else extract
    return " and ".join(f"`make extract CONFIG={file}`" for file in files) + " makes it"
