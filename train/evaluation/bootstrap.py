"""How sure a figure is: bootstrap intervals over utterances, of one run and of the difference of two.

In: counts of each utterance (nats and tokens, or errors and words). Out: an :class:`Interval`. The figure is always a
ratio of sums, so that every token (or word) weighs the same; what is drawn again is whole utterances, because the
tokens of one utterance are not independent. Percentile intervals (Efron 1979) of ``NUM_RESAMPLES`` seeded resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.errors import UserError

NUM_RESAMPLES = 2000
CONFIDENCE_LEVEL = 0.95
NATS, TOKENS = ("nats",), "tokens"
WORD_ERRORS, WORDS = ("word_insertions", "word_deletions", "word_substitutions"), "words"
CHARACTER_ERRORS = ("character_insertions", "character_deletions", "character_substitutions")
CHARACTERS = "characters"
_AT_ONCE = 2**22  # counts drawn at a time: 32 MiB

Array = npt.NDArray[Any]  # float64 or int64


class Interval(NamedTuple):
    """A figure and the bounds that 95 % of the resamples lie within."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio(counts: Array, weights: Array, seed: int = 0) -> Interval:
    """sum(counts) / sum(weights) of one set of utterances; both [n].

    Raises:
        ValueError: no utterance weighs anything.
    """
    return _interval([(counts, weights)], seed)


def ratio_difference(a: Array, weights_a: Array, b: Array, weights_b: Array, seed: int = 0) -> Interval:
    """``ratio`` of a minus that of b, all four [n] over the same utterances: a resample takes the same ones of both."""
    return _interval([(a, weights_a), (b, weights_b)], seed)


def paired_difference(
    a: pa.Table, b: pa.Table, seed: int = 0, *, counts: Sequence[str] = NATS, per: str = TOKENS
) -> Interval:
    """Figure of ``a`` minus figure of ``b`` over the utterances that both judged: below 0 means that a is better.

    Args:
        a, b: what ``read_utterances`` gives for two runs, in any order of rows.
        counts: columns that are added up: NATS, or WORD_ERRORS for the word error rate.
        per: column that they are divided by: TOKENS or WORDS. Runs with language models of different tokenizers count
            different tokens; their difference in nats a token then says little, that in word error rate is sound.

    Raises:
        UserError: no utterance has these counts in both.
    """
    names = [*counts, per]
    mine, theirs = ({row[0]: row[1:] for row in _rows(table, names)} for table in (a, b))
    common = sorted(mine.keys() & theirs.keys())
    shape = len(common), len(names)
    left, right = (np.array([rows[key] for key in common], float).reshape(shape) for rows in (mine, theirs))
    if not common or not left[:, -1].sum() or not right[:, -1].sum():
        raise UserError(
            f"the two runs have no utterance with {', '.join(names)} in common: judge them on the same cache"
        )
    return ratio_difference(left[:, :-1].sum(1), left[:, -1], right[:, :-1].sum(1), right[:, -1], seed)


def table_intervals(table: pa.Table) -> dict[str, Interval]:
    """Intervals of the figures that a run's table holds counts for, by the names of ``summary.json``."""
    sound = {
        "val_loss": (NATS, TOKENS, ()),
        "audio_gain": (("nats_shuffled",), TOKENS, NATS),
        "silent_gain": (("nats_silent",), TOKENS, NATS),
        "text_only_gain": (("nats_text_only",), TOKENS, NATS),
        "wer": (WORD_ERRORS, WORDS, ()),
        "cer": (CHARACTER_ERRORS, CHARACTERS, ()),
    }
    intervals = {}
    for name, (counts, per, less) in sound.items():
        known = table.select([*dict.fromkeys([*counts, *less, per])]).drop_null()
        columns = {column: known[column].to_numpy() for column in known.column_names}
        if len(known) and columns[per].sum():
            each = sum(columns[column] for column in counts) - sum(columns[column] for column in less)
            intervals[name] = ratio(each, columns[per])
    return intervals


def _rows(table: pa.Table, names: Sequence[str]) -> Iterator[tuple[tuple[str, str], *tuple[float, ...]]]:
    """((cache, key), a number of each of ``names``) of the rows that have all of them."""
    known = table.select(["cache", "key", *names]).drop_null()
    caches, keys, *values = (column.to_pylist() for column in known.columns)
    yield from zip(zip(caches, keys, strict=True), *values, strict=True)


def _interval(pairs: Sequence[tuple[Array, Array]], seed: int) -> Interval:
    """The first pair's ratio, less the second's where there are two."""
    sums = np.stack([np.asarray(column, float) for pair in pairs for column in pair], 1)  # [n, 2 or 4]
    if not all(sums[:, 1::2].sum(0)):
        raise ValueError("no utterance weighs anything")
    n, rng = len(sums), np.random.default_rng(seed)
    size = max(1, _AT_ONCE // n)
    draws = []
    for start in range(0, NUM_RESAMPLES, size):
        taken = rng.multinomial(n, np.full(n, 1 / n), size=min(size, NUM_RESAMPLES - start))  # how often each came
        draws.append(taken @ sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        figures = _figure(np.concatenate(draws))
    figures = figures[np.isfinite(figures)]  # a resample may hold nothing but utterances without weight
    low, high = np.quantile(figures, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    return Interval(float(_figure(sums.sum(0)[None])[0]), float(low), float(high))


def _figure(sums: Array) -> Array:
    """[draws, 2 or 4] -> [draws]."""
    ratios = sums[:, 0::2] / sums[:, 1::2]
    return ratios[:, 0] - ratios[:, 1] if ratios.shape[1] == 2 else ratios[:, 0]
