"""The languages of texts: which rules normalize them before errors are counted, and whether words are counted at all.

A text has the language of its row's label ``language``, else ``eval.language``, else it counts as English if nearly
all letters of the evaluated texts are ASCII, and as unknown otherwise. Codes of ISO 639 (``hi``, ``hi-IN``) and the
English names of some languages are understood.

| language | normalization | rates |
|---|---|---|
| English | Whisper's English normalizer | WER and CER |
| others | NFC, lower case, no punctuation and symbols; marks such as vowel signs stay | WER and CER |
| written without spaces | the same without any white space, and NFKC for Chinese, Japanese and Korean | CER |
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache

ENGLISH, UNKNOWN = "en", "und"
MIN_ASCII = 0.995  # of the letters of a corpus; French has 4 % others, German 1.5 %
# ISO 639-3 and names -> the code used here
_CODES = {
    **dict.fromkeys(("eng", "english"), ENGLISH),
    **dict.fromkeys(("zho", "chi", "cmn", "chinese", "mandarin"), "zh"),
    **dict.fromkeys(("jpn", "japanese"), "ja"),
    **dict.fromkeys(("kor", "korean"), "ko"),
    **dict.fromkeys(("tha", "thai"), "th"),
    **dict.fromkeys(("lao", "laotian"), "lo"),
    **dict.fromkeys(("mya", "bur", "burmese", "myanmar"), "my"),
    **dict.fromkeys(("khm", "khmer"), "km"),
    **dict.fromkeys(("bod", "tib", "tibetan"), "bo"),
    **dict.fromkeys(("dzo", "dzongkha"), "dz"),
    "cantonese": "yue",
}
UNSPACED = {"zh", "yue", "wuu", "nan", "hak", "lzh", "ja", "th", "lo", "my", "km", "bo", "dz"}
_WIDE = {"zh", "yue", "wuu", "nan", "hak", "lzh", "ja", "ko"}  # full-width letters and digits are common


def language_code(name: str) -> str:
    """Return the code for a language tag or name in any case: ``hi-IN`` -> ``hi``, ``Chinese`` -> ``zh``; "" for ""."""
    primary = re.split(r"[-_ ]", name.strip().lower(), maxsplit=1)[0]
    return _CODES.get(primary, primary)


def text_languages(labels: Sequence[str], texts: Sequence[str], default: str | None) -> list[str]:
    """Return the language code of each text; see the module for the order.

    Args:
        labels: the label ``language`` of each text, "" if it has none.
        texts: the reference texts.
        default: ``eval.language``.
    """
    fallback = language_code(default or "") or (ENGLISH if _is_ascii(texts) else UNKNOWN)
    return [language_code(label) or fallback for label in labels]


def language_metrics(codes: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return the number of texts by language as the metric ``languages``; {} if all are English."""
    counts = {code: codes.count(code) for code in sorted(set(codes))}
    return {"languages": counts} if counts.keys() - {ENGLISH} else {}


def _is_ascii(texts: Sequence[str]) -> bool:
    letters = [char for text in texts for char in text if char.isalpha()]
    return sum(map(str.isascii, letters)) >= MIN_ASCII * len(letters)


def separates_words(language: str) -> bool:
    """Return whether ``language`` separates words by spaces, so that a word error rate means something."""
    return language not in UNSPACED


def normalize_text(text: str, language: str) -> str:
    """Return ``text`` in the form in which errors are counted; words are separated by single spaces."""
    if language == ENGLISH:
        return _english()(text)
    text = unicodedata.normalize("NFKC" if language in _WIDE else "NFC", text).lower()
    kept = "".join(_plain(char) for char in text)
    return unicodedata.normalize("NFC", ("" if language in UNSPACED else " ").join(kept.split()))


def _plain(char: str) -> str:
    """Punctuation and symbols become a space; invisible format characters, such as the zero-width joiner, nothing."""
    category = unicodedata.category(char)
    return "" if category == "Cf" else " " if category[0] in "PS" else char


@cache
def _english() -> Callable[[str], str]:
    """Return Whisper's English text normalizer; it is built once, because it loads a table of spellings."""
    from whisper_normalizer.english import EnglishTextNormalizer

    english: Callable[[str], str] = EnglishTextNormalizer()
    return english
