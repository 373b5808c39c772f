"""The command ``python -m train sweep``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shards.config.base import validate_config
from shards.errors import UserError
from train.config.model import CustomConfig
from train.sweeps.config import SweepConfig, load_sweep

OWN_FILE = "--config with your own file of the sweep"


def sweep(file: str | None, resume: str | None, overrides: Sequence[str], engine: str | None = None) -> int:
    """Run or resume a sweep, print its table, and return the exit status.

    Args:
        file: YAML file of the sweep.
        resume: None starts a new sweep, "" resumes the sweep of ``file``, any other value is the folder to resume.
        overrides: ``key=value`` arguments.
        engine: replaces the key ``engine`` if not None.

    Raises:
        UserError: see :func:`~train.sweeps.sweep.run_sweep`.
        WorkFailed: no experiment finished.
    """
    config = _load_sweep_config(file, resume, overrides)
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
    print(f"metrics: {folder / SWEEP_STATE}\nreport: {folder / REPORT}", flush=True)
    return 0


def _load_sweep_config(file: str | None, resume: str | None, overrides: Sequence[str]) -> SweepConfig:
    overrides = list(overrides)
    if resume is not None and "=" in resume:  # `--resume key=value`: argparse took an override for SWEEP
        overrides, resume = [resume, *overrides], ""
    if file is not None:
        config = load_sweep(file, overrides)
        if resume:
            folder = Path(resume)
            config = config.model_copy(update={"runs": str(folder.parent), "name": folder.name})
        return config
    if not resume:
        raise UserError("no sweep: name a file with --config (see configs/sweep/), or a sweep folder with --resume")
    if overrides:
        raise UserError(
            f"'{overrides[0]}' cannot override a resumed sweep: start a new sweep with --config and another name=…"
        )
    from train.runs.folder import require_chosen_projector
    from train.sweeps.sweep import read_sweep_config

    config = read_sweep_config(Path(resume))
    for kind in _own_kinds(config.model_dump(mode="json")):
        require_chosen_projector(CustomConfig.model_construct(kind=kind), Path(resume), None, OWN_FILE)
    return config


def _own_kinds(tree: Any, key: str = "") -> Iterator[str]:
    """Yield every value of a key ``kind`` that is the import path of a class."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _own_kinds(value, key if name == "choices" else str(name))
    elif isinstance(tree, list):
        for value in tree:
            yield from _own_kinds(value, key)
    elif key.rpartition(".")[2] == "kind" and ":" in str(tree):
        yield str(tree)
