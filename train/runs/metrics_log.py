"""What a run tells while it runs: ``metrics.jsonl``, ``evaluations.jsonl``, the progress bar.

In: the figures of a step or an evaluation. Out: one JSON line each, flushed at once, and a bar with loss, audio gain at
the last evaluation, frames a second and time left. A resumed run first drops the lines past its checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shards.files import atomic_write, told, write_all
from train.runs.emergence import EmergenceDetector
from train.runs.trackers import Outlets

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
TOLD = 10  # lines with the loss that a whole run prints


class Tracker:
    """Writes a run's figures; a context manager that closes the bar and the files."""

    def __init__(self, run: Path, steps: int, step: int = 0, evaluated: int = 0, quiet: bool = False) -> None:
        """``step``, ``evaluated``: where a resumed run stands; lines after these steps are dropped from the files.

        With ``quiet`` the files alone are written.
        """
        self._emergence = EmergenceDetector()
        self._gain: float | None = None
        with told("writing metrics", run):
            for name, last in ((METRICS, step), (EVALUATIONS, evaluated)):
                kept = [line for line in read_lines(run / name) if line["step"] <= last]
                for line in kept:
                    if name == METRICS:
                        self._emergence.take(line["step"], line["loss"])
                    else:
                        self._gain = line["audio_gain"]
                atomic_write(run / name, "".join(map(_line, kept)).encode(), str(os.getpid()))
            # unbuffered: what a full disk refused must not be tried again when the file is closed
            self._metrics = open(run / METRICS, "ab", buffering=0)  # noqa: SIM115
            self._evaluations = open(run / EVALUATIONS, "ab", buffering=0)  # noqa: SIM115
        self._steps = steps
        self._outlets: Outlets | None = None
        # no bar in a log: the lines of `step` tell the same
        self._bar = tqdm(
            total=steps, initial=step, unit="step", desc="train", dynamic_ncols=True, disable=quiet or None
        )
        self._seconds = 0.0
        self._quiet = quiet

    def attach(self, outlets: Outlets) -> None:
        """Send the figures there, too, from here on."""
        self._outlets = outlets

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the bar, the files and what is attached."""
        if self._outlets is not None:
            self._outlets.close()
        self._bar.close()
        self._metrics.close()
        self._evaluations.close()

    def step(self, figures: dict[str, Any], frames_per_second: float, terms: Mapping[str, float] | None = None) -> None:
        """One training step: ``step``, ``loss`` and the rest go to ``metrics.jsonl`` and the bar.

        ``terms``: what was minimised beside the loss, which the lines for people tell, too.
        """
        emergence = self._emergence.take(figures["step"], figures["loss"])
        if emergence is not None:
            figures = {**figures, "emergence": emergence.record()}
            self.say(emergence.sentence())
        self._append(self._metrics, figures)
        if self._outlets is not None:
            self._outlets.log("train", figures, figures["step"])
        gain: dict[str, str] = {} if self._gain is None else {"gain": f"{self._gain:.2f}"}
        self._bar.set_postfix({"loss": f"{figures['loss']:.3f}", **gain, "frames/s": f"{frames_per_second:.0f}"}, False)
        self._bar.update()
        step = figures["step"]
        self._seconds = figures["seconds"] if not self._seconds else 0.9 * self._seconds + 0.1 * figures["seconds"]
        if step in (1, self._steps) or step % max(1, self._steps // TOLD) == 0:
            left = (self._steps - step) * self._seconds
            self.say(
                f"step {step:>6}/{self._steps}  loss {figures['loss']:.4f}{beside(terms or {})}  "
                f"lr {figures['lr']:.2e}  {frames_per_second:.0f} frames/s  {left:.0f} s left"
            )

    def evaluation(self, step: int, record: dict[str, Any]) -> None:
        """One evaluation with its samples goes to ``evaluations.jsonl``; its audio gain stays on the bar."""
        self._append(self._evaluations, {"step": step, **record})
        if self._outlets is not None:
            self._outlets.log("held_out", record, step)
        self._gain = record["audio_gain"]
        self.say(
            f"step {step:>6}/{self._steps}  held-out loss {record['val_loss']:.4f}  "
            f"shuffled {figure(record['val_loss_shuffled'])}  audio gain {figure(record['audio_gain'])}"
        )

    def say(self, line: str) -> None:
        """A line on standard output that does not tear the bar."""
        if not self._quiet:
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def _append(self, file: Any, tree: dict[str, Any]) -> None:
        with told("writing metrics", Path(file.name)):
            write_all(file.fileno(), _line(tree).encode())


class Silence(Tracker):
    """The tracker of the ranks that do not write."""

    def __init__(self) -> None:
        pass

    def close(self) -> None:
        pass

    def step(self, figures: dict[str, Any], frames_per_second: float, terms: Mapping[str, float] | None = None) -> None:
        pass

    def evaluation(self, step: int, record: dict[str, Any]) -> None:
        pass

    def say(self, line: str) -> None:
        pass


def figure(value: float | None, digits: int = 4) -> str:
    """``value`` for people; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def beside(terms: Mapping[str, float]) -> str:
    """What is told in brackets behind a loss: the other terms of what is minimised, if any."""
    told = ", ".join(f"{name} {value:.3g}" for name, value in terms.items())
    return f" ({told})" if told else ""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of ``path``; none when it is absent. A last line that a crash cut short is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            tree = json.loads(line)
        except ValueError:
            continue
        if isinstance(tree, dict) and isinstance(tree.get("step"), int):
            lines.append(tree)
    return lines


def _line(tree: dict[str, Any]) -> str:
    return json.dumps(tree, ensure_ascii=False) + "\n"
