"""Each preset with a tiny corpus of the layout that ``pipeline/sources/presets.py`` describes."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile
from tiny_corpus import flac, wav

from pipeline.config import ExtractConfig
from pipeline.sources import Source, SourceConfig, open_source
from pipeline.sources.presets import PRESETS, PresetName
from shards.config.base import load_config
from shards.errors import UserError


def opened(preset: str, path: Path, **settings) -> Source:
    return open_source(SourceConfig.model_validate({"preset": preset, "path": str(path), **settings}))


def compressed(format: str, seed: int = 0) -> bytes:
    """0.2 s of noise at 16 kHz, encoded."""
    file = io.BytesIO()
    soundfile.write(file, np.random.RandomState(seed).uniform(-0.3, 0.3, 3200), 16_000, format=format)
    return file.getvalue()


def write_tsv(path: Path, header: str, *rows: tuple[str, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *("\t".join(row) for row in rows)]) + "\n", encoding="utf-8")


def write_parquet(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), path)


def facts(source: Source) -> list[tuple[str, str, str, str]]:
    """Return (key, text, speaker, split) of each utterance, after checking that it can be read."""
    made = list(source.utterances())
    assert source.problems == []
    assert all(u.samples for u in made)
    assert all(isinstance(data, bytes) for _, data in source.read([u.audio for u in made]))
    return [(u.key, u.text, u.speaker, u.split) for u in made]


@pytest.fixture
def common_voice(tmp_path) -> Path:
    folder = tmp_path / "cv-corpus-17.0-2024-03-15" / "cy"
    header = (
        "client_id\tpath\tsentence_id\tsentence\tup_votes\tdown_votes\tage\tgender\taccents\tvariant\tlocale\tsegment"
    )
    sentences = {"train": '"Bore da," meddai hi.', "dev": "Diolch", "test": "Nos da", "validated": "Diolch"}
    (folder / "clips").mkdir(parents=True)
    for number, (split, sentence) in enumerate(sentences.items()):
        clip = f"common_voice_cy_{number}.mp3"
        (folder / "clips" / clip).write_bytes(compressed("MP3", number))
        write_tsv(
            folder / f"{split}.tsv", header, (f"c{number}", clip, "s", sentence, "2", "0", "", "", "", "", "cy", "")
        )
    write_tsv(folder / "clip_durations.tsv", "clip\tduration[ms]", ("common_voice_cy_0.mp3", "200"))
    return folder


def test_common_voice_is_read_from_its_tables_and_clips(common_voice):
    source = opened("common_voice", common_voice)
    assert facts(source) == [
        ("common_voice_cy_0", '"Bore da," meddai hi.', "c0", "train"),
        ("common_voice_cy_1", "Diolch", "c1", "dev"),
        ("common_voice_cy_2", "Nos da", "c2", "test"),
    ]
    assert source.name == "common_voice-cy"
    assert facts(opened("common_voice", common_voice, splits=["validated"])) == [
        ("common_voice_cy_3", "Diolch", "c3", "validated")
    ]


def test_voxpopuli_is_read_from_its_tables_and_the_folders_of_its_years(tmp_path):
    folder = tmp_path / "transcribed_data" / "en"
    names = {"train": "20180206-0900-PLENARY-1-en_1", "dev": "20090112-0900-PLENARY-2-en_2", "test": "20200101-x-en_3"}
    for split, name in names.items():
        row = (name, f"Raw {split}.", f"normalized {split}", "125", split, "female")
        write_tsv(folder / f"asr_{split}.tsv", "id\traw_text\tnormalized_text\tspeaker_id\tsplit\tgender", row)
        (folder / name[:4]).mkdir()
        (folder / name[:4] / f"{name}.ogg").write_bytes(compressed("OGG"))
    assert facts(opened("voxpopuli", folder)) == [(n, f"normalized {s}", "125", s) for s, n in names.items()]


def test_the_keys_of_fleurs_are_file_names_because_several_people_read_one_sentence(tmp_path):
    rows = [
        {
            "id": 903,
            "num_samples": 3200,
            "path": f"/cache/{name}.wav",
            "audio": {"bytes": wav(3200, 0), "path": f"{name}.wav"},
            "transcription": "a sentence",
            "raw_transcription": "A sentence.",
            "gender": 0,
            "lang_id": 19,
        }
        for name in ("17797742", "10004088")
    ]
    write_parquet(tmp_path / "en_us" / "validation" / "0000.parquet", *rows)
    assert facts(opened("fleurs", tmp_path / "en_us")) == [
        (name, "a sentence", "", "validation") for name in ("17797742", "10004088")
    ]


def test_mls_is_read_without_the_parts_of_its_training_split(tmp_path):
    for split in ("train", "dev", "test", "9_hours", "1_hours"):
        row = {
            "audio": {"bytes": flac(), "path": f"{split}_1_2.flac"},
            "original_path": "http://www.archive.org/download/book.mp3",
            "begin_time": 1.5,
            "end_time": 1.6,
            "transcript": f"words of {split}",
            "audio_duration": 0.1,
            "speaker_id": "10900",
            "chapter_id": "6473",
        }
        write_parquet(tmp_path / "polish" / f"{split}-00000-of-00001.parquet", row)
    splits = ["train", "dev", "test"]
    assert facts(opened("mls", tmp_path / "polish")) == [(f"{s}_1_2", f"words of {s}", "10900", s) for s in splits]


def test_the_unknown_speakers_of_gigaspeech_are_left_out(tmp_path):
    row = {
        "segment_id": "YOU0000000315_S0000660",
        "speaker": "N/A",
        "text": "AS THEY'RE LEAVING <COMMA>",
        "audio": {"bytes": wav(), "path": "xs_chunks_0000/YOU0000000315_S0000660.wav"},
        "begin_time": 2941.89,
        "end_time": 2945.07,
        "audio_id": "YOU0000000315",
    }
    write_parquet(tmp_path / "xs" / "train-00000-of-00001.parquet", row)
    assert facts(opened("gigaspeech", tmp_path / "xs")) == [
        ("YOU0000000315_S0000660", "AS THEY'RE LEAVING <COMMA>", "", "train")
    ]


def test_the_keys_of_aishell_are_its_names(tmp_path):
    row = {
        "name": "BAC009S0764W0121",
        "WavPath": "wav/a.wav",
        "text": "甚至 出现",
        "audio": {"bytes": wav(), "path": "a.wav"},
    }
    write_parquet(tmp_path / "data" / "test-00000-of-00003.parquet", row)
    assert facts(opened("aishell", tmp_path)) == [("BAC009S0764W0121", "甚至 出现", "", "test")]


def test_the_keys_of_wenetspeech_are_its_segment_ids(tmp_path):
    row = {
        "sid": "TEST_NET_Y0000000000_-KTKHdZ2fb8_S00000",
        "confidence": 1,
        "begin_time": 0.0,
        "end_time": 0.1,
        "subsets": ["TEST_NET"],
        "text": "怎么样",
        "WavPath": "a.wav",
        "audio": {"bytes": wav(), "path": "a.wav"},
    }
    write_parquet(tmp_path / "data" / "test_net-00000-of-00002.parquet", row)
    assert facts(opened("wenetspeech", tmp_path)) == [(row["sid"], "怎么样", "", "test_net")]


def test_columns_that_are_set_take_precedence_over_those_of_a_preset(common_voice):
    made = opened("common_voice", common_voice, splits=["dev"], columns={"text": "locale", "speaker": ""})
    assert facts(made) == [("common_voice_cy_1", "cy", "", "dev")]


def test_a_recorded_configuration_with_a_preset_loads_unchanged(common_voice):
    config = SourceConfig.model_validate(
        {"preset": "common_voice", "path": str(common_voice), "columns": {"key": "path"}}
    )
    assert SourceConfig.model_validate(config.model_dump(mode="json")) == config
    assert config.columns.key == "path"


def test_the_error_for_a_wrong_folder_names_the_files_of_the_preset(common_voice):
    with pytest.raises(
        UserError,
        match=r"no \*\.tsv in .*: set source\.path to the folder that contains these files of preset common_voice",
    ):
        opened("common_voice", common_voice.parent)
    with pytest.raises(UserError, match=r"no split other in .*which has clip_durations, dev, test, train, validated"):
        opened("common_voice", common_voice, splits=["other"])


def test_every_preset_has_a_name_and_a_configuration():
    assert set(PRESETS) == set(get_args(PresetName))
    for name, preset in PRESETS.items():
        config = load_config(ExtractConfig, None, [f"source.preset={name}", "source.path=x"]).source
        assert config.kind == preset.kind


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["source.preset=common_voices"], "did you mean 'common_voice'?"),
        (
            ["source.preset=mls", "source.kind=manifest"],
            "preset mls is of kind parquet, not manifest: remove source.kind",
        ),
        (["source.preset=[mls]"], "source.preset"),
    ],
)
def test_an_invalid_preset_is_a_one_sentence_error(words, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_config(ExtractConfig, None, [*words, "source.path=x"])
    assert "\n" not in str(caught.value)
