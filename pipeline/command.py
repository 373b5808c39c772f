"""The command ``extract``: an engine chosen, its run, and what is told at the end.

In: parsed arguments of the command line. Out: complete caches, lines on standard output, an exit status.

    python -m pipeline extract --config configs/extract/speech.yaml
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import ExtractConfig
from shards.config import load_config
from shards.disk import told
from shards.errors import UserError

if TYPE_CHECKING:
    from pipeline.facts import Facts
    from pipeline.tally import Tally


def extract(args: argparse.Namespace) -> int:
    """Make or resume the caches; 0 when they are complete. Raises UserError and WorkFailed."""
    config = load_config(ExtractConfig, args.config, args.overrides)
    signal.signal(signal.SIGTERM, _stop)
    started = time.perf_counter()

    def begin(facts: Facts) -> None:
        nonlocal started
        started = time.perf_counter()
        print(facts.headline(), flush=True)

    engine = _on_ray if args.engine == "ray" else _here
    try:
        facts, tally = engine(args, config, begin)
    except (KeyboardInterrupt, SystemExit):
        print("stopped: committed shards are kept, run the same command to go on", file=sys.stderr)
        raise
    for problem in facts.problems:
        print(f"note: {problem}", file=sys.stderr)
    if facts.complete:
        print("nothing to do, complete:")
        print("\n".join(f"  {cache}" for cache in facts.caches))
        return 0
    _summary(facts, tally, time.perf_counter() - started)
    if args.profile is not None:
        _profile(tally, facts.workers, args.profile)
    return 0


def _here(args: argparse.Namespace, config: ExtractConfig, begin: Callable[[Facts], None]) -> tuple[Facts, Tally]:
    """Extract with the encoder of this process."""
    from pipeline.engines import run_local, tidy
    from pipeline.facts import facts_of
    from pipeline.job import prepare, schedule
    from pipeline.tally import Tally
    from pipeline.workers import find_worker

    worker = find_worker(args.worker_index, args.num_workers, os.environ)
    job = prepare(config)
    schedule(job, verify=args.verify, retry_failed=args.retry_failed)
    facts = facts_of(job)
    if facts.complete:
        tidy(job)
        return facts, Tally()
    begin(facts)
    return facts, run_local(job, worker=worker, trace=args.profile is not None)


def _on_ray(args: argparse.Namespace, config: ExtractConfig, begin: Callable[[Facts], None]) -> tuple[Facts, Tally]:
    """Extract on a Ray cluster."""
    from pipeline.ray_engine import Cluster, run_ray

    for option in ("worker_index", "num_workers", "profile"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option.replace('_', '-')} is of --engine local: leave it out with --engine ray")
    cluster = Cluster(args.ray_address, args.actor_cpus)
    return run_ray(config, cluster, verify=args.verify, retry_failed=args.retry_failed, begin=begin)


def _profile(tally: Tally, workers: int, file: str) -> None:
    for line in tally.stages.table(workers):
        print(f"  {line}")
    with told("writing the profile", Path(file)):
        tally.stages.write(Path(file), workers)


def _stop(signum: int, frame: Any) -> None:
    """SIGTERM unwinds like an exception: the shard in flight is abandoned, its claim released."""
    raise SystemExit(128 + signum)


def _summary(facts: Facts, tally: Tally, seconds: float) -> None:
    from shards.info import cost, describe_cache

    caches = [describe_cache(cache) for cache in facts.caches]
    busy = tally.stages.seconds["encode"] / seconds if seconds else 0.0
    size = sum(cache["counts"]["bytes"] for cache in caches)
    rate, failed = tally.audio_seconds / seconds if seconds else 0.0, len(tally.failures)
    print(
        f"extracted {tally.utterances - failed} utterances, {tally.audio_seconds / 3600:.2f} h of audio in "
        f"{seconds:.0f} s ({rate:.1f} audio-h/h, encoder busy {busy:.0%}), {failed} failed, {size / 1e6:.0f} MB"
    )
    for key, stage, reason in tally.failures[:5]:
        print(f"  failed: {key}: {stage}: {reason}", file=sys.stderr)
    if len(tally.failures) > 5:
        print(f"  … and {len(tally.failures) - 5} more in failures.parquet", file=sys.stderr)
    print("complete:")
    for cache in caches:
        print(f"  {cache['path']}")
        print("\n".join(f"  {line}" for line in cost(cache)))
