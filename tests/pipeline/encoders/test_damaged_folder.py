"""Encoder folders with any values in their JSON files, and damaged weights, raise nothing but UserError.

EARSHARD_FUZZ=2000 python -m pytest -m slow tests/pipeline/encoders/test_damaged_folder.py
"""

from __future__ import annotations

import json
import os
import random
import shutil

import numpy as np
import pytest
from damaged_json import damage

from pipeline.encoders.batching import encode_in_batches
from pipeline.encoders.load import load_encoder
from pipeline.weights.resolve import resolve_weights
from shards.errors import UserError

CASES = int(os.environ.get("EARSHARD_FUZZ", "60"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_damaged_encoder_folder_raises_only_user_errors(tmp_path, whisper, name):
    folder, rng = tmp_path / "model", random.Random(name)
    shutil.copytree(whisper, folder)
    file, clip = folder / name, np.random.default_rng(0).normal(0, 0.1, 8000).astype(np.float32)
    good = file.read_bytes()
    header, messages = 8 + int.from_bytes(good[:8], "little"), []
    for _ in range(CASES):
        if name.endswith(".json"):
            data = json.dumps(damage(json.loads(good), rng)).encode()
        elif rng.random() < 0.5:
            text = json.dumps(damage(json.loads(good[8:header]), rng)).encode()
            data = len(text).to_bytes(8, "little") + text + good[header:]
        else:
            place = rng.randrange(header) if rng.random() < 0.5 else rng.randrange(len(good))
            data = good[:place] + rng.randbytes(rng.choice((1, 4, 64))) + good[place + rng.choice((0, 1, 4, 64)) :]
        file.write_bytes(data)
        try:
            encoder = load_encoder(resolve_weights(f"path:{folder}", role="encoder"), device="cpu", dtype="float32")
            encode_in_batches(encoder, [clip], [1], "valid")
        except UserError as error:
            messages.append(str(error))
    assert not any("\n" in each for each in messages)
