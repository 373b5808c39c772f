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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tiny_cache import append, make_spec, plan_row

from shards.commit.folder import add_labels
from shards.format import tar
from shards.format.layout import Layout
from shards.format.records import seal, unseal


def make_small_cache(folder: Path, codec: str = "f16", tensors: str = "weights", seed: int = 0) -> Path:
    """Write a generation of two shards and one of one shard, and two label sets, ``source`` and ``mine``.

    Each shard has three utterances, the middle one a failure. The last shard has a new utterance, a failure, and other
    audio of the first utterance. Shards 0 and 1 have one size.
    """
    spec, keys = make_spec(4, codec, tensors=tensors), [f"utt-{seed}-{i}" for i in range(8)]
    rows = [plan_row(key, 640 * (1 + i % 3), i // 3, i % 3, f"{key}.wav") for i, key in enumerate(keys)]
    rows.append(plan_row(keys[0], 1280, 2, 2, "changed.wav"))
    labels = [{"key": key, "text": f"text of {i}", "speaker": "s", "split": "train"} for i, key in enumerate(keys)]

    def features(key: str, frames: int) -> np.ndarray:
        rng = np.random.default_rng([len(tensors), seed, int(key[-1]), frames])
        return rng.standard_normal((frames, 4), dtype=np.float32)

    for part, known in ((rows[:6], labels[:6]), (rows[6:], labels)):
        failed, provenance = {keys[1], keys[4], keys[7]}, {"source": {"name": "small"}}
        append(folder, spec, part, known, features, failed=failed, provenance=provenance)
    mine = pa.table({"key": keys, "text": [f"my {i}" for i in range(8)], "prompt": ["count"] * 8})
    add_labels(Layout(folder), mine, "mine", "tiny")
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
    for kind, pattern in {
        "shard parquet": "shards/*.parquet",
        "commit record": "shards/*.json",
        "CACHE.json": "CACHE.json",
        "plan": "plans/*",
        "manifest": "manifests/*",
        "failures": "failures/*",
        "LABELS.json": "labels/LABELS.json",
        "label set": "labels/*.parquet",
    }.items():
        yield from ((kind, path, list(range(path.stat().st_size))) for path in sorted(folder.glob(pattern)))


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
    shard = (layout.tar(1), layout.rows(1), layout.record(1))
    tables = (layout.plan(0), layout.plan(1), layout.manifest(0), layout.manifest(1), layout.failures(1))
    for path in (*shard, *tables, layout.cache, *sorted(layout.labels.iterdir())):
        step = every if path.suffix == ".tar" else max(every // 4, 1)
        for length in range(0, path.stat().st_size, step):
            yield Fault(
                f"truncation of {path.suffix[1:]}",
                f"{path.name} to {length}",
                True,
                lambda path=path, length=length: os.truncate(path, length),
                (path,),
            )


def damages(folder: Path, count: int, seed: int) -> Iterator[Fault]:
    """Yield faults at random places of random files: bits flipped, bytes overwritten, cut or added, the file lost."""
    rng = random.Random(seed)
    files = _all(folder)
    for _ in range(count):
        path = rng.choice(files)
        size, kind = path.stat().st_size, rng.choice(("flip", "overwrite", "truncate", "extend", "remove"))
        at, data = rng.randrange(size), path.read_bytes()
        if kind == "flip":
            new = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == "overwrite":
            new = (data[:at] + rng.randbytes(rng.randrange(1, 600)))[:size]
            new += data[len(new) :]
        elif kind == "extend":
            new = data + rng.choice((b"\0", b"\n", data, rng.randbytes(512)))
        else:
            new = data[:at]
        if new == data:
            continue
        apply = path.unlink if kind == "remove" else partial(path.write_bytes, new)
        fast = path.suffix != ".tar" or kind not in ("flip", "overwrite")
        yield Fault(kind, f"{path.relative_to(folder)} at {at}", fast, apply, (path,))


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
    for name, paths in {
        "plan": (layout.plan(0), layout.plan(1)),
        "manifest": (layout.manifest(0), layout.manifest(1)),
        "failures": (layout.failures(0), layout.failures(1)),
        "label set": tuple(sorted(layout.labels.glob("*.parquet"))[:2]),
    }.items():
        swap = partial(_swap, [paths])
        yield Fault(f"swapped {name}", f"{[path.name for path in paths]}", True, swap, paths)
    for path in sorted(layout.labels.glob("*.parquet")):
        spare = path.with_name("spare-00000000.parquet")
        yield Fault("label set too many", spare.name, True, partial(shutil.copyfile, path, spare), (spare,))


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
