"""Turns a module and all modules of earshard that it imports into files of one folder, for ``trust_remote_code``.

transformers copies a model's code file by file, following ``from .name import``, and knows no packages in packages. So
``pipeline/encoders/base.py`` becomes ``earshard_pipeline_encoders_base.py``; only the import statements change. Two
things are left at home: imports for type checkers, and pydantic. In place of a module that defines settings with
pydantic there is one with its constants, and with empty classes for annotations.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the packages
PACKAGES = ("train", "pipeline", "shards")
REQUIRED = {"torch", "transformers", "safetensors", "numpy", "soundfile", "soxr", "tqdm", "yaml", "huggingface_hub"}
# imported by functions that a receiver does not call: converted wheels, and files of a run
LEFT_OUT = ("pipeline.weights.wheels", "train.runs.folder")

Edit = tuple[ast.stmt, list[str]]  # a statement and the lines in its place


def flatten(root: str, replaced: Mapping[str, str]) -> dict[str, str]:
    """Return file names and contents of the module ``root`` and of what it imports.

    ``root`` keeps the last part of its name, others get a prefix.

    Args:
        root: dotted name of a module.
        replaced: source texts of modules to use in place of the installed ones.
    """
    texts: dict[str, str] = {}
    names: dict[str, set[str]] = {}  # that are imported from a module with pydantic
    waiting = [root]
    while waiting:
        module = waiting.pop()
        if module in texts:
            continue
        texts[module], imported = _rewrite(module, replaced[module] if module in replaced else _source(module))
        for other, name in imported:
            if _is_settings(other):
                names.setdefault(other, set()).add(name)
            elif other not in texts:
                waiting.append(other)
    texts |= {module: _stand_in(module, sorted(found)) for module, found in names.items()}
    flat = {f"{flat_name(module)}.py": text for module, text in texts.items()}
    first = flat.pop(f"{flat_name(root)}.py")
    listed = "".join(f"    from .{name.removesuffix('.py')} import __doc__ as _\n" for name in sorted(flat))
    first += f"\nif False:  # for transformers, which otherwise follows every path from file to file\n{listed}"
    return {f"{root.rpartition('.')[2]}.py": first, **dict(sorted(flat.items()))}


def flat_name(module: str) -> str:
    """Return the name of ``module`` in an export."""
    return f"earshard_{module.replace('.', '_')}"


def _path(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def _source(module: str) -> str:
    path = _path(module)
    if path is None:
        raise ValueError(f"{module} is not a module of earshard")
    return path.read_text(encoding="utf-8")


def _is_settings(module: str) -> bool:
    return _path(module) is not None and "\nfrom pydantic import" in _source(module)


def _stand_in(module: str, names: list[str]) -> str:
    lines = [f'"""Names of earshard\'s ``{module}`` that this code uses; its classes only say what is meant."""', ""]
    lines += ["from types import SimpleNamespace", "from typing import Any", ""]
    for name in names:
        value = getattr(import_module(module), name)
        if isinstance(value, str | int | float):
            lines.append(f"{name} = {value!r}")
        elif isinstance(value, type):
            lines += ["", f"class {name}(SimpleNamespace):", '    """Settings."""', ""]
        elif callable(value) and getattr(value, "__module__", "") == module:
            raise ValueError(f"{module}.{name} is a function, which an export cannot use: move it to another module")
        else:
            lines.append(f"{name} = Any")
    return "\n".join(lines) + "\n"


def _rewrite(module: str, text: str) -> tuple[str, list[tuple[str, str]]]:
    """Return ``text`` with relative imports, and (module, name) of everything that it imports from earshard."""
    lines = text.splitlines()
    imported: list[tuple[str, str]] = []
    edits = list(_edits(module, ast.parse(text), imported))
    for node, new in sorted(edits, key=lambda edit: -edit[0].lineno):
        lines[node.lineno - 1 : node.end_lineno] = [" " * node.col_offset + line for line in new]
    return "\n".join(lines) + "\n", imported


def _edits(module: str, tree: ast.AST, imported: list[tuple[str, str]], inside: bool = False) -> Iterator[Edit]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            yield node, []
        elif isinstance(node, ast.Try):  # a package that may be missing
            yield from _edits(module, node, imported)
        elif isinstance(node, ast.ImportFrom) and (own := _absolute(module, node)):
            found = [(*_place(own, alias.name), alias.asname or alias.name) for alias in node.names]
            if own in LEFT_OUT:
                yield node, _guarded(node)
            else:
                imported += [(place, name) for place, name, _ in found]
                yield node, [line for each in found for line in _relative(*each)]
        elif isinstance(node, ast.Import | ast.ImportFrom) and inside and _packages(node) - REQUIRED:
            yield node, _guarded(node)
        else:
            yield from _edits(module, node, imported, inside or isinstance(node, ast.FunctionDef))


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """Return the module of earshard that ``node`` imports from, or "" for another package."""
    if node.level:
        return ".".join([*module.split(".")[: -node.level], *([node.module] if node.module else [])])
    return node.module or "" if (node.module or "").split(".")[0] in PACKAGES else ""


def _place(module: str, name: str) -> tuple[str, str]:
    """Return module and name of what ``from module import name`` gives; the name is "" for a module."""
    if _path(f"{module}.{name}"):
        return f"{module}.{name}", ""
    if module in ("train", "train.projectors"):  # which define nothing themselves
        return getattr(import_module(module), name).__module__, name
    return module, name


def _relative(module: str, name: str, alias: str) -> list[str]:
    flat = flat_name(module)
    if name:
        return [f"from .{flat} import {name}" + (f" as {alias}" if alias != name else "")]
    return [f"from .{flat} import __doc__ as _", f"from . import {flat} as {alias}"]  # transformers sees only the first


def _guarded(node: ast.stmt) -> list[str]:
    """Return lines that import as ``node`` does, in a form that transformers does not take for a requirement."""
    return ["try:", *(f"    {line}" for line in ast.unparse(node).splitlines()), "except ImportError:", "    raise"]


def _packages(node: ast.Import | ast.ImportFrom) -> set[str]:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
