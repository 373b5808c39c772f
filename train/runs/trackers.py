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
from shards.files import atomic_write, told
from train.config.train import TrainConfig

NEEDS = {"wandb": "wandb", "tensorboard": "tensorboard"}  # what each imports, and how pip calls it
WANDB_ID = "wandb-id"


class Outlet(Protocol):
    """One place that figures go to; any method may raise anything."""

    name: str

    def log(self, figures: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Outlets:
    """All of a run's; what fails is told once and left out from then on."""

    def __init__(self, outlets: Sequence[Outlet]) -> None:
        self._outlets = list(outlets)

    def log(self, group: str, figures: Mapping[str, Any], step: int) -> None:
        """The numbers among ``figures`` as ``group/name``."""
        numbers = {
            f"{group}/{name}": float(value)
            for name, value in flatten(dict(figures)).items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
        }
        self._each(lambda outlet: outlet.log(numbers, step))

    def close(self) -> None:
        """End all of them."""
        self._each(lambda outlet: outlet.close())

    def _each(self, work: Callable[[Outlet], None]) -> None:
        for outlet in list(self._outlets):
            try:
                work(outlet)
            except Exception as error:  # a foreign library, a network: neither may end a training
                self._outlets.remove(outlet)
                told = " ".join(str(error).split())[:200]
                tqdm.write(
                    f"note: {outlet.name} failed ({type(error).__name__}: {told}) and gets no more figures of this "
                    "session; metrics.jsonl has them all",
                    file=sys.stderr,
                )


def require_trackers(config: TrainConfig) -> None:
    """UserError when a library that ``config.trackers`` needs is not installed."""
    for name in config.trackers:
        if importlib.util.find_spec(NEEDS[name]) is None:
            raise missing_package(f"trackers=[{name}]", name, "trackers")


def open_outlets(config: TrainConfig, run: Path, step: int) -> Outlets:
    """Those of ``config.trackers`` for the run at ``run``, which stands at ``step``.

    Raises:
        UserError: one is not installed or does not start.
    """
    require_trackers(config)
    makers: dict[str, Callable[[], Outlet]] = {
        "wandb": lambda: Wandb(config, run),
        "tensorboard": lambda: TensorBoard(run, step),
    }
    outlets = []
    for name in config.trackers:
        try:
            outlets.append(makers[name]())
        except UserError:
            raise
        except Exception as error:  # whatever a foreign library raises at its start
            told = " ".join(str(error).split())[:200]
            mend = "log in by `wandb login`, set WANDB_MODE=offline, or" if name == "wandb" else "mend it, or"
            raise UserError(
                f"{name} does not start ({type(error).__name__}: {told}): {mend} go on by python -m train fit "
                f"--resume {run} 'trackers=[]'"
            ) from None
    return Outlets(outlets)


class Wandb:
    """A run of wandb; it goes on in the one that ``wandb-id`` names."""

    name = "wandb"

    def __init__(self, config: TrainConfig, run: Path) -> None:
        import wandb

        kept = run / WANDB_ID
        if not kept.is_file():
            with told("keeping the id of the wandb run", kept):
                atomic_write(kept, secrets.token_hex(4).encode(), str(os.getpid()))
        settings: Any = wandb.Settings(console="off", silent=True)
        self._run: Any = wandb.init(
            project=project_of(config),
            name=run.name,
            id=kept.read_text().strip(),
            resume="allow",
            dir=str(run),
            config=flatten(config.model_dump(mode="json")),
            reinit="create_new",  # experiments of a sweep are side by side
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        # The step is a figure, not wandb's own counter: that refuses the steps which a resumed run makes again.
        self._run.log({**figures, "step": step})

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files; steps past a resumed run's checkpoint are marked as void."""

    name = "tensorboard"

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter
        self._writer = writer(str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def project_of(config: TrainConfig) -> str:
    """``wandb_project``, or for a nanochat model ``nanochat-omni-audio``, or ``earshard``."""
    if config.wandb_project is not None:
        return config.wandb_project
    return "nanochat-omni-audio" if config.lm.model.startswith("nanochat:") else "earshard"
