"""Text rules of a run: the case, punctuation and Unicode form of targets and references.

A cache keeps the text as its source wrote it. A run may want another form: in capitals, LibriSpeech takes nearly twice
as many tokens of an LM as in lower case.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace

from shards.stream.batch import Batch
from train.config.model import TextConfig

AS_STORED = TextConfig()
IN_WORD = frozenset("'’-‐‑")  # between two letters or digits these are spelling, not punctuation


def apply_text_rules(text: str, rules: TextConfig) -> str:
    """``text`` in the form that ``rules`` ask for."""
    if rules.normalize != "keep":
        text = unicodedata.normalize(rules.normalize, text)
    if rules.punctuation == "strip":
        text = _strip_punctuation(text)
    if rules.case != "keep":
        text = text.lower()
    if rules.case == "sentence":
        text = re.sub(r"[^\W\d_]", lambda letter: letter[0].title(), text, count=1)
    return text if rules.normalize == "keep" else unicodedata.normalize(rules.normalize, text)


def with_text_rules(batch: Batch, rules: TextConfig) -> Batch:
    """``batch`` with its texts in the form of ``rules``; everything else is shared with it."""
    if rules == AS_STORED:
        return batch
    return replace(batch, texts=[apply_text_rules(text, rules) for text in batch.texts])


def emptied_texts(texts: Sequence[str], rules: TextConfig) -> int:
    """Number of texts that hold something, and nothing once the rules are applied."""
    if rules.punctuation == "keep":
        return 0
    wordless = (text for text in texts if text.strip() and not re.search(r"[^\W_]", text))  # quick: most have words
    return sum(1 for text in wordless if not apply_text_rules(text, rules))


def _strip_punctuation(text: str) -> str:
    """Punctuation (Unicode category P) becomes a space, except inside a word; runs of white space become one space.

    Marks (category M), such as the vowel signs of Hindi or Thai, are part of their letters and stay.
    """
    kept = []
    for i, char in enumerate(text):
        in_word = char in IN_WORD and 0 < i < len(text) - 1 and _is_word(text[i - 1]) and _is_word(text[i + 1])
        kept.append(char if in_word or unicodedata.category(char)[0] != "P" else " ")
    return " ".join("".join(kept).split())


def _is_word(char: str) -> bool:
    return unicodedata.category(char)[0] in "LNM"
