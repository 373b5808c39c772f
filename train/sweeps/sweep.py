"""Runs a sweep: creates its folder, trains its experiments group by group, and writes the results.

    runs/projectors/   sweep.yaml  sweep.json  report.html
        mlp/ linear/ …  run folders as written by `fit`; dropped.json if the experiment failed or was pruned

``sweep.yaml`` holds the settings, ``sweep.json`` the state and the metrics of every experiment. A sweep that was killed
can resume: finished experiments are skipped, the others resume from their checkpoints.

    python -m train sweep --config configs/sweep/projectors.yaml
    python -m train sweep --resume runs/projectors
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import yaml

from shards.errors import UserError, WorkFailed
from shards.files import atomic_write, translate_os_errors
from train.config.train import TrainConfig
from train.distributed.signals import StopRequest
from train.report import write_sweep_report
from train.runs.folder import hold
from train.sweeps.config import SweepConfig, experiments
from train.sweeps.group import (
    DROPPED,
    LmCache,
    LockstepMode,
    group_experiments,
    log,
    resume_hint,
    train_group,
    unfinished,
)
from train.sweeps.results import sweep_state, write_state
from train.trainer.trainer import Interrupted

SWEEP_CONFIG = "sweep.yaml"


def run_sweep(config: SweepConfig, resume: bool = False) -> Path:
    """Run every unfinished experiment of ``config``; return the folder of the sweep.

    Raises:
        UserError: the settings or the data are invalid; the folder exists; or, with ``resume``, the folder does not
            exist or has different settings.
        WorkFailed: no experiment finished.
        Interrupted: the process received SIGINT or SIGTERM; all experiments are saved.
    """
    require_single_process()
    with hold(config.folder):
        return _run_sweep(config, resume)


def _run_sweep(config: SweepConfig, resume: bool) -> Path:
    start = time.perf_counter()
    configs = [] if config.search is not None else experiments(config)
    open_sweep_folder(config, resume)
    lm_seconds: dict[str, float] = {}
    write_state(config.folder, {**sweep_state(config, configs, 0.0, {}), "state": "running"})
    try:
        if config.search is not None:
            from train.sweeps.search import search

            search(config, configs)
        else:
            lm_seconds = _run(config, configs)
    finally:
        state = sweep_state(config, configs, time.perf_counter() - start, lm_seconds)
        write_state(config.folder, state)
    write_sweep_report(config.folder)
    if not any(each["state"] == "finished" for each in state["experiments"]):
        raise WorkFailed(f"no experiment of '{config.folder}' finished: see {DROPPED} in the experiment folders")
    return config.folder


def require_single_process() -> None:
    """Raise UserError under torchrun, where every rank would run the whole sweep."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "a sweep runs in one process: start it without torchrun, distribute its groups with engine=ray, or train "
            "single runs with torchrun -m train fit"
        )


def open_sweep_folder(config: SweepConfig, resume: bool) -> None:
    """Create the folder of the sweep with ``sweep.yaml``; with ``resume``, check that the settings are unchanged."""
    folder = config.folder
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    if resume:
        changed = differences(read_sweep_config(folder), config)
        if changed:
            raise UserError(
                f"'{folder}' cannot resume with changed settings ({', '.join(changed)}): restore them, or start a new "
                "sweep under another name=…"
            )
        return
    if folder.exists():
        raise UserError(
            f"'{folder}' already exists: choose another name=…, resume it with --resume {folder}, or delete it"
        )
    with translate_os_errors("creating the sweep folder", folder):
        folder.mkdir(parents=True)
        atomic_write(folder / SWEEP_CONFIG, text.encode(), str(os.getpid()))


def read_sweep_config(folder: Path) -> SweepConfig:
    """Read the settings of the sweep at ``folder``, which may have been moved."""
    from shards.config.base import load_config

    if not (folder / SWEEP_CONFIG).is_file():
        raise UserError(
            f"'{folder}' is not a sweep: it has no {SWEEP_CONFIG}; start one with --config (see configs/sweep/)"
        )
    found = load_config(SweepConfig, folder / SWEEP_CONFIG)
    return found.model_copy(update={"runs": str(folder.parent), "name": folder.name})


def differences(config: SweepConfig, other: SweepConfig) -> list[str]:
    """Return the keys that differ, except those that may change on resume."""
    changeable = {"engine", "runs", "max_group_size"}
    tree, other_tree = config.model_dump(mode="json"), other.model_dump(mode="json")
    return [key for key in tree if key not in changeable and tree[key] != other_tree[key]]


def _run(config: SweepConfig, configs: list[TrainConfig]) -> dict[str, float]:
    """Run the experiments of a list and a grid; return the result of :func:`run_local`."""
    remaining = unfinished(configs)
    parts = group_experiments(remaining, 1 if config.lockstep == "none" else config.max_group_size)
    finished = len(configs) - len(remaining)
    log(f"{len(configs)} experiments ({finished} finished) in {len(parts)} groups, lockstep: {config.lockstep}")
    if config.engine == "ray":
        from train.sweeps.ray_engine import run_groups

        run_groups(parts, config.lockstep)
        return {}
    return run_local(parts, config.lockstep, config.folder)


def run_local(parts: Sequence[list[TrainConfig]], mode: LockstepMode, folder: Path) -> dict[str, float]:
    """Run one group after another in this process; return the seconds in shared LM passes, by purpose."""
    lm_cache, seconds = LmCache(), Counter[str]()
    with StopRequest() as stop:
        for number, part in enumerate(parts, 1):
            log(f"group {number} of {len(parts)}: {', '.join(str(config.name) for config in part)}")
            try:
                seconds.update(train_group(part, lm_cache, mode, stop, log))
            except Interrupted as stopped:
                raise Interrupted(f"{stopped}; {resume_hint(folder)}") from None
    return dict(seconds)
