"""bench/gpu.py runs on a CPU if asked to, and otherwise reports that it needs a GPU."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from scripts import load_script

SCRIPT = Path(__file__).parent.parent.parent / "bench/gpu.py"


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *argv], capture_output=True, text=True, cwd=SCRIPT.parent.parent
    )


def test_a_command_whose_time_is_over_leaves_no_child(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    gpu = load_script("bench/gpu_training.py")
    pid = tmp_path / "pid"

    def expire(*_):
        raise TimeoutError("over")

    before = signal.signal(signal.SIGALRM, expire)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(TimeoutError):
            gpu.run_whole(["sh", "-c", f"sleep 1000 & echo $! > '{pid}'; wait"])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    status, until = Path(f"/proc/{pid.read_text().strip()}/status"), time.monotonic() + 10
    while status.exists() and "(zombie)" not in status.read_text():
        assert time.monotonic() < until, "the child still runs"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence():
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: torch finds no GPU")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_its_code_runs_on_a_cpu_and_a_failing_step_does_not_lose_the_others(tmp_path):
    argv = ("--device", "cpu", "--sizes", "tiny", "--clips", "4", "--batch", "1", "--json", str(tmp_path / "gpu.json"))
    done = run(*argv, "--online", "-1")
    assert done.returncode == 0, done.stderr
    steps = {name: step["result"] for name, step in json.loads((tmp_path / "gpu.json").read_text())["steps"].items()}
    assert "error" in steps.pop("online")
    assert [name for name, result in steps.items() if isinstance(result, dict) and "error" in result] == []
    assert max(steps["fidelity"]["float32"]) < 1e-4
    assert all(steps["companions"].values())
    assert steps["resume"]["equal"]
    assert steps["pass tiny"]["plain ms"] > 0
    assert "compiled ms" not in steps["pass tiny"]  # nothing is compiled on a CPU
    assert steps["end to end tiny"]["audio-s/s"] > 0
