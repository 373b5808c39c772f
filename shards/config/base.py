"""Typed configuration: merges a YAML file and ``key=value`` arguments into one validated pydantic model.

Used by extraction (``pipeline/config.py``), training (``train/config/train.py``) and sweeps
(``train/sweeps/config.py``). The value of an argument is YAML, so ``source.splits=[dev-clean,test-clean]`` is a list.
PyYAML reads ``1e-3`` as a string; the typed model converts it. The old name of a renamed key is still accepted.
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
    """Base class of every configuration model. Unknown keys are errors; validated values are frozen.

    The string below a field documents its key. ``OLD_NAMES`` maps the old name of a key to its current name. Either
    name may be set; the current name is written.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    OLD_NAMES: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _accept_old_names(cls, tree: Any) -> Any:
        return rename_keys(cls, tree)


M = TypeVar("M", bound=BaseModel)


def load_config(model: type[M], path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> M:
    """Read ``path`` (a YAML mapping; ``None`` means empty), apply ``a.b=value`` in order and validate as ``model``.

    Raises:
        UserError: the file is missing or not a mapping, an override is not ``key=value``, a key is unknown or set by
            both its old and its new name, or a value is invalid. The message names the argument, or the file and line.
    """
    tree = read_yaml(path, model) if path is not None else {}
    for word, key, value in parse_overrides(overrides, model):
        set_key(tree, key, value, word)
    origins = Origins(model, {"": os.fspath(path)} if path is not None else {}, overrides)
    return validate_config(model, tree, origins.find)


def validate_config(model: type[M], tree: dict[str, Any], where: str | Callable[[str], str]) -> M:
    """Validate a mapping as ``model``.

    Args:
        where: the origin of the mapping that errors name, or a function that returns the origin of a dotted key.

    Raises:
        UserError: a key is unknown or missing, or a value is invalid.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(model, error, tree, where if callable(where) else lambda _: where)) from None


def parse_overrides(words: Sequence[str], model: type[BaseModel]) -> Iterator[tuple[str, str, Any]]:
    """Yield each word ``a.b=value`` with its key ``a.b``, under its current name in ``model``, and its value.

    Raises:
        UserError: a word is not ``key=value``, or two words set the same key by its old and its new name.
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
            raise UserError(
                f"the arguments set '{typed[key]}' and '{given}', which name the same key: set only '{key}'"
            )
        yield word, key, value


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"a": {"b": 1}}`` as ``{"a.b": 1}``. Lists are kept as values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def set_key(tree: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    """Set ``a.b`` in ``tree`` to ``value``.

    Raises:
        UserError: ``a`` is not a mapping. The message names ``where``, the origin of the value.
    """
    *above, last = dotted.split(".")
    for key in above:
        below = tree.setdefault(key, {})
        if below is None:
            below = tree[key] = {}
        if not isinstance(below, dict):
            raise UserError(f"'{where}' sets a key below '{key}': expected a mapping there, got {below!r}")
        tree = below
    tree[last] = value
