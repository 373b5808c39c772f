"""Experiment trackers: Weights & Biases, TensorBoard, MLflow and Trackio, in addition to ``metrics.jsonl``.

``trackers: [wandb, tensorboard]`` enables them. The id that a run has at a tracker is stored in the run folder
(``wandb-id``, ``mlflow-id``, ``trackio-id``), so that a resumed run continues the same one; TensorBoard event files are
written to ``tensorboard/`` in the run folder. MLflow writes to ``MLFLOW_TRACKING_URI``, Trackio to ``TRACKIO_DIR`` or
what else its variables name. Each library is imported only if enabled. wandb works offline with
``WANDB_MODE=offline`` (upload later with ``wandb sync RUN/wandb/offline-run-…``). A tracker that fails during training
is reported once and disabled; the run and the other trackers continue.

    python -m train fit --config configs/train/demo.yaml 'trackers=[tensorboard]'
    tensorboard --logdir runs
"""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from contextvars import Context
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from shards.config.base import flatten
from shards.errors import UserError, missing_package
from shards.files import atomic_write, translate_os_errors
from train.config.train import TrainConfig

NAMES = ("wandb", "tensorboard", "mlflow", "trackio")  # also the modules to import
FIXES = {
    "wandb": "log in with `wandb login`, set WANDB_MODE=offline, or",
    "mlflow": "set MLFLOW_TRACKING_URI to a server, install all of mlflow for a local store, or",
}
MAX_PARAMS, MAX_METRICS, MAX_VALUE = 100, 1000, 500  # of one request to MLflow; characters of a parameter


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
        if importlib.util.find_spec(name) is None:
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
        "mlflow": lambda: MLflow(config, run),
        "trackio": lambda: Trackio(config, run),
    }
    trackers = []
    for name in config.trackers:
        try:
            trackers.append(makers[name]())
        except UserError:
            raise
        except Exception as error:  # a third-party library may raise anything
            reason = " ".join(str(error).split())[:200]
            fix = FIXES.get(name, "fix the cause, or")
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

        settings: Any = wandb.Settings(console="off", silent=True)
        self._run: Any = wandb.init(
            project=wandb_project(config),
            name=run.name,
            id=stored_id(run, self.name, lambda: secrets.token_hex(4)),
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


class MLflow:
    """A run of MLflow in the experiment :func:`wandb_project`; continues the one whose id is in ``mlflow-id``."""

    name = "mlflow"

    def __init__(self, config: TrainConfig, run: Path) -> None:
        from mlflow import MlflowClient

        self._client: Any = MlflowClient()
        self._run = stored_id(run, self.name, lambda: self._start(config, run))
        self._client.update_run(self._run, status="RUNNING")

    def _start(self, config: TrainConfig, run: Path) -> str:
        from mlflow.entities import Param

        project = wandb_project(config)
        experiment = self._client.get_experiment_by_name(project)
        home = experiment.experiment_id if experiment is not None else self._client.create_experiment(project)
        started: str = self._client.create_run(home, run_name=run.name).info.run_id
        settings = flatten(config.model_dump(mode="json")).items()
        params = [Param(_mlflow_name(key), str(value)[:MAX_VALUE]) for key, value in settings]
        for first in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(started, params=params[first : first + MAX_PARAMS])
        return started

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        entries = [Metric(_mlflow_name(name), value, now, step) for name, value in metrics.items()]
        for first in range(0, len(entries), MAX_METRICS):
            self._client.log_batch(self._run, metrics=entries[first : first + MAX_METRICS])

    def close(self) -> None:
        self._client.set_terminated(self._run)


class Trackio:
    """A run of Trackio in the project :func:`wandb_project`; its name, ``run-hex``, is stored in ``trackio-id``."""

    name = "trackio"

    def __init__(self, config: TrainConfig, run: Path) -> None:
        import trackio

        name = stored_id(run, self.name, lambda: f"{run.name}-{secrets.token_hex(4)}")
        settings = flatten(config.model_dump(mode="json"))
        options: dict[str, Any] = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        # in a context of its own: a second run in this process (a sweep's) would end the first one
        with redirect_stdout(sys.stderr):
            self._run: Any = Context().run(
                trackio.init, wandb_project(config), name, config=settings, resume="allow", **options
            )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._run.finish()


def stored_id(run: Path, tracker: str, make: Callable[[], str]) -> str:
    """Return the id of ``run`` at ``tracker``; the first call stores what ``make`` returns in the run folder."""
    file = run / f"{tracker}-id"
    if not file.is_file():
        made = make()
        with translate_os_errors(f"storing the id of the {tracker} run", file):
            atomic_write(file, made.encode(), str(os.getpid()))
    return file.read_text().strip()


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w./ :-]", "_", name)


def wandb_project(config: TrainConfig) -> str:
    """Return ``wandb_project`` if set, else ``nanochat-omni-audio`` for a nanochat model, else ``earshard``."""
    if config.wandb_project is not None:
        return config.wandb_project
    return "nanochat-omni-audio" if config.lm.model.startswith("nanochat:") else "earshard"
