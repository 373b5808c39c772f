"""What the probes read of caches: the utterances that all have, their label columns, one vector each, and folds."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shards.errors import UserError
from shards.read.cache import Cache
from shards.stream.join import JoinedCaches, join
from train.data.caches import find_cache
from train.data.layers import require_floats
from train.probes.linear import FOLDS, Floats, Ints

MIN_PER_CLASS = FOLDS  # rarer classes are left out: a fold could not hold one of each
MIN_CLASSES, MIN_ROWS, MIN_VALUES = 2, 20, 10
NOT_PROBED = ("key", "id", "text", "split", "prompt", "audio", "source")  # unless they are named


@dataclass(frozen=True)
class Layers:
    """The caches of the layers, and ``rows`` [utterances, caches]: one row of each cache per utterance."""

    caches: tuple[Cache, ...]
    rows: npt.NDArray[np.int64]
    notes: tuple[str, ...]

    def column(self, name: str) -> list[str]:
        """Return a column as text, one entry per utterance; "" if unknown."""
        values = self.caches[0].column(name).take(self.rows[:, 0]).to_pylist()
        return ["" if value is None or value != value else str(value).strip() for value in values]

    def features(self, layer: int, utterance: int) -> npt.NDArray[np.floating]:
        """Return the features of an utterance in cache ``layer``: [frames, channels]."""
        return self.caches[layer].features(int(self.rows[utterance, layer]))

    def vectors(self, layer: int) -> Tensor:
        """Return the mean and the standard deviation over time of each utterance: float32 [rows, 2 · channels]."""
        found = []
        for utterance in range(len(self.rows)):
            x = np.asarray(self.features(layer, utterance), dtype=np.float32)
            found.append(np.concatenate([x.mean(axis=0), x.std(axis=0)]))
        return torch.from_numpy(np.stack(found))


@dataclass(frozen=True)
class Column:
    """A label column of the utterances ``rows``: their classes, as numbers of ``names``, or values without names."""

    name: str
    rows: Ints
    values: Floats
    names: tuple[str, ...] = ()
    left_out: int = 0

    @property
    def classes(self) -> Ints:
        return self.values.astype(np.int64)


def open_layers(patterns: Sequence[str], labels: str | None, limit: int, seed: int) -> Layers:
    """Open the caches and join them by key; at most ``limit`` utterances, those with the lowest hashes of their keys.

    Raises:
        UserError: a cache is missing or holds codes, or they cannot be joined (``shards/stream/join.py``).
    """
    caches: list[Cache] = []
    for pattern in patterns:
        path = find_cache(pattern)
        if path is None:
            raise UserError(f"there is no complete cache at '{pattern}': correct the path, or extract it")
        caches.append(Cache.open(path, caches[0].labels if caches else labels))
        require_floats(caches[-1], "probed")
    joined: JoinedCaches = join(caches)
    keys = caches[0].strings("key", joined.rows[:, 0])
    first = sorted({key: row for row, key in reversed(list(enumerate(keys)))}.values())
    notes = [
        f"{missing:,} utterances of '{cache.location}' are left out: another cache does not have them"
        for cache in caches
        if (missing := len(set(cache.column("key").to_pylist())) - len(first))
    ]
    if len(first) < len(keys):
        notes.append(f"{len(keys) - len(first):,} further rows of the same utterances are left out: the first counts")
    if len(first) > limit:
        notes.append(f"{limit:,} of {len(first):,} utterances are probed: raise --limit for more")
        first = sorted(sorted(first, key=lambda row: _hash(seed, keys[row]))[:limit])
    return Layers(tuple(caches), joined.rows[first], tuple(notes))


def choose_columns(layers: Layers, names: Sequence[str] | None) -> tuple[list[Column], list[str]]:
    """Return the columns to probe and notes about those that cannot be; ``None`` chooses all of the label set.

    Raises:
        UserError: a column that was named does not exist, or has too few rows or classes.
    """
    cache, chosen, notes = layers.caches[0], [], []
    known = cache.labels.table.column_names
    for name in names or [name for name in known if name not in NOT_PROBED]:
        if name not in known and name not in cache.features_table.table().column_names:
            raise UserError(f"--columns: the labels have no column '{name}': they have {', '.join(known)}")
        column = read_column(name, layers.column(name))
        if isinstance(column, Column):
            chosen.append(column)
        elif names:
            raise UserError(f"--columns: {column}: name another column, or give labels with more of it")
        else:
            notes.append(f"{column}: it is not probed")
    return chosen, notes


def read_column(name: str, texts: Sequence[str]) -> Column | str:
    """Return the column, of numbers if all are and more than a few differ, or one phrase why it cannot be probed."""
    rows = [row for row, text in enumerate(texts) if text]
    numbers = [_number(texts[row]) for row in rows]
    if all(number is not None for number in numbers) and len(set(numbers)) > MIN_VALUES and name != "speaker":
        if len(rows) < MIN_ROWS:
            return f"'{name}' is known of {len(rows)} utterances, fewer than {MIN_ROWS}"
        return Column(name, np.array(rows), np.array(numbers, dtype=np.float64), (), len(texts) - len(rows))
    counts = Counter(texts[row] for row in rows)
    names = tuple(sorted(each for each, count in counts.items() if count >= MIN_PER_CLASS))
    rows = [row for row in rows if texts[row] in names]
    if len(names) < MIN_CLASSES or len(rows) < MIN_ROWS:
        return (
            f"'{name}' has {len(counts)} different values, of which {len(names)} have at least {MIN_PER_CLASS} "
            f"utterances ({len(rows)} in all; {MIN_CLASSES} values and {MIN_ROWS} utterances are needed)"
        )
    values = np.array([names.index(texts[row]) for row in rows], dtype=np.float64)
    return Column(name, np.array(rows), values, names, len(texts) - len(rows))


def make_folds(groups: Sequence[str], seed: int) -> Ints:
    """Return the fold of each row: whole groups, by their hashes, each into the fold with the fewest rows."""
    sizes = Counter(groups)
    totals, fold = [0] * FOLDS, {}
    for group in sorted(sizes, key=lambda each: _hash(seed, each)):
        fold[group] = int(np.argmin(totals))
        totals[fold[group]] += sizes[group]
    return np.array([fold[group] for group in groups], dtype=np.int64)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _hash(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{text}".encode()).digest()
