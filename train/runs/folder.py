"""Run folders: creating, finding and reading them.

    runs/demo/   config.yaml  caches.json  [prompts.json]  metrics.jsonl  evaluations.jsonl  checkpoints/
                 projector.safetensors  summary.json  report.html
    runs/latest -> demo

``caches.json`` records the features that the run was trained on (spec, manifest ids, encoder reference) and which
generation and labels of its caches it read, so that a trained run can be used without its caches, and is evaluated on
the same utterances after they grew. ``prompts.json`` is the content of the file ``prompt.prompts``.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from shards import files as disk
from shards.config.base import load_config, parse_overrides
from shards.errors import UserError
from shards.files import TEMPORARY_INFIX, atomic_write, file_lock, fsync_folder, make_folder, translate_os_errors
from shards.format.spec import FeatureSpec
from train.config.model import CustomConfig
from train.config.train import TrainConfig
from train.data.caches import TrainData, Utterances
from train.data.instructions import Instructions
from train.data.pins import Pin, cache_record, pins

if TYPE_CHECKING:
    from shards.read.cache import Cache
    from train.data.layers import LayeredCaches

LATEST = "latest"
SUMMARY = "summary.json"  # written last: the run is finished
MAX_LISTED = 8  # number of runs listed in an error message
PROMPTS_FILE = "prompts.json"  # the instructions to draw from
EMBEDDING_SPACE_FILE = "space.json"  # soft tokens relative to the LM's embeddings
EVALUATION_FILE = "figures.json"  # metrics of `python -m train evaluate`
TYPED = "projector.kind={kind} (for transcribe and export: --projector {kind})"
_TEMPORARY = re.compile(rf"{re.escape(TEMPORARY_INFIX)}([1-9]\d{{0,9}})-[0-9a-f]{{12}}$")  # the writer is a process id
OTHER_EVALUATIONS = "judged"  # folder of the evaluations on other caches than the run's own


def new_run_folder(config: TrainConfig) -> Path:
    """Return the folder for a new run; UserError if it exists."""
    name = config.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{config.projector.kind.replace(':', '.')}"
    folder = Path(config.runs) / name
    require_new(folder)
    return folder


def require_new(folder: Path) -> None:
    """Raise UserError if the run folder exists."""
    if folder.exists() or folder.is_symlink():
        raise UserError(
            f"'{folder}' already exists: choose another name=…, resume it with --resume {folder}, or delete it"
        )


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a run or sweep folder, which need not exist yet: no other process trains in it inside the ``with`` block.

    The kernel releases the lock of a process that dies. On NFS it is as good as the locks of the mount: with
    ``local_lock=flock`` or ``nolock`` it excludes processes of one machine only.

    Raises:
        UserError: another process holds it. The message names the process.
    """
    folder = folder.absolute()
    lock = folder.with_name(f".{folder.name}.lock")
    with ExitStack() as stack:
        if not lock.parent.exists():
            stack.callback(_remove_if_empty, lock.parent)
        with translate_os_errors("locking the run folder", folder):
            make_folder(lock.parent)
            held = stack.enter_context(file_lock(lock, wait=False))
            if held:
                lock.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        if not held:
            raise UserError(f"{_holder(lock)} is training in '{folder}': wait until it ends, or choose another name=…")
        stack.callback(lock.unlink, missing_ok=True)
        remove_abandoned_files(folder)
        yield


def remove_abandoned_files(folder: Path) -> None:
    """Remove the temporary files below a run or sweep folder that processes of this machine left when they died."""
    for parent, _, names in os.walk(folder):
        for name in names:
            found = _TEMPORARY.search(name)
            if found and not _is_alive(int(found[1])):
                with suppress(OSError):
                    os.unlink(os.path.join(parent, name))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _holder(lock: Path) -> str:
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(lock.read_text())
        return f"process {int(found['pid'])} on {found['host']}"
    return "another process"


def create_run_folder(
    folder: Path, config: TrainConfig, data: TrainData, instructions: Instructions | None = None, latest: bool = True
) -> None:
    """Create the folder with ``config.yaml`` (``name`` filled in), ``caches.json`` and ``prompts.json``.

    With ``latest``, also point the link ``latest`` beside the folder at it.
    """
    named = config.model_copy(update={"name": folder.name})
    with translate_os_errors("creating the run folder", folder):
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)  # a killed process may have left it
        text = yaml.safe_dump(named.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        atomic_write(folder / "config.yaml", text.encode(), str(os.getpid()))
        val = {"val_caches": _records(data.held_out)} if config.val.caches else {}
        tasks = {"tasks": list(data.tasks)} if len(data.tasks) > 1 else {}
        write_json(folder / "caches.json", describe_caches(data.caches, data.layers) | val | tasks)
        if instructions is not None:
            write_instructions(folder, instructions)
        if latest:
            link = folder.parent / f".{LATEST}-{os.getpid()}"
            link.unlink(missing_ok=True)
            link.symlink_to(folder.name)
            os.replace(link, folder.parent / LATEST)
        fsync_folder(folder.parent)


def write_instructions(run: Path, instructions: Instructions) -> None:
    """Write ``prompts.json``."""
    write_json(run / PROMPTS_FILE, {task: list(own) for task, own in instructions.by_task.items()})


def describe_caches(caches: Sequence[Cache], layers: LayeredCaches | None = None) -> dict[str, Any]:
    """Return the content of ``caches.json``: feature spec, encoder reference, and what was read of each cache.

    For a run on several layers, ``layers`` provides the spec of each layer, and ``caches`` holds the first layer of
    each corpus.
    """
    first = caches[0]
    layer_specs = {} if layers is None else {"layers": [cache.spec.model_dump() for cache in layers.joined[0].caches]}
    encoder = first.provenance.get("encoder") or {}
    return {
        "spec": first.spec.model_dump(),
        "feature_id": first.feature_id,
        **layer_specs,
        "encoder": encoder.get("reference"),
        "caches": _records(Utterances(caches, np.zeros(0, np.int64), layers)),
    }


def _records(utterances: Utterances) -> list[dict[str, Any]]:
    if utterances.layers is not None:
        return [cache_record(joined.caches[0], joined.caches) for joined in utterances.layers.joined]
    return [cache_record(cache) for cache in utterances.caches]


def read_pins(run: Path) -> tuple[list[Pin], list[Pin]]:
    """Return what a run read of its ``caches`` and of ``val.caches``."""
    cache_info = read_json(run / "caches.json")
    try:
        return pins(cache_info["caches"]), pins(cache_info.get("val_caches", []))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"'{run / 'caches.json'}' does not say which generation and labels the run read ({error} is missing), "
            "because an older version of earshard wrote it: train the run again"
        ) from None


def read_run_instructions(run: Path) -> Instructions | None:
    """Return the content of the file ``prompt.prompts`` when the run was created; None if it had none."""
    path = run / PROMPTS_FILE
    return Instructions(read_json(path)) if path.is_file() else None


def find_run(name: str | None, runs: str | Path = "runs") -> Path:
    """Return the folder of a run, given its path, its name below ``runs``, or None for the newest run.

    Symbolic links are resolved.

    Raises:
        UserError: the run does not exist.
    """
    candidates = [Path(runs) / LATEST] if name is None else [Path(name), Path(runs) / name]
    for folder in candidates:
        if (folder / "config.yaml").is_file():
            return folder.parent / os.readlink(folder) if folder.is_symlink() else folder
    if name is None:
        raise UserError(f"no run exists under '{runs}': train one with `make train`")
    names = sorted(path.parent.name for path in Path(runs).glob("*/config.yaml") if not path.parent.is_symlink())
    known = f"runs under '{runs}': {', '.join(names[-MAX_LISTED:])}" if names else f"no run exists under '{runs}'"
    raise UserError(f"'{name}' is not a run: it has no config.yaml; {known}")


def saved_config(run: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Return the settings of a run, with ``overrides`` applied, to be shown or compared."""
    return load_config(TrainConfig, run / "config.yaml", overrides)


def run_config(run: Path, overrides: Sequence[str] = (), projector: str | None = None) -> TrainConfig:
    """Return the settings of a run, with ``overrides`` applied, to build its model.

    Args:
        projector: import path of the run's own projector class; ``projector.kind`` in ``overrides`` does the same.

    Raises:
        UserError: also if the folder names a projector class that would be imported, and the caller does not.
    """
    config = saved_config(run, overrides)
    require_chosen_projector(config.projector, run, projector or typed_projector(overrides))
    return config


def typed_projector(overrides: Sequence[str]) -> str | None:
    """Return ``projector.kind`` as ``key=value`` arguments set it; None if they do not."""
    kind = None
    for _, key, value in parse_overrides(overrides, TrainConfig):
        if key == "projector.kind":
            kind = str(value)
        elif key == "projector" and isinstance(value, dict):
            kind = str(value.get("kind"))
    return kind


def require_chosen_projector(projector: object, folder: Path, chosen: str | None, fix: str = TYPED) -> None:
    """Raise UserError if a file in ``folder`` names a class to import that the user did not name in this command.

    Args:
        projector: settings of a projector.
        chosen: the import path that the user named.
        fix: what to add to the command; ``{kind}`` is the class.
    """
    if isinstance(projector, CustomConfig) and projector.kind != chosen:
        raise UserError(
            f"'{folder}' has a projector of the class {projector.kind}, which is not part of earshard, and a folder "
            f"does not decide what is imported: if you know this class, add {fix.format(kind=projector.kind)} to the "
            "command"
        )


def read_cache_info(run: Path) -> dict[str, Any]:
    """Return the content of ``caches.json`` of a run, with ``spec`` as a FeatureSpec."""
    cache_info = read_json(run / "caches.json")
    return {**cache_info, "spec": FeatureSpec.parse(cache_info.get("spec"), str(run / "caches.json"))}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a run folder; UserError if it is missing or corrupt."""
    return disk.read_json(
        path,
        missing_hint="the run is incomplete; train it again under another name=…",
        corrupt_hint="train the run again",
    )


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Write ``tree`` to ``path`` atomically."""
    with translate_os_errors("writing a file of the run", path):
        atomic_write(path, (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode(), str(os.getpid()))
