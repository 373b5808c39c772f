"""The settings of a sweep: a YAML file and ``key=value`` arguments define a :class:`SweepConfig` and its experiments.

    base: configs/train/demo.yaml      # or a mapping of keys; on the command line base.steps=100
    change: {steps: 300}               # dotted keys changed in all experiments
    experiments:                       # for each, the keys that differ from the base
      - projector: {kind: mlp, stack: 5}
      - projector: {kind: linear}
    grid:                              # dotted key -> values; every combination of every experiment
      lr: [1e-3, 2e-3]

A value that is a mapping replaces the whole key; a dotted key sets only the key it names. The first experiment is the
baseline of all comparisons. This module does not import torch.
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
PER_RUN_KEYS = ("runs", "name")  # keys of a run that the sweep sets itself


class Range(Config):
    """Numbers from `low` to `high`; integers if both are integers."""

    low: int | float
    """Smallest value."""
    high: int | float
    """Largest value."""
    log: bool = False
    """Draw uniformly on a logarithmic scale."""

    @model_validator(mode="after")
    def _ascending(self) -> Range:
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError(f"expected low < high, and low > 0 with log=true, got low={self.low}, high={self.high}")
        return self


class Choices(Config):
    """One of `choices`, which may have any type; a mapping replaces the whole key."""

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
    """Number of trials that run in lockstep. The sampler learns only from earlier trials."""
    sampler: Literal["tpe", "random"] = "tpe"
    """How trials are drawn. tpe: Tree-structured Parzen Estimator. random: at random."""
    pruner: Literal["none", "median", "halving"] = "none"
    """Which trials are stopped early, at an evaluation during training. median: those worse than the median of the
    others. halving: all but the best quarter at each rung."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sampler."""


def _flat(value: Any) -> Any:
    return flatten(value) if isinstance(value, dict) else value


def _current_names(changes: dict[str, Any]) -> dict[str, Any]:
    """Return ``changes`` under the current names of the keys; ValueError if a key is set under two names."""
    renamed: dict[str, Any] = {}
    for key, value in changes.items():
        name, value = rename_key(TrainConfig, key, value)
        if name in renamed:
            raise ValueError(f"'{name}' is set under its old and its new name: remove one")
        renamed[name] = value
    return renamed


def _check_names(changes: dict[str, Any]) -> dict[str, Any]:
    """Validate the names of ``changes`` but return it as typed, because experiments are named after it."""
    _current_names(changes)
    return changes


Grid = Annotated[
    dict[str, Annotated[list[Any], Field(min_length=1)]], BeforeValidator(_flat), AfterValidator(_check_names)
]


class SweepConfig(Config):
    """The keys of ``python -m train sweep``; see ``configs/sweep/`` for examples."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "list": "experiments",
        "names": "name_template",
        "together": "max_group_size",
    }

    base: Annotated[dict[str, Any], KeysOf(TrainConfig)]
    """Training config that all experiments start from: a mapping of keys, or the path of a YAML file."""
    change: Annotated[dict[str, Any], KeysOf(TrainConfig), AfterValidator(_current_names)] = Field(default={})
    """Dotted key -> value. Changes to the base in all experiments."""
    experiments: list[Annotated[dict[str, Any], AfterValidator(_check_names)]] = Field(default=[])
    """The experiments. Each entry lists the keys that differ from the base."""
    grid: Grid = Field(default={})
    """Dotted key -> values. Every combination is run for each entry of `experiments`."""
    name: Name
    """Name of the sweep's folder. Default: the name of the YAML file."""
    runs: str = "runs"
    """Folder in which the sweep's folder is created."""
    name_template: str | None = None
    """Template of the experiments' names, such as `{projector.kind}-{lr}`. null: the values that differ."""
    engine: Literal["local", "ray"] = "local"
    """local: run in this process. ray: run the groups of experiments on a Ray cluster."""
    lockstep: Literal["batched", "separate", "none"] = "batched"
    """batched: the experiments of a group share passes of the language model. separate: each experiment has its own
    passes; on a CPU in float32 its results are bit-identical to a single run. none: one experiment after another."""
    max_group_size: int | None = Field(default=None, ge=1)
    """Maximum number of experiments in lockstep. null: all that share data, order and language model."""
    search: SearchConfig | None = None
    """Draw the experiments with Optuna. null: run `experiments` and `grid`."""

    _origins: Origins | None = PrivateAttr(default=None)  # of a sweep read from its file

    @model_validator(mode="after")
    def _consistent(self) -> SweepConfig:
        reserved = [key for key in PER_RUN_KEYS if key in self.base or key in self.change]
        if reserved:
            raise ValueError(f"base or change sets {', '.join(reserved)}, which a sweep sets itself: remove it")
        if self.search is not None and (self.experiments or self.grid or self.name_template or self.engine != "local"):
            raise ValueError(
                "search generates its own experiments in this process: remove experiments, grid, name_template, engine"
            )
        if self.search is not None and {**self.base, **self.change}.get("eval_every") == 0:
            raise ValueError("search minimizes the held-out loss: remove eval_every=0")
        return self

    @property
    def folder(self) -> Path:
        """The folder of the sweep."""
        return Path(self.runs) / self.name


def load_sweep(path: str, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read ``path`` and the file named by its ``base``, apply the ``a.b=value`` overrides in order, and validate.

    Raises:
        UserError: a file is missing or not a mapping, a key is unknown, or a value has the wrong type.
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
    """Return the named experiments of ``experiments`` and ``grid``, in order; the first is the baseline.

    Raises:
        UserError: a key is unknown, a value or a name is invalid, or two experiments have the same name.
    """
    cells = [dict(zip(config.grid, cell, strict=True)) for cell in product(*config.grid.values())]
    listed = list(enumerate(config.experiments or [{}]))
    changes = [{**entry, **cell} for _, entry in listed for cell in cells]
    change_origins = [
        {key: f"experiments.{n}.{key}" for key in entry} | {key: f"grid.{key}" for key in cell}
        for n, entry in listed
        for cell in cells
    ]
    varied = [key for key in dict.fromkeys(key for change in changes for key in change) if key != "name"]
    found = []
    for number, (change, origin_keys) in enumerate(zip(changes, change_origins, strict=True), 1):
        run = experiment_config(config, change, str(change.get("name") or f"number-{number}"), origin_keys)
        name = str(change.get("name") or _name(config, run, change, varied))
        found.append(validate_config(TrainConfig, run.model_dump() | {"name": name}, f"experiment '{name}'"))
    duplicates = [name for name, count in Counter(run.name for run in found).items() if count > 1]
    if duplicates:
        raise UserError(
            f"experiments of '{config.name}' have the same name ({', '.join(map(str, duplicates))}): set "
            f"name_template to the keys that differ, such as name_template='{{{'}-{'.join(varied or ['lr'])}}}'"
        )
    return found


def needed_runs(config: SweepConfig) -> Sequence[TrainConfig]:
    """Return runs that together need all caches of the sweep."""
    return [experiment_config(config, {}, "base")] if config.search is not None else experiments(config)


def experiment_config(
    config: SweepConfig, change: dict[str, Any], name: str, origin_keys: Mapping[str, str] | None = None
) -> TrainConfig:
    """Return the settings of the experiment ``name``: the base with ``change`` applied.

    ``origin_keys`` maps each changed key to the sweep key that set it, for error messages; the default is
    ``search.space``.
    """
    tree = copy.deepcopy(config.base)
    renamed = dict(rename_key(TrainConfig, key, value) for key, value in change.items())
    for key, value in {**config.change, **renamed}.items():
        if key != "name":
            set_key(tree, key, copy.deepcopy(value), f"{config.name}: {key}")
    tree |= {"runs": str(config.folder), "name": name}

    def find(key: str) -> str:
        origins = config._origins
        if origins is None:
            return f"experiment '{name}' of '{config.name}'"
        for typed in change:
            if within(key, rename_key(TrainConfig, typed)[0]):
                return origins.find((origin_keys or {}).get(typed, f"search.space.{typed}"))
        section = "change" if any(within(key, changed) for changed in config.change) else "base"
        return origins.find(f"{section}.{key}")

    return validate_config(TrainConfig, tree, find)


def _read_base(tree: dict[str, Any]) -> dict[str, str]:
    """Replace the file name in ``base`` by the keys of that file; return the prefix of these keys -> the file."""
    file = tree.get("base")
    if not isinstance(file, str):
        return {}
    tree["base"] = {key: value for key, value in read_yaml(file, TrainConfig).items() if key not in PER_RUN_KEYS}
    return {"base.": file}


def _name(config: SweepConfig, run: TrainConfig, change: dict[str, Any], varied: Sequence[str]) -> str:
    if config.name_template is None:
        return "-".join(part for key in varied if key in change for part in _name_parts(key, change[key])) or "base"
    flat = flatten(run.model_dump(mode="json"))

    def fill(match: re.Match[str]) -> str:
        key = rename_key(TrainConfig, match[1])[0]
        if key not in flat:
            raise UserError(f"name_template of '{config.name}' uses '{match[1]}', which is not a config key of a run")
        return _plain(flat[key])

    return re.sub(r"\{([\w.]+)\}", fill, config.name_template)


def _name_parts(key: str, value: Any) -> Iterator[str]:
    """Yield the parts of a name that identify ``value`` of ``key``: ``mlp``, ``stack5``, ``lr0.001``."""
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
