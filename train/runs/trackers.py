"""Where else the figures of a run go, beside ``metrics.jsonl``: Weights & Biases, TensorBoard.

In: ``trackers: [wandb, tensorboard]`` and the figures of steps and evaluations. Out: a wandb run whose id is kept in
``wandb-id`` of the run's folder, so that a resumed run goes on in it; event files in ``tensorboard/`` of the folder.
Both libraries are imported where they are asked for. wandb works offline under ``WANDB_MODE=offline`` (``wandb sync
RUN/wandb/offline-run-…`` later). The first failure of one that had started is told, and ends that one alone.

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

PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard"}  # what each imports, and how pip calls it
WANDB_ID = "wandb-id"


class Tracker(Protocol):
    """One place that figures go to; any method may raise anything."""

    name: str

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """All of a run's; what fails is told once and left out from then on."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

    def log(self, group: str, metrics: Mapping[str, Any], step: int) -> None:
        """The numbers among ``figures`` as ``group/name``."""
        numbers = {
            f"{group}/{name}": float(value)
            for name, value in flatten(dict(metrics)).items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
        }
        self._each(lambda outlet: outlet.log(numbers, step))

    def close(self) -> None:
        """End all of them."""
        self._each(lambda outlet: outlet.close())

    def _each(self, work: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                work(tracker)
            except Exception as error:  # a foreign library, a network: neither may end a training
                self._trackers.remove(tracker)
                reason = " ".join(str(error).split())[:200]
                tqdm.write(
                    f"note: {tracker.name} failed ({type(error).__name__}: {reason}) and gets no more figures of this "
                    "session; metrics.jsonl has them all",
                    file=sys.stderr,
                )


def require_trackers(config: TrainConfig) -> None:
    """UserError when a library that ``config.trackers`` needs is not installed."""
    for name in config.trackers:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise missing_package(f"trackers=[{name}]", name, "trackers")


def open_trackers(config: TrainConfig, run: Path, step: int) -> Trackers:
    """Those of ``config.trackers`` for the run at ``run``, which stands at ``step``.

    Raises:
        UserError: one is not installed or does not start.
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
        except Exception as error:  # whatever a foreign library raises at its start
            reason = " ".join(str(error).split())[:200]
            fix = "log in by `wandb login`, set WANDB_MODE=offline, or" if name == "wandb" else "mend it, or"
            raise UserError(
                f"{name} does not start ({type(error).__name__}: {reason}): {fix} go on by python -m train fit "
                f"--resume {run} 'trackers=[]'"
            ) from None
    return Trackers(trackers)


class Wandb:
    """A run of wandb; it goes on in the one that ``wandb-id`` names."""

    name = "wandb"

    def __init__(self, config: TrainConfig, run: Path) -> None:
        import wandb

        kept = run / WANDB_ID
        if not kept.is_file():
            with translate_os_errors("keeping the id of the wandb run", kept):
                atomic_write(kept, secrets.token_hex(4).encode(), str(os.getpid()))
        settings: Any = wandb.Settings(console="off", silent=True)
        self._run: Any = wandb.init(
            project=wandb_project(config),
            name=run.name,
            id=kept.read_text().strip(),
            resume="allow",
            dir=str(run),
            config=flatten(config.model_dump(mode="json")),
            reinit="create_new",  # experiments of a sweep are side by side
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        # The step is a figure, not wandb's own counter: that refuses the steps which a resumed run makes again.
        self._run.log({**metrics, "step": step})

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files; steps past a resumed run's checkpoint are marked as void."""

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
    """``wandb_project``, or for a nanochat model ``nanochat-omni-audio``, or ``earshard``."""
    if config.wandb_project is not None:
        return config.wandb_project
    return "nanochat-omni-audio" if config.lm.model.startswith("nanochat:") else "earshard"
