"""Variants of an utterance: rows whose audio was changed before it was encoded (``augment`` of an extraction).

The key of variant 2 of the utterance ``KEY`` is ``KEY~2``. No source makes a key with ``~``, so that the key alone
tells what a row is, in every table and tar. Labels name utterances, and hold for their variants.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

SEPARATOR = "~"
MAX_VARIANTS = 100  # rows of an utterance, so that numbers have one or two digits
SUFFIX = r"(~[1-9][0-9]?)?"  # what may follow the key of an utterance, as a regular expression
_NUMBER = re.compile("[1-9][0-9]?")


def variant_key(base: str, number: int) -> str:
    """Return the key of variant ``number`` of the utterance ``base``; 0 is the utterance itself."""
    return f"{base}{SEPARATOR}{number}" if number else base


def split_key(key: str) -> tuple[str, int]:
    """Return the key of the utterance and the number of the variant, 0 for the utterance itself.

    A key with anything else behind the ``~``, which only a corrupt cache has, is returned as it is.
    """
    base, _, number = key.partition(SEPARATOR)
    return (base, int(number)) if _NUMBER.fullmatch(number) else (key, 0)


def are_variants(keys: pa.Array | pa.ChunkedArray) -> NDArray[np.bool_]:
    """Return which keys are those of variants, bool [keys]."""
    found: Any = pc.match_substring(keys, SEPARATOR)
    return np.asarray(found.to_numpy() if isinstance(found, pa.ChunkedArray) else found.to_numpy(zero_copy_only=False))


def variant_numbers(keys: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """Return the number of the variant of each key of a variant, int64 [keys]; 0 if the key has no legal number."""
    numbers = pc.replace_substring_regex(keys, f"[^{SEPARATOR}]*{SEPARATOR}", "", max_replacements=1)
    legal = pc.match_substring_regex(numbers, r"\A[1-9][0-9]?\z")
    found = pc.cast(pc.if_else(legal, numbers, "0"), pa.int64())
    return np.asarray(found.to_numpy() if isinstance(found, pa.ChunkedArray) else found.to_numpy(zero_copy_only=False))


def base_keys(keys: pa.Array | pa.ChunkedArray) -> Any:
    """Return the key of the utterance of each key; ``keys`` itself if none is that of a variant."""
    return pc.replace_substring_regex(keys, f"{SEPARATOR}.*", "") if are_variants(keys).any() else keys
