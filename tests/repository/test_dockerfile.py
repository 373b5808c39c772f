"""The Dockerfile installs what the locks say, copies what is there, and leaves root; hadolint finds nothing in it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_the_image_has_the_versions_of_the_locks_and_the_makefile():
    (torch,) = re.findall(r"^TORCH := (\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"ARG TORCH_VERSION={torch.removeprefix('torch==')}\n" in TEXT
    assert "--require-hashes -r requirements.lock -r weights.lock" in TEXT


def test_everything_that_it_copies_is_there_and_not_ignored():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", TEXT, re.MULTILINE) for name in line.split()}
    assert copied == kept
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_its_commands_do_not_run_as_root():
    assert re.findall(r"^USER (\S+)$", TEXT, re.MULTILINE) == ["1000"]
    assert TEXT.index("\nUSER ") < TEXT.index("\nENTRYPOINT ")


@pytest.mark.slow
def test_hadolint_finds_nothing():
    lint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if lint is None:
        pytest.skip("needs hadolint")
    done = subprocess.run([lint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
