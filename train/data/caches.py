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
from shards.format.layout import Layout
from shards.format.spec import FeatureSpec
from shards.read.cache import Cache
from shards.read.filters import select_rows
from train.config.train import TrainConfig, ValConfig
from train.data.layers import LayeredCaches

if TYPE_CHECKING:
    import torch

Rows = npt.NDArray[np.int64]
VAL = "val"  # the split name that an extraction gives to what it holds out


class MissingCache(UserError):
    """No complete cache stands where a pattern points; an extraction makes it."""


@dataclass(frozen=True)
class Utterances:
    """Chosen rows of caches joined end to end."""

    caches: Sequence[Cache]
    rows: Rows
    layers: LayeredCaches | None = None  # of the same corpora; ``caches`` holds the first of each

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def specs(self) -> list[FeatureSpec]:
        """What the features are, one spec a layer."""
        caches = [self.caches[0]] if self.layers is None else self.layers.joined[0].caches
        return [cache.spec for cache in caches]

    def columns(self, *names: str) -> dict[str, list[Any]]:
        """Manifest columns of the chosen rows, in the order of ``rows``."""
        chunks = {name: [c for cache in self.caches for c in cache.manifest[name].chunks] for name in names}
        return {name: pa.chunked_array(chunks[name]).take(self.rows).to_pylist() for name in names}

    def features(self, index: int) -> npt.NDArray[Any]:
        """[frames, channels] of the ``index``-th chosen utterance, float16 or float32 as the reader gives it.

        Of several layers [frames, layers · channels].
        """
        row = int(self.rows[index])
        if self.layers is not None:
            return self.layers.features(row)
        for cache in self.caches:
            if row < len(cache):
                return cache.features(row)
            row -= len(cache)
        raise IndexError(index)

    def subset(self, count: int | None) -> Utterances:
        """At most ``count`` of them: those whose keys' hashes are lowest, so a part of every speaker and shard."""
        if count is None or len(self) <= count:
            return self
        keys = self.columns("key")["key"]
        chosen = sorted(range(len(self)), key=lambda index: _hash(0, f"{keys[index]}\0{self.rows[index]}"))[:count]
        return Utterances(self.caches, self.rows[sorted(chosen)], self.layers)


@dataclass(frozen=True)
class TrainData:
    """What a run trains on and what it is judged on."""

    caches: list[Cache]  # of several layers the first of each corpus
    train_rows: Rows  # joined rows over ``caches``
    held_out: Utterances
    layers: LayeredCaches | None = None  # the corpora of ``caches`` with all their layers

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {
            "feature id": self.caches[0].feature_id,
            "manifest ids": [cache.manifest_id for cache in self.caches],
            **({} if self.layers is None else self.layers.identity()),
        }


def open_data(config: TrainConfig) -> TrainData:
    """Open the caches of a run and divide their rows.

    Raises:
        UserError: a cache is absent or ambiguous, caches differ in feature spec, or nothing is left to train on or,
            where the run evaluates, to be judged on.
    """
    caches, layers = open_corpora(config.caches, config.extract)
    held = [held_out_mask(cache, config.val) for cache in caches]
    known = np.ones(sum(map(len, caches)), dtype=bool) if layers is None else layers.in_all_layers
    train_rows = np.flatnonzero(~np.concatenate(held) & known)
    if not len(train_rows):
        raise UserError(
            f"no utterance is left to train on in {_names(caches)}: all are held out; lower val.fraction or name "
            "another cache in caches"
        )
    if config.filter is not None:
        train_rows = np.intersect1d(train_rows, select_rows(caches, config.filter), assume_unique=True)
        if not len(train_rows):
            raise UserError(
                f"no utterance of {_names(caches)} that is not held out passes '{config.filter}': widen filter"
            )
    if config.val.caches:
        held_out = open_utterances(config.val.caches, config.extract)
        require_same_layers(held_out, caches, layers)
    else:
        held_out = Utterances(caches, np.flatnonzero(np.concatenate(held) & known), layers)
    if not len(held_out) and config.eval_every != 0:
        raise UserError(
            f"no utterance is held out in {_names(caches)}: set val.fraction=0.1, name a cache in val.caches, or train "
            "without evaluation by eval_every=0"
        )
    return TrainData(caches, train_rows, held_out.subset(config.val.limit), layers)


def require_same_features(found: Cache, wanted: Cache) -> None:
    """UserError with the fields that differ, unless both caches are of one feature spec."""
    if found.feature_id != wanted.feature_id:
        fields = "; ".join(found.spec.differences(wanted.spec))
        raise UserError(
            f"'{found.path}' holds other features than '{wanted.path}' ({fields}): "
            "extract it with the same encoder, layer, window, dtype and codec"
        )


def open_corpora(
    entries: Sequence[str | Sequence[str]], extract: Sequence[str] = ()
) -> tuple[list[Cache], LayeredCaches | None]:
    """The first cache of each corpus, and all their layers where an entry names several.

    Raises:
        UserError: a cache is absent or named twice, or caches differ in what they must share.
    """
    corpora: list[list[Cache]] = []
    for index, entry in enumerate(entries):
        corpora.append([])
        for pattern in _patterns(entry):
            cache = _open_cache(pattern, _extract_hint(len(entries), extract, index))
            if any(same_folder(cache.path, other.path) for caches in corpora for other in caches):
                raise UserError(f"caches names '{cache.path}' twice: its utterances would count double; name it once")
            corpora[-1].append(cache)
    firsts = [caches[0] for caches in corpora]
    for cache in firsts[1:]:
        require_same_features(cache, firsts[0])
    return firsts, LayeredCaches(corpora) if len(corpora[0]) > 1 else None


def open_utterances(entries: Sequence[str | Sequence[str]], extract: Sequence[str] = ()) -> Utterances:
    """All utterances of whole corpora, as :func:`open_corpora` opens them."""
    caches, layers = open_corpora(entries, extract)
    rows = np.arange(sum(map(len, caches))) if layers is None else np.flatnonzero(layers.in_all_layers)
    return Utterances(caches, rows, layers)


def require_same_layers(evaluated: Utterances, caches: Sequence[Cache], layers: LayeredCaches | None) -> None:
    """UserError unless ``judged`` holds the features, layer by layer, of the corpora of ``caches``."""
    ours = [caches[0]] if layers is None else layers.joined[0].caches
    theirs = [evaluated.caches[0]] if evaluated.layers is None else evaluated.layers.joined[0].caches
    for found, wanted in zip(theirs, ours, strict=True):
        require_same_features(found, wanted)


def _open_cache(pattern: str, hint: str) -> Cache:
    path = find_cache(pattern)
    if path is None:
        raise MissingCache(f"there is no complete cache at '{pattern}': {hint}")
    return Cache.open(path)


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


def missing_extractions(config: TrainConfig) -> list[str]:
    """The extraction configs to run because a cache they make is absent; empty when all caches stand.

    ``extract`` pairs with ``caches`` where both are equally long; otherwise any absent cache needs all of ``extract``.

    Raises:
        UserError: a cache is absent and ``extract`` names nothing that makes it.
    """
    paired = len(config.extract) == len(config.caches)
    files: list[str] = []
    for index, entry in enumerate([*config.caches, *config.val.caches]):
        absent = [pattern for pattern in _patterns(entry) if find_cache(pattern) is None]
        if not absent:
            continue
        if not config.extract:
            raise MissingCache(
                f"there is no complete cache at '{absent[0]}': {_extract_hint(len(config.caches), (), index)}"
            )
        if entry in config.caches and paired:
            files.append(config.extract[config.caches.index(entry)])
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


def same_folder(one: str | Path, other: str | Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _names(caches: Sequence[Cache]) -> str:
    return ", ".join(f"'{cache.location}'" for cache in caches)


def _patterns(entry: str | Sequence[str]) -> list[str]:
    """The caches of one corpus: one, or one a layer."""
    return [entry] if isinstance(entry, str) else list(entry)


def _extract_hint(entries: int, extract: Sequence[str], index: int) -> str:
    if not extract:
        return "make it with `make extract CONFIG=configs/extract/….yaml`, or correct the path in caches"
    files = [extract[index]] if len(extract) == entries else extract
    return " and ".join(f"`make extract CONFIG={file}`" for file in files) + " makes it"
