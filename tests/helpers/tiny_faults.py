"""Realistic file faults, injected into a small cache one at a time and undone.

Inside ``with fault():`` of a :class:`Fault`, the cache is broken; afterwards it is whole again.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tiny_cache import make_spec

from shards.commit.finalize import finalize, write_plan
from shards.commit.writer import ShardWriter
from shards.format import tar
from shards.format.layout import UTTERANCE_SCHEMA, Layout
from shards.format.records import seal, unseal


def make_small_cache(folder: Path, codec: str = "f16", tensors: str = "weights", seed: int = 0) -> Path:
    """Write three shards of three utterances; the middle one of each is a failure. Shards 0 and 1 have one size."""
    layout, spec, owner = Layout(folder), make_spec(4, codec, tensors=tensors), "tiny"
    keys = [f"utt-{seed}-{i}" for i in range(9)]
    rows = [
        {"key": key, "id": f"{key}.wav", "audio": f"{key}.wav", "samples": 640 * (1 + i % 3), "text": f"text of {i}"}
        | {"speaker": "s", "split": "train", "shard": i // 3, "row": i % 3}
        for i, key in enumerate(keys)
    ]
    plan = write_plan(layout, pa.Table.from_pylist(rows, schema=UTTERANCE_SCHEMA), owner)
    for shard in range(3):
        with ShardWriter(layout, shard, spec, plan.id, owner) as writer:
            for row in plan.shard_rows(shard):
                if row["row"] == 1:
                    writer.add_failure(row["key"], "decode", "empty file")
                    continue
                x = np.random.default_rng([len(tensors), seed, shard, row["row"]]).standard_normal(
                    (row["samples"] // 320, 4)
                )
                writer.add(row, x.astype(np.float32), samples=row["samples"], audio_sha256="ab" * 32)
            writer.commit({"seconds": 0.5})
    finalize(layout, spec, plan, owner, {"source": {"name": "small"}})
    return folder


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let ``change`` alter the object in a sealed JSON file, and seal it again."""
    tree = unseal(path)
    change(tree)
    path.write_bytes(seal(tree))


@dataclass(frozen=True)
class Fault:
    kind: str  # a row of the table
    where: str  # printed when the fault is not found
    fast: bool  # must the check that leaves the tars unread find it?
    apply: Callable[[], None]
    touched: tuple[Path, ...]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        kept = {path: path.read_bytes() if path.is_file() else None for path in self.touched}
        try:
            self.apply()
            yield
        finally:
            for path, data in kept.items():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
                if data is not None:
                    path.write_bytes(data)


def flips(folder: Path, count: int | None, seed: int) -> Iterator[Fault]:
    """Yield flips of one bit, at ``count`` positions of each kind (None: at every byte)."""
    rng = random.Random(seed)
    for kind, path, positions in places(folder):
        chosen = positions if count is None or count >= len(positions) else rng.sample(positions, count)
        for position in chosen:
            bit = 1 << rng.randrange(8)
            where = f"{path.name} byte {position} bit {bit}"
            yield Fault(f"flip in {kind}", where, path.suffix != ".tar", _flip(path, position, bit), (path,))


def places(folder: Path) -> Iterator[tuple[str, Path, list[int]]]:
    layout = Layout(folder)
    for path in sorted(layout.shards.glob("*.tar")):
        found: dict[str, list[int]] = {"tar header": [], "npy header": [], "payload": [], "member JSON": []}
        end = 0
        for member in tar.iter_members(memoryview(path.read_bytes())):
            found["tar header"] += range(member.offset - 512, member.offset)
            stop, end = member.offset + member.length, member.offset + member.length + (-member.length % 512)
            if member.name.endswith(".json"):
                found["member JSON"] += range(member.offset, stop)
            else:
                found["npy header"] += range(member.offset, member.offset + 128)
                found["payload"] += range(member.offset + 128, stop)
            found.setdefault("tar padding", []).extend(range(stop, end))
        found["tar padding"] += range(end, path.stat().st_size)
        yield from ((kind, path, positions) for kind, positions in found.items())
    for kind, paths in {
        "shard parquet": sorted(layout.shards.glob("*.parquet")),
        "commit record": sorted(layout.shards.glob("*.json")),
        "CACHE.json": [layout.cache],
        "plan": [layout.plan],
        "manifest": [layout.manifest],
        "failures": [layout.failures],
    }.items():
        yield from ((kind, path, list(range(path.stat().st_size))) for path in paths)


def _flip(path: Path, position: int, bit: int) -> Callable[[], None]:
    def apply() -> None:
        with open(path, "r+b") as file:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ bit]))

    return apply


def truncations(folder: Path, every: int) -> Iterator[Fault]:
    layout = Layout(folder)
    for path in (layout.tar(1), layout.rows(1), layout.record(1), layout.cache, layout.plan, layout.manifest):
        step = every if path.suffix == ".tar" else max(every // 4, 1)
        for length in range(0, path.stat().st_size, step):
            yield Fault(
                f"truncation of {path.suffix[1:]}",
                f"{path.name} to {length}",
                True,
                lambda path=path, length=length: os.truncate(path, length),
                (path,),
            )


def exchanges(folder: Path, other: Path, replanned: Path) -> Iterator[Fault]:
    """Yield faults of whole files: swapped, from another cache, missing, duplicated, longer, with a hole."""
    layout = Layout(folder)
    trio = (layout.tar, layout.rows, layout.record)
    for names, fast in (((0,), False), ((1,), True), ((2,), True), ((0, 1), True), ((0, 1, 2), True)):
        paths = [(trio[i](0), trio[i](1)) for i in names]
        flat = tuple(path for pair in paths for path in pair)
        yield Fault("swapped shards", f"{[p.name for p in flat]}", fast, lambda paths=paths: _swap(paths), flat)
    for kind, source in (("shard of other features", other), ("shard of another plan", replanned)):
        theirs = Layout(source)
        for names in ((0, 1, 2), (0,), (1,), (2,)):
            pairs = [((theirs.tar, theirs.rows, theirs.record)[i](1), trio[i](1)) for i in names]
            same_size = names == (0,) and pairs[0][0].stat().st_size == pairs[0][1].stat().st_size
            yield Fault(kind, str(names), not same_size, lambda pairs=pairs: _copy(pairs), tuple(b for _, b in pairs))
    for path in _all(folder):
        yield Fault("deleted file", path.name, True, path.unlink, (path,))
        yield Fault("empty file", path.name, True, lambda path=path: path.write_bytes(b""), (path,))
        yield Fault("folder for file", path.name, True, lambda path=path: (path.unlink(), path.mkdir()), (path,))
        yield Fault("pipe for file", path.name, True, lambda path=path: (path.unlink(), os.mkfifo(path)), (path,))
        yield Fault("grown file", path.name, True, lambda path=path: _append(path), (path,))
        yield Fault("zeroed file", path.name, path.suffix != ".tar", lambda path=path: _zero(path), (path,))
    extra = layout.tar(3)
    yield Fault("tar too many", extra.name, True, lambda: shutil.copyfile(layout.tar(0), extra), (extra,))


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _swap(pairs: list[tuple[Path, Path]]) -> None:
    for a, b in pairs:
        first, second = a.read_bytes(), b.read_bytes()
        a.write_bytes(second)
        b.write_bytes(first)


def _copy(pairs: list[tuple[Path, Path]]) -> None:
    for source, target in pairs:
        shutil.copyfile(source, target)


def _append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(bytes(512))


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))
