"""What the pages say to type and to look at exists: commands parse, keys are known, targets, links, files are there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from docs_text import PAGES, ROOT, commands

import earshard.__main__
import pipeline.__main__
import shards.__main__
import train.__main__
from pipeline.config import ExtractConfig
from shards.config.base import load_config
from train.config.train import TrainConfig

PARSERS = {
    "": earshard.__main__.parser,
    "pipeline": pipeline.__main__.parser,
    "shards": shards.__main__.parser,
    "train": train.__main__.parser,
}
MODELS = {("pipeline", "extract"): ExtractConfig, ("pipeline", "config"): ExtractConfig}
MODELS |= {("train", command): TrainConfig for command in ("fit", "config", "needs")}
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FOLDERS = ("shards", "pipeline", "train", "configs", "bench", "docs", "tests", ".github", ".ci")


@pytest.fixture(params=PAGES, ids=NAMES)
def page(request) -> Path:
    return request.param


def test_every_command_on_a_page_parses_and_its_keys_are_known(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for package, words in commands(page.read_text(encoding="utf-8")):
        try:
            args = PARSERS[package]().parse_args(words)
        except SystemExit:
            raise AssertionError(f"{package} {' '.join(words)} does not parse") from None
        model = MODELS.get((package, args.command))
        file = getattr(args, "config", None)
        if model and (file is None or Path(file).exists()) and not getattr(args, "resume", None):
            load_config(model, file, [word for word in args.overrides if "…" not in word])


def test_every_make_target_on_a_page_exists(page):
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    said = re.findall(r"(?:`|^|; |\()make ([a-z-]+)", text, re.MULTILINE)
    assert set(said) <= targets


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_help_explains_every_target():
    told = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    phony = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(line.split()[0] for line in told.splitlines()) == sorted(phony[1].split())
    assert all(len(line.split()) > 2 for line in told.splitlines())


def test_every_link_and_every_file_that_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    links += re.findall(r'(?:src|srcset)="([^"]+)"', text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = re.findall(rf"`((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]+\.(?:py|md|yaml|yml|svg|webp|sh))`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_commands_are_found_as_a_shell_would_cut_them():
    text = (
        "```\nX=1 python -m shards ls 'a b' --limit 3  # why\nearshard extract --config own\n"
        "python -m train fit \\\n  lr=1 || true\n```\n"
    )
    assert commands(text) == [
        ("shards", ["ls", "a b", "--limit", "3"]),
        ("pipeline", ["extract", "--config", "own"]),
        ("train", ["fit", "lr=1"]),
    ]
