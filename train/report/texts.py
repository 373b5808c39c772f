"""Two texts with their differences marked: what was said and not decoded, and what was decoded and not said.

In: reference and hypothesis. Out: HTML of both, words that differ inside ``<del>`` and ``<ins>``. Case and punctuation
at the ends of words make no difference, as in the error rates, which also normalise spellings and numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from html import escape


def marked(reference: str, hypothesis: str) -> tuple[str, str]:
    """Both as HTML; a hypothesis without a word is a dash."""
    said, heard = reference.split(), hypothesis.split()
    left, right = [], []
    matcher = SequenceMatcher(None, list(map(_plain, said)), list(map(_plain, heard)), autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        left.append(_run(said[a:b], "del" if kind != "equal" else ""))
        right.append(_run(heard[c:d], "ins" if kind != "equal" else ""))
    return " ".join(filter(None, left)), " ".join(filter(None, right)) or "–"


def _plain(word: str) -> str:
    return "".join(letter for letter in word.casefold() if letter.isalnum()) or word


def _run(words: Sequence[str], tag: str) -> str:
    text = escape(" ".join(words))
    return f"<{tag}>{text}</{tag}>" if text and tag else text
