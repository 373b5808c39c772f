"""A self-contained HTML report of a run or a sweep: metrics, charts, audio, settings, identity of the features.

Reads a run folder (``metrics.jsonl``, ``evaluations.jsonl``, ``config.yaml``, ``caches.json`` and, when finished,
``summary.json``, ``space.json``, ``utterances.parquet``), or a folder of run folders; writes ``report.html`` into it.
The page has no scripts and loads nothing: charts are inline SVG, and audio is embedded as data URIs.

    python -m train report runs/demo
    python -m train report runs/six        (a sweep: a folder of run folders)

``run_files`` reads the files, ``run`` and ``sweep`` fill in the templates, ``audio``, ``charts`` and ``embedding_plot``
make players and charts, and ``page`` holds the Jinja2 environment.
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
    """Write ``report.html`` into a run folder, from the files in it; return its path."""
    from train.report.run import render_run

    return _write(run, render_run(run))


def write_sweep_report(folder: Path) -> Path:
    """Write ``report.html`` into ``folder``, which holds one run folder per experiment; return its path.

    ``sweep.json``, if it exists, determines the order of the ``experiments`` (objects with ``name``, and ``state`` and
    ``reason`` for those that did not finish) and the ``baseline`` with which the others are compared.

    Raises:
        UserError: there is no run in ``folder``.
    """
    from train.report.sweep import render_sweep

    return _write(folder, render_sweep(folder, experiment_folders(folder), _state(folder)))


def is_sweep(folder: Path) -> bool:
    """Return whether ``folder`` contains run folders and is not one itself."""
    return not (folder / "config.yaml").is_file() and any(folder.glob("*/config.yaml"))


def experiment_folders(folder: Path) -> list[Path]:
    """Return the run folders of a sweep in the order of ``sweep.json``; the others follow, sorted by name.

    Raises:
        UserError: there are none.
    """
    found = sorted(path.parent for path in folder.glob("*/config.yaml") if not path.parent.is_symlink())
    if not found:
        raise UserError(f"'{folder}' contains no runs: run `python -m train sweep` first")
    names = [each["name"] for each in _state(folder).get("experiments", [])]
    return sorted(found, key=lambda path: names.index(path.name) if path.name in names else len(names))


def _state(folder: Path) -> dict[str, Any]:
    """Content of ``sweep.json``; empty if it does not exist."""
    from train.report.shapes import SweepState, require
    from train.runs.folder import read_json

    path = folder / SWEEP_STATE
    return require(SweepState, read_json(path), path) if path.is_file() else {}


def _write(folder: Path, text: str) -> Path:
    from train.runs.folder import remove_abandoned_files

    path = folder / REPORT
    remove_abandoned_files(folder)
    with translate_os_errors("writing the report", path):
        atomic_write(path, text.encode(errors="replace"), str(os.getpid()))  # texts may contain lone surrogates
    return path
