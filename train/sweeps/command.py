"""The command ``python -m train sweep``: words of the command line in, a sweep and its table out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from shards.config.base import validate_config
from shards.errors import UserError
from train.sweeps.config import SweepConfig, load_sweep


def sweep(file: str | None, resume: str | None, words: Sequence[str], engine: str | None = None) -> int:
    """Run or go on with a sweep, print its table; the exit status.

    ``resume`` None starts a new one, "" goes on with that of ``file``, else with the folder that it names. ``engine``
    stands for the key of that name.
    """
    config = _load_sweep_config(file, resume, words)
    if engine is not None:
        config = validate_config(SweepConfig, {**config.model_dump(mode="json"), "engine": engine}, "--engine")

    from train.report import REPORT
    from train.runs.folder import read_json
    from train.sweeps.results import SWEEP_STATE, format_table
    from train.sweeps.sweep import run_sweep
    from train.trainer.trainer import Interrupted

    try:
        folder = run_sweep(config, resume is not None)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 130
    print(format_table(read_json(folder / SWEEP_STATE)))
    print(f"figures: {folder / SWEEP_STATE}\nreport: {folder / REPORT}", flush=True)
    return 0


def _load_sweep_config(file: str | None, resume: str | None, words: Sequence[str]) -> SweepConfig:
    words = list(words)
    if resume is not None and "=" in resume:  # `--resume key=value`: the sweep is that of --config
        words, resume = [resume, *words], ""
    if file is not None:
        config = load_sweep(file, words)
        if resume:
            place = Path(resume)
            config = config.model_copy(update={"runs": str(place.parent), "name": place.name})
        return config
    if not resume:
        raise UserError("name a sweep with --config (see configs/sweep/), or the folder of one with --resume")
    if words:
        raise UserError(f"'{words[0]}': a sweep goes on with its own settings; start another by --config and name=…")
    from train.sweeps.sweep import read_sweep_config

    return read_sweep_config(Path(resume))
