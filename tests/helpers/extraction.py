"""Real extractions in separate processes, which tests start, kill and compare.

A fork server imports torch once, so a new process starts in a fraction of a second. It runs the entry point of
``python -m pipeline`` and can SIGKILL itself at its n-th file operation: before it, after it, or in the middle of a
write.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from shards.errors import run_command

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "transformers.models.whisper.modeling_whisper", "pipeline.extract.loop", "pipeline"]
)

OPERATIONS = ("open", "writev", "write", "fsync", "replace", "link", "unlink", "rename", "utime")


@dataclass(frozen=True)
class Kill:
    """SIGKILL at the ``at``-th file operation; ``when`` is before, after or inside (after half of a write)."""

    at: int
    when: str


def start(
    argv: list[str],
    kill: Kill | None = None,
    log: Path | None = None,
    count: Path | None = None,
    before: Callable[[], object] | None = None,
    package: str = "pipeline",
) -> Any:
    """Start ``python -m <package> <argv>``; write its output to ``log`` and its number of file operations to ``count``.

    ``before`` (a module-level function, or a partial of one) is called first in the new process.
    """
    process = _context.Process(target=_child, args=(argv, kill, log, count, before, package))
    process.start()
    return process


def run(argv: list[str], *args: Any, **kwargs: Any) -> int:
    """Run to the end, with the arguments of :func:`start`; return the exit code, -9 if the process was killed."""
    process = start(argv, *args, **kwargs)
    process.join()
    code: int = process.exitcode
    return code


def _child(
    argv: list[str],
    kill: Kill | None,
    log: Path | None,
    count: Path | None,
    before: Callable[[], object] | None,
    package: str,
) -> None:
    os.setsid()
    out = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if before is not None:
        before()
    done = [0]
    for name in OPERATIONS:
        setattr(os, name, _counted(name, getattr(os, name), done, kill))
    command = import_module(f"{package}.__main__").command
    try:
        code = run_command(command, argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    if count is not None:
        count.write_text(str(done[0]))
    os._exit(code)


def _counted(name: str, real: Any, done: list[int], kill: Kill | None) -> Any:
    def operation(*args: Any, **kwargs: Any) -> Any:
        done[0] += 1
        mine = kill is not None and done[0] == kill.at
        if mine and kill.when == "inside" and name == "writev":
            data = b"".join(args[1])
            os.pwrite(args[0], data[: len(data) // 2], os.lseek(args[0], 0, os.SEEK_CUR))
        if mine and kill.when != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return operation


def write_corpus(folder: Path, n: int, seconds: float = 0.2) -> None:
    """Write ``n`` short clips of noise, and ``clips.csv`` for a source of kind ``manifest``."""
    rng = np.random.default_rng(7)
    with open(folder / "clips.csv", "w") as manifest:
        manifest.write("audio,text,speaker\n")
        for i in range(n):
            noise = rng.normal(0, 0.1, int(16000 * seconds) + 997 * i).astype(np.float32)
            soundfile.write(folder / f"clip {i:02d}.flac", noise, 16000)
            manifest.write(f"clip {i:02d}.flac,text number {i},s{i % 4}\n")


def write_world(folder: Path, n: int) -> tuple[Path, Path]:
    """Write a corpus of ``n`` clips into ``folder`` and a tiny Whisper below it; return both for :func:`words`."""
    from tiny_whisper import write_tiny_whisper

    write_corpus(folder, n)
    return folder, write_tiny_whisper(folder / "whisper")


def words(root: Path, corpus: Path, whisper: Path, *more: str) -> list[str]:
    """Return the command line that extracts ``corpus`` into small shards below ``root``."""
    return [
        "extract",
        f"root={root}",
        "source.kind=manifest",
        f"source.path={corpus}/clips.csv",
        f"encoder.model=path:{whisper}",
        "encoder.dtype=float32",
        "encoder.batch_size=2",
        "shard_mb=0.02",
        "lease_seconds=3",
        *more,
    ]


def only_cache(root: Path) -> Path:
    """Return the only cache below ``root``."""
    (cache,) = root.glob("[!.]*/*")
    return cache


def snapshot(root: Path) -> dict[str, Any]:
    """Return every file of the caches below ``root`` by relative path: its bytes, or for JSON the tree without times.

    ``root`` may be a cache itself. What extraction remembers about audio files and encoders is left out.
    """
    files: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.is_file() and not name.parts[0].startswith("."):
            files[str(name)] = _untimed(json.loads(path.read_bytes())) if path.suffix == ".json" else path.read_bytes()
    return files


TIMES = ("timings", "sha256", "seconds", "encode_seconds", "finished", "last_run_seconds", "made", "from", "config")


def _untimed(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_untimed(each) for each in tree]
    if not isinstance(tree, dict):
        return tree
    digests = {"tar", "parquet", "plan", "manifest", "failures", "file"}  # their sha256 is not a seal
    return {key: value if key in digests else _untimed(value) for key, value in tree.items() if key not in TIMES}
