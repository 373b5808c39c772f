"""The listing: every utterance in source order, the same validation split as ever, and no file left behind."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.extract.listing import LISTING_SCHEMA, list_source
from pipeline.sources import Source, Utterance
from pipeline.sources.selection import FilteredSource, choose_validation
from shards.errors import UserError


class Listed(Source):
    """A source that is a list."""

    name = "listed"

    def __init__(self, utterances: Sequence[Utterance], speaker_split: bool = True) -> None:
        super().__init__()
        self.speaker_split, self._utterances = speaker_split, utterances

    def utterances(self) -> Iterator[Utterance]:
        return iter(self._utterances)

    def tokens(self, uris: Sequence[str]) -> list[str]:
        return [f"token of {uri}" for uri in uris]


def corpus(speakers: Sequence[str]) -> list[Utterance]:
    identifiers = [f"{number}.é" if number % 5 == 0 else f"clip-{number}" for number in range(len(speakers))]
    return [Utterance("", name, f"{name}.wav", f"text {name}", speaker, "own", 16_000 + number)
            for number, (name, speaker) in enumerate(zip(identifiers, speakers, strict=True))]  # fmt: skip


def listed(folder, speakers: Sequence[str], speaker_split: bool = True, **settings):
    return list_source(FilteredSource(Listed(corpus(speakers), speaker_split), name="x", **settings), folder)


def test_a_listing_has_every_utterance_in_order_with_its_token(tmp_path):
    number = 20_000  # several batches
    listing = listed(tmp_path, [f"s{n % 7}" for n in range(number)])
    assert listing.table.schema == LISTING_SCHEMA
    expected = corpus([f"s{n % 7}" for n in range(number)])
    rows = listing.table.to_pylist()
    assert [row["id"] for row in rows] == [u.id for u in expected]
    assert rows[-1] == {"key": "clip-19999", "id": "clip-19999", "audio": "clip-19999.wav", "text": "text clip-19999",
                        "speaker": f"s{19_999 % 7}", "split": "own", "samples": 35_999}  # fmt: skip
    assert listing.tokens.to_pylist() == [f"token of {row['audio']}" for row in rows]
    assert listing.problems[0].startswith("4000 keys rewritten")


def test_a_source_without_utterances_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"source 'x' has no utterances: check source\.path"):
        listed(tmp_path, [])


def test_a_text_that_is_not_unicode_is_an_error_that_names_the_utterance(tmp_path):
    utterances = [*corpus(["a"]), Utterance("", "second", "2.wav", "\ud800")]
    with pytest.raises(UserError, match="the text of utterance 'second' cannot be stored"):
        list_source(Listed(utterances), tmp_path)


def test_a_listing_leaves_no_file_not_even_when_it_is_killed(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from pipeline.extract.listing import list_source\n"
        "from pipeline.sources import Source, Utterance\n"
        "class Endless(Source):\n"
        "    name = 'endless'\n"
        "    def utterances(self):\n"
        "        for n in range(20_000):\n"
        "            yield Utterance(str(n), str(n), 'a.wav', 'text')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "list_source(Endless(), Path(sys.argv[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", program, tmp_path], timeout=60).returncode == -9
    listing = listed(tmp_path, ["a"] * 10)
    assert os.listdir(tmp_path) == []
    assert len(listing.table) == 10


SPLITS = {  # the number of validation utterances and a digest of their keys, as version 1 chose them
    "speakers":
        "2:98e2778f 17:2abebe15 94:470aceeb 3:5a2a3858 15:79571adc 93:a19d1769 2:d91cf334 17:2ce803b9 94:49b5b8f6",
    "speakers, not kept together":
        "2:60eee111 15:99bfaa9c 93:c6f364bb 2:cf5e0211 15:1fecd32c 93:81698188 2:fa32c8a7 15:3b239819 93:b46a3fe9",
    "nobody":
        "2:388a1900 20:55ff6be9 120:04061dae 2:cf5e0211 20:57ac09a8 120:99dfdc34 2:8aca8a84 20:bc063fe0 120:bd7cbdc0",
    "one":
        "1:e75b8173 5:280a5d15 30:d01d298b 1:bbbd38c1 5:5166d3e2 30:4ac21dbe 1:64022617 5:dcf45efd 30:c3a38a89",
    "some":
        "3:d918a68f 30:b457a5f7 180:a79b198e 3:df0bab5f 30:88264a10 180:f2f6ff69 3:2580466e 30:83bb68e6 180:d5d1ecc6",
    "two":
        "1:537282f1 1:537282f1 1:537282f1 1:537282f1 1:537282f1 1:537282f1 1:537282f1 1:537282f1 9:645847bf",
}  # fmt: skip
SPEAKERS = {
    "speakers": [f"speaker {n}" for n in range(40) for _ in range(n % 7 + 1)],
    "nobody": [""] * 200,
    "one": ["only"] * 50,
    "some": ["" if n % 3 else f"é{n % 11}" for n in range(300)],
    "two": ["a"] * 9 + ["b"],
}


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("prefix", [8, 1])  # of 1 byte, most are equal
def test_the_validation_split_is_the_same_as_in_version_1(name, prefix, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.sources.selection._PREFIX", prefix)
    corpus_name, _, by_utterance = name.partition(", ")
    found = []
    for seed in (0, 1, 12345):
        for fraction in (0.01, 0.1, 0.6):
            table = listed(tmp_path, SPEAKERS[corpus_name], not by_utterance, val_fraction=fraction, seed=seed).table
            assert set(table["split"].to_pylist()) == {"train", "val"}
            val = [row["key"] for row in table.to_pylist() if row["split"] == "val"]
            found.append(f"{len(val)}:{hashlib.sha256(chr(10).join(val).encode()).hexdigest()[:8]}")
    assert found == SPLITS[name].split()


def test_the_validation_split_shares_no_speaker(tmp_path):
    rows = listed(tmp_path, SPEAKERS["speakers"], val_fraction=0.1, seed=1).table.to_pylist()
    speakers = {split: {row["speaker"] for row in rows if row["split"] == split} for split in ("val", "train")}
    assert not speakers["val"] & speakers["train"]
    assert sum(row["split"] == "val" for row in rows) == pytest.approx(0.1 * len(rows), abs=2)


def test_a_corpus_of_one_speaker_is_split_by_utterance_and_reported(tmp_path):
    listing = listed(tmp_path, ["only"] * 10, val_fraction=0.2)
    assert Counter(listing.table["split"].to_pylist()) == {"val": 2, "train": 8}
    assert any(re.match("all 10 utterances have one speaker", problem) for problem in listing.problems)


@given(st.lists(st.text(max_size=2), min_size=2, max_size=60), st.floats(0.001, 0.999), st.integers(0, 3))
def test_both_sides_of_a_split_hold_at_least_one_speaker(speakers, fraction, seed):
    keys = pa.chunked_array([pa.array([f"k{n}" for n in range(len(speakers))])])
    chosen, is_shared = choose_validation(keys, pa.chunked_array([pa.array(speakers)]), fraction, seed)
    val = {(speaker or n) if not is_shared else n for n, speaker in enumerate(speakers) if chosen[n]}
    train = {(speaker or n) if not is_shared else n for n, speaker in enumerate(speakers) if not chosen[n]}
    assert val
    assert train
    assert not val & train
