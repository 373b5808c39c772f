"""A sweep: its folder, its experiments group by group, and what they show.

    runs/projectors/   sweep.yaml  sweep.json  report.html
        mlp/ linear/ …  run folders as `fit` leaves them, or with dropped.json: failed or pruned before the end

In: a :class:`~train.sweeps.config.SweepConfig`. Out: that folder. ``sweep.yaml`` holds the settings, ``sweep.json`` the
state and the figures of every experiment. A sweep that was killed goes on: finished experiments are left alone, the
others go on from their checkpoints.

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
from train.sweeps.config import SweepConfig, experiments
from train.sweeps.group import (
    DROPPED,
    LmCache,
    LockstepMode,
    LockstepTrainer,
    group_experiments,
    log,
    resume_hint,
    unfinished,
)
from train.sweeps.results import sweep_state, write_state
from train.trainer.trainer import Interrupted

SWEEP_CONFIG = "sweep.yaml"


def run_sweep(config: SweepConfig, resume: bool = False) -> Path:
    """Run every experiment of ``config`` that is not finished; returns the sweep's folder.

    Raises:
        UserError: bad settings or data; the folder exists, or ``resume`` finds none or one of other settings.
        WorkFailed: not one experiment came to its end.
        Interrupted: SIGINT or SIGTERM came; all is saved.
    """
    require_single_process()
    begun = time.perf_counter()
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
        state = sweep_state(config, configs, time.perf_counter() - begun, lm_seconds)
        write_state(config.folder, state)
    write_sweep_report(config.folder)
    if not any(each["state"] == "finished" for each in state["experiments"]):
        raise WorkFailed(f"no experiment of '{config.folder}' came to its end: see {DROPPED} in their folders")
    return config.folder


def require_single_process() -> None:
    """A sweep is one process: under torchrun, whose ranks would each run all of it, raise UserError."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "a sweep runs in one process: start it without torchrun, spread its groups by engine=ray, or train single "
            "runs with torchrun -m train fit"
        )


def open_sweep_folder(config: SweepConfig, resume: bool) -> None:
    """Make the sweep's folder with ``sweep.yaml``, or find it as it was left."""
    folder = config.folder
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    if resume:
        changed = differences(read_sweep_config(folder), config)
        if changed:
            raise UserError(
                f"'{folder}' cannot go on with other settings ({', '.join(changed)}): leave them alone, or start a new "
                "sweep under another name=…"
            )
        return
    if folder.exists():
        raise UserError(
            f"'{folder}' exists already: choose another name=…, go on with it by --resume {folder}, or delete it"
        )
    with translate_os_errors("making the sweep's folder", folder):
        folder.mkdir(parents=True)
        atomic_write(folder / SWEEP_CONFIG, text.encode(), str(os.getpid()))


def read_sweep_config(folder: Path) -> SweepConfig:
    """The settings of the sweep that stands at ``folder``, wherever it was moved."""
    from shards.config.base import load_config

    if not (folder / SWEEP_CONFIG).is_file():
        raise UserError(
            f"'{folder}' is not a sweep: it has no {SWEEP_CONFIG}; start one with --config (see configs/sweep/)"
        )
    found = load_config(SweepConfig, folder / SWEEP_CONFIG)
    return found.model_copy(update={"runs": str(folder.parent), "name": folder.name})


def differences(mine: SweepConfig, theirs: SweepConfig) -> list[str]:
    """The keys that decide what the experiments are, and differ."""
    free = {"engine", "runs", "max_group_size"}
    one, other = mine.model_dump(mode="json"), theirs.model_dump(mode="json")
    return [key for key in one if key not in free and one[key] != other[key]]


def _run(config: SweepConfig, configs: list[TrainConfig]) -> dict[str, float]:
    """The experiments of a list and a grid; what :func:`run_local` gives."""
    waiting = unfinished(configs)
    parts = group_experiments(waiting, 1 if config.lockstep == "none" else config.max_group_size)
    done = len(configs) - len(waiting)
    log(f"{len(configs)} experiments, {done} of them done; {len(parts)} groups, lockstep: {config.lockstep}")
    if config.engine == "ray":
        from train.sweeps.ray_engine import run_groups

        run_groups(parts, config.lockstep)
        return {}
    return run_local(parts, config.lockstep, config.folder)


def run_local(parts: Sequence[list[TrainConfig]], mode: LockstepMode, folder: Path) -> dict[str, float]:
    """One group after the other in this process; the seconds of shared passes, by what the language model was asked."""
    models, seconds = LmCache(), Counter[str]()
    with StopRequest() as stop:
        for number, part in enumerate(parts, 1):
            log(f"group {number} of {len(parts)}: {', '.join(str(config.name) for config in part)}")
            lockstep = LockstepTrainer(part, models, mode, stop, log)
            try:
                lockstep.run()
            except Interrupted as stopped:
                raise Interrupted(f"{stopped}, saved; {resume_hint(folder)}") from None
            seconds.update(lockstep.lm_seconds)
    return dict(seconds)
