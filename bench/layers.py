"""Several layers at small cost: what a projector and linear probes lose when the features are made smaller.

    python bench/layers.py caches/speech-600/whisper-base-L[0246]-*                # one cache per layer of one corpus
    python bench/layers.py CACHE … --labels mine.csv --columns speaker,pitch --steps 400 --json layers.json

Each form is written as caches by the project's own writer and read like any other: the layers as stored, as int8, with
the means of 2 or 4 neighbouring frames, and projected on the first principal components of the training frames (one
basis for all layers, since a projector sees their weighted sum). For each: bytes for a second of audio; stage 1 of an
MLP projector on all layers, whose time steps are 80 ms in every form (held-out nats per token and error rates of the
likeliest path); and the best layer of ``train probe`` for each column of the labels. The last cache alone comes first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from shards.commit.claims import new_owner
from shards.commit.finalize import finalize, write_plan
from shards.commit.folder import add_labels
from shards.commit.writer import ShardWriter
from shards.format.layout import Layout
from shards.format.schemas import PLAN_SCHEMA
from shards.format.spec import FeatureSpec
from shards.read.cache import Cache

ROOT = Path(__file__).parent.parent
STACK = 4  # frames of 20 ms in a time step of the projector
# name: codec, frames that are averaged, principal components (0: all channels)
FORMS = {
    "f16": ("f16", 1, 0),
    "int8": ("int8", 1, 0),
    "int8, mean of 2": ("int8", 2, 0),
    "int8, mean of 4": ("int8", 4, 0),
    "int8, 256 components": ("int8", 1, 256),
    "int8, 128 components": ("int8", 1, 128),
    "int8, 64 components": ("int8", 1, 64),
    "int8, 128 components, mean of 2": ("int8", 2, 128),
}


def principal_components(caches: Sequence[Cache], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean [channels] and ``count`` orthonormal directions [channels, count] of the training frames."""
    channels = caches[0].spec.channels
    total, square, frames = np.zeros(channels), np.zeros((channels, channels)), 0
    for cache in caches:
        for row, split in enumerate(cache.strings("split", range(len(cache)))):
            if split != "val":
                x = np.asarray(cache.features(row), dtype=np.float64)
                total, square, frames = total + x.sum(axis=0), square + x.T @ x, frames + len(x)
    mean = total / frames
    _, vectors = np.linalg.eigh(square / frames - np.outer(mean, mean))
    return mean.astype(np.float32), vectors[:, ::-1][:, :count].astype(np.float32)


def smaller(x: np.ndarray, pool: int, basis: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """Return float32 [ceil(frames / pool), components] of features [frames, channels]; the last may average fewer."""
    x = np.asarray(x, dtype=np.float32)
    x = x if basis is None else (x - basis[0]) @ basis[1]
    starts = np.arange(0, len(x), pool)
    counts = np.diff(np.append(starts, len(x)))[:, None]
    return np.add.reduceat(x, starts, axis=0) / counts.astype(np.float32) if pool > 1 else x


def write(folder: Path, cache: Cache, name: str, basis: tuple[np.ndarray, np.ndarray] | None) -> str:
    """Write ``cache`` in the form ``name`` and return its folder."""
    codec, pool, components = FORMS[name]
    old = cache.spec
    changed = {"codec": codec, "hop": old.hop * pool, "channels": components or old.channels}
    changed["tensors"] = hashlib.sha256(f"{old.tensors} {name}".encode()).hexdigest()
    spec = FeatureSpec.model_validate({**old.model_dump(), **changed})
    layout, owner = Layout(folder / f"L{old.layer}"), new_owner()
    rows = [cache.row(index) for index in range(len(cache))]
    planned = [{**row, "shard": 0, "row": index} for index, row in enumerate(rows)]
    plan = write_plan(layout, 0, [pa.Table.from_pylist(planned, schema=PLAN_SCHEMA)], owner)
    add_labels(layout, cache.labels.table, "source", "bench", reserved=True)
    with ShardWriter(layout, 0, spec, plan.id, owner) as writer:
        for row, utterance in zip(rows, plan.shard_rows(0), strict=True):
            index = utterance["row"]
            features = smaller(cache.features(index), pool, basis)
            labels = {"text": row.get("text", "")}
            writer.add(utterance, features, samples=row["samples"], audio_id=row["audio_id"], labels=labels)
        writer.commit({"seconds": 0.0})
    finalize(layout, spec, 0, plan, owner, {"encoder": {"reference": "path:none"}, "source": {"name": "bench"}})
    return str(layout.path)


def python(*words: str) -> None:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words[:4])}: {done.stderr[-3000:]}")


def stage_one(folder: Path, caches: list[str], pool: int, steps: int, seed: int) -> dict[str, Any]:
    """Train stage 1 on all ``caches`` together and return its summary."""
    recipe = {
        "caches": [caches if len(caches) > 1 else caches[0]],
        "val": {"fraction": 0.1},
        "projector": {"kind": "mlp", "stack": STACK // pool, "hidden": 512, "norm": "rms"},
        "pretrain": {"steps": steps, "augment": {"time_masks": 4, "channel_masks": 0, "speed": 0.1}},
        "batch": {"size": 8},
        "seed": seed,
        "runs": str(folder),
        "name": "run",
    }
    (folder / "run.yaml").write_text(json.dumps(recipe))  # is YAML
    python("-m", "train", "pretrain", "--config", str(folder / "run.yaml"))
    found: dict[str, Any] = json.loads((folder / "run" / "pretrain" / "summary.json").read_text())
    return found


def probes(folder: Path, caches: list[str], labels: str | None, columns: str) -> dict[str, float]:
    """Return the best layer's score of every column."""
    words = ["--labels", labels] if labels else []
    python("-m", "train", "probe", *caches, *words, "--columns", columns, "--no-words", "--out", str(folder / "probe"))
    results = json.loads((folder / "probe" / "probe.json").read_text())["results"]
    best: dict[str, float] = {}
    for each in results:
        best[each["probe"]] = max(best.get(each["probe"], float("-inf")), each["value"])
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caches", nargs="+", help="caches of one corpus, one per layer")
    parser.add_argument("--labels", help="label file with the columns (default: the labels of the source)")
    parser.add_argument("--columns", default="speaker")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--steps", type=int, default=400, help="of stage 1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    opened = [Cache.open(path) for path in arguments.caches]
    columns = arguments.columns.split(",")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"| layers | form | kB/s | nats per token | CER | WER | {' | '.join(columns)} |")
    print(f"|{'---|' * (6 + len(columns))}", flush=True)
    rows: list[dict[str, Any]] = []
    for name, members in [("f16", opened[-1:]), *((form, opened) for form in arguments.forms)]:
        _, pool, components = FORMS[name]
        basis = principal_components(members, components) if components else None
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            caches = [write(folder, cache, name, basis) for cache in members]
            stored = [Cache.open(path).info.counts for path in caches]
            seconds = stored[0]["samples"] / members[0].spec.sampling_rate
            row = {"layers": [cache.spec.layer for cache in members], "form": name}
            row["kilobytes_per_second"] = sum(each["bytes"] for each in stored) / seconds / 1000
            row |= probes(folder, caches, arguments.labels, arguments.columns)
            for seed in arguments.seeds:
                (folder / str(seed)).mkdir()
                summary = stage_one(folder / str(seed), caches, pool, arguments.steps, seed)
                rows.append({**row, "seed": seed, **{key: summary[key] for key in ("val_loss", "cer", "wer")}})
        same = rows[-len(arguments.seeds) :]
        mean = {key: sum(each[key] for each in same) / len(same) for key in ("val_loss", "cer", "wer")}
        figures = [
            f"{row['kilobytes_per_second']:.1f}",
            f"{mean['val_loss']:.2f}",
            f"{mean['cer']:.1%}",
            f"{mean['wer']:.1%}",
        ]
        listed = ", ".join(map(str, row["layers"]))
        print(
            f"| {listed} | {name} | {' | '.join(figures)} | {' | '.join(f'{row[each]:.3f}' for each in columns)} |",
            flush=True,
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
