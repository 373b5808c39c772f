"""A resolved configuration as text: every key, its value, and whether a file, a word or the default set it.

In: a validated model with the file and the words that it came from. Out: YAML that loads to the same model again;
behind each value a comment says where it is from::

    lr: 0.0005           # command line
    steps: 600           # configs/train/demo.yaml:17
    min_lr: 0.0          # default

    python -m train config --print --config configs/train/demo.yaml lr=5e-4
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from pydantic import BaseModel

from shards.config.base import flatten, parse_override

DEFAULT, WORD = "default", "command line"
WIDTH = 72  # a line longer than this does not push the comments of all others to the right


def origins(path: str | os.PathLike[str] | None, overrides: Sequence[str]) -> dict[str, str]:
    """Where each key that was set comes from: ``file:line`` or ``command line``, by dotted key; later ones win."""
    found = _lines(path) if path is not None else {}
    for word in overrides:
        key, value = parse_override(word)
        found = {k: place for k, place in found.items() if not _within(k, key) and not _within(key, k)}
        found |= dict.fromkeys(flatten({key: value}), WORD)
    return found


def _within(key: str, above: str) -> bool:
    return key == above or key.startswith(f"{above}.")


def _lines(path: str | os.PathLike[str]) -> dict[str, str]:
    """The line of each leaf of a YAML file that is known to be a mapping (or empty)."""
    with open(path, encoding="utf-8") as file:
        loader = yaml.SafeLoader(file.read())
    found: dict[str, str] = {}

    def walk(node: yaml.MappingNode, prefix: str) -> None:
        loader.flatten_mapping(node)
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if isinstance(value, yaml.MappingNode) and value.value:
                walk(value, f"{name}.")
            else:
                found[name] = f"{os.fspath(path)}:{key.start_mark.line + 1}"

    root = loader.get_single_node()
    if isinstance(root, yaml.MappingNode):
        walk(root, "")
    return found


def place_of(key: str, found: dict[str, str]) -> str:
    """Where ``key`` was set, also by a word or line that set the mapping it is in as one value."""
    while key:
        if key in found:
            return found[key]
        key = key.rpartition(".")[0]
    return DEFAULT


def render(config: BaseModel, path: str | os.PathLike[str] | None, overrides: Sequence[str]) -> str:
    """YAML of all keys of ``config`` with the place of each value as a comment; loads to an equal model."""
    found = origins(path, overrides)
    lines = list(_emit(config.model_dump(mode="json"), "", found))
    column = max((len(text) for text, place in lines if place and len(text) <= WIDTH), default=0)
    return "\n".join(f"{text.ljust(column)}  # {place}" if place else text for text, place in lines) + "\n"


def summary(config: BaseModel, path: str | os.PathLike[str] | None, overrides: Sequence[str]) -> str:
    """One line: how many keys came from where."""
    found = origins(path, overrides)
    places = Counter(place_of(key, found) for key in flatten(config.model_dump(mode="json")))
    defaults, words = places.pop(DEFAULT, 0), places.pop(WORD, 0)
    told = [f"{path} sets {places.total()} keys"] if path is not None else []
    told += [f"the command line {words}"] if words else []
    return ", ".join([*told, f"{defaults} are at their defaults"])


def _emit(tree: dict[str, Any], indent: str, found: dict[str, str], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        name = f"{indent}{_scalar(key)}:"
        if isinstance(value, dict) and value:
            yield name, ""
            yield from _emit(value, f"{indent}  ", found, f"{prefix}{key}.")
        else:
            yield f"{name} {_scalar(value)}", place_of(f"{prefix}{key}", found)


def _scalar(value: Any) -> str:
    """``value`` as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")
