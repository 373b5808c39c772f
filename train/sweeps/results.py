"""What a sweep shows: every experiment beside the baseline, utterance by utterance.

In: the run folders of a sweep. Out: ``sweep.json`` and a table for people. All experiments were judged on the same
utterances, so differences are paired: what is drawn again for the interval is utterances, the same ones of both
(``train/evaluation/bootstrap.py``). An interval that does not hold 0 is a difference that the held-out set can show.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from shards.config.base import flatten
from shards.errors import UserError
from train.config.train import TrainConfig
from train.evaluation.bootstrap import WORD_ERRORS, WORDS, Interval, paired_difference
from train.evaluation.utterance_table import UTTERANCES, read_utterances
from train.runs import folder as runs
from train.runs.metrics_log import METRICS, format_number, read_jsonl
from train.sweeps.config import SweepConfig
from train.sweeps.group import DROPPED, group_experiments

SWEEP_STATE = "sweep.json"
SUMMARY_KEYS = (
    "val_loss",
    "val_loss_shuffled",
    "audio_gain",
    "wer",
    "cer",
    "train_loss_last",
    "trained_parameters",
    "seconds",
)


def sweep_state(
    config: SweepConfig, configs: Sequence[TrainConfig], seconds: float, lm_seconds: dict[str, float]
) -> dict[str, Any]:
    """The content of ``sweep.json``; ``seconds`` that this session took, and those of shared passes of the LM."""
    where = {str(each.name): number for number, part in enumerate(group_experiments(configs, None)) for each in part}
    listed = [_experiment(config.folder / str(each.name), where[str(each.name)], each) for each in configs]
    baseline = _read_table(config.folder, listed[0]["name"]) if listed else None
    for each in listed[1:]:
        table = _read_table(config.folder, each["name"])
        if baseline is not None and table is not None:
            each["difference"] = _difference(table, baseline)
            each["wer_difference"] = _difference(table, baseline, counts=WORD_ERRORS, per=WORDS)
    trees = [flatten(each.model_dump(mode="json")) for each in configs]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    varied = [key for key in keys if key != "name" and any(tree.get(key) != trees[0].get(key) for tree in trees)]
    for each, tree in zip(listed, trees, strict=True):
        each["settings"] = {key: tree[key] for key in varied if key in tree}
    return {
        "name": config.name,
        "state": "finished" if all(each["state"] in ("finished", "failed", "pruned") for each in listed) else "stopped",
        "lockstep": config.lockstep,
        "engine": config.engine,
        "baseline": listed[0]["name"] if listed else None,
        "seconds": round(seconds, 3),
        "lm_seconds": lm_seconds,
        "varied": varied,
        "experiments": listed,
    }


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """``sweep.json`` at once."""
    runs.write_json(folder / SWEEP_STATE, state)


def format_table(state: dict[str, Any]) -> str:
    """The experiments sorted by held-out loss, as columns."""
    rows = [("experiment", "held-out loss", "minus baseline [95 %]", "audio gain", "WER", "minus baseline [95 %]", "")]
    evaluated = [each for each in state["experiments"] if each.get("val_loss") is not None]
    others = [each for each in state["experiments"] if each.get("val_loss") is None]
    for each in sorted(evaluated, key=lambda one: float(one["val_loss"])) + others:
        first = each["name"] == state["baseline"]
        rows.append(
            (
                each["name"],
                format_number(each.get("val_loss")),
                "baseline" if first else _format_interval(each.get("difference"), 1, 4),
                format_number(each.get("audio_gain"), 3),
                "–" if each.get("wer") is None else f"{100 * each['wer']:.1f} %",
                "baseline" if first else _format_interval(each.get("wer_difference"), 100, 1),
                each["state"] if each["state"] != "finished" else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _experiment(run: Path, group: int, config: TrainConfig) -> dict[str, Any]:
    """State and figures of one run folder."""
    tree: dict[str, Any] = {"name": run.name, "state": "waiting", "group": group, "steps": config.steps, "step": 0}
    lines = read_jsonl(run / METRICS)
    if lines:
        tree |= {"state": "stopped", "step": lines[-1]["step"]}
    if (run / "summary.json").is_file():
        summary = runs.read_json(run / "summary.json")
        tree |= {"state": "finished", "step": summary["steps"], **{key: summary.get(key) for key in SUMMARY_KEYS}}
    if (run / DROPPED).is_file():
        dropped = runs.read_json(run / DROPPED)
        tree |= {"state": dropped["state"], "step": dropped["step"], "reason": dropped["reason"]}
    return tree


def _read_table(folder: Path, name: str) -> pa.Table | None:
    return read_utterances(folder / name) if (folder / name / UTTERANCES).is_file() else None


def _difference(mine: pa.Table, baseline: pa.Table, **of: Any) -> list[float] | None:
    """Mean, low and high of an experiment minus the baseline; None where they have no such counts in common."""
    try:
        found: Interval = paired_difference(mine, baseline, **of)
    except UserError:
        return None
    return [found.mean, found.low, found.high]


def _format_interval(interval: list[float] | None, scale: float, digits: int) -> str:
    if interval is None:
        return "–"
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in interval)
    return f"{mean} [{low}, {high}]"
