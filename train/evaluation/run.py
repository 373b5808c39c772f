"""The evaluation of a finished run, on what it held out or on another corpus of the same features.

In: a run, and optionally the cache that ``--cache`` names (of a run on several layers one for each layer, separated by
commas, in the run's order). Out: the keys of ``summary.json`` with new figures, and the files that a report shows.

    python -m train evaluate runs/demo --cache cache/other/… --json other.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import UserError
from shards.files import make_folder, translate_os_errors
from shards.format.spec import FeatureSpec
from train.config.train import TrainConfig
from train.data.caches import (
    MissingCache,
    Utterances,
    find_cache,
    held_out_mask,
    open_data,
    open_utterances,
    same_folder,
)
from train.distributed.device import choose_device, choose_dtype
from train.distributed.group import ProcessGroup
from train.evaluation.evaluate import EvalConfig, Evaluation, evaluate
from train.model.build import load_model
from train.runs import folder as runs

EVALUATION_KEYS = ("val.limit", "dtype")  # beside the free ones, what may differ between training and evaluation


def evaluate_run(
    run: Path, config: TrainConfig, cache: str | None = None, group: ProcessGroup | None = None
) -> dict[str, Any]:
    """Judge a finished run on what it held out, or on ``cache``; the keys of its ``summary.json`` with new figures.

    Of a cache that the run trained on only the held-out rows are used. What tells about the training (``steps``,
    ``seconds`` …) stays as it was. The counts of the utterances go to the run's folder with the figures, or for
    another ``cache`` to ``judged/<manifest id>/`` below it, and the report shows them.

    Every process of ``group`` calls this and does its part of the batches; rank 0 writes.

    Raises:
        UserError: the run is not finished, ``cache`` holds other features, or nothing was held out.
    """
    group = group or ProcessGroup()
    with group.raise_on_all_ranks():
        utterances = _select_utterances(run, config, cache)
        device = choose_device(group.local_device(config.device))
        model = load_model(run, config, device, choose_dtype(config.dtype, device))
    manifests = [each.manifest_id for each in utterances.caches]
    group.assert_same({"choice of utterances": [manifests, utterances.rows.tolist()]})
    result = evaluate(model, utterances, EvalConfig.final(config), group=group)
    caches = [str(each.path) for each in utterances.caches]
    with group.raise_on_all_ranks():
        if group.is_main_process:
            _write_evaluation(run if cache is None else run / runs.OTHER_EVALUATIONS / manifests[0][:8], result, caches)
    return {**runs.read_json(run / "summary.json"), **result.metrics(), "judged_on": caches}


def _select_utterances(run: Path, config: TrainConfig, cache: str | None) -> Utterances:
    """What ``run`` held out, or what it may be judged on in ``cache``."""
    if not (run / "summary.json").is_file():
        raise UserError(f"'{run}' is not finished: go on with python -m train fit --resume {run}")
    changed = [key for key in runs.run_config(run).differences(config) if not key.startswith(EVALUATION_KEYS)]
    if changed:
        raise UserError(f"'{run}' was trained with other settings ({'; '.join(changed)}): leave these keys alone")
    cache_info = runs.read_cache_info(run)
    if cache is None:
        utterances = open_data(config).held_out
        if not len(utterances):
            raise UserError(f"'{run}' held nothing out: name a cache to judge it on with --cache")
    else:
        utterances = evaluation_utterances(cache, config, cache_info)
    return utterances


def _write_evaluation(folder: Path, result: Evaluation, caches: list[str]) -> None:
    """The files of an evaluation, in ``folder``."""
    with translate_os_errors("writing the evaluation", folder):
        make_folder(folder)
    result.write(folder)
    runs.write_json(folder / runs.EVALUATION_FILE, {**result.record(), "judged_on": caches})


def evaluation_utterances(cache_names: str, config: TrainConfig, cache_info: dict[str, Any]) -> Utterances:
    """The utterances of the cache ``word`` that a run may be judged on; ``about`` is its ``caches.json``.

    Of a cache that the run trained on only its held-out rows; one that it named in ``val.caches`` whole.

    Raises:
        UserError: there is no such cache, it holds other features, or the run trained on all of it.
    """
    names = cache_names.split(",") if config.layers > 1 else [cache_names]
    if len(names) != config.layers:
        raise UserError(
            f"the run hears {config.layers} layers and --cache names {len(names)}: name one cache a layer, with commas "
            "between, in the order of the run's caches"
        )
    try:
        found = open_utterances([names if config.layers > 1 else cache_names])
    except MissingCache as absent:
        missing = str(absent).partition(": ")[0]
        raise UserError(f"{missing}: correct --cache, or make it with `make extract`") from None
    _require_features(found, cache_info)
    cache, rows = found.caches[0], found.rows
    if cache.manifest_id in [each["manifest_id"] for each in cache_info["caches"]]:
        named = [find_cache(entry if isinstance(entry, str) else entry[0]) for entry in config.val.caches]
        if not any(path is not None and same_folder(path, cache.path) for path in named):
            rows = np.intersect1d(rows, np.flatnonzero(held_out_mask(cache, config.val)))
    if not len(rows):
        raise UserError(f"the run trained on every utterance of '{cache.path}': name another cache with --cache")
    return Utterances(found.caches, rows, found.layers).subset(config.val.limit)


def _require_features(found: Utterances, cache_info: dict[str, Any]) -> None:
    caches = [found.caches[0]] if found.layers is None else found.layers.joined[0].caches
    specs = (
        [cache_info["spec"]]
        if found.layers is None
        else [FeatureSpec.parse(s, "caches.json") for s in cache_info["layers"]]
    )
    for cache, spec in zip(caches, specs, strict=True):
        if cache.feature_id != spec.feature_id:
            raise UserError(
                f"'{cache.path}' holds other features than the run was trained on "
                f"({'; '.join(cache.spec.differences(spec))}): extract the cache with the run's encoder settings"
            )
