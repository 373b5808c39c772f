"""Extractions on a pretended CUDA device: the features of the CPU, and one wait a batch."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
from extraction import only_cache, snapshot, write_corpus
from tiny_encoders import write_tiny
from tiny_towers import write_tiny_tower

from shards.format.codec import relative_rms
from shards.format.layout import Layout, read_plan
from shards.format.records import unseal
from shards.read.cache import Cache

FAMILIES = ["whisper", "hubert", "wavlm", "wav2vec2-bert"]
TOWERS = ["qwen2_audio", "audioflamingo3", "moonshine", "parakeet_ctc"]
WAITS = json.loads(Path(__file__).with_name("waits.json").read_text())  # of a batch of 4 windows and 3 layers
# relative RMS of the frames against f16 frames of the CPU in float32: a few values round to another float16
ERROR = {"float32": 1e-4, "bfloat16": 0.03, "float16": 0.003}
CODEC_ERROR = {"f16": 3e-4, "bf16": 3e-3, "int8": 0.01, "fp8": 0.04}


@pytest.fixture(scope="module")
def models(tmp_path_factory, whisper) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    towers = {name: write_tiny_tower(folder / name, name) for name in TOWERS}
    return {"whisper": whisper, **{name: write_tiny(folder / name, name) for name in FAMILIES[1:]}, **towers}


def write_equal_clips(folder: Path, n: int, seconds: float = 0.5) -> None:
    """Write ``n`` clips of equal length."""
    rng = np.random.default_rng(5)
    for i in range(n):
        soundfile.write(folder / f"{i:02d}.flac", rng.normal(0, 0.1, int(16000 * seconds)).astype(np.float32), 16000)
    (folder / "clips.csv").write_text("audio,text\n" + "".join(f"{i:02d}.flac,text {i}\n" for i in range(n)))


@pytest.fixture(scope="module")
def extract(tmp_path_factory, pretended_cuda, models):
    """Extract clips of unequal or of equal length, or longer than a window; cached by arguments."""
    corpora = {name: tmp_path_factory.mktemp(name) for name in ("unequal", "equal", "long")}
    write_corpus(corpora["unequal"], 16)
    write_equal_clips(corpora["equal"], 16)
    write_equal_clips(corpora["long"], 2, seconds=31)

    @cache
    def run(family: str, *more: str, clips: str = "unequal", room: int | None = None) -> tuple[Path, dict]:
        root = tmp_path_factory.mktemp("root")
        argv = [f"root={root}", "source.kind=manifest", f"source.path={corpora[clips]}/clips.csv"]
        argv += ["encoder.compile=never", f"encoder.model=path:{models[family]}", "encoder.batch_size=4", *more]
        found = pretended_cuda("cuda_extraction:extract", {"argv": argv, "room": room})
        assert found["status"] == 0
        return root, found

    return run


@pytest.mark.parametrize("family", ["whisper", "hubert", "wav2vec2-bert"])
def test_the_waits_of_a_batch_are_those_of_the_list(extract, family):
    settings = ("encoder.device=cuda", "encoder.dtype=bfloat16", "encoder.layers=[0,1,2]")
    few, many = (
        Counter(extract(family, *settings, f"source.limit={clips}", clips="equal")[1]["waits"]) for clips in (8, 16)
    )
    per_batch = {name: count / 2 for name, count in (many - few).items()}
    assert per_batch == WAITS[family], json.dumps(per_batch, indent=1)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["audioflamingo3", "parakeet_ctc"])
def test_a_batch_of_a_tower_waits_once(extract, family):
    found = extract(family, "encoder.device=cuda", "encoder.dtype=bfloat16", "codec=int8", clips="equal")[1]
    event = "event.synchronize | pipeline.encoders.device:DeviceBatches._collect"
    assert found["waits"][event] == 4, found["waits"]  # 16 clips of equal length, 4 in a batch


def frames(root: Path) -> list[np.ndarray]:
    cache = Cache.open(only_cache(root))
    return [np.asarray(cache.features(index), np.float32) for index in range(len(cache))]


@pytest.mark.parametrize(
    ("family", "dtype", "codec", "window"),
    [
        *(("whisper", dtype, codec, "full30") for dtype in ERROR for codec in CODEC_ERROR),
        *(("whisper", dtype, "f16", "tight") for dtype in ERROR),
        *((family, "float32", "int8", "clip") for family in FAMILIES[1:]),
        *((family, "bfloat16", "f16", "clip") for family in FAMILIES[1:]),
        *(
            pytest.param(family, "float32", "int8", "clip", marks=pytest.mark.slow)
            for family in ("qwen2_audio", "moonshine")
        ),
    ],
)
def test_the_features_are_those_of_the_cpu(extract, family, dtype, codec, window):
    settings = (f"codec={codec}", *([] if window == "clip" else [f"window={window}"]))
    wanted = frames(extract(family, "encoder.device=cpu", "encoder.dtype=float32", "codec=f16", *settings[1:])[0])
    found = frames(extract(family, "encoder.device=cuda", f"encoder.dtype={dtype}", *settings)[0])
    assert [each.shape for each in found] == [each.shape for each in wanted]
    errors = [relative_rms(mine, theirs) for mine, theirs in zip(found, wanted, strict=True)]
    assert max(errors) < (ERROR[dtype] if codec == "f16" else ERROR[dtype] + CODEC_ERROR[codec])


def test_the_codecs_on_the_device_store_the_bytes_of_the_cpus_and_wait_for_nothing(pretended_cuda):
    found = pretended_cuda("cuda_extraction:codecs", {})
    assert {name: found[name] for name in CODEC_ERROR} == {name: [True, True, 0] for name in CODEC_ERROR}
    for bad in ("nan", "inf", "-inf"):
        assert found[bad] == [False, True, True, True, True, True]


@pytest.mark.parametrize("dtype", list(ERROR))
def test_a_clip_has_the_same_bytes_at_any_place_and_among_any_companions(pretended_cuda, whisper, dtype):
    assert pretended_cuda("cuda_extraction:companions", {"model": str(whisper), "dtype": dtype}) == [True, True]


def test_windows_of_several_shards_share_a_batch_and_the_shards_have_the_bytes_of_one_by_one(extract):
    settings = ("encoder.device=cuda", "encoder.dtype=float32")
    one, apart = extract("whisper", *settings), extract("whisper", *settings, "shard_mb=0.01")
    assert read_plan(Layout(only_cache(apart[0])).plan(0)).num_shards >= 3
    for mine, theirs in zip(frames(apart[0]), frames(one[0]), strict=True):
        assert mine.tobytes() == theirs.tobytes()
    event = "event.synchronize | pipeline.encoders.device:DeviceBatches._collect"
    assert [found["waits"][event] for _, found in (one, apart)] == [4, 4]


def test_the_windows_of_long_audio_are_joined_before_they_are_encoded(extract):
    settings = ("codec=int8", "encoder.dtype=float32")
    found, wanted = (
        frames(extract("whisper", f"encoder.device={device}", *settings, clips="long")[0]) for device in ("cuda", "cpu")
    )
    assert len(found[0]) > 1500
    assert max(relative_rms(mine, theirs) for mine, theirs in zip(found, wanted, strict=True)) < 0.005


def test_float32_is_not_rounded_to_tf32_and_the_callers_switches_come_back(extract):
    for dtype, wanted in (("float32", [[False, False]]), ("bfloat16", [[False, True]])):
        found = extract("whisper", "encoder.device=cuda", f"encoder.dtype={dtype}")[1]
        assert found["tf32"] == wanted
        assert found["kept"]


def test_after_an_out_of_memory_error_the_shards_under_way_are_encoded_again_with_one_size(extract):
    settings = ("encoder.device=cuda", "encoder.dtype=float32", "shard_mb=0.005")
    wanted, (root, _) = extract("whisper", *settings, "encoder.batch_size=2")[0], extract("whisper", *settings, room=2)
    mine, theirs = snapshot(only_cache(root)), snapshot(only_cache(wanted))
    del mine["CACHE.json"], theirs["CACHE.json"]
    assert mine == theirs
    recorded = unseal(only_cache(root) / "CACHE.json")["generations"][0]["provenance"]["encoder"]
    assert recorded["batch_size"] == 2


def test_a_process_uses_its_own_card_and_records_it(extract):
    root, found = extract("whisper", "encoder.device=cuda:0", "encoder.dtype=float32")
    assert found["devices_set"] == ["cuda:0"]
    about = unseal(only_cache(root) / "CACHE.json")["generations"][0]["provenance"]["encoder"]
    assert about["gpu"] == {"name": "pretended", "driver": None, "cuda": None, "cudnn": None}
    assert about["batch_size"] == 4


def test_a_batch_has_room_for_the_layers_asked_for(pretended_cuda, whisper):
    assert pretended_cuda("cuda_extraction:fitted", {"model": str(whisper), "free": 60_000_000}) == [8, 4]


def test_a_slot_is_used_again_only_after_its_event(pretended_cuda, whisper):
    assert pretended_cuda("cuda_extraction:slots", {"model": str(whisper)}) == [True, True, True]
