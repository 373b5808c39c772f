"""One self-contained page about a run or about a sweep: figures, curves, sound, settings, identity of the features.

In: a run's folder (``metrics.jsonl``, ``evaluations.jsonl``, ``config.yaml``, ``caches.json`` and, when finished,
``summary.json``, ``space.json``, ``utterances.parquet``), or a folder of such folders. Out: ``report.html`` there. No
script, no network: curves are inline SVG, sound is data inside the page.

    python -m train report runs/demo
    python -m train report runs/six        (a sweep: its run folders stand in it)

``source`` reads the files, ``run`` and ``sweep`` fill in the templates, ``sounds`` and ``space`` make samples and
pictures, ``page`` holds the Jinja2 environment.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.files import atomic_write, translate_os_errors

REPORT = "report.html"
SWEEP_STATE = "sweep.json"


def write_report(run: Path) -> Path:
    """Write ``report.html`` into the folder of a run from what stands there; returns its path."""
    from train.report.run import render_run

    return _write(run, render_run(run))


def write_sweep_report(folder: Path) -> Path:
    """Write ``report.html`` into ``folder``, which holds the run folder of each experiment; returns its path.

    Of ``sweep.json``, where it stands, it takes the ``experiments`` in their order (objects with ``name``, and the
    ``state`` and ``reason`` of one that did not finish) and the ``baseline``, with which the others are compared.

    Raises:
        UserError: no run stands in it.
    """
    from train.report.sweep import render_sweep

    return _write(folder, render_sweep(folder, experiment_folders(folder), _state(folder)))


def is_sweep(folder: Path) -> bool:
    """Whether ``folder`` holds runs and is none."""
    return not (folder / "config.yaml").is_file() and any(folder.glob("*/config.yaml"))


def experiment_folders(folder: Path) -> list[Path]:
    """The run folders of a sweep, in the order of ``sweep.json``, else of their names.

    Raises:
        UserError: there is none.
    """
    found = sorted(path.parent for path in folder.glob("*/config.yaml") if not path.parent.is_symlink())
    if not found:
        raise UserError(f"'{folder}' holds no run: train a sweep there first")
    names = [each["name"] for each in _state(folder).get("experiments", [])]
    return sorted(found, key=lambda path: names.index(path.name) if path.name in names else len(names))


def _state(folder: Path) -> dict[str, Any]:
    """``sweep.json``; empty where there is none."""
    from train.runs.folder import read_json

    return read_json(folder / SWEEP_STATE) if (folder / SWEEP_STATE).is_file() else {}


def _write(folder: Path, text: str) -> Path:
    path = folder / REPORT
    with translate_os_errors("writing the report", path):
        atomic_write(path, text.encode(errors="replace"), str(os.getpid()))  # a text may hold a lone surrogate
    return path
