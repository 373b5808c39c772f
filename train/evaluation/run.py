"""Evaluation of a finished run, on its held-out utterances or on another corpus with the same features.

Takes a run and optionally the cache named by ``--cache`` (for a run on several layers one cache per layer, separated by
commas, in the order of the run's caches). Returns the keys of ``summary.json`` with new metrics, and writes the files
that a report shows.

    python -m train evaluate runs/demo --cache cache/other/… --json other.json
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.errors import UserError
from shards.files import make_folder, translate_os_errors
from shards.format.spec import FeatureSpec
from shards.read.cache import Cache
from train.config.train import TrainConfig
from train.data.caches import (
    MissingCache,
    Utterances,
    cache_notes,
    find_cache,
    held_out_mask,
    open_corpora,
    open_data,
    open_utterances,
    print_notes,
    require_prompts,
    same_folder,
    usable_rows,
)
from train.data.layers import LayeredCaches
from train.data.pins import pins
from train.distributed.device import choose_device, choose_dtype, flushed_denormals
from train.distributed.group import ProcessGroup
from train.evaluation.evaluate import EvalConfig, Evaluation, evaluate
from train.model.build import load_model
from train.runs import folder as runs

EVALUATION_KEYS = (
    "val.limit",
    "dtype",
    "eval.",
    "projector.temperature",
    "projector.read_spelling",
)  # may differ from training, like CHANGEABLE_KEYS


@flushed_denormals()
def evaluate_run(
    run: Path,
    config: TrainConfig,
    cache: str | None = None,
    group: ProcessGroup | None = None,
    labels: str | None = None,
) -> dict[str, Any]:
    """Evaluate a finished run on its held-out utterances, or on ``cache``.

    Of a cache that the run trained on, only the held-out rows are used. Metrics and counts per utterance are written to
    the run folder, or for ``cache`` to ``judged/<manifest id>/`` in it; the report shows them.

    Every process of ``group`` must call this. Each evaluates its share of the batches; rank 0 writes.

    Returns:
        The keys of ``summary.json`` with new metrics; those about the training (``steps``, ``seconds``, …) are
        unchanged.

    Raises:
        UserError: the run is not finished or has no held-out utterances, ``config`` has other settings than the
            training, or ``cache`` does not exist or holds other features.
    """
    group = group or ProcessGroup()
    with group.raise_on_all_ranks():
        utterances = _select_utterances(run, config, cache, labels)
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


def _select_utterances(run: Path, config: TrainConfig, cache: str | None, labels: str | None) -> Utterances:
    """Return the held-out utterances of ``run``, or those of ``cache`` that it may be evaluated on."""
    if labels is not None and cache is None:
        raise UserError("--labels belongs to --cache: name the cache that it labels with --cache")
    if not (run / "summary.json").is_file():
        raise UserError(f"'{run}' is not finished: resume it with `python -m train fit --resume {run}`")
    changed = [key for key in runs.saved_config(run).differences(config) if not key.startswith(EVALUATION_KEYS)]
    if changed:
        raise UserError(f"'{run}' was trained with other settings ({'; '.join(changed)}): remove these overrides")
    cache_info = runs.read_cache_info(run)
    if cache is None:
        data = open_data(config, *runs.read_pins(run))
        print_notes(data.notes)
        if not len(data.held_out):
            raise UserError(f"'{run}' has no held-out utterances: name a cache to evaluate it on with --cache")
        return data.held_out
    return evaluation_utterances(cache, config, cache_info, labels)


def _write_evaluation(folder: Path, result: Evaluation, caches: list[str]) -> None:
    """Write the files of an evaluation into ``folder``."""
    with translate_os_errors("writing the evaluation", folder):
        make_folder(folder)
    result.write(folder)
    runs.write_json(folder / runs.EVALUATION_FILE, {**result.record(), "judged_on": caches})


def evaluation_utterances(
    cache_names: str, config: TrainConfig, cache_info: dict[str, Any], labels: str | None = None
) -> Utterances:
    """Return the utterances of a cache that a run may be evaluated on.

    Of a cache that the run trained on, these are the held-out rows of the generation and the labels that it read; of
    any other cache, and of one that the run names in ``val.caches``, all rows with the newest labels of the source.
    With ``labels``, all rows of these labels that belong to the same utterances. ``val.limit`` applies to all.

    Args:
        cache_names: the value of ``--cache``: a cache, or one cache per layer separated by commas.
        config: settings of the run.
        cache_info: ``caches.json`` of the run, as :func:`~train.runs.folder.read_cache_info` returns it.
        labels: the value of ``--labels``: labels of the cache, see :meth:`shards.read.cache.Cache.open`.

    Raises:
        UserError: the cache does not exist, it holds other features, or the run trained on all of it.
    """
    names = cache_names.split(",") if config.layers > 1 else [cache_names]
    if len(names) != config.layers:
        raise UserError(
            f"the run uses {config.layers} layers and --cache names {len(names)}: name one cache per layer, separated "
            "by commas, in the order of the run's caches"
        )
    entries = [names if config.layers > 1 else cache_names]
    limit: dict[str, Any] = {"max_label_problems": config.max_label_problems}
    try:
        caches, layers = open_corpora(entries, labels=[labels], **limit)
    except MissingCache as absent:
        missing = str(absent).partition(": ")[0]
        raise UserError(f"{missing}: correct --cache, or run `make extract`") from None
    _require_features(caches, layers, cache_info)
    cache, index = caches[0], _index_of_training_cache(caches[0], config, cache_info)
    if index is None:
        rows, notes = np.flatnonzero(usable_rows(caches, layers)), cache_notes(caches, [labels], pinned=False)
    else:
        own = config.cache_labels[index]
        pinned = open_utterances(entries, pins=[pins(cache_info["caches"])[index]], labels=[own], **limit)
        usable = np.zeros(len(pinned.caches[0]), dtype=bool)
        usable[pinned.rows] = True
        rows = np.flatnonzero(held_out_mask(pinned.caches[0], config.val, usable))
        notes = cache_notes(pinned.caches, [own], pinned=True)
        if labels is None:
            caches, layers = list(pinned.caches), pinned.layers
        else:  # all labels of the utterances that the run did not train on
            held = pinned.caches[0].column("key").take(pa.array(rows)).unique()
            rows = np.flatnonzero(usable_rows(caches, layers) & pc.is_in(cache.column("key"), held).to_numpy())
    print_notes(notes)
    if not len(rows):
        raise UserError(f"the run trained on every utterance of '{cache.path}': name another cache with --cache")
    require_prompts(config.prompt, caches, rows)
    return Utterances(caches, rows, layers).subset(config.val.limit)


def _index_of_training_cache(cache: Cache, config: TrainConfig, cache_info: dict[str, Any]) -> int | None:
    """Return which of the run's ``caches`` is ``cache``; None if it is another one, or named in ``val.caches``."""
    named = [find_cache(entry if isinstance(entry, str) else entry[0]) for entry in config.val.caches]
    if any(path is not None and same_folder(path, cache.path) for path in named):
        return None
    ids = {generation.manifest_id for generation in cache.info.generations}
    return next((i for i, each in enumerate(cache_info["caches"]) if each["manifest_id"] in ids), None)


def _require_features(firsts: Sequence[Cache], layers: LayeredCaches | None, cache_info: dict[str, Any]) -> None:
    """UserError if a layer has another feature id than the run."""
    caches = firsts[:1] if layers is None else layers.joined[0].caches
    specs = (
        [cache_info["spec"]] if layers is None else [FeatureSpec.parse(s, "caches.json") for s in cache_info["layers"]]
    )
    for cache, spec in zip(caches, specs, strict=True):
        if cache.feature_id != spec.feature_id:
            raise UserError(
                f"'{cache.path}' holds other features than those the run was trained on "
                f"({'; '.join(cache.spec.differences(spec))}): extract the cache with the run's encoder settings"
            )
