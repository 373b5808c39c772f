"""How long until a projector listens to real speech: plain cross-entropy, with a contrastive term, with stage 1.

    python bench/listening.py CACHE                                    # three seeds of four projectors: about a day
    python bench/listening.py CACHE --kinds linear --seeds 0           # one column
    python bench/listening.py CACHE --other OTHER --json listening.json

CACHE holds real speech with speakers, such as LibriSpeech from ``configs/extract/librispeech.yaml``; a tenth of the
speakers is held out, or all of OTHER. Runs of one kind and seed form a sweep: they share batches and passes of the
language model. ``plain`` and ``contrastive`` take ``--steps`` steps, ``stage 1`` the steps of the recipe. A run listens
from the first evaluation with an audio gain of 1 nat a token whose 95 % interval is above 0.5. Prints steps of the
language model and seconds until then, audio gain, WER and retrieval at the end, for every seed and their median.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

KINDS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "stack": 5, "norm": "rms"},
    "mlp": {"kind": "mlp", "stack": 5, "hidden": 1024, "norm": "rms"},
    "posterior": {"kind": "posterior", "read_spelling": True},
    "qformer": {"kind": "qformer", "layers": 1, "dropout": 0.0, "window": 10, "queries": 4, "norm": "rms"},
}
FORMS = ("plain", "contrastive", "stage 1")


def experiments(kind: str, seed: int, steps: int, forms: list[str]) -> list[dict[str, Any]]:
    """Return the experiments of one kind and seed."""
    from_start: dict[str, Any] = {"pretrain": {"steps": 0}, "ctc": {"weight": 0.0}, "decode": {"ctc_weight": 0.0}}
    from_start |= {"steps": steps, "lr": 2e-3, "warmup": 30}
    changes: dict[str, dict[str, Any]] = {
        "plain": from_start,
        "contrastive": {**from_start, "contrastive": {"weight": 3.0}},
        "stage 1": {} if kind == "posterior" else {"decode.spelling_weight": 0.0},  # others score no bytes
    }
    shared = {"projector": KINDS[kind], "seed": seed, "data_seed": seed}
    return [{"name": form.replace(" ", ""), **shared, **changes[form]} for form in forms]


def run_sweep(folder: Path, recipe: dict[str, Any], listed: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Train ``listed`` and return the summaries, in their order."""
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps({"base": recipe, "experiments": listed, "runs": str(folder), "name": name}))  # is YAML
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-m", "train", "sweep", "--config", str(file)], cwd=root, check=True)
    return [json.loads((folder / name / each["name"] / "summary.json").read_text()) for each in listed]


def row(form: str, kind: str, seed: int, found: dict[str, Any]) -> dict[str, Any]:
    """Return one line of the table."""
    listening = found["listening"] or {}
    low, high = found["intervals"].get("audio_gain", (None, None))
    return {
        "kind": kind,
        "form": form,
        "seed": seed,
        "lm_steps": listening.get("steps"),
        "seconds": listening.get("seconds"),
        "steps": found["steps"],
        "audio_gain": found["audio_gain"],
        "interval": [low, high],
        "wer": found["wer"],
        "retrieval": None if found.get("retrieval") is None else found["retrieval"]["by_likelihood"],
    }


def format_row(kind: str, form: str, rows: list[dict[str, Any]]) -> str:
    """Return the medians over the seeds that have a figure, and of every seed the steps until the run listens."""

    def median(name: str, form: str) -> str:
        values = [each[name] for each in rows if each[name] is not None]
        return format(statistics.median(values), form) if values else "–"

    steps = ", ".join("–" if each["lm_steps"] is None else str(each["lm_steps"]) for each in rows)
    figures = [median("seconds", ".0f"), median("audio_gain", ".2f"), median("wer", ".1%"), median("retrieval", ".0%")]
    return f"| {kind} | {form} | {steps} | {' | '.join(figures)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", help="cache of real speech")
    parser.add_argument("--other", help="cache to evaluate on (default: a tenth of the speakers of CACHE)")
    parser.add_argument("--config", default="configs/train/librispeech.yaml")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600, help="steps of the runs without stage 1")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a setting of the recipe")
    arguments = parser.parse_intermixed_args()

    from shards.config.base import load_config
    from train.config.train import TrainConfig

    words = [f"caches=[{arguments.cache}]", "extract=[]", *arguments.overrides]
    words += [f"val.caches=[{arguments.other}]"] if arguments.other else []
    recipe = load_config(TrainConfig, arguments.config, words).model_dump(mode="json", exclude={"runs", "name"})
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}; {arguments.config}")
    print("| projector | training | LM steps until it listens | seconds | audio gain | WER | retrieval |", flush=True)
    print("|---|---|---|---|---|---|---|", flush=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for kind in arguments.kinds:
            for seed in arguments.seeds:
                listed = experiments(kind, seed, arguments.steps, arguments.forms)
                name = f"{kind}-{seed}"
                found = run_sweep(Path(temporary), recipe, listed, name)
                rows += [row(form, kind, seed, each) for form, each in zip(arguments.forms, found, strict=True)]
                if arguments.json:
                    arguments.json.write_text(json.dumps(rows, indent=1))
            for form in arguments.forms:
                print(format_row(kind, form, [r for r in rows if (r["kind"], r["form"]) == (kind, form)]), flush=True)


if __name__ == "__main__":
    main()
