"""bench/gpu.py runs on a CPU if asked to, and otherwise reports that it needs a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent.parent / "bench/gpu.py"


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *argv], capture_output=True, text=True, cwd=SCRIPT.parent.parent
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence():
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: torch finds no GPU")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_its_code_runs_on_a_cpu():
    done = run("--device", "cpu", "--sizes", "tiny", "--clips", "3", "--batch", "1")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("tiny ")]
    figures = line.split()
    assert all(float(figure) > 0 for figure in figures[1:4])
    assert figures[4] == "-"  # nothing is compiled on a CPU
    assert "busy end to end: " in done.stdout
