"""bench/step.py measures a step, its bound and the plain loop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_lm import save_tiny_lm

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_it_runs_with_a_tiny_language_model(tmp_path):
    argv = ["--lm", f"path:{save_tiny_lm(tmp_path / 'lm')}", "--steps", "2", "--batch", "2", "--dtype", "float32"]
    argv += ["--padding-free", "--shapes", "demo", "--json", str(tmp_path / "step.json")]
    command = [sys.executable, str(ROOT / "bench/step.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "step.json").read_text())["results"]
    assert 0 < result["of_bound"] < 1
    assert result["seconds"]["earshard"] > 0
    assert result["seconds"]["plain loop"] > 0
    assert result["seconds"]["no padding"] > 0
    assert sum(result["shares"].values()) == pytest.approx(1, abs=0.05)
    assert "x the plain loop" in done.stdout
