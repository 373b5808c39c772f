"""The keys of a configuration model: old names, and the descriptions used by completion and ``docs/config.md``.

Replaces old names in a mapping, and lists the keys of a pydantic model class as one :class:`Key` per leaf, in order, in
one :class:`KeyGroup` per model. The string below a field in the source documents its key.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo

CHOICE = (Union, types.UnionType, Annotated)
BOUNDS = {
    Ge: ("≥", "ge"),
    Gt: (">", "gt"),
    Le: ("≤", "le"),
    Lt: ("<", "lt"),
    MultipleOf: ("multiple of", "multiple_of"),
}
TYPE_NAMES = {
    "int": "integer",
    "float": "number",
    "str": "text",
    "bool": "true, false",
    "NoneType": "null",
    "Any": "anything",
}


@dataclass(frozen=True)
class KeysOf:
    """Marks a field (in ``Annotated``) that holds some of the keys of ``model`` as a plain mapping."""

    model: type[BaseModel]


@dataclass(frozen=True)
class Key:
    """One leaf: its dotted name, its values and default as text, and its description (may be empty)."""

    name: str
    values: str
    default: str
    about: str


@dataclass(frozen=True)
class KeyGroup:
    """The keys of one model; ``prefix`` is the dotted prefix of its keys, such as ``lm.``."""

    prefix: str
    model: type[BaseModel]
    keys: list[Key]


def models_in(annotation: Any, through: tuple[Any, ...] = CHOICE) -> list[type[BaseModel]]:
    """Return the models that a value may be. With ``list`` or ``dict`` in ``through``, also those it may contain."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in through:
        return [found for part in get_args(annotation) for found in models_in(part, through)]
    return []


def content_of(field: FieldInfo) -> Any:
    """Return the annotation of a field, or the model marked with :class:`KeysOf`."""
    return next((mark.model for mark in field.metadata if isinstance(mark, KeysOf)), field.annotation)


def submodels(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield ``("", model)``, then each nested model (every member of a union) with its prefix, such as ``lm.lora.``."""
    yield prefix, model
    for name, field in model.model_fields.items():
        for below in models_in(field.annotation):
            yield from submodels(below, f"{prefix}{name}.")


def old_names(model: type[BaseModel]) -> dict[str, str]:
    """Map the old names of the renamed keys of ``model`` to their current names."""
    found: dict[str, str] = getattr(model, "OLD_NAMES", {})
    return found


def rename_keys(model: type[BaseModel], tree: Any) -> Any:
    """Return ``tree`` with old key names replaced.

    Raises:
        ValueError: a key is set by both its old and its new name.
    """
    return _rename([model], tree)


def rename_key(model: type[BaseModel], dotted: str, value: Any = None) -> tuple[str, Any]:
    """Like :func:`rename_keys`, for one dotted key and its value."""
    parts = dotted.split(".")
    for part in reversed(parts):
        value = {part: value}
    value, names = rename_keys(model, value), []
    for _ in parts:
        ((name, value),) = value.items()
        names.append(name)
    return ".".join(names), value


def _rename(models: Sequence[type[BaseModel]], tree: Any) -> Any:
    if not isinstance(tree, dict) or not models:
        return tree
    old = {name: new for model in models for name, new in old_names(model).items()}
    renamed: dict[Any, Any] = {}
    for key, value in tree.items():
        name = old.get(key, key)
        if name in renamed:
            former = next(each for each in tree if old.get(each) == name)
            raise ValueError(f"'{former}' is the old name of '{name}', and both are set: remove '{former}'")
        fields = [model.model_fields[name] for model in models if name in model.model_fields]
        renamed[name] = _rename([below for field in fields for below in models_in(content_of(field))], value)
    return renamed


def groups(model: type[BaseModel]) -> Iterator[KeyGroup]:
    """Yield ``model`` itself with the keys that hold values, then each nested model (every member of a union)."""
    for prefix, each in submodels(model):
        keys = []
        for name, field in each.model_fields.items():
            members = models_in(field.annotation)
            if not members or type(None) in get_args(field.annotation):
                values, default = ("null, or a mapping", "null") if members else (_values(field), _default(field))
                keys.append(Key(prefix + name, values, default, " ".join((field.description or "").split())))
        yield KeyGroup(prefix, each, keys)


def names(model: type[BaseModel]) -> list[str]:
    """Return every key that ``key=value`` may set, sorted and without duplicates."""
    return sorted({key.name for group in groups(model) for key in group.keys})


def choices(model: type[BaseModel]) -> dict[str, list[str]]:
    """Return every key that ``key=value`` may set, sorted, with its values if they are few and named; else []."""
    found: dict[str, list[str]] = {name: [] for name in names(model)}
    for prefix, each in submodels(model):
        for name, field in each.model_fields.items():
            if prefix + name in found:
                found[prefix + name] = list(dict.fromkeys([*found[prefix + name], *_named(field.annotation)]))
    return found


def _named(annotation: Any) -> list[str]:
    if annotation is bool:
        return ["true", "false"]
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return [str(part) for part in parts]
    if origin in CHOICE:
        return [value for part in parts[: 1 if origin is Annotated else None] for value in _named(part)]
    return []


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _values(field: FieldInfo) -> str:
    bounds = [_bound(part) for part in field.metadata]
    return ", ".join([_type(field.annotation), *(bound for bound in bounds if bound)])


def _bound(part: Any) -> str:
    if type(part) in BOUNDS:
        sign, name = BOUNDS[type(part)]
        bound = getattr(part, name)
        return f"{sign} {int(bound) if bound == int(bound) else bound}"
    return ""


def _type(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = [b for p in parts[1:] for meta in getattr(p, "metadata", [p]) if (b := _bound(meta))]
        return " ".join([_type(parts[0]), *bounds])
    if origin is Literal:
        return ", ".join(str(part) for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part) for part in parts)
    if origin in (list, tuple):
        return f"list of {_type(parts[0])}"
    if origin is dict:
        return "mapping"
    name = getattr(annotation, "__name__", str(annotation))
    return TYPE_NAMES.get(name, name)
