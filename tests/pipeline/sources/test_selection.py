from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_corpus import librispeech_files, write_tree

from pipeline.sources import SourceConfig, Utterance, decode_key, encode_key, open_source
from pipeline.sources.base import ProblemLog
from pipeline.sources.selection import FilteredSource
from shards.config.base import load_config
from shards.errors import UserError

LEGAL = re.compile(r"[A-Za-z0-9_-]{1,90}")


class Listed:
    """A source that is a list."""

    name, sequential, root, version, problems = "listed", False, None, "", []
    speaker_split = hash_ahead = True

    def __init__(self, utterances: Sequence[Utterance]) -> None:
        self.made = 0
        self._utterances = utterances

    def utterances(self) -> Iterator[Utterance]:
        for utterance in self._utterances:
            self.made += 1
            yield utterance

    def read(self, uris: Sequence[str]) -> Iterator[tuple[str, bytes | Exception]]:
        return iter([(uri, uri.encode()) for uri in uris])


def utterance(identifier: str, samples: int = 16_000, speaker: str = "") -> Utterance:
    return Utterance("", identifier, f"{identifier}.wav", "text", speaker, "own", samples)


def select(utterances: Sequence[Utterance], **settings) -> list[Utterance]:
    return list(FilteredSource(Listed(utterances), name="x", **settings).utterances())


@given(st.text(st.sampled_from("-xX2AFE.é/_"), min_size=1, max_size=16) | st.text(min_size=1, max_size=20))
@example("-x2E-x41-")
@example("-xAB.")
@example("--x2E-")
@example("-x-x2E-")
@example("-x2D-x2E-")
def test_a_key_is_legal_and_decodes_to_its_id_exactly(identifier):
    key = encode_key(identifier)
    assert LEGAL.fullmatch(key)
    if len(key) < 89:
        assert decode_key(key) == identifier


@given(st.sets(st.text(st.sampled_from("-x2EA."), min_size=1, max_size=8), min_size=2, max_size=30))
def test_different_ids_have_different_keys(identifiers):
    assert len({encode_key(identifier) for identifier in identifiers}) == len(identifiers)


def test_a_legal_key_stays_as_it_is():
    for identifier in ("19-198-0000", "a_b", "x2E", "-x2e-", "-x2E", "a" * 90):
        assert encode_key(identifier) == identifier


def test_a_long_id_becomes_its_head_and_a_hash():
    keys = {encode_key("a" * 91), encode_key("a" * 92), encode_key("." * 40)}
    assert len(keys) == 3
    assert all(len(key) == 89 and LEGAL.fullmatch(key) for key in keys)


def test_rewritten_keys_are_reported_once_and_the_id_is_kept():
    source = FilteredSource(Listed([utterance("a.b"), utterance("c/d"), utterance("e")]), name="x")
    for _ in range(2):
        made = list(source.utterances())
    assert [(u.key, u.id) for u in made] == [("a-x2E-b", "a.b"), ("c-x2F-d", "c/d"), ("e", "e")]
    assert len(source.problems) == 1
    assert source.problems[0].startswith("2 keys rewritten")
    assert "'a.b' to 'a-x2E-b'" in source.problems[0]


def test_duplicate_ids_are_an_error_that_names_the_key_and_both_places():
    with pytest.raises(UserError, match=r"duplicate key 'a\.b'.*utterance 1 \('a\.b\.wav'\).*utterance 3"):
        select([utterance("a.b"), utterance("c"), utterance("a.b")])


def test_a_duplicate_of_an_utterance_that_is_filtered_out_is_an_error():
    with pytest.raises(UserError, match=r"duplicate key 'a'.*utterance 2 .*utterance 3"):
        select([utterance("b"), utterance("a", samples=1), utterance("a")], min_duration=0.5)


def test_different_keys_with_equal_hashes_are_no_duplicates(monkeypatch):
    monkeypatch.setattr("pipeline.sources.selection.hash", lambda key: len(key), raising=False)
    made = [utterance(name) for name in ("a", "b", "cc", "d")]
    assert [u.key for u in select(made)] == ["a", "b", "cc", "d"]
    with pytest.raises(UserError, match=r"duplicate key 'b'.*utterance 2 .*utterance 5"):
        select([*made, utterance("b")])


def test_a_duplicate_stops_a_long_listing_early():
    listed = Listed([utterance(str(number % 100)) for number in range(1000)])
    with pytest.raises(UserError, match="duplicate key '0'"):
        list(FilteredSource(listed, name="x").utterances())
    assert listed.made <= 3 * 128


def test_an_empty_id_is_an_error():
    with pytest.raises(UserError, match="empty key"):
        select([utterance("")])


def test_durations_are_filtered_and_a_recording_of_unknown_length_is_kept():
    made = [utterance(name, round(16_000 * seconds)) for name, seconds in zip("abcde", (0.5, 1, 2, 3, 0), strict=True)]
    assert [u.key for u in select(made, min_duration=1, max_duration=2)] == ["b", "c", "e"]
    assert [u.key for u in select(made, min_duration=1, limit=2)] == ["b", "c"]


def test_limit_makes_no_more_utterances_than_it_needs():
    listed = Listed([utterance(str(number)) for number in range(100)])
    assert len(list(FilteredSource(listed, name="x", limit=3).utterances())) == 3
    assert listed.made == 3


def test_without_val_fraction_the_splits_are_the_sources_own():
    assert {u.split for u in select([utterance("a"), utterance("b")])} == {"own"}


def test_a_problem_log_counts_all_and_names_the_first_few():
    problem_log = ProblemLog()
    for number in range(7):
        problem_log.add("odd things", str(number))
    assert problem_log.sentences() == ["7 odd things: 0, 1, 2, 3, 4, …"]


def test_the_name_is_made_safe_for_a_folder(tmp_path):
    write_tree(tmp_path, librispeech_files())
    config = SourceConfig(kind="librispeech", path=str(tmp_path), name="my corpus/ü.1")
    assert open_source(config).name == "my-corpus-1"
    assert open_source(config.model_copy(update={"name": None})).name == "librispeech-dev-clean-train-clean-100"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kind=librispeech"], "kind librispeech needs a path"),
        (["kind=tones", "path=x"], "has no path and no splits"),
        (["kind=speech", "splits=[train]"], "has no path and no splits"),
        (["kind=manifest", "path=x", "n=5"], "num_sentences is only for kind speech"),
        (["kind=parquet", "path=x", "config=clean"], "config_name is only for datasets of a hub"),
        (["kind=tones", "min_duration=3", "max_duration=2"], "min_duration 3.0 is above max_duration 2.0"),
        (["kind=tones", "limit=0"], "limit"),
        (["kind=tones", "val_fraction=1"], "val_fraction"),
        (["kind=radio"], "kind"),
        (["kind=tones", "speed=2"], "unknown key 'speed'"),
    ],
)
def test_an_invalid_setting_is_a_one_sentence_error(words, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_config(SourceConfig, None, words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["librispeech", "parquet", "manifest"])
def test_a_path_that_does_not_exist_is_an_error_that_names_it(kind, tmp_path):
    with pytest.raises(UserError, match="absent"):
        open_source(SourceConfig(kind=kind, path=str(Path(tmp_path) / "absent")))


def test_more_held_out_than_asked_is_told():
    source = FilteredSource(Listed([]), name="x", val_fraction=0.01)
    keys, speakers = [f"utt-{i}" for i in range(100)], [f"speaker-{i % 2}" for i in range(100)]
    assert source.validation_rows(pa.chunked_array([keys]), pa.chunked_array([speakers])).sum() == 50
    (note,) = source.problems
    assert note.startswith("50 of 100 utterances are held out, more than twice what source.val_fraction=0.01 asks for")
