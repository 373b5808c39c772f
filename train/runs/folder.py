"""Run folders: creating, finding and reading them.

    runs/demo/   config.yaml  caches.json  metrics.jsonl  evaluations.jsonl  checkpoints/  projector.safetensors
                 summary.json  report.html
    runs/latest -> demo

``caches.json`` records the features that the run was trained on (spec, manifest ids, encoder reference), so that a
trained run can be used without its caches.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from shards import files as disk
from shards.config.base import load_config
from shards.errors import UserError
from shards.files import atomic_write, fsync_folder, translate_os_errors
from shards.format.spec import FeatureSpec
from train.config.train import TrainConfig

if TYPE_CHECKING:
    from shards.read.cache import Cache
    from train.data.layers import LayeredCaches

LATEST = "latest"
MAX_LISTED = 8  # number of runs listed in an error message
EMBEDDING_SPACE_FILE = "space.json"  # soft tokens relative to the LM's embeddings
EVALUATION_FILE = "figures.json"  # metrics of `python -m train evaluate`
OTHER_EVALUATIONS = "judged"  # folder of the evaluations on other caches than the run's own


def new_run_folder(config: TrainConfig) -> Path:
    """Return the folder for a new run; UserError if it exists."""
    name = config.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{config.projector.kind.replace(':', '.')}"
    folder = Path(config.runs) / name
    if folder.exists() or folder.is_symlink():
        raise UserError(
            f"'{folder}' already exists: choose another name=…, resume it with --resume {folder}, or delete it"
        )
    return folder


def create_run_folder(
    folder: Path, config: TrainConfig, caches: Sequence[Cache], layers: LayeredCaches | None = None, latest: bool = True
) -> None:
    """Create the folder with ``config.yaml`` (``name`` filled in) and ``caches.json``.

    With ``latest``, also point the link ``latest`` beside the folder at it.
    """
    named = config.model_copy(update={"name": folder.name})
    with translate_os_errors("creating the run folder", folder):
        (folder / "checkpoints").mkdir(parents=True)
        text = yaml.safe_dump(named.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        atomic_write(folder / "config.yaml", text.encode(), str(os.getpid()))
        write_json(folder / "caches.json", describe_caches(caches, layers))
        if latest:
            link = folder.parent / f".{LATEST}-{os.getpid()}"
            link.unlink(missing_ok=True)
            link.symlink_to(folder.name)
            os.replace(link, folder.parent / LATEST)
        fsync_folder(folder.parent)


def describe_caches(caches: Sequence[Cache], layers: LayeredCaches | None = None) -> dict[str, Any]:
    """Return the content of ``caches.json``: feature spec, encoder reference, and id and size of each cache.

    For a run on several layers, ``layers`` provides the spec of each layer, and ``caches`` holds the first layer of
    each corpus.
    """
    first = caches[0]
    layer_specs = {} if layers is None else {"layers": [cache.spec.model_dump() for cache in layers.joined[0].caches]}
    encoder = (first.info.get("provenance") or {}).get("encoder") or {}
    return {
        "spec": first.spec.model_dump(),
        "feature_id": first.feature_id,
        **layer_specs,
        "encoder": encoder.get("reference"),
        "caches": [
            {
                "path": os.path.abspath(cache.path) if cache.mirror is None else cache.location,
                "manifest_id": cache.manifest_id,
                "utterances": len(cache),
            }
            for cache in caches
        ],
    }


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


def run_config(run: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Return the settings of a run, with ``overrides`` applied."""
    return load_config(TrainConfig, run / "config.yaml", overrides)


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
