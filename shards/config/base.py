"""Typed configuration: one YAML file and ``key=value`` words in, one validated pydantic model out.

Both stages use it (``pipeline/config.py`` and ``train/config/train.py`` hold their models). A value on the command line
is YAML, so ``source.splits=[dev-clean,test-clean]`` is a list. PyYAML reads ``1e-3`` as a string; the typed model
coerces it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from shards.errors import UserError


class Config(BaseModel):
    """Base of every configuration model: unknown keys are errors, values are frozen once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True)


M = TypeVar("M", bound=BaseModel)


def load_config(model: type[M], path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> M:
    """Read ``path`` (YAML mapping; ``None`` = empty), apply ``a.b=value`` overrides in order, validate as ``model``.

    Raises:
        UserError: the file is missing or not a mapping, an override is not ``key=value``, a key is unknown
            (with the allowed ones) or a value has the wrong type.
    """
    tree = read_yaml(path) if path is not None else {}
    for word in overrides:
        key, value = parse_override(word)
        set_key(tree, key, value, word)
    return validate_config(model, tree, str(path) if path is not None else "the command line", overrides)


def parse_override(word: str) -> tuple[str, Any]:
    """``a.b=value`` as the key ``a.b`` and the value that its YAML stands for. UserError when it is not one."""
    key, eq, text = word.partition("=")
    if not eq or not key:
        raise UserError(f"'{word}' is not an override: write it as key=value, such as source.limit=100")
    try:
        return key, yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: such as the date 2024-13-45
        raise UserError(f"the value of '{key}' on the command line is not YAML: {_one_line(error)}") from None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def validate_config(model: type[M], tree: dict[str, Any], where: str, overrides: Sequence[str] = ()) -> M:
    """Validate an in-memory mapping; errors name ``where`` (a file) or the override that set the bad value."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(model, error, where, overrides)) from None


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping that a YAML file holds; an empty file holds an empty one. UserError when it is something else."""
    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.safe_load(file)
    except FileNotFoundError:
        raise UserError(
            f"no configuration file at '{path}': name one with --config (examples stand in configs/)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration file '{path}': {_one_line(error)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not YAML: {_one_line(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"'{path}' holds a {type(tree).__name__}, not a mapping of keys: see configs/ for examples")
    return tree


def set_key(tree: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    """Put ``value`` at ``a.b`` of ``tree``; UserError, naming ``where``, when ``a`` holds something else."""
    *above, last = dotted.split(".")
    for key in above:
        below = tree.setdefault(key, {})
        if below is None:
            below = tree[key] = {}
        if not isinstance(below, dict):
            raise UserError(f"'{where}' sets a key below '{key}', which holds {below!r} and not a mapping")
        tree = below
    tree[last] = value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _explain(model: type[BaseModel], error: ValidationError, where: str, overrides: Sequence[str]) -> str:
    """One sentence for the first complaint, an unknown key before what is missing for it; the count of the others."""
    first, *others = sorted(error.errors(), key=lambda complaint: complaint["type"] != "extra_forbidden")
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    place = next((f"'{word}' on the command line" for word in overrides if word.split("=")[0] == key), f"'{where}'")
    more = f" (and {len(others)} more)" if others else ""
    if first["type"] == "extra_forbidden":
        allowed = _fields_at(model, path[:-1])
        return f"unknown key '{key}' in {place}; allowed here: {', '.join(allowed) or 'none'}{more}"
    if first["type"] == "missing":
        return f"key '{key}' is missing in {place}; set it in the file or as {key}=value{more}"
    message = first["msg"].removeprefix("Value error, ")
    if not path:  # of keys that do not go together
        return f"{place}: {message}{more}"
    return f"key '{key}' in {place} is {first['input']!r}: {message[:1].lower() + message[1:]}{more}"


def _fields_at(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    current: Any = model
    for part in path:
        if isinstance(current, type) and issubclass(current, BaseModel) and part in current.model_fields:
            current = _model_of(current.model_fields[part].annotation)
        elif not (isinstance(current, type) and issubclass(current, BaseModel)):
            return []
    return sorted(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _model_of(annotation: Any) -> Any:
    """The pydantic model inside ``X``, ``X | None`` or ``list[X]``, else the annotation itself."""
    from typing import get_args

    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return annotation
