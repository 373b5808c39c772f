"""Settings of runs that take a second: a tiny cache, a tiny language model, a small projector, float32 on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shards.config.base import validate_config
from train.config.train import TrainConfig


def make_config(folder: Path, cache: Path | str, model: str, **keys: Any) -> TrainConfig:
    """Return the settings of a run of 8 steps under ``folder``; ``keys`` replace whole top-level keys."""
    tree: dict[str, Any] = {
        "caches": [str(cache)],
        "runs": str(folder / "runs"),
        "name": "run",
        "lm": {"model": model},
        "projector": {"kind": "mlp", "stack": 4, "norm": "rms"},
        "steps": 8,
        "lr": 1e-2,
        "batch": {"size": 4},
        "eval_batch_size": 5,
        "decode_limit": 3,
        "max_new_tokens": 4,
        "device": "cpu",
        "dtype": "float32",
    }
    return validate_config(TrainConfig, {**tree, **keys}, "the test")


def write_config(path: Path, config: TrainConfig) -> Path:
    """Write ``config`` to a file for the command line (JSON is YAML)."""
    path.write_text(json.dumps(config.model_dump(mode="json")))
    return path


def losses(run: Path) -> list[float]:
    """Return the training losses of a run in step order, exactly as computed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def forget_after(run: Path, step: int) -> None:
    """Leave ``run`` as if killed after ``step`` was saved: later lines may remain, later checkpoints do not."""
    for path in (run / "checkpoints").iterdir():
        if int(path.stem.split("-")[1]) > step:
            path.unlink()
    for name in ("summary.json", "projector.safetensors", "report.html"):
        (run / name).unlink()
