"""Damage to JSON trees: any value in any place."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

VALUES = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        3,
        2**31,
        2**63,
        2**200,
        0.5,
        1e300,
        "",
        "x",
        "é\u0000\u001b[31m",
        "../x",
        "/etc/passwd",
    ),
    *([], {}, [None], [[]], {"": None}, [1] * 300, "y" * 5000, "0" * 64, "f" * 64),
]


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of every value in a JSON tree."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in list(pairs) for place in ((tree, key), *places(value))]


def damage(tree: dict[str, Any], rng: random.Random, values: Sequence[Any] = VALUES) -> dict[str, Any]:
    """Return a copy with one to three values replaced, removed, moved or added."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        all_places = places(tree)
        if not all_places:
            break
        container, key = rng.choice(all_places)
        other, name = rng.choice(all_places)
        how = rng.random()
        if how < 0.6:
            container[key] = copy.deepcopy(rng.choice(values))
        elif how < 0.75:
            del container[key]
        elif how < 0.9:
            container[key] = copy.deepcopy(other[name])
        elif isinstance(container, dict):
            container[rng.choice(["x", "files", "schema_version", "../x"])] = rng.choice(values)
        else:
            container.append(copy.deepcopy(container[key]))
    return tree
