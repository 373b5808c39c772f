"""Command line of the training stage: ``python -m train fit|sweep|lr-range|evaluate|score|transcribe|probe`` etc.

Each command takes a config or a run folder. ``fit`` writes a run folder with a trained projector, its metrics and a
report. Each command imports the heavy libraries it needs, so that ``--help`` stays fast.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.config.cli import add_config, config_file, parse_args, show_config
from shards.errors import UserError, run_command
from shards.share.publish import add_options

if TYPE_CHECKING:
    from train.config.train import TrainConfig

OWN_PROJECTOR = "your own projector class, if the run has one: what a run folder names is not imported"
EXAMPLES = """examples:
  python -m train fit --config configs/train/demo.yaml
  python -m train fit --config configs/train/demo.yaml name=small projector.stack=8 lr=5e-4
  python -m train fit --resume runs/demo
  torchrun --nproc-per-node 4 -m train fit --config configs/train/demo.yaml
  python -m train evaluate runs/demo --cache caches/librispeech/whisper-base-… --json metrics.json
  python -m train transcribe runs/demo hello.wav
  python -m train sweep --config configs/sweep/projectors.yaml
  python -m train config --print --config configs/train/demo.yaml lr=5e-4
"""


def parser() -> argparse.ArgumentParser:
    """Build the argument parser of ``python -m train``."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="python -m train",
        description="Train and evaluate a projector from cached speech features into a frozen language model.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=text, description=text, formatter_class=raw, epilog=f"example:\n  python -m train {example}"
        )

    def overrides(to: argparse.ArgumentParser) -> None:
        to.add_argument(
            "overrides", nargs="*", metavar="key=value", help="override a config key; the value is parsed as YAML"
        )

    file: dict[str, Any] = {"metavar": "FILE", "help": "YAML file, or the name of one in configs/ (such as demo)"}
    stages = {
        "fit": ("train a projector", "configs/train/demo.yaml steps=100 lr=1e-3"),
        "pretrain": ("train stage 1 of a run, without the language model", "configs/train/librispeech.yaml"),
    }
    for name, (summary, example) in stages.items():
        stage = add(name, summary, f"{name} --config {example}")
        stage.add_argument("--config", type=config_file("train"), **file)
        stage.add_argument(
            "--resume",
            nargs="?",
            const="",
            metavar="RUN",
            help="resume a run (default: the run of --config, or the newest run)",
        )
        overrides(stage)

    sweep = add("sweep", "train several projectors in lockstep", "sweep --config configs/sweep/projectors.yaml")
    sweep.add_argument("--config", type=config_file("sweep"), **file)
    sweep.add_argument(
        "--resume", nargs="?", const="", metavar="SWEEP", help="resume a sweep (default: the sweep of --config)"
    )
    sweep.add_argument(
        "--engine", choices=("local", "ray"), help="ray: run the groups on a Ray cluster (default: local)"
    )
    overrides(sweep)

    lr_range = add(
        "lr-range", "run a learning-rate range test and suggest lr", "lr-range --config configs/train/demo.yaml"
    )
    lr_range.add_argument("--config", type=config_file("train"), required=True, **file)
    lr_range.add_argument("--low", type=float, default=1e-6, help="first learning rate (default: 1e-6)")
    lr_range.add_argument("--high", type=float, default=1.0, help="last learning rate (default: 1)")
    lr_range.add_argument("--steps", type=int, default=100, help="maximum number of steps (default: 100)")
    lr_range.add_argument("--json", metavar="FILE", help="write the losses and the suggestion to FILE")
    overrides(lr_range)

    evaluate = add("evaluate", "evaluate a trained run", "evaluate runs/demo --json metrics.json")
    evaluate.add_argument(
        "run", nargs="?", metavar="RUN", help="run folder (default: the run of --config, or the newest run)"
    )
    evaluate.add_argument(
        "--config", metavar="FILE", type=config_file("train"), help="evaluate the run trained with this config"
    )
    evaluate.add_argument(
        "--cache", metavar="CACHE", help="evaluate on this cache instead of the run's held-out utterances"
    )
    evaluate.add_argument("--labels", metavar="LABELS", help="label set or file of that cache (default: the source's)")
    evaluate.add_argument("--json", metavar="FILE", help="write the metrics to FILE")
    overrides(evaluate)

    score = add("score", "recompute error rates from stored texts, without a model", "score runs/demo --language hi")
    score.add_argument(
        "run",
        nargs="?",
        metavar="RUN",
        help="run folder, or the folder of an evaluation in it (default: the newest run)",
    )
    score.add_argument(
        "--language", metavar="CODE", help="language of all texts, such as hi (default: as in the evaluation)"
    )
    score.add_argument("--json", metavar="FILE", help="write the rates to FILE")

    transcribe = add("transcribe", "transcribe audio files", "transcribe runs/demo hello.wav")
    transcribe.add_argument("run", metavar="RUN", help="run folder")
    transcribe.add_argument(
        "audio", nargs="+", metavar="WAV", help="WAV, FLAC, OGG or MP3 files; - reads standard input"
    )
    transcribe.add_argument("--stream", action="store_true", help="print each token as soon as it is decoded")
    transcribe.add_argument(
        "--raw", type=int, metavar="HZ", help="standard input is raw 16-bit mono PCM at this sampling rate"
    )
    transcribe.add_argument(
        "--instruction", metavar="TEXT", default="", help="text that replaces {instruction} in the run's prompt"
    )
    transcribe.add_argument(
        "--encoder", metavar="REFERENCE", help="new location of the run's encoder, such as path:/models/x"
    )

    transcribe.add_argument("--projector", metavar="MODULE:CLASS", help=OWN_PROJECTOR)

    export = add("export", "export a trained projector as a self-contained folder", "export runs/demo exported/demo")
    export.add_argument("run", metavar="RUN", help="run folder")
    export.add_argument("folder", metavar="DIR", help="new folder for the weights, settings, source and model card")
    export.add_argument("--projector", metavar="MODULE:CLASS", help=OWN_PROJECTOR)

    push = add("push", "publish an export as a model on a hub", "push exported/demo hf://OWNER/NAME --private")
    push.add_argument("folder", type=Path, metavar="DIR", help="an export")
    push.add_argument("url", metavar="URL", help="hf://OWNER/NAME")
    add_options(push)

    needs = add(
        "needs", "list the extraction configs whose caches are missing", "needs --config configs/train/demo.yaml"
    )
    needs.add_argument(
        "--config",
        metavar="FILE",
        type=config_file("train", "sweep"),
        required=True,
        help="YAML file of a run or a sweep, or a built-in one's name",
    )
    overrides(needs)

    report = add("report", "rewrite report.html of a run or a sweep", "report runs/demo")
    report.add_argument("run", nargs="?", metavar="RUN", help="folder of a run or a sweep (default: the newest run)")

    probe = add("probe", "tell what each layer carries, from caches alone", "probe caches/speech-1800/whisper-base-L*")
    probe.add_argument("caches", nargs="+", metavar="CACHE", help="caches of one corpus, one per layer")
    probe.add_argument("--labels", metavar="LABELS", help="label set or file (default: the source's)")
    probe.add_argument("--columns", metavar="A,B", help="label columns to probe (default: all of the label set)")
    probe.add_argument("--no-words", action="store_true", help="leave out the probe for words, which takes longest")
    probe.add_argument(
        "--by", choices=("speaker", "utterance"), default="speaker", help="what is held out (default: speaker)"
    )
    probe.add_argument("--pool", type=int, default=1, help="frames averaged before the probe for words (default: 1)")
    probe.add_argument("--steps", type=int, default=300, help="steps of the probe for words (default: 300)")
    probe.add_argument("--limit", type=int, default=2000, help="the most utterances (default: 2000)")
    probe.add_argument("--seed", type=int, default=0, help="of folds, sample and intervals (default: 0)")
    probe.add_argument("--out", metavar="DIR", default="runs/probe", help="folder to write to (default: runs/probe)")

    add_config(commands, "train", "--config configs/train/demo.yaml lr=5e-4", "train")
    return top


def command(argv: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    args = parse_args(parser(), argv)
    handlers = {
        "fit": _fit,
        "pretrain": _pretrain,
        "sweep": _sweep,
        "lr-range": _lr_range,
        "evaluate": _evaluate,
        "score": _score,
        "transcribe": _transcribe,
        "export": _export,
        "push": _push,
        "needs": _needs,
        "report": _report,
        "probe": _probe,
        "config": _config,
    }
    return handlers[args.command](args)


def _pretrain(args: argparse.Namespace) -> int:
    return _fit(args, stage_one_only=True)


def _fit(args: argparse.Namespace, stage_one_only: bool = False) -> int:
    from train.distributed.group import open_process_group

    with open_process_group() as group:
        with group.raise_on_all_ranks():
            config, resume = _fit_config(args)
            if stage_one_only and not config.pretrain.steps:
                raise UserError("there is no stage 1 without pretrain.steps: set it to a number of steps")

        from train.trainer.fit import fit
        from train.trainer.trainer import Interrupted

        try:
            run = fit(config, resume, group, stage_one_only=stage_one_only)
        except Interrupted as stop:
            print(stop, file=sys.stderr)
            return 130
        if group.is_main_process:
            from train.config.train import STAGE_ONE
            from train.report import REPORT
            from train.runs.folder import read_json
            from train.runs.summary import format_summary

            shown = run / STAGE_ONE if stage_one_only else run
            print(format_summary(read_json(shown / "summary.json")))
            print(f"report: {shown / REPORT}", flush=True)
            if stage_one_only:
                print(f"stage 2 starts from it: python -m train fit --resume {run}", flush=True)
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from train.sweeps.command import sweep

    return sweep(args.config, args.resume, args.overrides, args.engine)


def _fit_config(args: argparse.Namespace) -> tuple[TrainConfig, Path | None]:
    """Return the settings, and the run to resume or None."""
    overrides = list(args.overrides)
    if args.resume is None:
        if args.config is None and not overrides:
            raise UserError("no configuration: name one with --config (see configs/train/), or a run with --resume")
        return _typed_config(args.config, overrides), None
    run_name = args.resume
    if "=" in run_name:  # `--resume key=value`: argparse took an override for RUN
        run_name, overrides = "", [run_name, *overrides]
    return _config_and_run(run_name or None, args.config, overrides)


def _evaluate(args: argparse.Namespace) -> int:
    from train.distributed.group import open_process_group

    overrides = list(args.overrides)
    if args.run is not None and "=" in args.run and not Path(args.run).exists():
        overrides, args.run = [args.run, *overrides], None
    with open_process_group() as group:
        with group.raise_on_all_ranks():
            target = _json_path(args.json)

            from train.runs.folder import run_config, write_json

            typed, run = _config_and_run(args.run, args.config, [] if args.config else overrides)
            config = run_config(run, overrides, None if args.config is None else typed.projector.kind)

        from train.evaluation.run import evaluate_run
        from train.report import write_report

        metrics = evaluate_run(run, config, args.cache, group, args.labels)
        with group.raise_on_all_ranks():
            if group.is_main_process:
                write_report(run)
        if group.is_main_process:
            if target is not None:
                write_json(target, metrics)
            print(json.dumps(metrics, indent=1, ensure_ascii=False))
    return 0


def _score(args: argparse.Namespace) -> int:
    target = _json_path(args.json)

    from train.evaluation.score import score
    from train.evaluation.utterance_table import UTTERANCES
    from train.runs import folder as runs

    if args.run is not None and (Path(args.run) / UTTERANCES).is_file():
        folder = Path(args.run)
    else:
        folder = runs.find_run(args.run)
    default = runs.run_config(folder).eval.language if (folder / "config.yaml").is_file() else None
    rates = score(folder, args.language, default)
    if target is not None:
        runs.write_json(target, rates)
    print(json.dumps(rates, indent=1, ensure_ascii=False))
    return 0


def _lr_range(args: argparse.Namespace) -> int:
    config = _typed_config(args.config, args.overrides)
    target = _json_path(args.json)

    from train.runs.folder import write_json
    from train.trainer.lr_range import format_table, lr_range, record, suggest_lr

    points = lr_range(config, args.low, args.high, args.steps)
    print(format_table(points, args.high), flush=True)
    suggestion = suggest_lr(points)
    print(f"suggested: lr={suggestion.lr:.1e}: {suggestion.reason}")
    if target is not None:
        write_json(target, record(points, suggestion))
    return 0


def _json_path(value: str | None) -> Path | None:
    """Return the path given to ``--json``; UserError if its folder does not exist."""
    target = None if value is None else Path(value)
    if target is not None and not target.parent.is_dir():
        raise UserError(f"--json {target}: the folder '{target.parent}' does not exist: create it first")
    return target


def _transcribe(args: argparse.Namespace) -> int:
    from train.runs import folder as runs

    run = runs.find_run(args.run)
    config = runs.run_config(run, projector=args.projector)

    from train.inference.transcribe import TokenWriter, find_recordings, transcribe

    recordings = find_recordings(args.audio, args.raw)
    writer = TokenWriter(sys.stdout)
    on_token = writer if args.stream else None
    texts = transcribe(run, config, recordings, args.encoder, instruction=args.instruction, on_token=on_token)
    for name, text in texts:
        writer.finish(name, text)
    return 0


def _export(args: argparse.Namespace) -> int:
    from train.inference.export import export
    from train.runs.folder import find_run

    print(f"exported: {export(find_run(args.run), Path(args.folder), args.projector)}")
    return 0


def _push(args: argparse.Namespace) -> int:
    from shards.share.publish import is_agreed
    from train.inference.export import describe_export, push_export

    if is_agreed(args, args.url, describe_export(args.folder)):
        push_export(args.folder, args.url, args.private)
        print(f"pushed: {args.url}")
    return 0


def _needs(args: argparse.Namespace) -> int:
    from shards.config.base import load_config
    from shards.config.origins import read_yaml
    from train.config.train import TrainConfig
    from train.data.caches import missing_extractions

    if "base" in read_yaml(args.config):
        from train.sweeps.config import load_sweep, needed_runs

        configs = needed_runs(load_sweep(args.config, args.overrides))
    else:
        configs = [load_config(TrainConfig, args.config, args.overrides)]
    for file in dict.fromkeys(file for config in configs for file in missing_extractions(config)):
        print(file)
    return 0


def _report(args: argparse.Namespace) -> int:
    from train.report import is_sweep, write_report, write_sweep_report
    from train.runs.folder import find_run

    if args.run is not None and is_sweep(Path(args.run)):
        print(f"report: {write_sweep_report(Path(args.run))}")
    else:
        print(f"report: {write_report(find_run(args.run))}")
    return 0


def _probe(args: argparse.Namespace) -> int:
    for name in ("pool", "steps", "limit"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give a number of at least 1")

    from train.probes.run import PAGE, probe, table

    columns = None if args.columns is None else [name.strip() for name in args.columns.split(",")]
    options = {name: getattr(args, name) for name in ("labels", "by", "pool", "steps", "limit", "seed")}
    found = probe(args.caches, Path(args.out), columns=columns, words=not args.no_words, **options)
    for note in found["notes"]:
        print(f"note: {note}", file=sys.stderr)
    print(table(found))
    print(f"picture: {Path(args.out) / PAGE}")
    return 0


def _config(args: argparse.Namespace) -> int:
    from train.config.train import TrainConfig

    return show_config(TrainConfig, args)


def _typed_config(file: str | None, overrides: Sequence[str]) -> TrainConfig:
    """Return the settings of a file that the user wrote. One in a run folder names no class to import, see there."""
    from shards.config.base import load_config
    from train.config.train import TrainConfig
    from train.runs import folder as runs

    config = load_config(TrainConfig, file, overrides)
    if file is not None and (Path(file).parent / "caches.json").exists():
        runs.require_chosen_projector(config.projector, Path(file).parent, runs.typed_projector(overrides))
    return config


def _config_and_run(run_name: str | None, file: str | None, overrides: Sequence[str]) -> tuple[TrainConfig, Path]:
    """Return the run named ``run_name``, else that of ``file``, else the newest; and its settings, overridden."""
    from train.runs import folder as runs

    if file is None:
        run = runs.find_run(run_name)
        return runs.run_config(run, overrides), run
    config = _typed_config(file, overrides)
    run = runs.find_run(run_name or (config.name and str(Path(config.runs) / config.name)), config.runs)
    return config.model_copy(update={"name": run.name}), run


if __name__ == "__main__":
    sys.exit(run_command(command))
