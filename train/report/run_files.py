"""What a report reads: the files of one run's folder, none of which must be there but ``caches.json``.

In: a run's folder. Out: :class:`RunFiles`. A run that goes on, or of an older earshard, lacks some; what is there is
shown.
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
from train.runs.folder import EMBEDDING_SPACE_FILE, EVALUATION_FILE, OTHER_EVALUATIONS, read_json, run_config
from train.runs.metrics_log import EVALUATIONS, METRICS, read_jsonl

Metrics = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """One run, read once."""

    folder: Path

    @property
    def name(self) -> str:
        """Of the run: that of its folder."""
        return self.folder.name

    @cached_property
    def step_metrics(self) -> list[Metrics]:
        """A line a step."""
        return read_jsonl(self.folder / METRICS)

    @cached_property
    def evaluations(self) -> list[Metrics]:
        """A line an evaluation."""
        return read_jsonl(self.folder / EVALUATIONS)

    @cached_property
    def summary(self) -> Metrics:
        """Empty while the run is not finished."""
        path = self.folder / "summary.json"
        return read_json(path) if path.is_file() else {}

    @cached_property
    def cache_info(self) -> Metrics:
        """The caches' identity."""
        return read_json(self.folder / "caches.json")

    @cached_property
    def embedding_space(self) -> Metrics:
        """Soft tokens among the LM's embeddings; empty before the end."""
        path = self.folder / EMBEDDING_SPACE_FILE
        return read_json(path) if path.is_file() else {}

    @cached_property
    def config(self) -> TrainConfig | None:
        """None where this earshard does not know its keys."""
        try:
            return run_config(self.folder)
        except UserError:
            return None

    @cached_property
    def table(self) -> pa.Table | None:
        """The counts of the utterances; None where there are none of this earshard's."""
        try:
            return read_utterances(self.folder)
        except UserError:
            return None

    @cached_property
    def metrics(self) -> Metrics:
        """The latest of everything: progress, the last evaluation, the summary, an evaluation by command."""
        path = self.folder / EVALUATION_FILE
        again = read_json(path) if path.is_file() else {}
        last = self.evaluations[-1] if self.evaluations else {}
        return {**_progress(self.step_metrics), **last, **self.summary, **again}

    @property
    def samples(self) -> list[Metrics]:
        """Of the last evaluation."""
        found: list[Metrics] = self.metrics.get("samples", [])
        return found

    @property
    def other_evaluations(self) -> list[Metrics]:
        """The figures on other caches."""
        return [read_json(path) for path in sorted((self.folder / OTHER_EVALUATIONS).glob(f"*/{EVALUATION_FILE}"))]

    @property
    def settings(self) -> dict[str, Any]:
        """Flat keys and values; empty where they are not known."""
        return {} if self.config is None else flatten(self.config.model_dump(mode="json"))

    def changed_settings(self) -> list[tuple[str, Any, Any]]:
        """(key, value, default) of every key that is not at its default; of a projector, at its kind's default."""
        if self.config is None:
            return []
        default = TrainConfig.model_validate({"caches": ["-"], "projector": {"kind": self.config.projector.kind}})
        other = flatten(default.model_dump(mode="json")) | {"caches": None}
        mine = self.settings
        keys = [key for key in mine if mine[key] != other.get(key) and key not in ("runs", "name")]
        return [(key, mine[key], other.get(key)) for key in keys]

    def cache_paths(self) -> list[str]:
        """Where the run's caches stood, and those that it was judged on instead."""
        paths = [str(cache["path"]) for cache in self.cache_info.get("caches", [])]
        for entry in [] if self.config is None else self.config.val.caches:
            try:
                found = find_cache(entry if isinstance(entry, str) else entry[0])  # layers are of the same audio
            except UserError:  # by now several match
                continue
            paths += [found] if found else []
        return paths


def _progress(metrics: list[Metrics]) -> Metrics:
    """What ``summary.json`` will hold, from the steps so far."""
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
