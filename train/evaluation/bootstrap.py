"""Bootstrap confidence intervals over utterances, for one run or for the difference between two.

Takes counts per utterance (nats and tokens, or errors and words); returns an :class:`Interval`. A metric is always a
ratio of sums, so that every token (or word) has equal weight. Whole utterances are resampled, because the tokens of one
utterance are not independent. Intervals are percentile intervals (Efron 1979) of ``NUM_RESAMPLES`` seeded resamples.
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
_QUIET = np.errstate(invalid="ignore", over="ignore", divide="ignore")  # NaN and infinite nats of a run that diverged
_CHUNK = 2**22  # counts drawn at a time: 32 MiB

Array = npt.NDArray[Any]  # float64 or int64


class Interval(NamedTuple):
    """A metric and the bounds within which 95 % of its resamples lie."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio(counts: Array, weights: Array, seed: int = 0) -> Interval:
    """Interval of sum(counts) / sum(weights) over n utterances; both arrays are [n].

    Raises:
        ValueError: the sum of the weights is 0.
    """
    return _interval([(counts, weights)], seed)


def ratio_difference(a: Array, weights_a: Array, b: Array, weights_b: Array, seed: int = 0) -> Interval:
    """Interval of sum(a) / sum(weights_a) - sum(b) / sum(weights_b).

    All four arrays are [n], over the same utterances; each resample draws the same utterances for both ratios.

    Raises:
        ValueError: the sum of ``weights_a`` or of ``weights_b`` is 0.
    """
    return _interval([(a, weights_a), (b, weights_b)], seed)


@_QUIET
def paired_difference(
    a: pa.Table, b: pa.Table, seed: int = 0, *, counts: Sequence[str] = NATS, per: str = TOKENS
) -> Interval:
    """Metric of ``a`` minus metric of ``b`` over the utterances of both: below 0, ``a`` is better.

    Args:
        a, b: tables of two runs as :func:`read_utterances` returns them, rows in any order.
        counts: columns whose sum is the numerator: NATS, or WORD_ERRORS for the word error rate.
        per: column of the denominator: TOKENS or WORDS. Language models with different tokenizers count different
            tokens, so that nats per token are not comparable between them; the word error rate is.

    Raises:
        UserError: no utterance has these counts in both tables.
    """
    names = [*counts, per]
    mine, theirs = ({row[0]: row[1:] for row in _rows(table, names)} for table in (a, b))
    common = sorted(mine.keys() & theirs.keys())
    shape = len(common), len(names)
    left, right = (np.array([rows[key] for key in common], float).reshape(shape) for rows in (mine, theirs))
    if not common or not left[:, -1].sum() or not right[:, -1].sum():
        raise UserError(
            f"the two runs have no utterance with {', '.join(names)} in common: evaluate them on the same cache"
        )
    return ratio_difference(left[:, :-1].sum(1), left[:, -1], right[:, :-1].sum(1), right[:, -1], seed)


@_QUIET
def table_intervals(table: pa.Table) -> dict[str, Interval]:
    """Intervals of the metrics that a run's table has counts for, keyed by their names in ``summary.json``."""
    metrics = {  # name: (numerator, denominator, subtracted from the numerator)
        "val_loss": (NATS, TOKENS, ()),
        "audio_gain": (("nats_shuffled",), TOKENS, NATS),
        "silent_gain": (("nats_silent",), TOKENS, NATS),
        "text_only_gain": (("nats_text_only",), TOKENS, NATS),
        "wer": (WORD_ERRORS, WORDS, ()),
        "cer": (CHARACTER_ERRORS, CHARACTERS, ()),
    }
    intervals = {}
    for name, (counts, per, subtracted) in metrics.items():
        known = table.select([*dict.fromkeys([*counts, *subtracted, per])]).drop_null()
        columns = {column: known[column].to_numpy() for column in known.column_names}
        if len(known) and columns[per].sum():
            numerators = sum(columns[column] for column in counts) - sum(columns[column] for column in subtracted)
            intervals[name] = ratio(numerators, columns[per])
    return intervals


def accuracy(table: pa.Table) -> Interval | None:
    """Interval of the share of decoded utterances that are right, if every reference is one word; else None."""
    known = table.select([*WORD_ERRORS, WORDS]).drop_null()
    *errors, words = (column.to_numpy() for column in known.columns)
    if not len(known) or (words != 1).any():
        return None
    return ratio((sum(errors) == 0).astype(float), np.ones(len(known)))


def _rows(table: pa.Table, names: Sequence[str]) -> Iterator[tuple[tuple[str, ...], *tuple[float, ...]]]:
    """Yield ((cache, key, task, prompt), value of each of ``names``) for the rows that have all of them."""
    identity = [name for name in ("cache", "key", "task", "prompt") if name in table.column_names]
    known = table.select([*identity, *names]).drop_null()
    columns = [column.to_pylist() for column in known.columns]
    rows = zip(*columns[: len(identity)], strict=True)
    yield from zip(rows, *columns[len(identity) :], strict=True)


@_QUIET
def _interval(pairs: Sequence[tuple[Array, Array]], seed: int) -> Interval:
    """Interval of the first pair's ratio, minus the second pair's ratio if there are two pairs."""
    sums = np.stack([np.asarray(column, float) for pair in pairs for column in pair], 1)  # [n, 2 or 4]
    if not all(sums[:, 1::2].sum(0)):
        raise ValueError("the weights of the utterances sum to 0")
    n, rng = len(sums), np.random.default_rng(seed)
    size = max(1, _CHUNK // n)
    draws = []
    for start in range(0, NUM_RESAMPLES, size):
        times_drawn = rng.multinomial(n, np.full(n, 1 / n), size=min(size, NUM_RESAMPLES - start))  # [draws, n]
        draws.append(times_drawn @ sums)
    values = _metric(np.concatenate(draws))
    values = values[np.isfinite(values)]  # the weights of a resample may sum to 0
    bounds = [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2]
    low, high = np.quantile(values, bounds) if len(values) else (np.nan, np.nan)
    return Interval(float(_metric(sums.sum(0)[None])[0]), float(low), float(high))


def _metric(sums: Array) -> Array:
    """Ratios, or differences of two ratios, of resampled sums: [draws, 2 or 4] -> [draws]."""
    ratios = sums[:, 0::2] / sums[:, 1::2]
    return ratios[:, 0] - ratios[:, 1] if ratios.shape[1] == 2 else ratios[:, 0]
