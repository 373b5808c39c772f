"""One of several processes of an extraction on this machine; started by ``pipeline/extract/local.py``, not by hand.

In, on standard input: one line of JSON, the job; then nothing, and its end means that the starting process is gone.
Out: committed shards; on standard output a line of JSON for every utterance, failure and shard.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import IO, TYPE_CHECKING, Any

from shards.errors import UserError, run_command

if TYPE_CHECKING:
    from pipeline.extract.job import Job
    from pipeline.extract.stats import Tally

GRACE = 8.0  # seconds to abandon the shard in


def command(argv: object) -> int:
    """Make shards until none is left that nobody else makes."""
    reports, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no report
    line = sys.stdin.readline()
    if not line:  # the starting process is gone already
        return 0
    told = json.loads(line)
    threading.Thread(target=_end_with, args=(sys.stdin,), name="lifeline", daemon=True).start()
    signal.signal(signal.SIGTERM, _stop)

    from pipeline.extract.loop import count_committed_failures, make_shards
    from pipeline.extract.shard import open_decoders
    from pipeline.extract.stats import Tally

    job, tally = join(told), Tally()
    count_committed_failures(job, tally)
    with job.at_work(), open_decoders(job, tally.stages) as decoders:
        make_shards(job, tally, decoders, Reports(reports, tally))
    return 0


def join(told: dict[str, Any]) -> Job:
    """The job of the process that started this one: its plan stands, and the source is not listed again.

    Raises:
        UserError: the encoder here is not the one that the caches are made with.
    """
    from pipeline.config import ExtractConfig
    from pipeline.encoders.load import speed_up
    from pipeline.extract.job import Job, Target, feature_spec, open_weights
    from pipeline.extract.plan import windows_of
    from pipeline.sources import open_source
    from shards.commit.store import open_store
    from shards.config.base import validate_config

    config = validate_config(ExtractConfig, told["config"], "the configuration")
    weights, encoder = open_weights(config, told["device"])
    targets = []
    for layer, folder, feature_id in told["targets"]:
        spec = feature_spec(config, encoder, layer)
        if spec.feature_id != feature_id:
            raise UserError(f"the encoder on {told['device']} makes other features than '{folder}' holds: set dtype")
        targets.append(Target(layer, open_store(folder, config.scratch), spec))
    plan = targets[0].store.plan()
    assert plan is not None
    job = Job(config, open_source(config.source), encoder, weights, targets, plan, told["fingerprint"])
    job.attempts.update(told["attempts"])
    speed_up(encoder, config.encoder.compile, windows_of(plan.table, encoder, config.overlap))
    return job


class Reports:
    """Lines for the process that started this one; see ``engines.Watch``."""

    def __init__(self, file: IO[str], tally: Tally) -> None:
        self._file, self._tally, self._known = file, tally, len(tally.failures)

    def step(self, utterances: int, audio_seconds: float) -> None:
        for failure in self._tally.failures[self._known :]:
            self._tell({"failure": failure})
            self._known += 1
        self._tell({"step": (utterances, audio_seconds)})

    def made(self, shard: int) -> None:
        self._tell({"made": shard})

    def found(self, shard: int) -> None:
        """Others' shards are theirs to report."""

    def waiting(self, shards: int) -> None:
        """The starting process waits, too."""

    def _tell(self, line: dict[str, object]) -> None:
        print(json.dumps(line), file=self._file, flush=True)


def _end_with(parent: IO[str]) -> None:
    parent.read()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)


def _stop(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(run_command(command, []))
