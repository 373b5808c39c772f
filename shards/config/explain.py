"""Formats a pydantic validation error as one sentence for a :class:`shards.errors.UserError`.

The sentence names the key, the file and line or argument that set it, and the key or value that was probably meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher, get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, Tag, ValidationError

from shards.config.fields import CHOICE, content_of, models_in, old_names, submodels

SIMILAR = 0.7  # threshold for difflib's ratio: accepts one wrong letter in four


def explain(model: type[BaseModel], error: ValidationError, tree: Any, find: Callable[[str], str]) -> str:
    """Describe the first error and count the others. Unknown keys come before missing ones.

    Args:
        tree: the mapping that was validated.
        find: returns the place where a dotted key was set.
    """
    first, *others = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    kind, value, context = first["type"], first["input"], first.get("ctx", {})
    key, siblings = _locate(model, first["loc"], tree, kind == "missing")
    if kind == "union_tag_invalid":
        key, value, context = f"{key}.kind", context["tag"], {"expected": context["expected_tags"]}
    place = find(key)
    message = first["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        sentence = f"unknown key '{key}' in {place}: {_suggest_key(model, key, siblings)}"
    elif kind == "missing":
        sentence = f"key '{key}' is missing in {place}: set it in the file or as {key}=…"
    elif kind in ("literal_error", "union_tag_invalid"):
        close = get_close_matches(str(value), re.findall("'(.*?)'", context["expected"]), 1)
        sentence = f"key '{key}' in {place} is {value!r}: expected {context['expected']}"
        sentence += f"; did you mean '{close[0]}'?" if close else ""
    elif kind in ("model_type", "union_tag_not_found"):
        sentence = f"key '{key}' in {place} is {value!r}: expected a mapping of keys"
    elif not key or (kind == "value_error" and isinstance(value, dict)):  # a conflict between keys
        sentence = f"'{key}' in {place}: {message}" if key else f"{place}: {message}"
    else:
        sentence = f"key '{key}' in {place} is {value!r}: {message[:1].lower()}{message[1:]}"
    return f"{sentence} (and {len(others)} more)" if others else sentence


def _locate(model: type[BaseModel], loc: Sequence[Any], tree: Any, missing: bool) -> tuple[str, list[str]]:
    """Return the dotted key of pydantic's ``loc`` (which also names union members) and every key allowed there."""
    found: list[str] = []
    current: Any = model
    siblings = list(model.model_fields)
    for part in loc:
        if member := _tagged(current, part):
            current = member
            continue
        held = (isinstance(tree, dict) and part in tree) or (isinstance(tree, list) and isinstance(part, int))
        if not held and not (missing and part == loc[-1]):
            continue
        fields = {
            k: v for each in models_in(current, (*CHOICE, list, tuple, dict)) for k, v in each.model_fields.items()
        }
        found, siblings, tree = [*found, str(part)], list(fields), tree[part] if held else None
        current = content_of(fields[part]) if part in fields else current
    return ".".join(found), siblings


def _tagged(annotation: Any, tag: Any) -> Any:
    """Return the member of a discriminated union that ``tag`` names."""
    for part in get_args(annotation):
        if any(isinstance(mark, Tag) and mark.tag == tag for mark in getattr(part, "__metadata__", ())):
            return part
    return None


def _suggest_key(model: type[BaseModel], key: str, siblings: Sequence[str]) -> str:
    """Suggest a replacement for an unknown key: the same name elsewhere, a similar name, or the keys allowed here."""
    above, dot, last = key.rpartition(".")
    here = {name: above + dot + name for name in siblings}
    elsewhere: dict[str, str] = {}
    for prefix, each in submodels(model):
        for name, present in {**old_names(each), **{name: name for name in each.model_fields}}.items():
            if prefix != above + dot:
                if not key.startswith(f"{prefix}{name}."):
                    elsewhere[prefix + name] = prefix + present
            elif present in siblings:
                here.setdefault(name, prefix + present)
            elif name == last:
                allowed = f"allowed here: {', '.join(siblings)}"
                return f"{allowed}; to drop the keys of another kind, set {above}={{kind: …}}"
    same = [name for name in elsewhere if name.endswith(f".{last}")]
    if len(same) == 1:
        return f"did you mean '{elsewhere[same[0]]}'?"
    scores = [(SequenceMatcher(None, last, name).ratio(), present) for name, present in here.items()]
    scores += [(SequenceMatcher(None, key, name).ratio(), present) for name, present in elsewhere.items()]
    score, closest = max(scores, default=(0.0, ""))
    return f"did you mean '{closest}'?" if score > SIMILAR else f"allowed here: {', '.join(siblings) or 'no key'}"
