"""Which generation and which labels of its caches a run reads, so that it is resumed and evaluated on the same rows.

A cache grows, and its labels are corrected. ``caches.json`` of a run records what the run read (:func:`cache_record`);
:func:`pins` reads it, and :func:`growth_note` says that there is something newer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.format.layout import Layout
from shards.labels.remote import fetch_label_index
from shards.labels.store import SOURCE, read_index
from shards.read.cache import Cache, read_cache_info
from shards.read.features import parse_info
from shards.read.labels import is_label_file
from shards.remote.client import is_url


@dataclass(frozen=True)
class Pin:
    """What a run read of one corpus.

    Attributes:
        generations: of the cache of each layer.
        manifest_id: of the first layer.
        labels: id of the label set.
    """

    generations: tuple[int, ...]
    manifest_id: str
    labels: str


def cache_record(cache: Cache, layers: Sequence[Cache] = ()) -> dict[str, Any]:
    """Return the entry of ``caches.json`` for the first cache of a corpus; ``layers`` are all its caches."""
    return {
        "path": os.path.abspath(cache.path) if cache.mirror is None else cache.location,
        "manifest_id": cache.manifest_id,
        "generation": cache.generation,
        "labels": {"name": cache.labels.name, "id": cache.labels.id},
        "utterances": len(cache),
        **({} if cache.variants is None else {"variants": int(cache.variants.counts.sum())}),
        **({"layer_generations": [layer.generation for layer in layers]} if layers else {}),
    }


def pins(records: Sequence[Mapping[str, Any]]) -> list[Pin]:
    """Return the pins of the entries of ``caches.json``."""
    return [
        Pin(
            tuple(each.get("layer_generations") or [each["generation"]]), each["manifest_id"], str(each["labels"]["id"])
        )
        for each in records
    ]


def open_pinned(path: str, labels: str | None, pin: Pin, max_label_problems: float) -> Cache:
    """Open the cache at ``path`` with the generation and the labels of ``pin``; a file ``labels`` is read again.

    Raises:
        UserError: see :meth:`shards.read.cache.Cache.open`; or features or labels differ from those of the run.
    """
    reference = labels if labels is not None and is_label_file(labels) else pin.labels
    if not is_url(path):  # before the labels of another cache are searched for those of this one
        layout = Layout(Path(path))
        generations = parse_info(read_cache_info(layout), layout.cache).generations[pin.generations[0] :]
        _require_manifest(path, generations[0].manifest_id if generations else "none", pin)
    generation = pin.generations[0]
    cache = Cache.open(path, reference, generation=generation, max_label_problems=max_label_problems)
    _require_manifest(path, cache.manifest_id, pin)
    if cache.labels.id != pin.labels:
        raise UserError(
            f"the labels '{reference}' have changed since the run was trained (id {cache.labels.id[:16]}, expected "
            f"{pin.labels[:16]}): restore the file, or train a new run"
        )
    return cache


def _require_manifest(path: str, found: str, pin: Pin) -> None:
    if found != pin.manifest_id:
        raise UserError(
            f"the cache '{path}' has changed since the run was trained (manifest id {found[:16]}, expected "
            f"{pin.manifest_id[:16]}): restore it, or train a new run"
        )


def growth_note(cache: Cache, labels: str | None) -> str | None:
    """Return a note if there are newer features or labels than those of ``cache``, which a run opened by its pin.

    Args:
        cache: the first cache of a corpus.
        labels: the labels that the configuration names.
    """
    grown = cache.generation < len(cache.info.generations) - 1
    relabelled = False
    if labels is None or not is_label_file(labels):
        index = read_index(cache.path) if cache.mirror is None else fetch_label_index(cache.mirror.remote)[1]
        newest = index.current(labels or SOURCE)
        relabelled = newest is not None and newest.id != cache.labels.id
    if not grown and not relabelled:
        return None
    seen = "something else"
    if cache.mirror is None:
        with suppress(UserError):
            seen = f"{len(Cache.open(cache.path, labels, max_label_problems=float('inf'))):,}"
    return (
        f"'{cache.location}' has {'grown' if grown else 'newer labels'}: this run keeps generation {cache.generation} "
        f"({len(cache):,} utterances) and labels {cache.labels.name}-{cache.labels.id[:8]}; a new run would see {seen}"
    )
