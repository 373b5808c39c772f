"""Seconds of 4 and 8 experiments in lockstep, compared with the same runs one after another.

    python bench/sweep.py                                   # the demo's corpus and language model; about 40 minutes
    python bench/sweep.py --steps 10 --counts 2 --short     # a small run

One after another: `python -m train fit` for each experiment, in a separate process each. In lockstep:
`python -m train sweep`, batched and separate. Settings, batches and evaluations are the same; losses must agree.

The floor is the cost that cannot be shared: the rows of every experiment pass forward and backward through the language
model, and each projector takes its own optimizer steps. Processes, the language model in memory, reading and the
evaluation without audio can be shared, and so can the passes if the machine is bound by memory bandwidth rather than
arithmetic (small batches on a GPU). For batched lockstep, the seconds in the language model are printed by purpose. CPU
seconds are printed next to wall-clock seconds; on a machine with other load, compare only CPU seconds.
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
MAX_LOSS_DIFFERENCE = 0.05  # relative, of the last training losses; bfloat16 and many steps let them diverge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/train/demo.yaml", help="base configuration of all experiments")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 8], help=f"experiments, at most {len(LIST)}")
    parser.add_argument("--short", action="store_true", help="evaluate on 8 utterances at the end")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a setting of the runs")
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
    """Return the settings of a run without those that a sweep sets itself."""
    from shards.config.base import load_config
    from train.config.train import TrainConfig

    return load_config(TrainConfig, file, words).model_dump(mode="json", exclude={"runs", "name"})


def run_alone(folder: Path, base: dict[str, Any], change: dict[str, Any]) -> dict[str, float]:
    """Run one experiment in a separate process; return its seconds in total and by phase."""
    path = folder / f"{change['name']}.yaml"
    path.write_text(yaml.safe_dump({**base, **change, "runs": str(folder / "alone")}))
    seconds, cpu = timed(["fit", "--config", str(path)])
    run = folder / "alone" / change["name"]
    steps = sum(line["seconds"] for line in lines(run / "metrics.jsonl"))
    evaluation = sum(line["eval_seconds"] for line in lines(run / "evaluations.jsonl"))
    parts = {
        "all": seconds,
        "cpu": cpu,
        "steps": steps,
        "evaluation": evaluation,
        "loss": lines(run / "metrics.jsonl")[-1]["loss"],
    }
    print(f"alone  {change['name']:<10} {describe(parts)}", flush=True)
    return parts


def compare(folder: Path, base: dict[str, Any], count: int, alone: list[dict[str, float]]) -> None:
    """Run the first ``count`` experiments in both lockstep modes; print them next to the sum of their single runs."""
    total = {key: sum(run[key] for run in alone) for key in ("all", "cpu", "steps", "evaluation")}
    print(f"\n{count} experiments\n  one after another   {describe(total)}")
    for mode in ("separate", "batched"):
        name = f"{mode}-{count}"
        tree = {"base": base, "experiments": LIST[:count], "lockstep": mode, "runs": str(folder), "name": name}
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        seconds, cpu = timed(["sweep", "--config", str(path)])
        ratio, of_cpu = seconds / total["all"], cpu / total["cpu"]
        print(
            f"  lockstep, {mode:<9} {seconds:7.1f} s, {ratio:.2f} ×; CPU {cpu:.1f} s, {of_cpu:.2f} ×",
            flush=True,
        )
        for change, run in zip(LIST[:count], alone, strict=True):
            loss = lines(folder / name / change["name"] / "metrics.jsonl")[-1]["loss"]
            if abs(loss - run["loss"]) > MAX_LOSS_DIFFERENCE * run["loss"]:
                print(
                    f"  {change['name']}: loss {loss:.4f}, alone {run['loss']:.4f}: "
                    f"they differ by more than {MAX_LOSS_DIFFERENCE:.0%}"
                )
    inside = json.loads((folder / name / "sweep.json").read_text())["lm_seconds"]
    by_purpose = ", ".join(f"{key} {value:.1f} s" for key, value in inside.items())
    print(f"  batched lockstep, seconds in the language model: {by_purpose}")
    print(f"  floor, if everything except the training passes were free: {inside['training'] / total['all']:.2f} ×")


def timed(words: list[str]) -> tuple[float, float]:
    """Run ``python -m train``; return its wall-clock and CPU seconds, including the start of the process."""
    begun, before = time.perf_counter(), getrusage(RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "train", *words], check=True, stdout=subprocess.DEVNULL)
    after = getrusage(RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begun, cpu


def lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def describe(parts: dict[str, float]) -> str:
    """Return the seconds of single runs as text."""
    rest = parts["all"] - parts["steps"] - parts["evaluation"]
    phases = f"steps {parts['steps']:.1f}, evaluation {parts['evaluation']:.1f}, start and writing {rest:.1f}"
    return f"{parts['all']:7.1f} s, CPU {parts['cpu']:.1f} s: {phases}"


if __name__ == "__main__":
    main()
