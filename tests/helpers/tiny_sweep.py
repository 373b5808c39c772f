"""Sweeps of short runs, and a comparison of two equal runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_run import losses, make_config

from train.evaluation.utterance_table import read_utterances
from train.runs.folder import read_json
from train.sweeps.config import SweepConfig

DROPOUT = {"kind": "residual", "stack": 3, "blocks": 1, "hidden": 16, "dropout": 0.2}


TIMED = {"seconds", "elapsed", "data_wait_fraction", "frames_per_second", "eval_seconds"}
TIMED |= {"training_seconds", "evaluation_seconds"}


# They differ in everything that experiments of a group may differ in: projector, prompt, optimizer, length, averages,
# noise.
LIST: list[dict[str, Any]] = [
    {"name": "mlp"},
    {"name": "dropout", "projector": DROPOUT, "prompt": {"template": "slam"}, "seed": 3, "lr": 2e-2},
    {"name": "short", "steps": 4, "schedule": "constant", "ema_decay": 0.5, "frame_mask_prob": 0.2, "noise_std": 0.1},
    {"name": "distilled", "distill": {"weight": 0.5}, "contrastive": {"weight": 0.1}, "steps": 5, "eval_every": 0},
    {"name": "pool", "projector": {"kind": "pool", "pool": 2}, "eval_every": 3, "patience": 3},
]


def make_sweep(folder: Path, cache: Path, lm: str, base: dict[str, Any] | None = None, **keys: Any) -> SweepConfig:
    """Return a sweep over short runs under ``folder``; ``base`` changes keys of the runs, ``keys`` of the sweep."""
    given = {"eval_every": 4, "checkpoint_every": 2, "data_seed": 7, "decode_samples": 1, "retrieval_limit": 0}
    run = make_config(folder, cache, lm, **{**given, **(base or {})}).model_dump(mode="json", exclude={"runs", "name"})
    tree = {"base": run, "runs": str(folder / "runs"), "name": "sweep", "experiments": LIST, "lockstep": "separate"}
    return SweepConfig.model_validate({**tree, **keys})


def same_run(one: Path, other: Path) -> None:
    """Assert that losses, evaluations, saved files, checkpoints and all values except times are equal bit for bit."""
    assert losses(one) == losses(other)
    for name in ("projector.safetensors", *sorted(p.name for p in (one / "checkpoints").iterdir())):
        where = name if name == "projector.safetensors" else f"checkpoints/{name}"
        ours, theirs = load_file(one / where), load_file(other / where)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert (one / "projector.safetensors").read_bytes() == (other / "projector.safetensors").read_bytes()
    ours, theirs = (read_json(run / "summary.json") for run in (one, other))
    assert {k: v for k, v in ours.items() if k not in TIMED} == {k: v for k, v in theirs.items() if k not in TIMED}
    if ours["val_loss"] is not None:  # the run was evaluated
        assert read_utterances(one).equals(read_utterances(other))
    lines = [
        [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()] for run in (one, other)
    ]
    assert [{k: v for k, v in line.items() if k not in TIMED} for line in lines[0]] == [
        {k: v for k, v in line.items() if k not in TIMED} for line in lines[1]
    ]
