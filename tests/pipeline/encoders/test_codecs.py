"""Neural codecs as encoders: their codes against what transformers' own ``encode`` returns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from extraction import only_cache, words, write_corpus
from safetensors.torch import load_file, save_file
from tiny_codecs import FAMILIES, codes_of_transformers, write_tiny_codec
from tiny_encoders import load, noise, write_tiny

from pipeline.__main__ import command
from shards.errors import UserError, run_command
from shards.read.cache import Cache


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, write_tiny_codec(tmp_path_factory.mktemp("codecs") / request.param, request.param)


def codes(encoder, clip) -> np.ndarray:
    return encoder.encode([clip], [0])[0][0]


def test_codes_are_those_of_transformers(tiny):
    _family, folder = tiny
    encoder = load(folder)
    for samples in (1, encoder.hop, encoder.hop + 1, 20_001):
        (clip,) = noise(samples)
        found = codes(encoder, clip)
        assert found.dtype == np.int32
        assert found.shape == (-(-samples // encoder.hop), encoder.channels)
        assert np.array_equal(found, codes_of_transformers(folder, clip))
    assert len(np.unique(found)) > 2  # of a codec that hears something


def test_a_chosen_number_of_codebooks_is_that_of_transformers(tiny):
    family, folder = tiny
    (clip,) = noise(20_001)
    count = {"mimi": 2, "encodec": 4, "dac": 2}[family]
    encoder = load(folder, codebooks=count)
    assert encoder.channels == count
    assert np.array_equal(codes(encoder, clip), codes_of_transformers(folder, clip, count))


def test_a_clip_has_the_same_codes_in_any_batch(tiny):
    encoder, clips = load(tiny[1]), noise(9000, 0, 30_001)
    for clip, found in zip(clips, encoder.encode(clips, [0]), strict=True):
        assert np.array_equal(codes(encoder, clip), found[0])
    assert encoder.window_samples % encoder.hop == 0


def test_other_weights_a_missing_and_an_unknown_tensor_are_seen(tiny, tmp_path):
    family, folder = tiny
    other = write_tiny_codec(tmp_path / "other", family, seed=1)
    assert load(other).tensors != load(folder).tensors
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if name.startswith("quantizer.") and tensors[name].ndim > 1)
    save_file({key: value for key, value in tensors.items() if key != name}, other / "model.safetensors")
    with pytest.raises(UserError, match=f"lacks the tensor {name}"):
        load(other)
    save_file({**tensors, "encoder.adapter.weight": tensors[name].clone()}, other / "model.safetensors")
    with pytest.raises(UserError, match=r"has the tensor encoder\.adapter\.weight, which is no part"):
        load(other)


def test_the_decoder_is_neither_read_nor_part_of_the_identity(tiny, tmp_path):
    _family, folder = tiny
    shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: each for name, each in tensors.items() if not name.startswith(("decoder", "upsample"))}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "copy" / "model.safetensors")
    assert load(tmp_path / "copy").tensors == load(folder).tensors


def test_weight_norm_under_its_older_names_is_the_same_codec(tmp_path):
    folder = write_tiny_codec(tmp_path / "encodec", "encodec")
    before, tensors = load(folder), load_file(folder / "model.safetensors")
    renamed = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): each
        for name, each in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / "model.safetensors")
    after, (clip,) = load(folder), noise(20_001)
    assert after.tensors == before.tensors
    assert np.array_equal(codes(after, clip), codes(before, clip))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "bfloat16"}, "rounding changes codes"),
        ({"window": "tight"}, "set window=clip"),
        ({"codebooks": 99}, r"encoder.codebooks=99, but the codec '\w+' has \d+"),
    ],
)
def test_settings_that_a_codec_does_not_take_are_refused(tiny, settings, message):
    with pytest.raises(UserError, match=message):
        load(tiny[1], **settings)


def test_codebooks_of_an_encoder_of_floats_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"encoder\.codebooks is for codecs"):
        load(write_tiny(tmp_path / "hubert", "hubert"), codebooks=2)


def test_a_codec_of_stereo_or_of_another_rate_than_its_preprocessor_is_refused(tmp_path):
    stereo = write_tiny_codec(tmp_path / "stereo", "encodec", audio_channels=2)
    with pytest.raises(UserError, match="is for stereo"):
        load(stereo)
    mimi = write_tiny_codec(tmp_path / "mimi", "mimi")
    (mimi / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 16_000}))
    with pytest.raises(UserError, match=r"is for 16000 Hz and the codec's config\.json for 24000 Hz"):
        load(mimi)


def test_codes_that_do_not_depend_on_the_audio_end_the_job(tmp_path):
    from pipeline.encoders.batching import encode_in_batches

    folder = write_tiny_codec(tmp_path / "dac", "dac")
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: each * 1e-9 for name, each in tensors.items() if name.endswith("in_proj.weight")}
    tensors |= {name: each * 0 + 1 for name, each in tensors.items() if name.endswith("in_proj.bias")}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="do not depend on the audio"):
        encode_in_batches(load(folder), noise(20_000), [0], "valid")


@pytest.fixture(scope="module")
def extracted(tmp_path_factory) -> tuple[Path, Path, Path, list[str]]:
    """A corpus at 16 and 44.1 kHz, a Mimi, the cache of its codes, and the words that made it."""
    root = tmp_path_factory.mktemp("extracted")
    write_corpus(root, 4, 0.7)
    soundfile.write(root / "clip 00.flac", noise(44_100)[0], 44_100)
    mimi = write_tiny_codec(root / "mimi", "mimi")
    line = words(root / "caches", root, mimi, "codec=u16", "encoder.codebooks=3")
    assert run_command(command, line) == 0
    return root, mimi, only_cache(root / "caches"), line


def test_an_extraction_resamples_once_from_the_rate_of_the_file_to_that_of_the_codec(extracted):
    root, mimi, path, _ = extracted
    cache = Cache.open(path)
    assert (cache.spec.sampling_rate, cache.spec.hop, cache.spec.channels) == (24_000, 1920, 3)
    found = {cache.row(i)["id"]: cache.features(i) for i in range(len(cache))}
    for name, stored in found.items():
        samples, rate = soundfile.read(root / f"{name}.flac", dtype="float32")
        clip = soxr.resample(samples, rate, 24_000, quality="HQ")
        assert np.array_equal(stored, codes_of_transformers(mimi, clip, 3)), name
    row = next(row for row in map(cache.row, range(4)) if row["id"] == "clip 00")
    assert row["samples"] == 24_000
    assert row["frames"] == 13


def test_plans_count_samples_at_the_rate_of_the_codec(extracted):
    import pyarrow.parquet as pq

    cache = extracted[2]
    plan, manifest = (pq.read_table(cache / name / "000.parquet") for name in ("plans", "manifests"))
    assert abs(plan["samples"].to_numpy() - manifest["samples"].to_numpy()).max() <= 1


def test_a_second_extraction_encodes_nothing_and_a_check_passes(extracted, capfd):
    _, _, path, line = extracted
    before = (path / "CACHE.json").read_bytes()
    assert run_command(command, line) == 0
    assert (path / "CACHE.json").read_bytes() == before
    assert run_command(command, ["check", str(path), "--n", "2"]) == 0
    assert "2 utterances compared, 0 above the tolerance" in capfd.readouterr().out


def test_a_codec_and_a_storage_format_that_do_not_fit_are_refused_in_one_sentence(extracted, tmp_path, capfd):
    root, mimi, _, _ = extracted
    hubert = write_tiny(tmp_path / "hubert", "hubert")
    for model, codec, message in (
        (mimi, "int8", "codec=int8 does not store what mimi makes, integer codes: set codec=u16"),
        (hubert, "u16", "codec=u16 does not store what hubert makes, floats: set codec=f16"),
    ):
        line = words(tmp_path / "caches", root, model, f"codec={codec}")
        assert run_command(command, line) == 2
        assert message in capfd.readouterr().err
    assert not list((tmp_path / "caches").glob("[!.]*"))
