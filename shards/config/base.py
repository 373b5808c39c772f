"""Typed configuration: a YAML file and ``key=value`` arguments in, one validated pydantic model out.

Extraction, training and sweeps use it (``pipeline/config.py``, ``train/config/train.py`` and ``train/sweeps/config.py``
hold their models). The value of an argument is YAML, so ``source.splits=[dev-clean,test-clean]`` is a list. PyYAML
reads ``1e-3`` as a string; the typed model converts it. A renamed key is still accepted by its old name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from shards.config.explain import explain
from shards.config.fields import rename_key, rename_keys
from shards.config.origins import Origins, parse_yaml, read_yaml
from shards.errors import UserError


class Config(BaseModel):
    """Base of every configuration model: unknown keys are errors, values are frozen once validated.

    The string below a field documents its key. ``OLD_NAMES`` maps the old name of a key to its present one; either may
    be set, the present one is written.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    OLD_NAMES: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _accept_old_names(cls, tree: Any) -> Any:
        return rename_keys(cls, tree)


M = TypeVar("M", bound=BaseModel)


def load_config(model: type[M], path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> M:
    """Read ``path`` (a YAML mapping; ``None``: empty), apply ``a.b=value`` in order, validate as ``model``.

    Raises:
        UserError: the file is missing or not a mapping, an override is not ``key=value``, a key is unknown or set by
            its old and its new name, or a value is wrong. It names the argument, or the file and line.
    """
    tree = read_yaml(path, model) if path is not None else {}
    for word, key, value in parse_overrides(overrides, model):
        set_key(tree, key, value, word)
    origins = Origins(model, {"": os.fspath(path)} if path is not None else {}, overrides)
    return validate_config(model, tree, origins.find)


def validate_config(model: type[M], tree: dict[str, Any], where: str | Callable[[str], str]) -> M:
    """Validate a mapping; an error names ``where`` it is from, or what ``where`` returns for the wrong key."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(model, error, tree, where if callable(where) else lambda _: where)) from None


def parse_overrides(words: Sequence[str], model: type[BaseModel]) -> Iterator[tuple[str, str, Any]]:
    """Each ``a.b=value`` with the key ``a.b``, by its present name in ``model``, and its value.

    Raises:
        UserError: one is no override, or two set one key by its old and its new name.
    """
    typed: dict[str, str] = {}
    for word in words:
        given, eq, text = word.partition("=")
        if not eq or not given:
            raise UserError(f"'{word}' is not an override: write it as key=value, such as source.limit=100")
        try:
            key, value = rename_key(model, given, parse_yaml(text))
        except ValueError as error:
            raise UserError(f"the value of the argument '{word}' is not valid: {error}") from None
        if typed.setdefault(key, given) != given:
            raise UserError(f"the arguments set '{typed[key]}' and '{given}', two names of one key: set only '{key}'")
        yield word, key, value


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


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
