"""Experiment trackers: send metrics to Weights & Biases and TensorBoard in addition to ``metrics.jsonl``.

``trackers: [wandb, tensorboard]`` enables them. The id of the wandb run is stored in ``wandb-id`` in the run folder, so
that a resumed run continues the same wandb run; TensorBoard event files are written to ``tensorboard/`` in the run
folder. Each library is imported only if enabled. wandb works offline with ``WANDB_MODE=offline`` (upload later with
``wandb sync RUN/wandb/offline-run-…``). A tracker that fails during training is reported once and disabled; the run and
the other trackers continue.

    python -m train fit --config configs/train/demo.yaml 'trackers=[tensorboard]'
    tensorboard --logdir runs
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from shards.config.base import flatten
from shards.errors import UserError, missing_package
from shards.files import atomic_write, translate_os_errors
from train.config.train import TrainConfig

PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard"}  # tracker -> module to import
WANDB_ID = "wandb-id"


class Tracker(Protocol):
    """A destination for metrics; any method may raise any exception."""

    name: str

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """The trackers of a run; one that fails is reported once and dropped."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

    def log(self, group: str, metrics: Mapping[str, Any], step: int) -> None:
        """Log the numeric values of ``metrics`` under ``group/name``."""
        numbers = {
            f"{group}/{name}": float(value)
            for name, value in flatten(dict(metrics)).items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
        }
        self._each(lambda tracker: tracker.log(numbers, step))

    def close(self) -> None:
        """Close all trackers."""
        self._each(lambda tracker: tracker.close())

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                action(tracker)
            except Exception as error:  # neither a third-party library nor the network may end a run
                self._trackers.remove(tracker)
                reason = " ".join(str(error).split())[:200]
                tqdm.write(
                    f"note: {tracker.name} failed ({type(error).__name__}: {reason}) and is disabled for this session; "
                    "metrics.jsonl has all metrics",
                    file=sys.stderr,
                )


def require_trackers(config: TrainConfig) -> None:
    """Raise UserError if a library that ``config.trackers`` needs is not installed."""
    for name in config.trackers:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise missing_package(f"trackers=[{name}]", name, "trackers")


def open_trackers(config: TrainConfig, run: Path, step: int) -> Trackers:
    """Open the trackers of ``config.trackers`` for the run at ``run``, which is at ``step``.

    Raises:
        UserError: a tracker is not installed or fails to start.
    """
    require_trackers(config)
    makers: dict[str, Callable[[], Tracker]] = {
        "wandb": lambda: Wandb(config, run),
        "tensorboard": lambda: TensorBoard(run, step),
    }
    trackers = []
    for name in config.trackers:
        try:
            trackers.append(makers[name]())
        except UserError:
            raise
        except Exception as error:  # a third-party library may raise anything
            reason = " ".join(str(error).split())[:200]
            fix = "log in with `wandb login`, set WANDB_MODE=offline, or" if name == "wandb" else "fix the cause, or"
            raise UserError(
                f"{name} failed to start ({type(error).__name__}: {reason}): {fix} resume without trackers: "
                f"python -m train fit --resume {run} 'trackers=[]'"
            ) from None
    return Trackers(trackers)


class Wandb:
    """A wandb run; continues the run whose id is stored in ``wandb-id``."""

    name = "wandb"

    def __init__(self, config: TrainConfig, run: Path) -> None:
        import wandb

        id_file = run / WANDB_ID
        if not id_file.is_file():
            with translate_os_errors("storing the id of the wandb run", id_file):
                atomic_write(id_file, secrets.token_hex(4).encode(), str(os.getpid()))
        settings: Any = wandb.Settings(console="off", silent=True)
        self._run: Any = wandb.init(
            project=wandb_project(config),
            name=run.name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(run),
            config=flatten(config.model_dump(mode="json")),
            reinit="create_new",  # a sweep has several wandb runs in one process
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        # The step is a metric: wandb's own step counter rejects the steps that a resumed run repeats.
        self._run.log({**metrics, "step": step})

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """TensorBoard event files; the events past the checkpoint of a resumed run are purged."""

    name = "tensorboard"

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter
        self._writer = writer(str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def wandb_project(config: TrainConfig) -> str:
    """Return ``wandb_project`` if set, else ``nanochat-omni-audio`` for a nanochat model, else ``earshard``."""
    if config.wandb_project is not None:
        return config.wandb_project
    return "nanochat-omni-audio" if config.lm.model.startswith("nanochat:") else "earshard"
