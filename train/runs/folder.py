"""Run folders: where a run stands, what is in it, and how its trained model comes back.

    runs/demo/   config.yaml  caches.json  metrics.jsonl  evaluations.jsonl  checkpoints/  projector.safetensors
                 summary.json  report.html
    runs/latest -> demo

In: a config, or the path of a run. Out: a new folder, the config of a run, its trained model. ``caches.json`` says
which features the run was trained on (spec, manifest ids, the encoder's reference), so that a run needs no cache to be
used.
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
MAX_LISTED = 8  # runs that an error names
EMBEDDING_SPACE_FILE = "space.json"  # soft tokens among the LM's embeddings
EVALUATION_FILE = "figures.json"  # of an evaluation by command
OTHER_EVALUATIONS = "judged"  # folder of what a run was judged on beside what it held out


def new_run_folder(config: TrainConfig) -> Path:
    """Where a new run goes; UserError when a run stands there already."""
    name = config.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{config.projector.kind.replace(':', '.')}"
    folder = Path(config.runs) / name
    if folder.exists() or folder.is_symlink():
        raise UserError(
            f"'{folder}' exists already: choose another name=…, go on with it by --resume {folder}, or delete it"
        )
    return folder


def create_run_folder(
    folder: Path, config: TrainConfig, caches: Sequence[Cache], layers: LayeredCaches | None = None, latest: bool = True
) -> None:
    """Make the folder with ``config.yaml`` (``name`` filled in) and ``caches.json``; ``latest`` points a link at it."""
    named = config.model_copy(update={"name": folder.name})
    with translate_os_errors("making the run folder", folder):
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
    """The content of ``caches.json``: one feature spec, the caches' ids and counts, the encoder's reference.

    Of a run on several layers, ``layers`` lists the spec of each, and ``caches`` holds the first layer of each corpus.
    """
    first = caches[0]
    several = {} if layers is None else {"layers": [cache.spec.model_dump() for cache in layers.joined[0].caches]}
    encoder = (first.info.get("provenance") or {}).get("encoder") or {}
    return {
        "spec": first.spec.model_dump(),
        "feature_id": first.feature_id,
        **several,
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
    """The folder of a run from its path, its name below ``runs``, or ``None`` for the newest; links are followed.

    Raises:
        UserError: there is no such run.
    """
    candidates = [Path(runs) / LATEST] if name is None else [Path(name), Path(runs) / name]
    for place in candidates:
        if (place / "config.yaml").is_file():
            return place.parent / os.readlink(place) if place.is_symlink() else place
    if name is None:
        raise UserError(f"there is no run under '{runs}' yet: train one with `make train`")
    names = sorted(path.parent.name for path in Path(runs).glob("*/config.yaml") if not path.parent.is_symlink())
    known = f"under '{runs}' stand {', '.join(names[-MAX_LISTED:])}" if names else f"there is no run under '{runs}' yet"
    raise UserError(f"'{name}' is not a run: it has no config.yaml; {known}")


def run_config(run: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The settings that a run was made with, with ``overrides`` applied."""
    return load_config(TrainConfig, run / "config.yaml", overrides)


def read_cache_info(run: Path) -> dict[str, Any]:
    """``caches.json`` of a run; its ``spec`` as a FeatureSpec."""
    cache_info = read_json(run / "caches.json")
    return {**cache_info, "spec": FeatureSpec.parse(cache_info.get("spec"), str(run / "caches.json"))}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a run folder; UserError when it is missing or damaged."""
    return disk.read_json(
        path,
        missing_hint="the run is not whole, train it again under another name=…",
        corrupt_hint="train the run again",
    )


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Put ``tree`` under ``path`` at once."""
    with translate_os_errors("writing a run's file", path):
        atomic_write(path, (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode(), str(os.getpid()))
