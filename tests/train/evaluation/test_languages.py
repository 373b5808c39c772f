"""Error rates by language: marks are letters, words are counted where they are written, texts are scored again."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tiny_cache import make_cache
from tiny_labels import write_labels
from tiny_lm import save_tiny_lm
from tiny_run import make_config

from shards.errors import UserError
from shards.read.cache import Cache
from train.__main__ import command
from train.evaluation.error_rates import error_rates, make_sample
from train.evaluation.languages import language_code, normalize_text, text_languages
from train.evaluation.score import score
from train.evaluation.utterance_table import read_utterances, utterance_table, write_utterances
from train.trainer.fit import fit

HINDI = "हिन्दी में लिखी हुई किताबें"
MARKLESS = "हनद म लख हई कतब"  # the same without vowel signs and viramas, as Whisper's English normalizer leaves it


def rates(reference: str, hypothesis: str, language: str) -> tuple[float | None, float | None]:
    return error_rates([make_sample("key", reference, hypothesis, "", language)])


def test_lost_vowel_signs_are_errors():
    wer, cer = rates(HINDI, MARKLESS, "hi")
    assert (wer, round(cer, 3)) == (1.0, round((27 - 15) / 27, 3))
    assert rates("कुछ", "कछ", "hi") == (1.0, pytest.approx(1 / 3))
    assert rates("कुछ", "कछ", "en") == (0.0, 0.0)  # what the English rules make of it


@pytest.mark.parametrize(
    ("language", "reference", "hypothesis", "wer"),
    [
        ("ta", "தமிழ் மொழி", "தமழ மழ", 1.0),
        ("bn", "বাংলা ভাষা", "বল ভষ", 1.0),
        ("ar", "كَتَبَ الوَلَدُ", "كتب الولد", 1.0),
        ("he", "שָׁלוֹם עולם", "שלום עולם", 0.5),
        ("vi", "tiếng Việt", "tieng Viet", 1.0),
        ("fr", "Été, à Paris !", "été à paris", 0.0),
        ("hi", "नमस्ते, दुनिया।", "नमस्ते दुनिया", 0.0),
        ("fa", "می‌روم", "میروم", 0.0),
        ("vi", "tiếng", "tiếng", 0.0),  # composed and decomposed
        ("de", "Straße", "strasse", 1.0),
    ],
)
def test_marks_and_letters_count_and_punctuation_case_and_forms_do_not(language, reference, hypothesis, wer):
    assert rates(reference, hypothesis, language)[0] == wer


@pytest.mark.parametrize(
    ("language", "reference", "hypothesis", "cer"),
    [
        ("zh", "今天 天气，很好。", "今天天汽很好", 1 / 6),
        ("ja", "東京ﾀﾜｰ１２", "東京タワー12", 0.0),
        ("yue", "你好嗎", "你好", 1 / 3),
        ("th", "น้ำ ดื่ม", "น้ำดืม", 1 / 7),
        ("lo", "ສະບາຍດີ", "ສະບາຍດ", 1 / 7),
        ("my", "မြန်မာ", "မြန်မာ", 0.0),
        ("km", "ភាសាខ្មែរ", "ភាសាខ្មែរ", 0.0),
    ],
)
def test_languages_without_spaces_have_a_character_error_rate_and_no_word_error_rate(
    language, reference, hypothesis, cer
):
    wer, found = rates(reference, hypothesis, language)
    assert (wer, found) == (None, pytest.approx(cer))


def test_an_empty_hypothesis_is_all_deletions_and_an_empty_reference_is_left_out_in_every_language():
    for language in ("en", "hi", "zh"):
        assert rates("कख", "", language)[1] == (1.0 if language != "en" else rates("कख", "", "en")[1])
        assert rates("…!", "कख", language) == (None, None)


def test_english_is_normalized_as_before():
    assert normalize_text("Mr. Colour's don't, twenty-one", "en") == "mister color is do not 21"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("hi-IN", "hi"),
        ("English", "en"),
        ("en_US", "en"),
        ("cmn_hans_cn", "zh"),
        ("Thai", "th"),
        ("", ""),
        ("hau", "hau"),
    ],
)
def test_tags_and_names_of_languages_are_understood(name, code):
    assert language_code(name) == code


def test_a_row_has_its_own_language_else_that_of_the_settings_else_that_of_the_letters():
    assert text_languages(["hi-IN", "", "eng"], ["a", "b", "c"], "zh") == ["hi", "zh", "en"]
    assert text_languages(["", ""], ["one café", "in a long English sentence " * 9], None) == ["en", "en"]
    assert text_languages(["", "zh"], ["voilà l'été à la plage", "你好"], None) == ["und", "zh"]
    assert text_languages([""], ["123"], None) == ["en"]


def world(tmp_path, languages: list[str], **keys):
    cache = make_cache(tmp_path / "cache", n=24, val_every=3)
    rows = Cache.open(cache).manifest.select(["key", "split"]).to_pylist()
    labels = write_labels(
        tmp_path / "labels.csv",
        [
            {**row, "text": "你好" if i % 2 else HINDI, "language": languages[i % 2] if languages else ""}
            for i, row in enumerate(rows)
        ],
    )
    model = f"path:{save_tiny_lm(tmp_path / 'lm')}"
    return fit(make_config(tmp_path, cache, model, steps=2, labels=labels, decode_limit=8, **keys))


def test_a_run_scores_each_row_in_its_language_and_stored_texts_are_scored_again_without_a_model(tmp_path, capsys):
    run = world(tmp_path, ["hi", "zh-CN"])
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["languages"]) == {"hi", "zh"}
    table = read_utterances(run)
    for row in table.to_pylist():
        assert (row["words"] is None) == (row["language"] == "zh" or row["hypothesis"] is None)
    capsys.readouterr()
    assert command(["score", str(run), "--json", str(tmp_path / "rates.json")]) == 0
    found = json.loads((tmp_path / "rates.json").read_text())
    assert {name: found[name] for name in ("wer", "cer", "languages", "word_edits", "character_edits")} == {
        name: summary[name] for name in ("wer", "cer", "languages", "word_edits", "character_edits")
    }
    (tmp_path / "lm").rename(tmp_path / "gone")
    hypotheses = [MARKLESS if "ह" in text else text for text in table["reference"].to_pylist()]
    index = table.column_names.index("hypothesis")
    write_utterances(run, table.set_column(index, "hypothesis", pa.array(hypotheses)))
    hindi = [text for text in table["reference"].to_pylist() if text == HINDI]
    for language in ("hi", "en"):
        capsys.readouterr()
        assert command(["score", str(run), "--language", language]) == 0
        edits = json.loads(capsys.readouterr().out)["character_edits"]
        right = edits["deletions"] + edits["substitutions"] == 12 * len(hindi)
        assert right == (language == "hi")


def test_eval_language_decides_for_rows_without_one_and_may_change_after_training(tmp_path, capsys):
    run = world(tmp_path, [], eval={"language": "Chinese"})
    assert set(json.loads((run / "summary.json").read_text())["languages"]) == {"zh"}
    assert command(["evaluate", str(run), "eval.language=hi"]) == 0
    capsys.readouterr()
    assert command(["score", str(run)]) == 0
    rates = json.loads(capsys.readouterr().out)
    assert set(rates["languages"]) == {"hi"}
    assert rates["wer"] is not None


def test_an_older_run_without_languages_is_scored_and_the_summary_shows_cer_alone_where_there_is_no_wer(tmp_path):
    from train.runs.summary import format_summary

    run = world(tmp_path, ["zh", "zh"])
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["wer"], "CER (no WER" in format_summary(summary)) == (None, True)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config.pop("eval")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    path = run / "utterances.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["language"]), path)
    assert command(["score", str(run)]) == 0


def test_stored_texts_are_scored_by_task_with_intervals_and_without_those_that_were_not_decoded(tmp_path):
    columns = {
        "key": ["a", "b", "c"],
        "cache": ["x"] * 3,
        "reference": ["red blue", "turn left", "stop"],
        "hypothesis": ["red blue", "turn right", None],
        "task": ["say", "spell", "say"],
    }
    write_utterances(tmp_path, utterance_table(columns))
    found = score(tmp_path)
    assert (found["n_decoded"], found["wer"]) == (2, 0.25)
    assert {name: rates["wer"] for name, rates in found["tasks"].items()} == {"say": 0.0, "spell": 0.5}
    assert found["intervals"]["wer"][0] <= 0.25 <= found["intervals"]["wer"][1]
    assert score(tmp_path, default="zh")["wer"] is None
    write_utterances(tmp_path, utterance_table({**columns, "hypothesis": [None] * 3}))
    with pytest.raises(UserError, match="has no decoded texts: run"):
        score(tmp_path)
