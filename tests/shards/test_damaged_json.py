"""Sealed JSON with any values raises nothing but UserError.

EARSHARD_FUZZ=20000 python -m pytest -m slow tests/shards/test_damaged_json.py
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
from damaged_json import damage
from tiny_cache import grow, make_cache

from shards.errors import UserError
from shards.format.records import seal, unseal
from shards.inspect.verify import verify
from shards.read.cache import Cache

CASES = int(os.environ.get("EARSHARD_FUZZ", "500"))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["CACHE.json", "labels/LABELS.json", "shards/000001.json"])
def test_a_cache_with_any_values_in_its_sealed_files_raises_only_user_errors(tmp_path, pattern):
    path = make_cache(tmp_path / "cache", 12, shards=2)
    grow(path)
    (file,) = path.glob(pattern)
    good, rng = unseal(file), random.Random(pattern)
    messages = []
    for _ in range(CASES):
        file.write_bytes(seal(damage(good, rng)))
        try:
            verify(path, deep=False)
            cache = Cache.open(path)
            cache.read_stored(np.arange(len(cache)))
        except UserError as error:
            messages.append(str(error))
    assert messages or pattern.startswith("shards/")
    assert not any("\n" in each for each in messages)
    assert {each.name for each in Path(tmp_path).iterdir()} == {"cache"}
