from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from train.evaluation.bootstrap import WORD_ERRORS, WORDS, paired_difference, ratio, ratio_difference
from train.evaluation.utterance_table import read_utterances, utterance_table, write_utterances

counts = st.lists(st.tuples(st.floats(0, 100), st.integers(1, 30)), min_size=1, max_size=20)


def run_table(nats, tokens, keys=None, **columns) -> pa.Table:
    keys = keys or [f"utt-{i}" for i in range(len(nats))]
    return utterance_table({"key": keys, "cache": ["c"] * len(keys), "nats": nats, "tokens": tokens, **columns})


@given(counts, st.integers(0, 3))
def test_the_mean_is_the_ratio_of_sums_and_the_interval_lies_within_the_ratios_of_single_utterances(pairs, seed):
    nats, tokens = np.array(pairs).T
    mean, low, high = ratio(nats, tokens, seed)
    assert mean == pytest.approx(nats.sum() / tokens.sum())
    ratios = nats / tokens
    assert ratios.min() - 1e-9 <= low <= high <= ratios.max() + 1e-9


def test_the_interval_is_deterministic_and_has_its_nominal_coverage():
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        tokens = rng.integers(5, 30, 40)
        nats = tokens * (3 + rng.normal(0, 1, 40))
        interval = ratio(nats, tokens, seed)
        assert interval == ratio(nats, tokens, seed)
        covered += interval.low <= 3 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_paired_difference_has_a_narrower_interval_than_one_run_alone():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 30, 60).astype(float)
    hard = rng.normal(3, 1, 60)
    a, b = tokens * hard, tokens * (hard + rng.normal(0.2, 0.05, 60))
    paired = ratio_difference(a, tokens, b, tokens)
    alone = ratio(a, tokens)
    assert paired.low < -0.2 < paired.high < 0
    assert paired.high - paired.low < (alone.high - alone.low) / 5


def test_two_runs_are_paired_by_key_in_any_order_and_swapping_them_changes_the_sign():
    a = run_table([1.0, 2.0, 9.0], [1, 2, 3], ["x", "y", "only-a"])
    b = run_table([4.0, 3.0], [2, 1], ["y", "x"])
    there, back = paired_difference(a, b, seed=5), paired_difference(b, a, seed=5)
    assert there.mean == pytest.approx(3 / 3 - 7 / 3)
    assert there == pytest.approx((-back.mean, -back.high, -back.low))
    assert paired_difference(a, a) == (0, 0, 0)


def test_word_errors_are_compared_over_utterances_that_both_decoded():
    edits = {"word_insertions": [1, 0, None], "word_deletions": [0, 0, None], "word_substitutions": [1, 2, None]}
    a = run_table([1, 1, 1], [1, 1, 1], words=[4, 4, None], **edits)
    b = run_table([1, 1, 1], [1, 1, 1], words=[4, 4, 4], **{name: [0, 0, 3] for name in edits})
    assert paired_difference(a, b, counts=WORD_ERRORS, per=WORDS).mean == pytest.approx(4 / 8)


def test_runs_with_no_utterance_in_common_are_refused():
    with pytest.raises(UserError, match="in common"):
        paired_difference(run_table([1], [1], ["x"]), run_table([1], [1], ["y"]))


def test_the_table_round_trips_and_a_corrupt_one_names_the_command(tmp_path):
    table = run_table([1.5, 2.5], [3, 4])
    path = write_utterances(tmp_path, table)
    assert read_utterances(tmp_path).equals(table)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="train evaluate"):
        read_utterances(tmp_path)
    with pytest.raises(UserError, match="does not exist: run `python -m train evaluate"):
        read_utterances(tmp_path / "other")
