from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.config.base import validate_config
from train.config.model import TextConfig
from train.data.text import apply_text_rules, emptied_texts


@given(st.text())
def test_without_rules_a_text_stays_as_it_is(text):
    assert apply_text_rules(text, TextConfig()) == text


@pytest.mark.parametrize(
    ("rules", "text", "expected"),
    [
        ({"case": "lower"}, "MISTER QUILTER IS", "mister quilter is"),
        ({"case": "sentence"}, "“MISTER QUILTER IS", "“Mister quilter is"),
        ({"case": "sentence"}, "7 ÉTÉS", "7 Étés"),
        ({"punctuation": "strip"}, "Well-known -- don't, he said; 'no'!", "Well-known don't he said no"),
        ({"punctuation": "strip"}, "नमस्ते, दुनिया।", "नमस्ते दुनिया"),
        ({"punctuation": "strip"}, "你好，世界。", "你好 世界"),
        ({"punctuation": "strip"}, "$5 + 3%", "$5 + 3"),
        ({"case": "sentence"}, "ßA", "Ssa"),
        ({"normalize": "NFC"}, "e\u0301te\u0301", "été"),
        ({"normalize": "NFKC", "case": "lower"}, "ﬁn Ａ", "fin a"),
    ],
)
def test_each_rule_does_what_its_documentation_says(rules, text, expected):
    assert apply_text_rules(text, TextConfig(**rules)) == expected


@given(st.text())
def test_marks_and_letters_survive_without_punctuation(text):
    def words(value: str) -> list[str]:
        return [char for char in value if unicodedata.category(char)[0] in "LMN"]

    assert words(apply_text_rules(text, TextConfig(punctuation="strip"))) == words(text)


def test_texts_that_were_punctuation_alone_are_counted_and_empty_ones_are_not():
    assert emptied_texts(["…", "__", "", " ", "a.", "$"], TextConfig(punctuation="strip")) == 2
    assert emptied_texts(["…"], TextConfig()) == 0


def test_normalise_is_another_spelling_of_the_key():
    assert validate_config(TextConfig, {"normalise": "NFC"}, "x").normalize == "NFC"
