"""Code blocks, commands and sections of the Markdown pages, for the tests of the documentation."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from earshard.__main__ import route

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [
    ROOT / "README.md",
    *(page for page in (ROOT / "CONTRIBUTING.md",) if page.exists()),
    *sorted((ROOT / "docs").glob("*.md")),
]
OURS = re.compile(r"(?:python -m |torchrun .*-m )(pipeline|shards|train)\b ?(.*)|(?:^|\s)earshard ((?:[a-z]).*)")


def blocks(text: str, language: str | None = None) -> list[str]:
    """Return the fenced blocks of ``text``, of one language or of any."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [body for name, body in found if language is None or name == language]


def sections(text: str) -> dict[str, str]:
    """Return ``{heading: text below it}`` for headings of the second level."""
    _, *parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Return (package, words) of every command of earshard in the blocks of ``text``, split as a shell would."""
    found = []
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            code = re.split(r"\s#\s|\s{2,}#|\s\|\|\s|\s&&\s|\s\|\s|\s&$|;\s|\s>\s", line)
            for part in code:
                if match := OURS.search(part):
                    found.append((match[1], shlex.split(match[2])) if match[1] else route(shlex.split(match[3])))
    return found
