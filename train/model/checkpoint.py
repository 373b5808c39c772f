"""Checkpoints: everything that a run needs to resume exactly where it stopped.

The model, its optimizer and the state of the training loop are written atomically to
``checkpoints/step-000500.safetensors``: trained tensors and Adam's moments as tensors, everything else as JSON in the
metadata of the file. There is no pickle, and no state of random generators: the numbers drawn in a step are a function
of its index (``train/trainer/step.py``). The newest two checkpoints are kept; a corrupt one is skipped with a warning.

| tensor                         | contents                                        |
|--------------------------------|-------------------------------------------------|
| ``projector.…`` ``lm.…``       | trained parameters, float32 (``lm`` if trained) |
| ``optimizer.<name>.exp_avg`` … | AdamW's state of that parameter                 |
| ``ema.<name>``                 | its moving average (with ``ema_decay``)         |
| ``best.<name>``                | its best values so far (with ``patience``)      |
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shards.errors import UserError
from shards.files import create_file, rename_durably, temporary_path, translate_os_errors

FORMAT = 1
MAX_CHECKPOINTS = 2
SUFFIX = ".safetensors"


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients by name: ``projector.…`` and, if the LM is trained, ``lm.…``."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    extra_tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the checkpoint of ``step`` to ``folder`` and delete all but the newest two.

    Args:
        folder: the folder of checkpoints.
        step: number of optimizer steps done.
        model: its trained parameters are saved.
        optimizer: an AdamW over these parameters.
        state: the state of the training loop, as JSON values.
        extra_tensors: tensors to save in addition to those of model and optimizer.

    Returns:
        The path of the checkpoint.

    Raises:
        UserError: the disk is full or the folder is not writable.
    """
    parameters = trained_parameters(model)
    tensors: dict[str, Tensor] = {name: parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value.detach()
    tensors.update(extra_tensors or {})
    path = folder / f"step-{step:06d}{SUFFIX}"
    metadata = {"state": json.dumps({**state, "format": FORMAT, "step": step}, allow_nan=False)}
    write_tensors(path, tensors, metadata, "saving a checkpoint")
    with translate_os_errors("removing an older checkpoint", folder):
        for old in checkpoints(folder)[MAX_CHECKPOINTS:]:
            old.unlink(missing_ok=True)
    return path


def load_checkpoint(folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Load the newest readable checkpoint: its path, its tensors on the CPU, and its state.

    Raises:
        UserError: there is none, or it has another format version.
    """
    for path in checkpoints(folder):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                state = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            print(f"warning: skipping the corrupt checkpoint '{path}' ({error})", file=sys.stderr)
            continue
        if state.get("format") != FORMAT:
            raise UserError(f"'{path}' has checkpoint format {state.get('format')}, expected {FORMAT}: update earshard")
        return path, tensors, state
    raise UserError(f"'{folder}' has no checkpoint to resume from: train again under another name=…")


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], source: str) -> None:
    """Restore parameters and AdamW's state from ``tensors``; error messages name ``source``.

    Raises:
        UserError: a parameter is missing or has another shape.
    """
    restore_parameters(model, tensors, source)
    states: dict[int, dict[str, Tensor]] = {}
    names = {id(parameter): name for name, parameter in trained_parameters(model).items()}
    index = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            prefix = f"optimizer.{names[id(parameter)]}."
            found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if found:
                states[index] = found
            index += 1
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def restore_parameters(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str,
    reason: str = "the run's config.yaml was changed after training",
) -> None:
    """Copy ``tensors`` to the trained parameters of the same names; error messages name ``source`` and a ``reason``.

    Raises:
        UserError: a parameter is missing or has another shape.
    """
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            saved = tensors.get(name)
            if saved is None or saved.shape != parameter.shape:
                found = "is missing" if saved is None else f"has shape {list(saved.shape)}"
                raise UserError(
                    f"'{name}' {found} in '{source}', expected shape {list(parameter.shape)}: {reason}; restore it "
                    "or train again"
                )
            parameter.copy_(saved)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint files of ``folder``, newest first."""
    return sorted(folder.glob(f"step-*{SUFFIX}"), key=lambda path: int(path.stem.split("-")[1]), reverse=True)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], action: str = "saving trained tensors"
) -> None:
    """Write a safetensors file to ``path`` atomically and durably.

    Raises:
        UserError: the file cannot be written; the message starts with ``action``.
    """
    partial = temporary_path(path, str(os.getpid()))
    with translate_os_errors(action, path):
        try:
            _write(partial, tensors, metadata)
            rename_durably(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    fd = create_file(path)
    mode = stat.S_IMODE(os.fstat(fd).st_mode)  # as the umask says; the library would write a file of mode 0600
    os.close(fd)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))  # the library reports errno only in its message
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fchmod(fd, mode)
        os.fsync(fd)
    finally:
        os.close(fd)
