"""Extraction, training and transcription from Python: what the command lines call, without a command line."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config import ExtractConfig
from shards.config.base import flatten, load_config
from shards.config.origins import builtin_config
from train.config.train import TrainConfig


def extract(config: str | os.PathLike[str] | None = None, **settings: Any) -> list[Path]:
    """Create, resume or extend the caches of a configuration on this machine.

    Args:
        config: a YAML file, or the name of a built-in configuration (``"speech"``).
        settings: keys that override it, nested as in YAML: ``source={"kind": "tones"}, limit=3``.

    Returns:
        The cache folders, one per encoder layer.

    Raises:
        shards.errors.UserError: a setting, the source or the encoder is not usable.
        shards.errors.WorkFailed: too many recordings failed.
    """
    typed = load_config(ExtractConfig, _file(config, "extract"), _words(settings))

    from pipeline.extract.local import extract as run

    return [Path(result.cache) for result in run(typed).results]


def fit(config: str | os.PathLike[str] | None = None, **settings: Any) -> Path:
    """Train a projector, evaluate it, and write its report.

    Args:
        config: a YAML file, or the name of a built-in configuration (``"demo"``).
        settings: keys that override it, nested as in YAML: ``caches="caches/mine/*", projector={"kind": "linear"}``.

    Returns:
        The new run folder, with ``summary.json``, ``report.html`` and the checkpoints.

    Raises:
        shards.errors.UserError: a setting or a cache is not usable.
        shards.errors.WorkFailed: the loss became NaN or infinite, or fell by less than ``min_loss_drop``.
    """
    typed = load_config(TrainConfig, _file(config, "train"), _words(settings))

    from train.trainer.fit import fit as run

    return run(typed)


def transcribe(
    run: str | os.PathLike[str], audio: Sequence[str | os.PathLike[str]], *, encoder: str | None = None
) -> list[str]:
    """Return what a trained run hears in each of the audio files ``audio``, one line of text per file, in their order.

    Args:
        run: a run folder.
        audio: audio files.
        encoder: new reference of the run's encoder; required if that is a class of your own, ``module:Class``.

    Raises:
        shards.errors.UserError: a file cannot be read, or the run's encoder is not available.
    """
    from train.inference.transcribe import find_recordings
    from train.inference.transcribe import transcribe as decode
    from train.runs.folder import find_run, run_config

    folder = find_run(os.fspath(run))
    recordings = find_recordings([os.fspath(file) for file in audio])
    return [text for _, text in decode(folder, run_config(folder), recordings, encoder)]


def _file(config: str | os.PathLike[str] | None, kind: str) -> str | None:
    return None if config is None else builtin_config(os.fspath(config), kind)


def _words(settings: dict[str, Any]) -> list[str]:
    """The settings as ``key=value`` arguments; JSON is YAML."""
    return [f"{key}={json.dumps(value, default=os.fspath)}" for key, value in flatten(settings).items()]
