from __future__ import annotations

import json
import shutil
from io import BytesIO, StringIO, TextIOWrapper

import numpy as np
import pytest
from tiny_corpus import wav
from tiny_lm import save_tiny_lm
from tiny_run import make_config
from tiny_whisper import write_tiny_whisper

from pipeline.__main__ import command as pipeline_command
from pipeline.audio import decode
from pipeline.encoders.recording import open_encoder
from shards.errors import UserError, run_command
from shards.read.cache import Cache
from train.__main__ import command
from train.data.caches import open_data
from train.data.live import encode_features, feature_specs, require_one_encoder
from train.inference.transcribe import Recording, TokenWriter, transcribe
from train.runs.folder import read_cache_info, run_config
from train.trainer.fit import fit

SAMPLES = {"short": 4000, "middle": 20_001, "long": 33 * 16_000}  # the last one spans two windows


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder, config, run): recordings extracted by the command line with a tiny Whisper, and a run on them."""
    folder = tmp_path_factory.mktemp("transcribe")
    rows = []
    for number, (key, samples) in enumerate(SAMPLES.items()):
        (folder / f"{key}.wav").write_bytes(wav(samples, seed=number))
        rows.append(json.dumps({"audio": f"{key}.wav", "text": f"text {number}", "key": key}))
    (folder / "manifest.jsonl").write_text("\n".join(rows) + "\n")
    whisper = write_tiny_whisper(folder / "whisper")
    (folder / "extract.yaml").write_text(
        json.dumps(
            {
                "root": str(folder / "caches"),
                "source": {"kind": "manifest", "path": str(folder / "manifest.jsonl")},
                "encoder": {"model": f"path:{whisper}", "dtype": "float32", "device": "cpu", "layers": [1, 2]},
                "codec": "int8",
            }
        )
    )
    assert run_command(pipeline_command, ["extract", "--config", str(folder / "extract.yaml")]) == 0
    caches = f"{folder}/caches/*/*-L2-int8-*"
    lm = f"path:{save_tiny_lm(folder / 'lm')}"
    config = make_config(folder, caches, lm, steps=2, val={"caches": [caches]}, eval_every=0)
    return folder, config, fit(config)


@pytest.mark.parametrize("key", SAMPLES)
def test_audio_is_encoded_to_exactly_the_features_that_extraction_stored(world, key):
    folder, _, run = world
    cache_info = read_cache_info(run)
    cache = Cache.open(cache_info["caches"][0]["path"])
    row = cache.manifest["key"].to_pylist().index(key)
    encoder = open_encoder(cache_info["spec"], cache_info["encoder"])
    ours = encode_features(decode((folder / f"{key}.wav").read_bytes()), encoder, [cache_info["spec"]])
    assert ours.shape == (-(-SAMPLES[key] // 320), 32)
    assert np.array_equal(ours, cache.features(row))


def test_tight_features_are_extracted_checked_and_transcribed_alike(world, capsys):
    folder, _, _ = world
    settings = ["extract", "--config", str(folder / "extract.yaml"), "encoder.layers=[2]", "window=tight", "margin=1"]
    assert run_command(pipeline_command, [*settings, "--profile", str(folder / "profile.json")]) == 0
    profile = json.loads((folder / "profile.json").read_text())
    assert set(profile["stages"]) == {"read", "decode", "encode", "codec", "write", "commit"}
    assert "waited for" in capsys.readouterr().out
    (path,) = (folder / "caches").glob("*/*-L2-tight-*")
    cache = Cache.open(path)
    assert (cache.spec.window, cache.spec.margin) == ("tight", 1.0)
    assert run_command(pipeline_command, ["check", str(path)]) == 0
    assert "3 utterances compared, 0 above" in capsys.readouterr().out
    encoder = open_encoder(cache.spec, cache.provenance["encoder"]["reference"])
    for row, key in enumerate(cache.manifest["key"].to_pylist()):
        ours = encode_features(decode((folder / f"{key}.wav").read_bytes()), encoder, [cache.spec])
        assert np.array_equal(ours, cache.features(row))
    assert run_command(pipeline_command, [*settings, "trim=none"]) == 2
    assert "trim=valid" in capsys.readouterr().err
    shutil.rmtree(path)


def test_the_command_prints_path_and_text_in_the_order_given(world, capsys):
    folder, _, run = world
    paths = [str(folder / f"{key}.wav") for key in ("middle", "short")]
    assert run_command(command, ["transcribe", str(run), *paths]) == 0
    lines = capsys.readouterr().out.removesuffix("\n").split("\n")
    assert [line.split("\t")[0] for line in lines] == paths


def test_each_text_is_printed_on_one_line(world, monkeypatch, capsys):
    monkeypatch.setattr("train.model.audio_lm.AudioLM.generate", lambda *_: ["one\ntwo\tthree"])
    assert run_command(command, ["transcribe", str(world[2]), str(world[0] / "short.wav")]) == 0
    assert capsys.readouterr().out.endswith("short.wav\tone two three\n")


def test_streaming_writes_the_same_line_in_pieces_and_standard_input_is_a_recording(world, monkeypatch, capsys):
    folder, _, run = world
    data = (folder / "short.wav").read_bytes()
    assert run_command(command, ["transcribe", str(run), str(folder / "short.wav")]) == 0
    whole = capsys.readouterr().out.split("\t")[1]
    pieces: list[str] = []
    for words, given in ((["-"], data), (["--raw", "16000", "-"], data[44:])):
        monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(given)))
        monkeypatch.setattr("sys.stdout.write", pieces.append)
        assert run_command(command, ["transcribe", str(run), "--stream", *words]) == 0
        assert "".join(pieces) == f"-\t{whole}"
        assert len(pieces) > 3
        pieces.clear()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["-", "-"], "pass - once"),
        (["--raw", "16000", "x.wav"], "--raw describes samples on standard input"),
        (["--raw", "1", "-"], "such as 16000"),
    ],
)
def test_invalid_uses_of_standard_input_are_refused(world, words, sentence, capsys):
    assert run_command(command, ["transcribe", str(world[2]), *words]) == 2
    assert sentence in capsys.readouterr().err


def test_an_incomplete_character_is_held_back_until_it_is_complete():
    out = StringIO()
    writer = TokenWriter(out)
    for text in ("a", "a \ufffd", "a é"):
        writer("x.wav", text)
        assert "\ufffd" not in out.getvalue()
    writer.finish("x.wav", "a é!")
    writer.finish("y.wav", "")
    assert out.getvalue() == "x.wav\ta é!\ny.wav\t\n"


def test_other_encoder_weights_are_refused(world, tmp_path):
    folder, config, run = world
    other = write_tiny_whisper(tmp_path / "whisper", seed=1)
    with pytest.raises(UserError, match=r"did not make these features .* --encoder"):
        next(transcribe(run, config, [Recording(str(folder / "short.wav"))], f"path:{other}"))


def test_a_moved_encoder_can_be_named(world, tmp_path):
    folder, config, run = world
    moved = write_tiny_whisper(tmp_path / "elsewhere", whole=False)
    short = Recording(str(folder / "short.wav"))
    assert next(transcribe(run, config, [short], f"path:{moved}"))[0] == short.name


def test_a_missing_file_is_reported_before_anything_is_loaded(world):
    folder, _, run = world
    words = ["transcribe", str(run), "--encoder", "path:nothing", str(folder / "short.wav"), str(folder / "gone.wav")]
    with pytest.raises(UserError, match=r"the audio file '.*gone\.wav' does not exist"):
        command(words)
    with pytest.raises(UserError, match=r"the audio file 'x*' does not exist"):
        command([*words[:-1], "x" * 300])


def test_a_file_that_cannot_be_read_does_not_prevent_the_others(world, tmp_path, capsys):
    folder, _, run = world
    (tmp_path / "bad.wav").write_bytes(b"no audio")
    words = ["transcribe", str(run), str(tmp_path / "bad.wav"), str(folder / "short.wav")]
    assert run_command(command, words) == 2
    out, err = capsys.readouterr()
    assert out.startswith(str(folder / "short.wav"))
    assert "bad.wav" in err.splitlines()[-1]


def test_a_run_on_several_layers_encodes_them_in_one_pass(world, tmp_path, capsys):
    folder, config, _ = world
    layers = [[f"{folder}/caches/*/*-L1-int8-*", f"{folder}/caches/*/*-L2-int8-*"]]
    keys = {"caches": layers, "val": config.val.model_copy(update={"caches": layers}), "runs": str(tmp_path)}
    run = fit(config.model_copy(update=keys))
    cache_info = read_cache_info(run)
    specs = feature_specs(cache_info)
    encoder = open_encoder(specs[0], cache_info["encoder"])
    ours = encode_features(decode((folder / "long.wav").read_bytes()), encoder, specs)
    held_out = open_data(run_config(run)).held_out
    stored = held_out.features(held_out.columns("key")["key"].index("long"))
    assert np.array_equal(ours, stored)
    assert run_command(command, ["transcribe", str(run), str(folder / "short.wav")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{folder}/short.wav\t")
    cache_info["layers"][1]["tensors"] = "0" * 64
    with pytest.raises(UserError, match="several encoders"):
        require_one_encoder(feature_specs(cache_info))
