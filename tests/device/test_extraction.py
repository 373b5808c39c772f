"""Extractions on a pretended CUDA device: the features of the CPU, and the waits of a batch."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from extraction import only_cache, write_corpus
from tiny_encoders import write_tiny

from shards.format.codec import relative_rms
from shards.read.cache import Cache

FAMILIES = ["whisper", "hubert", "wavlm", "wav2vec2-bert"]
WAITS = json.loads(Path(__file__).with_name("waits.json").read_text())  # of a batch of 4 windows and 3 layers
# relative RMS of the frames against f16 frames of the CPU in float32: a few values round to another float16
ERROR = {"float32": 1e-4, "bfloat16": 0.03, "float16": 0.003}
CODEC_ERROR = {"f16": 3e-4, "bf16": 3e-3, "int8": 0.01, "fp8": 0.04}


@pytest.fixture(scope="module")
def models(tmp_path_factory, whisper) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"whisper": whisper, **{name: write_tiny(folder / name, name) for name in FAMILIES[1:]}}


@pytest.fixture(scope="module")
def extract(tmp_path_factory, pretended_cuda, models):
    """Extract clips of equal and of unequal length, each shorter than a window but one; cached by arguments."""
    corpus = tmp_path_factory.mktemp("clips")
    write_corpus(corpus, 16)

    @cache
    def run(family: str, *more: str) -> tuple[Path, dict[str, int]]:
        root = tmp_path_factory.mktemp("root")
        argv = [f"root={root}", "source.kind=manifest", f"source.path={corpus}/clips.csv", "encoder.compile=never"]
        argv += [f"encoder.model=path:{models[family]}", "encoder.batch_size=4", *more]
        found = pretended_cuda("cuda_extraction:extract", {"argv": argv})
        assert found["status"] == 0
        return root, found["waits"]

    return run


@pytest.mark.parametrize("family", ["whisper", "hubert", "wav2vec2-bert"])
def test_the_waits_of_a_batch_are_those_of_the_list(extract, family):
    settings = ("encoder.device=cuda", "encoder.dtype=bfloat16", "encoder.layers=[0,1,2]")
    few, many = (Counter(extract(family, *settings, f"source.limit={clips}")[1]) for clips in (8, 16))
    per_batch = {name: count / 2 for name, count in (many - few).items()}
    assert per_batch == WAITS[family], json.dumps(per_batch, indent=1)


def frames(root: Path) -> list[np.ndarray]:
    cache = Cache.open(only_cache(root))
    return [np.asarray(cache.features(index), np.float32) for index in range(len(cache))]


@pytest.mark.parametrize(
    ("family", "dtype", "codec", "window"),
    [
        *(("whisper", dtype, codec, "full30") for dtype in ERROR for codec in CODEC_ERROR),
        *(("whisper", dtype, "f16", "tight") for dtype in ERROR),
        *((family, dtype, codec, "clip") for family in FAMILIES[1:] for dtype, codec in (("float32", "int8"),)),
        *((family, "bfloat16", "f16", "clip") for family in FAMILIES[1:]),
    ],
)
def test_the_features_are_those_of_the_cpu(extract, family, dtype, codec, window):
    settings = (f"codec={codec}", *([] if window == "clip" else [f"window={window}"]))
    wanted = frames(extract(family, "encoder.device=cpu", "encoder.dtype=float32", "codec=f16", *settings[1:])[0])
    found = frames(extract(family, "encoder.device=cuda", f"encoder.dtype={dtype}", *settings)[0])
    assert [each.shape for each in found] == [each.shape for each in wanted]
    errors = [relative_rms(mine, theirs) for mine, theirs in zip(found, wanted, strict=True)]
    assert max(errors) < (ERROR[dtype] if codec == "f16" else ERROR[dtype] + CODEC_ERROR[codec])
