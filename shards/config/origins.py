"""Reads YAML files, and finds the line or ``key=value`` argument that set a key (``configs/train/demo.yaml:17``)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml
from pydantic import BaseModel

from shards.config.fields import rename_key, rename_keys
from shards.errors import UserError

BUILT_IN = Path(__file__).with_name("builtin")  # configs/, in a checkout by a link
MAX_YAML = 1 << 20  # characters; parsing takes seconds and 100 times the memory


class _Loader(yaml.SafeLoader):
    """A YAML loader without anchors and aliases: a few lines of them can expand to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if event.anchor is not None:
            problem = "anchors and aliases are not supported, write the value in full;"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def builtin_config(name: str, *kinds: str) -> str:
    """Return ``configs/KIND/name.yaml`` if ``name`` is no file but the plain name of a built-in configuration.

    Any other ``name`` is returned as it is. ``kinds`` are the folders of configs/ to look into, in this order.
    """
    if name == PurePath(name).stem and not Path(name).is_file():
        found = (kind for kind in kinds if (BUILT_IN / kind / f"{name}.yaml").is_file())
        name = next((f"configs/{kind}/{name}.yaml" for kind in found), name)
    return name


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML document.

    Raises:
        ValueError: ``text`` is not valid YAML. The message is one line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise ValueError(
            f"{error.problem} at line {mark.line + 1}, column {mark.column + 1}" if mark else error
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an invalid date such as 2024-13-45
        raise ValueError(" ".join(str(error).split())) from None


def read_yaml(path: str | os.PathLike[str], model: type[BaseModel] | None = None) -> dict[str, Any]:
    """Return the mapping in a YAML file (empty for an empty file). Keys of ``model`` get their current names.

    Raises:
        UserError: the file does not exist, is not valid YAML, is not a mapping, or sets a key by both its old and its
            new name.
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
        raise UserError(
            f"'{path}' is not a valid configuration: expected a mapping, got {type(tree).__name__}; see configs/"
        )
    return tree


@dataclass(frozen=True)
class Origins:
    """Where the keys of a configuration were set. Lookups reread the files, so use it only to report an error.

    Attributes:
        model: the configuration model.
        files: YAML files by the prefix of their keys, ``{"": "sweep.yaml", "base.": "run.yaml"}``.
        arguments: ``key=value`` arguments. Later ones override earlier ones and files.
    """

    model: type[BaseModel]
    files: Mapping[str, str]
    arguments: Sequence[str]

    def find(self, key: str) -> str:
        """Return the place that set ``key``: ``the argument 'lr=fast'``, ``run.yaml:3`` or the whole file."""
        names = {word: self._current_name(word.partition("=")[0]) for word in reversed(self.arguments)}
        for word, name in names.items():
            if within(key, name):
                return f"the argument '{word}'"
        for prefix, path in sorted(self.files.items(), reverse=True):
            lines = {self._current_name(f"{prefix}{name}"): line for name, line in _lines(path)}
            above = key if key.startswith(prefix) else ""
            while above:  # for a missing key, the nearest mapping around it
                if above in lines:
                    return f"{path}:{lines[above]}"
                above = above.rpartition(".")[0]
        for word, name in names.items():
            if within(name, key):
                return f"the argument '{word}'"
        return f"'{self.files['']}'" if "" in self.files else "the command line"

    def _current_name(self, key: str) -> str:
        return rename_key(self.model, key)[0]


def within(key: str, above: str) -> bool:
    """Return whether the dotted ``key`` is ``above`` or is nested below it."""
    return key == above or key.startswith(f"{above}.")


def _lines(path: str) -> Iterator[tuple[str, int]]:
    """Yield each dotted key of a YAML file with its line number. The file has been read successfully before."""

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


def _on_disk(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return ``path``, or the built-in file if ``path`` is ``configs/KIND/NAME.yaml`` and no file in this folder."""
    top, *below = PurePath(path).parts or ("",)
    built_in = BUILT_IN.joinpath(*below)
    is_built_in = top == "configs" and len(below) == 2 and ".." not in below and built_in.is_file()
    return built_in if is_built_in and not os.path.exists(path) else path


def _read(path: str | os.PathLike[str]) -> str:
    try:
        with open(_on_disk(path), encoding="utf-8") as file:
            text = file.read(MAX_YAML + 1)
    except FileNotFoundError:
        raise UserError(
            f"configuration file '{path}' does not exist: pass a file with --config, or the name of a built-in one, "
            "such as own (they are in configs/)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration file '{path}': {' '.join(str(error).split())}") from None
    if len(text) > MAX_YAML:
        raise UserError(f"'{path}' is larger than {MAX_YAML >> 20} MiB, which no configuration is: name another file")
    return text
