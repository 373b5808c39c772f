"""The keys of a configuration model, as its code tells them: for shell completion and for ``docs/config.md``.

In: a pydantic model class. Out: one :class:`Key` a leaf, in order, and one :class:`Group` for each model in which keys
stand. What a key is about is the comment beside or above it in the source, or its line under ``Attributes:`` in the
docstring of its class: each is written once.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
import tokenize
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo

BOUNDS = {
    Ge: ("≥", "ge"),
    Gt: (">", "gt"),
    Le: ("≤", "le"),
    Lt: ("<", "lt"),
    MultipleOf: ("multiple of", "multiple_of"),
}
NAMES = {
    "int": "integer",
    "float": "number",
    "str": "text",
    "bool": "true, false",
    "NoneType": "null",
    "Any": "anything",
}


@dataclass(frozen=True)
class Key:
    """One leaf: its dotted name, its values and its default as text, and what it is about (may be empty)."""

    name: str
    values: str
    default: str
    about: str


@dataclass(frozen=True)
class Group:
    """The keys of one model; ``prefix`` is where they stand (``lm.``), ``model`` tells the rest."""

    prefix: str
    model: type[BaseModel]
    keys: list[Key]


def groups(model: type[BaseModel], prefix: str = "") -> Iterator[Group]:
    """``model`` itself with the keys that hold values, then each model below it (of a choice: every member)."""
    here, below = [], []
    told = comments(model)
    for name, field in model.model_fields.items():
        members = _models(field.annotation)
        below += [(f"{prefix}{name}.", member) for member in members]
        if not members or type(None) in get_args(field.annotation):
            default = _default(field) if not members else "null"
            here.append(Key(prefix + name, _values(field, members), default, told.get(name, "")))
    yield Group(prefix, model, here)
    for place, member in below:
        yield from groups(member, place)


def names(model: type[BaseModel]) -> list[str]:
    """Every key that ``key=value`` may set, sorted, each once."""
    return sorted({key.name for group in groups(model) for key in group.keys})


@cache
def comments(model: type[BaseModel]) -> dict[str, str]:
    """What the source says of each field, fields of base classes included."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            found |= {name: text for name, text in _comments_of(base).items() if text or name not in found}
    return found


def _comments_of(model: type[BaseModel]) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(model))
    lines = source.splitlines()
    told = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = _attributes(inspect.cleandoc(model.__doc__ or ""))
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    for field in body.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            above = field.lineno
            while above - 1 in told and lines[above - 2].lstrip().startswith("#"):
                above -= 1
            within = range(above, (field.end_lineno or field.lineno) + 1)
            text = " ".join(told[line] for line in within if line in told)
            found[field.target.id] = text or found.get(field.target.id, "")
    return found


def _attributes(doc: str) -> dict[str, str]:
    """The lines ``name, other: text`` under ``Attributes:``."""
    found: dict[str, str] = {}
    block = doc.partition("Attributes:\n")[2]
    for entry in re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {5,}.*)*)", block, re.MULTILINE):
        found |= {name.strip(): " ".join(entry[1].split()) for name in entry[0].split(",")}
    return found


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that a value may be; none for a plain value or a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [found for part in get_args(annotation) for found in _models(part)]
    return []


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _values(field: FieldInfo, members: list[type[BaseModel]]) -> str:
    if members:
        return "null, or a mapping"
    bounds = [_bound(part) for part in field.metadata]
    return ", ".join([_type(field.annotation), *(b for b in bounds if b)])


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
    return NAMES.get(name, name)
