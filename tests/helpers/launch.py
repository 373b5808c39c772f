"""Start runs with several processes through torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}


SECONDS = 300  # generous, because the machine may be busy


def torchrun(
    processes: int, *words: object, job: str = "fit", launcher: Sequence[object] = ("--standalone",)
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, launcher), "--nproc-per-node", str(processes)]
    return popen([*command, "-m", "train", job, *map(str, words)])


def popen(command: Sequence[str], **env: object) -> subprocess.Popen[str]:
    environment = {**ENV, **{name: str(value) for name, value in env.items()}}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Return standard output and standard error of a launch that must succeed."""
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    return out, err


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Process id of each rank that a launcher started on this machine."""
    found = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = [int(word.split(b"=")[1]) for word in environment if word.startswith(b"RANK=")]
        if rank:
            found[rank[0]] = int(child)
    return found


def at_step(process: subprocess.Popen[str], step: int, of: int) -> None:
    """Return when ``process`` has printed the line of ``step``."""
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
        if line.startswith(f"step {step:>6}/{of}"):
            return
    raise AssertionError(process.stderr.read())
