"""Reading a YAML file, and finding the line or the ``key=value`` argument that set a key.

In: paths and arguments. Out: a mapping; for a wrong key, a place such as ``configs/train/demo.yaml:17``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel

from shards.config.fields import rename_key, rename_keys
from shards.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML without anchors and aliases: a few lines of them can expand to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if event.anchor is not None:
            problem = "anchors and aliases are not supported, write the value out;"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def parse_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        ValueError: one line, why ``text`` is no value.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise ValueError(
            f"{error.problem} at line {mark.line + 1}, column {mark.column + 1}" if mark else error
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: such as the date 2024-13-45
        raise ValueError(" ".join(str(error).split())) from None


def read_yaml(path: str | os.PathLike[str], model: type[BaseModel] | None = None) -> dict[str, Any]:
    """The mapping in a YAML file, empty for an empty file; keys of ``model`` by their present names.

    Raises:
        UserError: there is no such file, it is not YAML or not a mapping, or sets a key by its old and its new name.
    """
    text = _read(path)
    try:
        tree = parse_yaml(text)
        if isinstance(tree, dict) and model is not None:
            tree = rename_keys(model, tree)
    except ValueError as error:
        raise UserError(f"'{path}' is not a valid configuration: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"'{path}' holds a {type(tree).__name__}, not a mapping of keys: see configs/ for examples")
    return tree


@dataclass(frozen=True)
class Origins:
    """Where the keys of a configuration were set; files are read again, so ask only when a key is wrong.

    Attributes:
        model: whose keys they are.
        files: YAML files by the key that their keys stand below, ``{"": "sweep.yaml", "base.": "run.yaml"}``.
        words: ``key=value`` arguments; later ones override earlier ones and files.
    """

    model: type[BaseModel]
    files: Mapping[str, str]
    arguments: Sequence[str]

    def find(self, key: str) -> str:
        """``the argument 'lr=fast'``, ``run.yaml:3``, or the file as a whole."""
        names = {word: self._present(word.partition("=")[0]) for word in reversed(self.arguments)}
        for word, name in names.items():
            if within(key, name):
                return f"the argument '{word}'"
        for prefix, path in sorted(self.files.items(), reverse=True):
            lines = {self._present(f"{prefix}{name}"): line for name, line in _lines(path)}
            above = key if key.startswith(prefix) else ""
            while above:  # the nearest mapping around a key that is missing
                if above in lines:
                    return f"{path}:{lines[above]}"
                above = above.rpartition(".")[0]
        for word, name in names.items():
            if within(name, key):
                return f"the argument '{word}'"
        return f"'{self.files['']}'" if "" in self.files else "the command line"

    def _present(self, key: str) -> str:
        return rename_key(self.model, key)[0]


def within(key: str, above: str) -> bool:
    """Whether the dotted ``key`` is ``above`` or stands below it."""
    return key == above or key.startswith(f"{above}.")


def _lines(path: str) -> Iterator[tuple[str, int]]:
    """The line of each dotted key of a YAML file that was read before."""

    def walk(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
        children: list[tuple[str, yaml.Node, yaml.Node]] = []
        if isinstance(node, yaml.MappingNode):
            children = [(str(key.value), key, value) for key, value in node.value]
        if isinstance(node, yaml.SequenceNode):
            children = [(str(index), value, value) for index, value in enumerate(node.value)]
        for name, start, value in children:
            yield f"{prefix}{name}", start.start_mark.line + 1
            yield from walk(value, f"{prefix}{name}.")

    yield from walk(_Loader(_read(path)).get_single_node(), "")


def _read(path: str | os.PathLike[str]) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(
            f"there is no configuration file '{path}': name one with --config (examples are in configs/)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration file '{path}': {' '.join(str(error).split())}") from None
