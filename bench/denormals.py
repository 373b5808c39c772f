"""Stage 1 with and without numbers below 1.2e-38, on the CPU: milliseconds a step, and whether the losses differ.

    python bench/denormals.py CACHE                                                    # 300 steps, seven minutes
    python bench/denormals.py CACHE --config configs/train/librispeech.yaml pretrain.steps=700

Trains the same stage 1 twice, each in a process of its own. ``kept`` leaves the CPU as it starts, ``flushed`` is what a
run does (``train/distributed/device.py``).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

KEPT = "import torch; torch.set_flush_denormal = lambda on: False\n"
COMMAND = "import sys; from train.__main__ import command; sys.exit(command(sys.argv[1:]))"
SETTINGS = ["pretrain.steps=300", "pretrain.eval_every=0"]


def pretrain(name: str, words: list[str], folder: Path) -> list[dict[str, Any]]:
    """Train a stage 1 and return the lines of its steps."""
    code = (KEPT if name == "kept" else "") + COMMAND
    argv = [sys.executable, "-c", code, "pretrain", *words, f"runs={folder}", f"name={name}"]
    subprocess.run(argv, cwd=Path(__file__).parent.parent, check=True, stdout=subprocess.DEVNULL)
    lines = (folder / name / "pretrain" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", help="cache with speech")
    parser.add_argument("--config", default="configs/train/librispeech.yaml", metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a setting of the run")
    arguments = parser.parse_intermixed_args()

    cache = Path(arguments.cache).resolve()
    words = ["--config", arguments.config, f"caches=[{cache}]", "extract=[]", *SETTINGS, *arguments.overrides]
    with tempfile.TemporaryDirectory() as folder:
        found = {name: pretrain(name, words, Path(folder)) for name in ("flushed", "kept")}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}; {arguments.config}")
    steps = len(found["kept"])
    print(f"{'steps':<14} {'kept':>10} {'flushed':>10}  milliseconds a step")
    tenth = max(1, steps // 10)
    for first in range(0, steps, tenth):
        parts = {name: lines[first : first + tenth] for name, lines in found.items()}
        ms = {name: 1000 * sum(line["seconds"] for line in part) / len(part) for name, part in parts.items()}
        label = f"{first + 1} to {first + len(parts['kept'])}"
        print(f"{label:<14} {ms['kept']:>10.0f} {ms['flushed']:>10.0f}")
    whole = {name: sum(line["seconds"] for line in lines) for name, lines in found.items()}
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(found["kept"], found["flushed"], strict=True))
    print(f"all: {whole['kept']:.0f} s and {whole['flushed']:.0f} s, {whole['kept'] / whole['flushed']:.2f} times")
    print(f"largest difference between the losses of a step: {apart:.2g}")


if __name__ == "__main__":
    main()
