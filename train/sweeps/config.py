"""The settings of a sweep: a YAML file and ``key=value`` words in, one :class:`SweepConfig` and its experiments out.

    base: configs/train/demo.yaml      # or the keys themselves; on the command line base.steps=100
    change: {steps: 300}               # dotted keys that all experiments change
    list:                              # experiments, each a mapping of the keys that differ from the base
      - projector: {kind: mlp, stack: 5}
      - projector: {kind: linear}
    grid:                              # dotted key -> values; every combination, of each experiment of the list
      lr: [1e-3, 2e-3]

A value that is a mapping replaces the whole key; a dotted key sets what it names alone. The first experiment is the
baseline that the others are compared with. Nothing here imports torch.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from shards.config.base import Config, flatten, parse_override, read_yaml, set_key, validate_config
from shards.errors import UserError
from train.config.train import TrainConfig

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
OWN = ("runs", "name")  # keys of a run that a sweep sets


class Range(Config):
    """Numbers between ``low`` and ``high``: whole ones when both are."""

    low: int | float
    high: int | float
    log: bool = False  # drawn evenly in the logarithm

    @model_validator(mode="after")
    def _ascending(self) -> Range:
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError(f"low={self.low} must be below high={self.high}, and above 0 with log=true")
        return self


class Choices(Config):
    """One of ``choices``, of any kind: a mapping replaces the whole key."""

    choices: list[Any] = Field(min_length=1)


class SearchConfig(Config):
    """A search by Optuna for the lowest held-out loss: trials are drawn and run in lockstep, ``together`` at a time."""

    trials: int = Field(ge=1)  # experiments to draw
    space: dict[str, Range | Choices] = Field(min_length=1)  # dotted key -> what it may be
    together: int = Field(default=4, ge=1)  # trials in lockstep; the sampler learns from those before
    sampler: Literal["tpe", "random"] = "tpe"  # how trials are drawn
    # whom evaluations on the way drop: below the median of the others, or not among the best third at each rung
    pruner: Literal["none", "median", "halving"] = "none"
    seed: int = Field(default=0, ge=0)  # of the sampler


def _flat(value: Any) -> Any:
    return flatten(value) if isinstance(value, dict) else value


Changes = list[dict[str, Any]]  # named here: SweepConfig has a key of the name list
Grid = Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], BeforeValidator(_flat)]


class SweepConfig(Config):
    """Every key of ``python -m train sweep``; see ``configs/sweep/`` for files."""

    base: dict[str, Any]  # keys of a run, or the file that holds them
    change: dict[str, Any] = Field(default={})  # dotted key -> value, of all experiments
    list: Changes = Field(default=[])  # experiments: the keys in which each differs from the base
    grid: Grid = Field(default={})  # dotted key -> values; every combination, of each experiment of the list
    name: Name  # folder below ``runs``; the file's name when not told
    runs: str = "runs"  # folder under which the sweep's folder is made
    names: str | None = None  # pattern of the experiments' names, such as "{projector.kind}-{lr}"; None: what differs
    engine: Literal["local", "ray"] = "local"  # local: this process; ray: groups over a Ray cluster
    # batched: one pass of the language model for all experiments of a group; separate: a pass each, bit-equal to runs
    # alone on a CPU in float32; none: one experiment after another
    lockstep: Literal["batched", "separate", "none"] = "batched"
    together: int | None = Field(default=None, ge=1)  # most experiments in a group; None: all that fit together
    search: SearchConfig | None = None  # needs optuna

    @model_validator(mode="after")
    def _consistent(self) -> SweepConfig:
        own = [key for key in OWN if key in self.base or key in self.change]
        if own:
            raise ValueError(f"base or change sets {', '.join(own)}: a sweep names its runs by its own keys")
        if self.search is not None and (self.list or self.grid or self.names or self.engine != "local"):
            raise ValueError("search draws its experiments itself, on this machine: leave list, grid, names and engine")
        if self.search is not None and {**self.base, **self.change}.get("eval_every") == 0:
            raise ValueError("search goes by the held-out loss: leave eval_every=0 away")
        return self

    @property
    def folder(self) -> Path:
        """Where the sweep stands."""
        return Path(self.runs) / self.name


def load_sweep(path: str, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read ``path`` and the file that its ``base`` names, apply ``a.b=value`` in order, validate.

    Raises:
        UserError: a file is missing or not a mapping, a key is unknown, a value of the wrong type.
    """
    tree = read_yaml(path)
    _resolve(tree)
    for word in overrides:
        key, value = parse_override(word)
        set_key(tree, key, value, word)
        _resolve(tree)
    tree.setdefault("name", Path(path).stem)
    return validate_config(SweepConfig, tree, path, overrides)


def experiments(config: SweepConfig) -> list[TrainConfig]:
    """The experiments of a list and a grid, named, in their order: the first is the baseline.

    Raises:
        UserError: one has a key that no run has, or a bad value; two have the same name, or one's name is no name.
    """
    grid = [[(key, value) for value in values] for key, values in config.grid.items()]
    changes = [{**entry, **dict(cell)} for entry in config.list or [{}] for cell in product(*grid)]
    varied = [key for key in dict.fromkeys(key for change in changes for key in change) if key != "name"]
    found = []
    for number, change in enumerate(changes, 1):
        run = as_run(config, change, str(change.get("name") or f"number-{number}"))
        name = str(change.get("name") or _name(config, run, change, varied))
        found.append(validate_config(TrainConfig, run.model_dump() | {"name": name}, f"experiment {name}"))
    twice = [name for name, count in Counter(run.name for run in found).items() if count > 1]
    if twice:
        raise UserError(
            f"{len(found)} experiments of '{config.name}' are called {', '.join(map(str, twice))} more than once: set "
            f"names to a pattern of what differs, such as names='{{{'}-{'.join(varied or ['lr'])}}}'"
        )
    return found


def needed_runs(config: SweepConfig) -> Sequence[TrainConfig]:
    """Runs whose caches are those of the sweep."""
    return [as_run(config, {}, "base")] if config.search is not None else experiments(config)


def as_run(config: SweepConfig, change: dict[str, Any], name: str) -> TrainConfig:
    """The base with the keys of ``change`` as the settings of the experiment ``name``."""
    tree = copy.deepcopy(config.base)
    for key, value in {**config.change, **change}.items():
        if key != "name":
            set_key(tree, key, copy.deepcopy(value), f"{config.name}: {key}")
    tree |= {"runs": str(config.folder), "name": name}
    return validate_config(TrainConfig, tree, f"experiment {name} of {config.name}")


def _resolve(tree: dict[str, Any]) -> None:
    if isinstance(tree.get("base"), str):
        tree["base"] = {key: value for key, value in read_yaml(tree["base"]).items() if key not in OWN}


def _name(config: SweepConfig, run: TrainConfig, change: dict[str, Any], varied: Sequence[str]) -> str:
    if config.names is None:
        return "-".join(word for key in varied if key in change for word in _words(key, change[key])) or "base"
    flat = flatten(run.model_dump(mode="json"))

    def fill(match: re.Match[str]) -> str:
        if match[1] not in flat:
            raise UserError(f"names of '{config.name}' asks for '{match[1]}', no key of a run: correct it")
        return _plain(flat[match[1]])

    return re.sub(r"\{([\w.]+)\}", fill, config.names)


def _words(key: str, value: Any) -> Iterator[str]:
    """What tells ``value`` from other values of ``key``: ``mlp``, ``stack5``, ``lr0.001``."""
    last = key.rsplit(".", 1)[-1]
    if isinstance(value, dict):
        for name, part in flatten(value).items():
            yield from _words(name, part)
    elif isinstance(value, str) and not re.fullmatch(r"[\d.e+-]+", value):
        yield _plain(value)
    else:
        yield f"{last}{_plain(value)}"


def _plain(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "none"
