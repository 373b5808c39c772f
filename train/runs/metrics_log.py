"""The log of a run: ``metrics.jsonl``, ``evaluations.jsonl`` and the progress bar.

Every step and every evaluation is one JSON line, written immediately. The bar shows the loss, the audio gain of the
last evaluation, frames per second and the remaining time. A resumed run first drops the lines past its checkpoint.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shards.files import atomic_write, open_file, translate_os_errors, write_all
from train.runs.trackers import Trackers

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
MAX_LINE = 16 << 20  # bytes
LOG_LINES = 10  # number of lines with the loss printed over a whole run


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """The metrics of one step, over all ranks."""

    step: int  # number of completed steps, including this one
    loss: float  # nats per target token
    lr: float
    grad_norm: float  # before clipping
    projector_rms_ratio: float  # RMS of the soft tokens (mean over batches) / RMS of the LM's embeddings
    seconds: float  # on rank 0, including the wait for data
    data_wait: float  # seconds, on the slowest rank
    frames: int  # valid frames
    padded_frames: int  # including padding
    tokens: int  # target tokens
    utterances: int
    # losses minimized besides the cross-entropy: means of the auxiliary objectives, losses of the projector
    auxiliary_losses: dict[str, float] = field(default_factory=dict)
    projector_metrics: dict[str, float] = field(default_factory=dict)  # such as the usage of experts
    task_losses: dict[str, float] = field(default_factory=dict)  # of the tasks in the step, if the run has several

    @property
    def finite(self) -> bool:
        """Whether the loss and the gradient are finite; otherwise no weight was changed."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def record(self) -> dict[str, Any]:
        """Return the record for ``metrics.jsonl``."""
        return {
            "step": self.step,
            "loss": self.loss,
            **self.auxiliary_losses,
            **self.projector_metrics,
            **{f"loss/{task}": loss for task, loss in self.task_losses.items()},
            "lr": self.lr,
            "grad_norm": self.grad_norm,
            "projector_rms_ratio": self.projector_rms_ratio,
            "seconds": self.seconds,
            "data_wait": self.data_wait,
            "padding": 1 - self.frames / self.padded_frames,
            "frames": self.frames,
            "tokens": self.tokens,
        }


class MetricsLogger:
    """Writes the metrics of a run; a context manager that closes the bar and the files."""

    def __init__(self, run: Path, steps: int, step: int = 0, evaluated: int = 0, quiet: bool = False) -> None:
        """Open the files of ``run``.

        Args:
            steps: total number of steps.
            step, evaluated: steps of the checkpoint and of its last evaluation; later lines are dropped from the files.
            quiet: write the files only, without a bar and printed lines.
        """
        self._audio_gain: float | None = None
        with translate_os_errors("writing metrics", run):
            for name, last in ((METRICS, step), (EVALUATIONS, evaluated)):
                kept = [line for line in read_jsonl(run / name) if line["step"] <= last]
                if name == EVALUATIONS and kept:
                    self._audio_gain = kept[-1].get("audio_gain")
                atomic_write(run / name, "".join(map(_line, kept)).encode(), str(os.getpid()))
            # unbuffered: bytes that a full disk rejected must not be written again on close
            self._metrics = open(run / METRICS, "ab", buffering=0)  # noqa: SIM115
            self._evaluations = open(run / EVALUATIONS, "ab", buffering=0)  # noqa: SIM115
        self._steps = steps
        self._trackers: Trackers | None = None
        # disable=None hides the bar if stderr is no terminal: `log_step` prints the same
        self._bar = tqdm(
            total=steps, initial=step, unit="step", desc="train", dynamic_ncols=True, disable=quiet or None
        )
        self._seconds = 0.0
        self._quiet = quiet

    def attach_trackers(self, trackers: Trackers) -> None:
        """Also send all further metrics to ``trackers``."""
        self._trackers = trackers

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the bar, the files and the attached trackers."""
        if self._trackers is not None:
            self._trackers.close()
        self._bar.close()
        self._metrics.close()
        self._evaluations.close()

    def log_step(self, metrics: StepMetrics, frames_per_second: float) -> None:
        """Log a training step to ``metrics.jsonl``, the bar and, at some steps, standard output."""
        record = metrics.record()
        self._append(self._metrics, record)
        if self._trackers is not None:
            self._trackers.log("train", record, metrics.step)
        gain: dict[str, str] = {} if self._audio_gain is None else {"gain": f"{self._audio_gain:.2f}"}
        self._bar.set_postfix({"loss": f"{metrics.loss:.3f}", **gain, "frames/s": f"{frames_per_second:.0f}"}, False)
        self._bar.update()
        self._seconds = metrics.seconds if not self._seconds else 0.9 * self._seconds + 0.1 * metrics.seconds
        if metrics.step in (1, self._steps) or metrics.step % max(1, self._steps // LOG_LINES) == 0:
            left = (self._steps - metrics.step) * self._seconds
            self.log(
                f"step {metrics.step:>6}/{self._steps}  loss {metrics.loss:.4f}"
                f"{format_losses(metrics.auxiliary_losses)}  lr {metrics.lr:.2e}  "
                f"{frames_per_second:.0f} frames/s  {left:.0f} s left"
            )

    def log_evaluation(self, step: int, record: dict[str, Any]) -> None:
        """Log an evaluation with its samples to ``evaluations.jsonl``, and show its audio gain on the bar."""
        self._append(self._evaluations, {"step": step, **record})
        if self._trackers is not None:
            self._trackers.log("held_out", record, step)
        self._audio_gain = record["audio_gain"]
        self.log(
            f"step {step:>6}/{self._steps}  held-out loss {record['val_loss']:.4f}  "
            f"shuffled {format_number(record['val_loss_shuffled'])}  audio gain {format_number(record['audio_gain'])}"
        )

    def log(self, line: str) -> None:
        """Print a line to standard output without breaking the bar."""
        if not self._quiet:
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def _append(self, file: Any, tree: dict[str, Any]) -> None:
        with translate_os_errors("writing metrics", Path(file.name)):
            write_all(file.fileno(), _line(tree).encode())


class NullLogger(MetricsLogger):
    """The logger of ranks other than 0: writes nothing."""

    def __init__(self) -> None:
        pass

    def close(self) -> None:
        pass

    def log_step(self, metrics: StepMetrics, frames_per_second: float) -> None:
        pass

    def log_evaluation(self, step: int, record: dict[str, Any]) -> None:
        pass

    def log(self, line: str) -> None:
        pass


def format_number(value: float | None, digits: int = 4) -> str:
    """Format ``value`` with ``digits`` decimals; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def format_losses(auxiliary_losses: Mapping[str, float]) -> str:
    """Format the auxiliary losses as a suffix to the loss; "" if there are none."""
    listed = ", ".join(f"{name} {value:.3g}" for name, value in auxiliary_losses.items())
    return f" ({listed})" if listed else ""


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the JSON lines of ``path``; [] if it does not exist. Skips what no logger writes: a line truncated by a
    crash, bytes that are not UTF-8, a line without its step, a line longer than any evaluation.
    """
    if not path.is_file():
        return []
    lines = []
    with io.BufferedReader(open_file(path)) as file:
        whole = True  # whether the last read ended a line
        while data := file.readline(MAX_LINE):
            start, whole = whole, data.endswith(b"\n")
            try:
                tree = json.loads(data) if start and (whole or len(data) < MAX_LINE) else None
            except (ValueError, RecursionError):
                continue
            if isinstance(tree, dict) and type(tree.get("step")) is int:
                lines.append(tree)
    return lines


def _line(tree: dict[str, Any]) -> str:
    return json.dumps(tree, ensure_ascii=False) + "\n"
