"""The settings of a sweep: a YAML file and ``key=value`` arguments in, a :class:`SweepConfig` and its experiments out.

    base: configs/train/demo.yaml      # or the keys themselves; on the command line base.steps=100
    change: {steps: 300}               # dotted keys that all experiments change
    experiments:                       # each a mapping of the keys that differ from the base
      - projector: {kind: mlp, stack: 5}
      - projector: {kind: linear}
    grid:                              # dotted key -> values; every combination, of each of the experiments
      lr: [1e-3, 2e-3]

A value that is a mapping replaces the whole key; a dotted key sets what it names alone. The first experiment is the
baseline that the others are compared with. Nothing here imports torch.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, model_validator

from shards.config.base import Config, flatten, parse_overrides, set_key, validate_config
from shards.config.fields import KeysOf, rename_key
from shards.config.origins import Origins, read_yaml, within
from shards.errors import UserError
from train.config.train import TrainConfig

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
PER_RUN_KEYS = ("runs", "name")  # keys of a run that a sweep sets


class Range(Config):
    """Numbers from `low` to `high`: integers if both are."""

    low: int | float
    """Smallest value."""
    high: int | float
    """Largest value."""
    log: bool = False
    """Draw uniformly in the logarithm."""

    @model_validator(mode="after")
    def _ascending(self) -> Range:
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError(f"low={self.low} must be below high={self.high}, and above 0 with log=true")
        return self


class Choices(Config):
    """One of `choices`, of any type: a mapping replaces the whole key."""

    choices: list[Any] = Field(min_length=1)
    """The values."""


class SearchConfig(Config):
    """An Optuna search for the lowest held-out loss."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"together": "max_concurrent_trials"}

    trials: int = Field(ge=1)
    """Number of experiments to draw."""
    space: dict[str, Range | Choices] = Field(min_length=1)
    """Dotted key -> `{low: …, high: …, log: true}` or `{choices: […]}`."""
    max_concurrent_trials: int = Field(default=4, ge=1)
    """Trials that run in lockstep. The sampler learns only from those before."""
    sampler: Literal["tpe", "random"] = "tpe"
    """How trials are drawn: by the Tree-structured Parzen Estimator, or at random."""
    pruner: Literal["none", "median", "halving"] = "none"
    """Which trials end early, at an evaluation during training. median: those below the median of the others. halving:
    all but the best quarter at each rung."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sampler."""


def _flat(value: Any) -> Any:
    return flatten(value) if isinstance(value, dict) else value


def _current_names(changes: dict[str, Any]) -> dict[str, Any]:
    """``changes`` by the present names of the dotted keys of a run; ValueError where one key has two."""
    found: dict[str, Any] = {}
    for key, value in changes.items():
        name, value = rename_key(TrainConfig, key, value)
        if name in found:
            raise ValueError(f"'{name}' is set by its old and its new name: remove one")
        found[name] = value
    return found


def _check_names(changes: dict[str, Any]) -> dict[str, Any]:
    """``changes`` as typed, because experiments are named by it."""
    _current_names(changes)
    return changes


Grid = Annotated[
    dict[str, Annotated[list[Any], Field(min_length=1)]], BeforeValidator(_flat), AfterValidator(_check_names)
]


class SweepConfig(Config):
    """Every key of ``python -m train sweep``; see ``configs/sweep/`` for files."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "list": "experiments",
        "names": "name_template",
        "together": "max_group_size",
    }

    base: Annotated[dict[str, Any], KeysOf(TrainConfig)]
    """Training config that all experiments start from: its keys, or the file that holds them."""
    change: Annotated[dict[str, Any], KeysOf(TrainConfig), AfterValidator(_current_names)] = Field(default={})
    """Dotted key -> value: what all experiments change in the base."""
    experiments: list[Annotated[dict[str, Any], AfterValidator(_check_names)]] = Field(default=[])
    """The experiments: for each the keys in which it differs from the base."""
    grid: Grid = Field(default={})
    """Dotted key -> values. Every combination is run, of each of `experiments`."""
    name: Name
    """Name of the sweep's folder. Default: the name of the YAML file."""
    runs: str = "runs"
    """Folder in which the sweep's folder is created."""
    name_template: str | None = None
    """Template of the experiments' names, such as `{projector.kind}-{lr}`. null: what differs between them."""
    engine: Literal["local", "ray"] = "local"
    """local: this process. ray: groups of experiments on a Ray cluster."""
    lockstep: Literal["batched", "separate", "none"] = "batched"
    """batched: one pass of the language model for all experiments of a group. separate: one pass for each, bit-equal to
    runs of their own on a CPU in float32. none: one experiment after another."""
    max_group_size: int | None = Field(default=None, ge=1)
    """Maximum number of experiments in lockstep. null: all that share data, order and language model."""
    search: SearchConfig | None = None
    """Draw the experiments with Optuna. null: run `experiments` and `grid`."""

    _origins: Origins | None = PrivateAttr(default=None)  # of a sweep read from its file

    @model_validator(mode="after")
    def _consistent(self) -> SweepConfig:
        own = [key for key in PER_RUN_KEYS if key in self.base or key in self.change]
        if own:
            raise ValueError(f"base or change sets {', '.join(own)}: a sweep names its runs by its own keys, remove it")
        if self.search is not None and (self.experiments or self.grid or self.name_template or self.engine != "local"):
            raise ValueError(
                "search draws its experiments itself, on this machine: remove experiments, grid, name_template, engine"
            )
        if self.search is not None and {**self.base, **self.change}.get("eval_every") == 0:
            raise ValueError("search goes by the held-out loss: remove eval_every=0")
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
    tree = read_yaml(path, SweepConfig)
    files = {"": path} | _read_base(tree)
    for word, key, value in parse_overrides(overrides, SweepConfig):
        set_key(tree, key, value, word)
        files |= _read_base(tree)
    tree.setdefault("name", Path(path).stem)
    origins = Origins(SweepConfig, files, [word for word in overrides if not word.startswith("base=")])
    config = validate_config(SweepConfig, tree, origins.find)
    config._origins = origins
    return config


def experiments(config: SweepConfig) -> list[TrainConfig]:
    """The experiments of a list and a grid, named, in their order: the first is the baseline.

    Raises:
        UserError: one has a key that no run has, or a bad value; two have the same name, or one's name is no name.
    """
    cells = [dict(zip(config.grid, cell, strict=True)) for cell in product(*config.grid.values())]
    listed = list(enumerate(config.experiments or [{}]))
    changes = [{**entry, **cell} for _, entry in listed for cell in cells]
    places = [
        {key: f"experiments.{n}.{key}" for key in entry} | {key: f"grid.{key}" for key in cell}
        for n, entry in listed
        for cell in cells
    ]
    varied = [key for key in dict.fromkeys(key for change in changes for key in change) if key != "name"]
    found = []
    for number, (change, where) in enumerate(zip(changes, places, strict=True), 1):
        run = experiment_config(config, change, str(change.get("name") or f"number-{number}"), where)
        name = str(change.get("name") or _name(config, run, change, varied))
        found.append(validate_config(TrainConfig, run.model_dump() | {"name": name}, f"experiment '{name}'"))
    twice = [name for name, count in Counter(run.name for run in found).items() if count > 1]
    if twice:
        raise UserError(
            f"{len(found)} experiments of '{config.name}' are called {', '.join(map(str, twice))} more than once: set "
            f"name_template to what differs, such as name_template='{{{'}-{'.join(varied or ['lr'])}}}'"
        )
    return found


def needed_runs(config: SweepConfig) -> Sequence[TrainConfig]:
    """Runs whose caches are those of the sweep."""
    return [experiment_config(config, {}, "base")] if config.search is not None else experiments(config)


def experiment_config(
    config: SweepConfig, change: dict[str, Any], name: str, places: Mapping[str, str] | None = None
) -> TrainConfig:
    """The base with the keys of ``change`` as the settings of the experiment ``name``.

    ``places``: the key of the sweep that each is from, for errors; ``search.space`` by default.
    """
    tree = copy.deepcopy(config.base)
    present = dict(rename_key(TrainConfig, key, value) for key, value in change.items())
    for key, value in {**config.change, **present}.items():
        if key != "name":
            set_key(tree, key, copy.deepcopy(value), f"{config.name}: {key}")
    tree |= {"runs": str(config.folder), "name": name}

    def find(key: str) -> str:
        origins = config._origins
        if origins is None:
            return f"experiment '{name}' of '{config.name}'"
        for typed in change:
            if within(key, rename_key(TrainConfig, typed)[0]):
                return origins.find((places or {}).get(typed, f"search.space.{typed}"))
        above = "change" if any(within(key, changed) for changed in config.change) else "base"
        return origins.find(f"{above}.{key}")

    return validate_config(TrainConfig, tree, find)


def _read_base(tree: dict[str, Any]) -> dict[str, str]:
    """Put the keys of the file that ``base`` names in its place; that file by where its keys stand now."""
    file = tree.get("base")
    if not isinstance(file, str):
        return {}
    tree["base"] = {key: value for key, value in read_yaml(file, TrainConfig).items() if key not in PER_RUN_KEYS}
    return {"base.": file}


def _name(config: SweepConfig, run: TrainConfig, change: dict[str, Any], varied: Sequence[str]) -> str:
    if config.name_template is None:
        return "-".join(word for key in varied if key in change for word in _name_parts(key, change[key])) or "base"
    flat = flatten(run.model_dump(mode="json"))

    def fill(match: re.Match[str]) -> str:
        key = rename_key(TrainConfig, match[1])[0]
        if key not in flat:
            raise UserError(f"name_template of '{config.name}' asks for '{match[1]}', which is no key of a run")
        return _plain(flat[key])

    return re.sub(r"\{([\w.]+)\}", fill, config.name_template)


def _name_parts(key: str, value: Any) -> Iterator[str]:
    """What tells ``value`` from other values of ``key``: ``mlp``, ``stack5``, ``lr0.001``."""
    last = key.rsplit(".", 1)[-1]
    if isinstance(value, dict):
        for name, part in flatten(value).items():
            yield from _name_parts(name, part)
    elif isinstance(value, str) and not re.fullmatch(r"[\d.e+-]+", value):
        yield _plain(value)
    else:
        yield f"{last}{_plain(value)}"


def _plain(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "none"
