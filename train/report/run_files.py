"""The files of a run folder that a report reads.

Only ``caches.json`` is required. An unfinished run, or one of an older version of earshard, lacks some of the others;
the report shows what exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from shards.config.base import flatten
from shards.errors import UserError
from train.config.train import TrainConfig
from train.data.caches import find_cache
from train.evaluation.utterance_table import read_utterances
from train.report.shapes import (
    CacheInfo,
    EmbeddingSpace,
    Evaluation,
    OtherEvaluation,
    Shape,
    Step,
    require,
)
from train.runs.folder import EMBEDDING_SPACE_FILE, EVALUATION_FILE, OTHER_EVALUATIONS, read_json, saved_config
from train.runs.metrics_log import EVALUATIONS, METRICS, read_jsonl

Metrics = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """Files of one run; each is read once, on first access."""

    folder: Path

    @property
    def name(self) -> str:
        """Name of the run: the name of its folder."""
        return self.folder.name

    @cached_property
    def step_metrics(self) -> list[Metrics]:
        """``metrics.jsonl``: one entry per step."""
        return self._lines(METRICS, Step)

    @cached_property
    def evaluations(self) -> list[Metrics]:
        """``evaluations.jsonl``: one entry per evaluation."""
        return self._lines(EVALUATIONS, Evaluation)

    @cached_property
    def summary(self) -> Metrics:
        """``summary.json``; empty while the run is not finished."""
        return self._optional("summary.json", Evaluation)

    @cached_property
    def cache_info(self) -> Metrics:
        """``caches.json``: identity of the caches."""
        path = self.folder / "caches.json"
        return require(CacheInfo, read_json(path), path)

    @cached_property
    def embedding_space(self) -> Metrics:
        """``space.json``: soft tokens among the LM's embeddings; empty while the run is not finished."""
        return self._optional(EMBEDDING_SPACE_FILE, EmbeddingSpace)

    @cached_property
    def config(self) -> TrainConfig | None:
        """``config.yaml``; None if this version of earshard cannot read it."""
        try:
            return saved_config(self.folder)
        except UserError:
            return None

    @cached_property
    def table(self) -> pa.Table | None:
        """``utterances.parquet``: counts per utterance; None if this version of earshard cannot read it."""
        try:
            return read_utterances(self.folder)
        except UserError:
            return None

    @cached_property
    def metrics(self) -> Metrics:
        """Latest metrics: progress, last evaluation, summary, `train evaluate`; later ones replace earlier ones."""
        reevaluated = self._optional(EVALUATION_FILE, Evaluation)
        last = self.evaluations[-1] if self.evaluations else {}
        return {**_progress(self.step_metrics), **last, **self.summary, **reevaluated}

    @property
    def samples(self) -> list[Metrics]:
        """Decoded samples of the last evaluation."""
        found: list[Metrics] = self.metrics.get("samples", [])
        return found

    @property
    def other_evaluations(self) -> list[Metrics]:
        """Metrics of the evaluations on other caches."""
        paths = sorted((self.folder / OTHER_EVALUATIONS).glob(f"*/{EVALUATION_FILE}"))
        return [require(OtherEvaluation, read_json(path), path) for path in paths]

    @property
    def settings(self) -> dict[str, Any]:
        """Settings as flat keys and values; empty if ``config`` is None."""
        return {} if self.config is None else flatten(self.config.model_dump(mode="json"))

    def _lines(self, name: str, shape: type[Shape]) -> list[Metrics]:
        path = self.folder / name
        return [require(shape, line, path) for line in read_jsonl(path)]

    def _optional(self, name: str, shape: type[Shape]) -> Metrics:
        """Content of a file; empty if it does not exist."""
        path = self.folder / name
        return require(shape, read_json(path), path) if path.is_file() else {}

    def changed_settings(self) -> list[tuple[str, Any, Any]]:
        """Return (key, value, default) of every key that differs from its default; a projector's depend on its kind."""
        if self.config is None:
            return []
        default = TrainConfig.model_validate({"caches": ["-"], "projector": {"kind": self.config.projector.kind}})
        defaults = flatten(default.model_dump(mode="json")) | {"caches": None}
        settings = self.settings
        keys = [key for key in settings if settings[key] != defaults.get(key) and key not in ("runs", "name")]
        return [(key, settings[key], defaults.get(key)) for key in keys]

    def cache_paths(self) -> list[str]:
        """Return the paths of the run's caches, and of those in ``val.caches``."""
        paths = [str(cache["path"]) for cache in self.cache_info.get("caches", [])]
        for entry in [] if self.config is None else self.config.val.caches:
            try:
                found = find_cache(entry if isinstance(entry, str) else entry[0])  # all layers have the same audio
            except UserError:  # the pattern is ambiguous by now
                continue
            paths += [found] if found else []
        return paths


def _progress(metrics: list[Metrics]) -> Metrics:
    """The keys of ``summary.json`` that are known from the steps so far."""
    if not metrics:
        return {}
    seconds = sum(line["seconds"] for line in metrics) or 1e-9
    return {
        "steps": metrics[-1]["step"],
        "seconds": seconds,
        "frames_per_second": sum(line["frames"] for line in metrics) / seconds,
        "data_wait_fraction": sum(line["data_wait"] for line in metrics) / seconds,
        "train_loss_first": metrics[0]["loss"],
        "train_loss_last": metrics[-1]["loss"],
    }
