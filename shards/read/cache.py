"""A complete cache with one of its label sets: the utterances that a reader sees.

:class:`Cache` takes a cache folder (one with ``CACHE.json``) or its URL (``shards/remote/mirror.py``), and a label set.
Its *items* are the rows of the label set that have features, ordered as the features are stored. Several rows of a
label set may share the features of one recording, such as two tasks. An utterance may have variants, rows whose audio
was changed: they have its labels, and are items of their own only if that is asked for.

```
CACHE.json -> generations -> feature rows (shards/read/features.py)
labels/LABELS.json, or any file -> label set (shards/labels) --join by key--> items
```

Methods are thread-safe.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from shards.errors import UserError
from shards.format.codec import Array, decode
from shards.format.layout import Layout
from shards.format.records import CacheInfo, RecordError, unseal
from shards.format.spec import FeatureSpec
from shards.labels.join import join
from shards.labels.table import LabelSet
from shards.read.features import FeatureRows, parse_info
from shards.read.index import corrupt_cache
from shards.read.labels import Joined, open_labels
from shards.read.strings import Strings
from shards.remote.client import is_url
from shards.remote.mirror import Mirror

LABEL_COLUMNS = ("text", "speaker", "split", "language", "prompt", "task")  # every manifest has them; "" if unknown


class StoredUtterance(NamedTuple):
    """One item as stored: read-only views of the shard, and the key and text of the utterance."""

    payload: Array  # [frames, channels] of the codec's dtype
    scale: Array | None  # float32 [channels] if the codec is scaled
    key: str
    text: str


class ItemVariants(NamedTuple):
    """The variants of items: item i has ``counts[i]`` of them, from ``starts[i]`` on in ``rows`` and ``numbers``.

    Attributes:
        starts, counts: int64 [items].
        rows, numbers: int64, feature row and number of each variant, see :class:`shards.read.features.Variants`.
    """

    starts: NDArray[np.int64]
    counts: NDArray[np.int64]
    rows: NDArray[np.int64]
    numbers: NDArray[np.int64]

    def count_below(self, number: int) -> NDArray[np.int64]:
        """Return how many variants of each item have a number below ``number``, int64 [items]."""
        sums = np.concatenate([[0], np.cumsum(self.numbers < number)])
        found: NDArray[np.int64] = sums[self.starts + self.counts] - sums[self.starts]
        return found

    def of(self, items: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return all variants of ``items``: the position of each one's item in ``items``, and its own in ``rows``."""
        counts = self.counts[items]
        owners = np.repeat(np.arange(len(items)), counts)
        places = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
        return owners, self.starts[items][owners] + places


class Cache:
    """A complete cache and a label set. Create it with :meth:`open`.

    Attributes:
        path: the cache folder; for a remote cache, the local folder that mirrors it.
        location: the cache folder, or the URL of a remote cache.
        mirror: fetches the shards of a remote cache; ``None`` for a local cache.
        spec: the feature spec; ``feature_id`` is its hash.
        info: content of ``CACHE.json``, with the generations after :attr:`generation`.
        generation: the last generation that is read.
        manifest_id: 64 hex digits that identify the features up to that generation.
        labels: the label set; ``labels.id`` identifies it.
        frames: int32 [items], number of frames of each item.
        item_shards: int32 [items], the shard of each item, ascending.
        bounds: int64 [non-empty shards + 1]; non-empty shard s holds the items ``bounds[s]:bounds[s + 1]``.
        feature_rows: int64 [items], the row of each item in the features.
        num_unlabeled: number of utterances with features, but without a row in the label set.
        num_missing: number of rows in the label set without features.
        variants: the variants of each item; None if there are none, or they are items of their own.
        variants_are_items: whether they are.
    """

    def __init__(
        self,
        info: CacheInfo,
        features: FeatureRows,
        labels: LabelSet,
        joined: Joined | None = None,
        as_items: bool = False,
    ) -> None:
        self.path, self.info, self.mirror = features.layout.path, info, features.mirror
        self.location = features.location
        self.features_table, self.labels = features, labels
        self.spec: FeatureSpec = features.spec
        self.feature_id: str = self.spec.feature_id
        self.generation = len(features.generations) - 1
        self.manifest_id: str = features.generations[-1].manifest_id
        current, keys = features.current()
        label_rows, found = joined or join(labels.table, keys)
        self._label_rows: NDArray[np.int64] = label_rows
        self.feature_rows: NDArray[np.int64] = found if current is None else current[found]
        self.variants_are_items = as_items
        self.variants: ItemVariants | None = None
        if (variants := features.variants(keys)) is not None:
            self.variants = ItemVariants(
                variants.starts[found], np.diff(variants.starts)[found], variants.rows, variants.numbers
            )
        if as_items and self.variants is not None:
            self._add_variants(self.variants)
        self.num_unlabeled = len(keys) - int(np.count_nonzero(np.diff(found, prepend=-1)))  # it is ascending
        self.num_missing = len(labels.table) - len(label_rows)
        self.frames: NDArray[np.int32] = features.frames[self.feature_rows]
        self.item_shards: NDArray[np.int32] = features.shards[self.feature_rows]
        edges = np.flatnonzero(np.diff(self.item_shards)) + 1
        self.bounds: NDArray[np.int64] = np.r_[0, edges, [len(self)] if len(self) else []].astype(np.int64)
        self._strings: dict[str, Strings | None] = {}  # by column; None if the label set does not have it

    @classmethod
    def open(
        cls,
        path: str | Path | Mirror,
        labels: str | Path | LabelSet | None = None,
        *,
        generation: int | None = None,
        verify: bool = True,
        max_label_problems: float = 0.01,
        variants: bool = False,
    ) -> Cache:
        """Open the cache at ``path``, a folder or a URL.

        Args:
            path: pass a :class:`~shards.remote.mirror.Mirror` instead of a URL to set the local folder and its size.
            labels: name or id of a label set of the cache, or the path or URL of a file of labels (CSV, TSV, JSONL or
                parquet), or a label set. ``None``: the newest labels of the source.
            generation: the last generation to read; ``None`` is the newest.
            verify: whether to verify the checksum of each row when it is read first.
            max_label_problems: for a file: how many rows may have no features, no text or the key, task and prompt of
                another row; below 1 a fraction of the rows.
            variants: whether the variants of utterances (``KEY~1``, made by ``augment`` of an extraction) are items of
                their own, with the labels of their utterance.

        Raises:
            UserError: there is no complete cache, it has another format, it is corrupt, a remote cache cannot be
                reached, or there are no such labels.
        """
        info, features = open_features(path, generation=generation, verify=verify)
        return cls(info, features, *open_labels(labels, features, max_label_problems), as_items=variants)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process creates its own mappings.
        arguments = self.labels, self.generation, self.features_table.verify, self.variants_are_items
        return _reopen, (self.mirror or self.path, *arguments)

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def provenance(self) -> dict[str, Any]:
        """How the newest generation that is read was made; free form."""
        return self.info.generations[self.generation].provenance

    def detach(self) -> None:
        """Drop mappings, cached strings and locks. Call it in a process that was forked while threads were reading."""
        self.features_table.detach()

    @cached_property
    def manifest(self) -> pa.Table:
        """All items: the columns of ``MANIFEST_SCHEMA``, then those of the label set, made on first use.

        ``text``, ``speaker``, ``split``, ``language``, ``prompt`` and ``task`` are always present.
        """
        table = self.features_table.table().take(pa.array(self.feature_rows))
        for name in dict.fromkeys([*LABEL_COLUMNS, *self.labels.table.column_names]):
            if name != "key":
                table = table.append_column(name, self.column(name))
        return table

    def column(self, name: str) -> pa.ChunkedArray:
        """Return one column of :attr:`manifest` [items] without making the others."""
        if name != "key" and name in self.labels.table.column_names:
            return self.labels.table[name].take(pa.array(self._label_rows))
        if name in LABEL_COLUMNS:
            return pa.chunked_array([pa.repeat(pa.scalar("", pa.string()), len(self))])
        return self.features_table.column(name).take(pa.array(self.feature_rows))

    def row(self, index: int) -> dict[str, Any]:
        """Return the manifest row of item ``index``."""
        row: dict[str, Any] = self.manifest.slice(self._place(index), 1).to_pylist()[0]
        return row

    def strings(self, column: str, rows: ArrayLike) -> list[str]:
        """Return ``key`` or a text column of the label set of the items ``rows``, without making the manifest."""
        items = np.asarray(rows, dtype=np.int64)
        if column == "key":
            return self.features_table.keys(self.feature_rows[items])
        values = self._column(column)
        return [""] * len(items) if values is None else values.take(self._label_rows[items])

    def label_rows(self, rows: ArrayLike) -> pa.Table:
        """Return the rows of the label set of the items ``rows``, with all its columns."""
        return self.labels.table.take(pa.array(self._label_rows[np.asarray(rows, dtype=np.int64)]))

    def has_column(self, column: str) -> bool:
        """Return whether the label set has a column of this name."""
        return column in self.labels.table.column_names

    def features(self, index: int) -> Array:
        """Return item ``index`` [frames, channels]: codec f16 as a read-only float16 view, others as float32.

        Codes, codec u16, are returned as int32 [frames, codebooks].

        Raises:
            UserError: the shard is missing or truncated, or the checksum of the row does not match.
        """
        stored = self._stored(index)
        return stored.payload if self.spec.codec == "f16" else decode(self.spec.codec, stored.payload, stored.scale)

    def read_into(self, index: int, out: Array, variant: int = 0) -> None:
        """Copy or decode item ``index``, or the variant of this number, into ``out`` [frames, channels].

        ``out`` is float16 or float32; for codes int32 or int64.

        Raises:
            ValueError: ``out`` has another shape, or is for floats where the cache holds codes.
            KeyError: there is no such variant.
            UserError: as :meth:`features`.
        """
        stored = self._stored(index, variant)
        if out.shape != stored.payload.shape:
            raise ValueError(f"out has shape {out.shape}, but utterance {index} has shape {stored.payload.shape}")
        decode(self.spec.codec, stored.payload, stored.scale, out)

    def version_rows(self, rows: NDArray[np.int64], versions: NDArray[np.int64] | None) -> NDArray[np.int64]:
        """Return the feature rows of items.

        Args:
            rows: int64 [n], the items.
            versions: int64 [n]: 0 is the utterance itself, v its v-th variant that is there; None: all 0.
        """
        found = self.feature_rows[rows]
        if versions is not None and self.variants is not None and versions.any():
            changed = versions > 0
            found[changed] = self.variants.rows[self.variants.starts[rows[changed]] + versions[changed] - 1]
        return found

    def num_versions(self, most: int | None = None) -> NDArray[np.int64]:
        """Return the versions of each item, int64 [items]: itself, and its variants with numbers below ``most``."""
        if self.variants is None:
            return np.ones(len(self), dtype=np.int64)
        return 1 + (self.variants.counts if most is None else self.variants.count_below(most))

    def max_frames(self, most: int | None = None) -> NDArray[np.int32]:
        """Return the frames of the longest version of each item, int32 [items]; ``most`` as :meth:`num_versions`."""
        longest, counts = self.frames.copy(), self.num_versions(most)
        for version in range(1, int(counts.max(initial=1))):
            rows = np.flatnonzero(counts > version)
            frames = self.features_table.frames[self.version_rows(rows, np.full(len(rows), version))]
            longest[rows] = np.maximum(longest[rows], frames)
        return longest

    def read_stored(self, rows: NDArray[np.int64], versions: NDArray[np.int64] | None = None) -> list[StoredUtterance]:
        """Return the items at ``rows`` (int64, 0 … len - 1) as stored. Performance-critical: batches wait for it.

        Args:
            versions: which version of each, see :meth:`version_rows`.

        Raises:
            UserError: as :meth:`features`.
        """
        texts = self.strings("text", rows)
        found = self.features_table.read(self.version_rows(rows, versions))
        return [StoredUtterance(*stored, text) for stored, text in zip(found, texts, strict=True)]

    def shard_of(self, index: int) -> int:
        """Return the number of the shard that holds item ``index``."""
        return int(self.item_shards[index])

    def will_need(self, rows: NDArray[np.int64], versions: NDArray[np.int64] | None = None) -> None:
        """Ask the kernel to read the pages of ``rows`` from disk in the background."""
        self.features_table.will_need(self.version_rows(rows, versions))

    def _add_variants(self, variants: ItemVariants) -> None:
        """Make each variant an item, with the row of the label set of its utterance."""
        items, places = variants.of(np.arange(len(self.feature_rows)))
        rows = np.concatenate([self.feature_rows, variants.rows[places]])
        order = np.argsort(rows, kind="stable")
        self.feature_rows = rows[order]
        self._label_rows = np.concatenate([self._label_rows, self._label_rows[items]])[order]
        self.variants = None

    def _column(self, name: str) -> Strings | None:
        if name not in self._strings:
            self._strings[name] = Strings(self.labels.table[name]) if self.has_column(name) else None
        return self._strings[name]

    def _place(self, index: int) -> int:
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"utterance {index} is out of range for a cache of {len(self)} utterances")
        return place

    def _stored(self, index: int, variant: int = 0) -> StoredUtterance:
        rows, version = np.array([self._place(index)]), 0
        if variant:
            numbers = [] if self.variants is None else self.variants.numbers[self.variants.of(rows)[1]].tolist()
            if variant not in numbers:
                raise KeyError(f"utterance {index} has no variant {variant}")
            version = 1 + numbers.index(variant)
        return self.read_stored(rows, np.array([version]))[0]


def _reopen(path: Path | Mirror, labels: LabelSet, generation: int, verify: bool, variants: bool) -> Cache:
    return Cache.open(path, labels, generation=generation, verify=verify, variants=variants)


def open_features(
    path: str | Path | Mirror, *, generation: int | None = None, verify: bool = True
) -> tuple[CacheInfo, FeatureRows]:
    """Open the features of the cache at ``path`` without labels; arguments and errors as :meth:`Cache.open`."""
    if not isinstance(path, Mirror) and is_url(path):
        path = Mirror.open(str(path))
    mirror, layout = (path, path.layout) if isinstance(path, Mirror) else (None, Layout(Path(path)))
    info = parse_info(read_cache_info(layout), layout.cache)
    last = len(info.generations) - 1 if generation is None else generation
    if not 0 <= last < len(info.generations):
        where = layout.path if mirror is None else mirror.url
        raise UserError(f"the cache '{where}' has no generation {last}: it has 0 to {len(info.generations) - 1}")
    if mirror is not None:
        mirror.fetch_tables(last)
    spec = FeatureSpec.parse(info.spec, f"'{layout.cache}'")
    return info, FeatureRows(layout, spec, info.generations[: last + 1], verify, mirror)


def read_cache_info(layout: Layout) -> dict[str, Any]:
    """Return the content of ``CACHE.json``; UserError if there is no complete cache or it is corrupt."""
    if not layout.path.is_dir():
        raise UserError(f"cache '{layout.path}' does not exist: run `make extract`, or correct the path")
    try:
        return unseal(layout.cache)
    except FileNotFoundError:
        if layout.plan(0).exists():
            raise UserError(
                f"the cache '{layout.path}' is not complete (no CACHE.json): rerun the same extraction to finish it"
            ) from None
        raise UserError(f"'{layout.path}' is not a cache: it has no CACHE.json; run `make extract`") from None
    except (OSError, RecordError) as error:
        raise corrupt_cache(layout.path, str(error)) from None
