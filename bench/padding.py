"""Padding fraction at batch sizes 8, 16 and 32 on LibriSpeech's lengths, and how well the batches are mixed.

    python bench/padding.py                            # lengths as in train-clean-100, 28,539 utterances
    python bench/padding.py --corpus ../LibriSpeech/train-clean-100   # lengths of the .flac files of a folder

Without a corpus, lengths are 2 to 17 s, most of them near 15 s, as in train-clean-100 (mean 12.7 s). Mixing is measured
over two epochs at batch size 16: *same again* is the fraction of pairs that share a batch in both epochs (random
batches: 15 / rows); *length carried* is the correlation between the mean lengths of consecutive batches (0: no
curriculum by length); *reach* is the mean distance in stored order between two utterances of a batch, relative to that
of two random utterances (1 is the maximum).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from shards.stream.sampler import BatchSampler, SamplerConfig, SamplerState

ROWS, SHARD_ROWS = 28_539, 345  # utterances of train-clean-100; 345 clips of whisper-base are 224 MB


def lengths(corpus: str | None) -> np.ndarray:
    """Return the lengths in frames of 20 ms: int32 [rows]."""
    rng = np.random.default_rng(0)
    if corpus is None:
        return np.ceil((2 + 15 * rng.beta(2.5, 0.9, ROWS)) * 50).astype(np.int32)
    import soundfile

    files = sorted(Path(corpus).rglob("*.flac"))
    if not files:
        raise SystemExit(f"error: no .flac files under '{corpus}'")
    frames = np.array([np.ceil(soundfile.info(path).frames / 320) for path in files], dtype=np.int32)
    return frames if len(frames) > 5000 else rng.choice(frames, ROWS)


def padding(frames: np.ndarray, batches: list[np.ndarray]) -> float:
    return 1 - sum(frames[b].sum() for b in batches) / sum(len(b) * frames[b].max() for b in batches)


def at_random(rows: int, size: int, seed: int) -> list[np.ndarray]:
    order = np.random.default_rng(seed).permutation(rows)
    return [order[start : start + size] for start in range(0, rows, size)]


def pairs(batches: list[np.ndarray], rows: int) -> np.ndarray:
    found = [
        np.sort(batch)[first] * rows + np.sort(batch)[second]
        for batch in batches
        for first, second in [np.triu_indices(len(batch), 1)]
    ]
    return np.unique(np.concatenate(found))


def mixing(frames: np.ndarray, epochs: list[list[np.ndarray]]) -> tuple[float, float, float]:
    rows = len(frames)
    first, second = (pairs(batches, rows) for batches in epochs)
    again = len(np.intersect1d(first, second, assume_unique=True)) / len(first)
    means = np.array([frames[batch].mean() for batch in epochs[0]])
    carried = float(np.corrcoef(means[:-1], means[1:])[0, 1])
    reach = float(np.mean(first % rows - first // rows)) / (rows / 3)
    return again, carried, reach


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="folder of .flac files whose lengths are used")
    frames = lengths(parser.parse_args().corpus)
    rows = len(frames)
    bounds = np.append(np.arange(0, rows, SHARD_ROWS), rows)
    print(f"{rows:,} utterances, mean {frames.mean() / 50:.1f} s, in {len(bounds) - 1} shards")
    print(f"{'':22}" + "".join(f"{f'batch {size}':>10}" for size in (8, 16, 32))
          + f"{'same again':>14}{'length carried':>17}{'reach':>8}")  # fmt: skip

    def show(label: str, of: Any) -> None:
        fractions = [padding(frames, of(size, 0)) for size in (8, 16, 32)]
        again, carried, reach = mixing(frames, [of(16, 0), of(16, 1)])
        cells = "".join(f"{part:10.2%}" for part in fractions)
        print(f"{label:22}{cells}{again:14.3%}{carried:17.3f}{reach:8.2f}", flush=True)

    show("random batches", lambda size, epoch: at_random(rows, size, epoch))
    for window in (1, 2, 4, 8, 0):
        shuffle = "window" if window else "global"

        def ours(size: int, epoch: int, window: int = window, shuffle: Any = shuffle) -> list[np.ndarray]:
            config = SamplerConfig(batch_size=size, window_shards=window or 1, shuffle=shuffle)
            sampler = BatchSampler(frames, bounds, config, seed=1)
            return [batch for batch, _, _ in sampler.iter_batches(SamplerState(epoch), epoch + 1)]

        show(f"window_shards {window}" if window else "shuffle global", ours)
    print("target: below 2 % with window_shards of at least 4")


if __name__ == "__main__":
    main()
