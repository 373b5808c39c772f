"""Every sentence that docs/troubleshooting.md quotes is one that the code can raise."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
from docs_text import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = [
    " ".join(lines.replace("\n> ", " ").split()) for lines in re.findall(r"^> (.+(?:\n> .+)*)", PAGE, re.MULTILINE)
]
# an exception, or a text that is given back or named before it is raised
RAISED = {"error": "UserError|MissingCache|ValueError|made", "failed": "WorkFailed|made"}


@cache
def sentences() -> list[tuple[str, str]]:
    """(exception, text with … for what is filled in) of each call; ``made`` of a text given back or named."""
    found = []
    for package in ("shards", "pipeline", "train"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    found += [(node.func.id, text_of(argument)) for argument in node.args]
                elif isinstance(node, ast.Return | ast.Assign):
                    found.append(("made", text_of(node.value)))
    return found


def text_of(node: ast.expr | None) -> str:
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)


def matches(quoted: str, kinds: str) -> bool:
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in quoted.split("…")))
    return any(re.fullmatch(kinds, kind) and pattern.search(text) for kind, text in sentences())


@pytest.mark.parametrize("quoted", QUOTED)
def test_each_quoted_sentence_is_raised_somewhere(quoted):
    kind, colon, text = quoted.partition(": ")
    if not colon or kind not in RAISED:
        kind, text = "", quoted
    assert matches(text, RAISED.get(kind, ".*"))


def test_a_sentence_that_nobody_raises_is_noticed():
    assert not matches("the moon is … today", ".*")
    assert not matches("'…' is not valid: … problem…", "UserError")


def test_the_page_has_the_sentences_of_each_part():
    assert len(QUOTED) >= 30
