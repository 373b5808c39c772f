"""Modules that a docstring, a comment, a test or a page names exist, and so does what is said to be in them."""

from __future__ import annotations

import re
import subprocess
import tomllib

from docs_text import ROOT

import earshard

PATH = re.compile(r"(?<![\w./-])(?:earshard|shards|pipeline|train|tests|bench)(?:/\w+)*/\w+\.py\b")
DOTTED = re.compile(r"(?<=[`~\"'])(?:earshard|shards|pipeline|train)(?:\.[A-Za-z_]\w*)+(?=[`\"'])")

FILES = ("train.parquet", "train.yaml")


def is_stale(name: str) -> bool:
    if name.endswith(".py"):
        return not (ROOT / name).is_file()
    package, *inside = name.split(".")
    module = ROOT / package
    while inside and ((module / inside[0]).is_dir() or (module / f"{inside[0]}.py").is_file()):
        module /= inside.pop(0)
    file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
    return bool(inside) and not re.search(rf"\b{inside[0]}\b", file.read_text(encoding="utf-8"))


def test_every_module_that_is_named_exists():
    listed = subprocess.run(["git", "ls-files", "*.py", "*.md", "*.toml", "*.yaml", "Makefile"], cwd=ROOT, text=True,
                            capture_output=True, check=True)  # fmt: skip
    stale = []
    for file in listed.stdout.split():
        if file not in ("CHANGELOG.md", "tests/docs/test_names.py") and (ROOT / file).is_file():
            text = (ROOT / file).read_text(encoding="utf-8")
            found = {name for name in PATH.findall(text) + DOTTED.findall(text) if name not in FILES}
            stale += [f"{file}: {name}" for name in sorted(found) if is_stale(name)]
    assert not stale


def test_the_rooms_page_names_every_module_in_the_row_of_its_folder():
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `((?:earshard|shards|pipeline|train)/[\w/]*)` \|.*\| (.*) \|$", page, re.MULTILINE)
    named = {f"{folder}{name}.py" for folder, text in rows for name in re.findall(r"`([a-z_0-9]+)`", text)}
    patterns = ["earshard/*.py", "shards/*.py", "pipeline/*.py", "train/*.py"]
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, text=True, capture_output=True, check=True)
    modules = {file for file in listed.stdout.split() if not file.endswith("/__init__.py") and (ROOT / file).is_file()}
    assert modules - named == set()
    assert named - modules == set()


def test_the_rooms_page_draws_the_layers_that_the_import_contracts_check():
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    contracts = [contract for contract in tools["importlinter"]["contracts"] if contract.get("exhaustive")]
    layers = {contract["containers"][0]: contract["layers"] for contract in contracts}
    assert sorted(layers) == ["pipeline", "shards", "train"]
    for package, names in layers.items():
        (drawn,) = re.findall(rf"^- \*\*{package}\*\*: (.*(?:\n  .*)*)", page, re.MULTILINE)
        assert re.findall(r"`([^`]+)`", drawn) == names


def test_a_name_that_is_gone_is_noticed():
    assert is_stale("shards.remote.mirror.Nobody")
    assert is_stale("shards.nobody")
    assert is_stale("shards/nobody.py")
    assert not is_stale("shards.remote.mirror.Mirror")


def test_the_page_of_the_public_api_explains_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    explained = {line.rpartition(".")[2] for line in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}
    assert set(earshard.__all__) - explained == {"__version__", "open"}  # `open` is told in words
