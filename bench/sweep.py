"""Seconds of 4 and 8 experiments in lockstep, against the same runs one after another.

    python bench/sweep.py                                   # the demo's corpus and language model; about 40 minutes
    python bench/sweep.py --steps 10 --counts 2 --short     # a try

One after another: `python -m train fit` for each experiment, a process each, as without sweeps. In lockstep:
`python -m train sweep`, batched and separate. Same settings, batches and evaluations on all sides; losses must agree.

The floor is what no sharing avoids: the rows of every experiment pass forward and backward through the language model,
and each projector takes its own steps. What can be shared is the start of processes, the language model in memory,
reading, what is judged without audio, and, where the machine waits for weights and not for arithmetic (small batches on
a GPU), the passes. Of batched lockstep, seconds in the language model are printed by what it was asked.
Seconds of processors stand beside those of the clock: on a machine that does other work they alone can be compared.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import Any

import yaml

LIST: list[dict[str, Any]] = [
    {"name": "mlp", "projector": {"kind": "mlp", "stack": 5, "hidden": 1024, "norm": "rms"}},
    {"name": "linear", "projector": {"kind": "linear", "stack": 5, "norm": "rms"}},
    {"name": "conv", "projector": {"kind": "conv", "stack": 5, "norm": "rms"}},
    {"name": "pool", "projector": {"kind": "pool", "pool": 5, "hidden": 1024, "norm": "rms"}},
    {"name": "swiglu", "projector": {"kind": "swiglu", "stack": 5, "hidden": 2048, "norm": "rms"}},
    {"name": "qformer", "projector": {"kind": "qformer", "layers": 1, "dropout": 0.0, "norm": "rms"}},
    {"name": "mlp-fast", "projector": {"kind": "mlp", "stack": 5, "hidden": 1024, "norm": "rms"}, "lr": 4e-3},
    {"name": "mlp-slow", "projector": {"kind": "mlp", "stack": 5, "hidden": 1024, "norm": "rms"}, "lr": 1e-3},
]
FARTHEST = 0.05  # relative difference of last training losses, in bfloat16 and after many steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/train/demo.yaml", help="the base of all experiments")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 8], help=f"experiments, at most {len(LIST)}")
    parser.add_argument("--short", action="store_true", help="judge on 8 utterances at the end")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the runs")
    arguments = parser.parse_args()
    words = [f"steps={arguments.steps}", "eval_every=null", "checkpoint_every=null", *arguments.overrides]
    if arguments.short:
        words += ["val.limit=8", "decode_limit=8", "retrieval_limit=0"]
    print(f"{platform.processor() or platform.machine()}; {arguments.steps} steps; {' '.join(words[3:])}")
    with tempfile.TemporaryDirectory() as folder:
        base = resolved(arguments.config, words)
        alone = [run_alone(Path(folder), base, change) for change in LIST[: max(arguments.counts)]]
        for count in arguments.counts:
            compare(Path(folder), base, count, alone[:count])


def resolved(file: str, words: list[str]) -> dict[str, Any]:
    """The settings of a run without what a sweep sets itself."""
    from shards.config.base import load_config
    from train.config.train import TrainConfig

    return load_config(TrainConfig, file, words).model_dump(mode="json", exclude={"runs", "name"})


def run_alone(folder: Path, base: dict[str, Any], change: dict[str, Any]) -> dict[str, float]:
    """Seconds of one experiment as a process of its own, and where they went."""
    path = folder / f"{change['name']}.yaml"
    path.write_text(yaml.safe_dump({**base, **change, "runs": str(folder / "alone")}))
    seconds, cpu = timed(["fit", "--config", str(path)])
    run = folder / "alone" / change["name"]
    steps = sum(line["seconds"] for line in lines(run / "metrics.jsonl"))
    judged = sum(line["eval_seconds"] for line in lines(run / "evaluations.jsonl"))
    parts = {
        "all": seconds,
        "cpu": cpu,
        "steps": steps,
        "judging": judged,
        "loss": lines(run / "metrics.jsonl")[-1]["loss"],
    }
    print(f"alone  {change['name']:<10} {told(parts)}", flush=True)
    return parts


def compare(folder: Path, base: dict[str, Any], count: int, alone: list[dict[str, float]]) -> None:
    """Both ways of lockstep for the first ``count`` experiments, beside the sum of their runs alone."""
    total = {key: sum(run[key] for run in alone) for key in ("all", "cpu", "steps", "judging")}
    print(f"\n{count} experiments\n  one after another   {told(total)}")
    for mode in ("separate", "batched"):
        name = f"{mode}-{count}"
        tree = {"base": base, "experiments": LIST[:count], "lockstep": mode, "runs": str(folder), "name": name}
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        seconds, cpu = timed(["sweep", "--config", str(path)])
        ratio, of_cpu = seconds / total["all"], cpu / total["cpu"]
        print(
            f"  lockstep, {mode:<9} {seconds:7.1f} s, {ratio:.2f} ×; of processors {cpu:.1f} s, {of_cpu:.2f} ×",
            flush=True,
        )
        for change, run in zip(LIST[:count], alone, strict=True):
            loss = lines(folder / name / change["name"] / "metrics.jsonl")[-1]["loss"]
            if abs(loss - run["loss"]) > FARTHEST * run["loss"]:
                print(f"  {change['name']}: loss {loss:.4f}, alone {run['loss']:.4f}: more apart than {FARTHEST:.0%}")
    inside = json.loads((folder / name / "sweep.json").read_text())["lm_seconds"]
    told_inside = ", ".join(f"{key} {value:.1f} s" for key, value in inside.items())
    print(f"  of batched lockstep, in the language model: {told_inside}")
    print(f"  floor, if all but its training passes were free: {inside['training'] / total['all']:.2f} ×")


def timed(words: list[str]) -> tuple[float, float]:
    """Seconds of a command of ours, its start included: of the clock and of processors."""
    begun, before = time.perf_counter(), getrusage(RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "train", *words], check=True, stdout=subprocess.DEVNULL)
    after = getrusage(RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begun, cpu


def lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def told(parts: dict[str, float]) -> str:
    """Seconds of runs alone for people."""
    rest = parts["all"] - parts["steps"] - parts["judging"]
    where = f"steps {parts['steps']:.1f}, judging {parts['judging']:.1f}, start and writing {rest:.1f}"
    return f"{parts['all']:7.1f} s, of processors {parts['cpu']:.1f} s: {where}"


if __name__ == "__main__":
    main()
