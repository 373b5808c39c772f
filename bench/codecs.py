"""Codecs on real features: bits per value, error, cosine, speed, size relative to FLAC, and cost during extraction.

    python bench/codecs.py /data/LibriSpeech --n 40
    python bench/codecs.py some/wavs --n 8 --encoder wheel:whisper-tiny.en

Encodes n recordings (FLAC or WAV), spread over a folder, and stores the float32 features of the last layer in every
codec with the code that extraction uses. Speeds are in MB/s of the same features as float16, with one thread, the best
of three passes over all of them; ``encode`` includes measuring the error, as extraction does.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from pipeline.audio import SAMPLING_RATE, decode
from pipeline.encoders.load import load_encoder
from pipeline.encoders.recording import encode_recording
from pipeline.weights.resolve import resolve_weights
from shards.format import codec as codecs
from shards.format.codec import FLOAT_CODECS, relative_rms

LIMIT = 0.05  # fraction of the extraction time without a codec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder that is searched for .flac and .wav files")
    parser.add_argument("--n", type=int, default=40)
    parser.add_argument("--encoder", default="wheel:whisper-base")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()

    paths = sorted(path for path in args.folder.rglob("*") if path.suffix in (".flac", ".wav"))
    if not paths:
        parser.error(f"no .flac or .wav files under {args.folder}")
    paths = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, args.n).astype(int))]
    encoder = load_encoder(resolve_weights(args.encoder, role="encoder"), device="auto", dtype=args.dtype, batch_size=8)
    layer = encoder.n_layers
    audio = [decode(path.read_bytes()) for path in paths]
    encode_recording(audio[0], encoder, [layer], overlap=4.0, trim="valid")  # warm up
    started = time.perf_counter()
    features = [encode_recording(x, encoder, [layer], overlap=4.0, trim="valid")[layer] for x in audio]
    encoder_seconds = time.perf_counter() - started

    seconds = sum(map(len, audio)) / SAMPLING_RATE
    values = sum(x.size for x in features)
    flac = sum(map(flac_bytes, audio))
    print(
        f"{len(paths)} recordings, {seconds:.0f} s; {args.encoder} layer {layer} in {encoder.dtype} on "
        f"{encoder.device}: {sum(map(len, features)):,} frames × {encoder.channels} in {encoder_seconds:.1f} s; "
        f"FLAC {flac / 1e6:.2f} MB"
    )
    print(
        f"{'codec':<6} {'bits/value':>10} {'rel. error':>10} {'worst':>8} {'cosine':>9} {'encode MB/s':>12} "
        f"{'decode MB/s':>12} {'× FLAC':>7} {'of extraction':>14}"
    )
    slow = []
    for codec in FLOAT_CODECS:
        encode_seconds, encoded = best(lambda codec=codec: [codecs.encode(codec, x) for x in features])
        out = [np.empty(x.shape, np.float16 if codec == "f16" else np.float32) for x in features]

        def decode_all(codec=codec, encoded=encoded, out=out) -> None:
            for stored, into in zip(encoded, out, strict=True):
                codecs.decode(codec, stored.payload, stored.scale, into)

        decode_seconds, _ = best(decode_all)
        size = sum(e.payload.nbytes + (e.scale.nbytes if e.scale is not None else 0) for e in encoded)
        a, b = (np.concatenate([x.ravel() for x in many]).astype(np.float64) for many in (out, features))
        cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        share = encode_seconds / encoder_seconds
        slow += [codec] * (share > LIMIT)
        print(
            f"{codec:<6} {8 * size / values:>10.2f} {relative_rms(a, b):>10.2e} {max(e.error for e in encoded):>8.1e} "
            f"{cosine:>9.6f} {2 * values / encode_seconds / 1e6:>12,.0f} {2 * values / decode_seconds / 1e6:>12,.0f} "
            f"{size / flac:>7.2f} {share:>14.2%}"
        )
    verdict = f"exceeded by {', '.join(slow)}" if slow else "no codec exceeds it"
    print(f"limit on the slowdown of extraction by encoding: {LIMIT:.0%}; {verdict}")


def best(work: Callable[[], object]) -> tuple[float, object]:
    """Return the seconds of the fastest of three calls, and the result of the last."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return min(seconds), result


def flac_bytes(samples: np.ndarray) -> int:
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return len(file.getvalue())


if __name__ == "__main__":
    main()
