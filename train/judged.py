"""What a finished run may be judged on, beside what it held out: any other corpus of the same features.

In: the cache that ``--cache`` names (of a run on several layers one a layer, with commas between, in the run's order)
and ``caches.json`` of the run. Out: the :class:`~train.data.Utterances` of it that the run was not trained on.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shards.errors import UserError
from shards.spec import FeatureSpec
from train.config import TrainConfig
from train.data import AbsentCache, Utterances, find_cache, held_out_mask, open_judged, same_folder


def judged_on(word: str, config: TrainConfig, about: dict[str, Any]) -> Utterances:
    """The utterances of the cache ``word`` that a run may be judged on; ``about`` is its ``caches.json``.

    Of a cache that the run trained on only its held-out rows; one that it named in ``val.caches`` whole.

    Raises:
        UserError: there is no such cache, it holds other features, or the run trained on all of it.
    """
    names = word.split(",") if config.layers > 1 else [word]
    if len(names) != config.layers:
        raise UserError(
            f"the run hears {config.layers} layers and --cache names {len(names)}: name one cache a layer, with commas "
            "between, in the order of the run's caches"
        )
    try:
        found = open_judged([names if config.layers > 1 else word])
    except AbsentCache as absent:
        told = str(absent).partition(": ")[0]
        raise UserError(f"{told}: correct --cache, or make it with `make extract`") from None
    _require_features(found, about)
    cache, rows = found.caches[0], found.rows
    if cache.manifest_id in [each["manifest_id"] for each in about["caches"]]:
        named = [find_cache(entry if isinstance(entry, str) else entry[0]) for entry in config.val.caches]
        if not any(path is not None and same_folder(path, cache.path) for path in named):
            rows = np.intersect1d(rows, np.flatnonzero(held_out_mask(cache, config.val)))
    if not len(rows):
        raise UserError(f"the run trained on every utterance of '{cache.path}': name another cache with --cache")
    return Utterances(found.caches, rows, found.layers).first(config.val.limit)


def _require_features(found: Utterances, about: dict[str, Any]) -> None:
    caches = [found.caches[0]] if found.layers is None else found.layers.joined[0].caches
    specs = [about["spec"]] if found.layers is None else [FeatureSpec.parse(s, "caches.json") for s in about["layers"]]
    for cache, spec in zip(caches, specs, strict=True):
        if cache.feature_id != spec.feature_id:
            raise UserError(
                f"'{cache.path}' holds other features than the run was trained on "
                f"({'; '.join(cache.spec.differences(spec))}): extract the cache with the run's encoder settings"
            )
