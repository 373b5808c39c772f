from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_cache import make_cache

from shards.errors import UserError
from shards.labels.table import LabelSet, canonical_labels, label_id
from shards.read.cache import Cache
from shards.read.filters import parse_filter, select_rows
from shards.stream.iterable_dataset import FeatureStream
from shards.stream.sampler import SamplerConfig


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    return [
        Cache.open(make_cache(folder / "a", n=30, seed=1, shards=4, val_every=5)),
        Cache.open(make_cache(folder / "b", n=17, seed=2, shards=2, prefix="other")),
    ]


def rows(caches) -> list[dict]:
    joined = [row for cache in caches for row in cache.manifest.to_pylist()]
    return [{**row, "duration": row["samples"] / 16000, "text_length": len(row["text"])} for row in joined]


FILTERS = [
    "duration < 0.5",
    "0.2 <= duration <= 0.6",
    "split == 'val'",
    "split != 'val' and frames > 20",
    "speaker in ['speaker-1', 'speaker-3']",
    "speaker not in ('speaker-1',)",
    "text_length > 12 or not (frames >= 10 and split == 'train')",
    "offset > -1",
    "key == 'utt-00003'",
]


@pytest.mark.parametrize("text", FILTERS)
def test_a_filter_selects_what_python_would(caches, text):
    wanted = [index for index, row in enumerate(rows(caches)) if eval(text, {}, row)]
    assert select_rows(caches, text).tolist() == wanted


def test_an_expression_of_pyarrow_is_a_filter(caches):
    wanted = [index for index, row in enumerate(rows(caches)) if row["duration"] < 0.5]
    assert select_rows(caches, pc.field("duration") < 0.5).tolist() == wanted


@given(st.sampled_from(FILTERS), st.integers(1, 9), st.integers(1, 3), st.integers(0, 5))
def test_a_filtered_epoch_holds_every_passing_row_exactly_once(caches, text, size, window, seed):
    passing = select_rows(caches, text)
    if len(passing):
        rules = SamplerConfig(batch_size=size, window_shards=window)
        order = FeatureStream(caches, rules, seed, rows=passing, epochs=1, prefetch=0).batch_sampler
        seen = np.concatenate(
            [
                batch
                for batch, _, _ in order.iter_batches(state=FeatureStream(caches, rules, seed)._sampler_state, epochs=1)
            ]
        )
        assert sorted(seen.tolist()) == passing.tolist()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is not an expression"),
        ("duration <", "it is not an expression"),
        ("lenght > 3", "column 'lenght' does not exist"),
        ("duration", "'duration' is not a comparison"),
        ("1 < 2", "is a column"),
        ("speaker in 'abc'", "'in' expects a list"),
        ("__import__('os').system('true') == 0", "column '__import__' does not exist"),
        ("duration < frames.real", "'frames.real' is not a column, a string"),
        ("duration is 3", "expected one of"),
        ("duration < [1]", "is not a column, a string"),
        ("duration < -'a'", "is not a column, a string"),
        ("(" * 300 + "1", "it is not an expression"),
    ],
)
def test_what_is_not_a_filter_is_reported_in_one_sentence(text, reason):
    with pytest.raises(UserError, match="is not a valid filter") as told:
        parse_filter(text, ["duration", "frames", "speaker"])
    assert reason in str(told.value)


def test_a_comparison_of_text_with_a_number_is_reported(caches):
    with pytest.raises(UserError, match="the filter 'speaker < 3' does not fit the manifest of"):
        select_rows(caches, "speaker < 3")


def test_a_filter_knows_every_column_of_the_label_set(tmp_path):
    path = make_cache(tmp_path / "cache", n=6, shards=2)
    table = pa.table(
        {
            "key": [f"utt-{i:05d}" for i in range(6)],
            "accent": ["north", "south"] * 3,
            "snr": [10.5, 20.0, 5.0, 30.0, float("nan"), 15.0],
            "clean": [True, False, True, True, False, True],
            "take": [1, 2, 3, 4, 5, 6],
        }
    )
    labels = canonical_labels(table, "test")
    cache = Cache.open(path, LabelSet(labels, label_id(labels), "test"))
    for text, wanted in {
        "accent == 'north'": [0, 2, 4],
        "snr > 10 and take != 6": [0, 1, 3],
        "clean == True": [0, 2, 3, 5],
        "not (clean == True)": [1, 4],
        "text == '' and prompt == ''": [0, 1, 2, 3, 4, 5],
    }.items():
        assert select_rows([cache], text).tolist() == wanted
    with pytest.raises(UserError, match="the filter 'clean > 'a'' does not fit"):
        select_rows([cache], "clean > 'a'")
