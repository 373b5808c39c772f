"""The results of a sweep: ``sweep.json`` and a printed table that compare every experiment with the baseline.

All experiments are evaluated on the same utterances, so the differences are paired: the bootstrap resamples utterances,
the same ones for both experiments (``train/evaluation/bootstrap.py``). A difference is significant on the held-out set
if its interval excludes 0.
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
    "intervals",
    "listening",
    "wer",
    "cer",
    "train_loss_last",
    "trained_parameters",
    "seconds",
)


def sweep_state(
    config: SweepConfig, configs: Sequence[TrainConfig], seconds: float, lm_seconds: dict[str, float]
) -> dict[str, Any]:
    """Return the content of ``sweep.json``.

    Args:
        seconds: wall time of this session.
        lm_seconds: seconds in shared passes of the LM, by purpose.
    """
    group_of = {str(each.name): number for number, part in enumerate(group_experiments(configs, None)) for each in part}
    listed = [_experiment(config.folder / str(each.name), group_of[str(each.name)], each) for each in configs]
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
    """Write ``sweep.json`` atomically."""
    runs.write_json(folder / SWEEP_STATE, state)


def format_table(state: dict[str, Any]) -> str:
    """Format the experiments as a table, sorted by held-out loss."""
    rows = [
        (
            *("experiment", "held-out loss", "minus baseline [95 %]", "audio gain [95 %]", "listening", "WER"),
            *("minus baseline [95 %]", ""),
        )
    ]
    evaluated = [each for each in state["experiments"] if each.get("val_loss") is not None]
    others = [each for each in state["experiments"] if each.get("val_loss") is None]
    for each in sorted(evaluated, key=lambda one: float(one["val_loss"])) + others:
        first = each["name"] == state["baseline"]
        rows.append(
            (
                each["name"],
                format_number(each.get("val_loss")),
                "baseline" if first else _format_interval(each.get("difference"), 1, 4),
                _gain(each),
                format_listening(each.get("listening")),
                "–" if each.get("wer") is None else f"{100 * each['wer']:.1f} %",
                "baseline" if first else _format_interval(each.get("wer_difference"), 100, 1),
                each["state"] if each["state"] != "finished" else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _gain(each: dict[str, Any]) -> str:
    """Format the audio gain and its interval."""
    low, high = (each.get("intervals") or {}).get("audio_gain") or (None, None)
    return format_number(each.get("audio_gain"), 3) + ("" if low is None else f" [{low:+.3f}, {high:+.3f}]")


def _experiment(run: Path, group: int, config: TrainConfig) -> dict[str, Any]:
    """Return the state and the metrics of one run folder."""
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


def _difference(table: pa.Table, baseline: pa.Table, **columns: Any) -> list[float] | None:
    """Return mean, low and high of an experiment minus the baseline; None if the tables share no such counts."""
    try:
        interval: Interval = paired_difference(table, baseline, **columns)
    except UserError:
        return None
    return [interval.mean, interval.low, interval.high]


def format_listening(found: dict[str, float] | None) -> str:
    """Format ``listening`` of a summary: steps of the LM and seconds."""
    if found is None:
        return "–"
    return f"{found['steps']:,} steps" + (f", {found['seconds']:,.0f} s" if "seconds" in found else "")


def _format_interval(interval: list[float] | None, scale: float, digits: int) -> str:
    if interval is None:
        return "–"
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in interval)
    return f"{mean} [{low}, {high}]"
