"""Stored features, read back with the webdataset library, compared with the encoder of transformers.

    python bench/fidelity.py CACHE --n 20

Reads the first n utterances of a full30 cache (audio of at most 30 s) through ``webdataset``, encodes the same audio
with transformers' feature extractor and float32 encoder, and prints the relative RMS error and the cosine similarity of
each utterance and of all together.
"""

from __future__ import annotations

import argparse
import io
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from transformers import WhisperFeatureExtractor, WhisperModel

from pipeline.audio import decode
from pipeline.maintain.check import recorded_config
from pipeline.sources import open_source
from pipeline.weights.resolve import resolve_weights
from shards.format.codec import relative_rms
from shards.read.cache import Cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--n", type=int, default=20)
    args = parser.parse_args()

    cache = Cache.open(args.cache)
    source = open_source(recorded_config(cache.provenance, cache.path).source)
    weights = resolve_weights(cache.provenance["encoder"]["reference"], role="encoder")
    extractor = WhisperFeatureExtractor(feature_size=cache.spec.frontend["n_mels"])
    encoder = WhisperModel.from_pretrained(weights.folder, dtype=torch.float32).encoder.eval()
    audio = dict(zip(cache.manifest["key"].to_pylist(), cache.manifest["audio"].to_pylist(), strict=True))

    tars = [str(path) for path in sorted((args.cache / "shards").glob("*.tar"))]
    stored, fresh = [], []
    for sample in islice(wds.WebDataset(tars, shardshuffle=False), args.n):
        features = np.load(io.BytesIO(sample["npy"]), allow_pickle=False).astype(np.float32)
        ((_, data),) = source.read([audio[sample["__key__"]]])
        assert isinstance(data, bytes)
        samples = decode(data)
        if len(samples) > cache.spec.sampling_rate * 30:
            continue
        mel = extractor(samples, sampling_rate=16000, return_tensors="pt").input_features
        with torch.inference_mode():
            hidden = encoder(mel, output_hidden_states=True).hidden_states[cache.spec.layer][0].numpy()[: len(features)]
        stored.append(features)
        fresh.append(hidden)
        cosine = float((features * hidden).sum() / np.linalg.norm(features) / np.linalg.norm(hidden))
        print(
            f"{sample['__key__']:<30} {len(features):>5} frames  "
            f"rel. error {relative_rms(features, hidden):.4f}  cosine {cosine:.5f}"
        )
    a, b = np.concatenate(stored).astype(np.float64), np.concatenate(fresh).astype(np.float64)
    print(
        f"\n{len(stored)} utterances: relative RMS error {relative_rms(a, b):.4f}, "
        f"cosine {float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)):.5f} "
        f"({cache.spec.dtype} encoder, {cache.spec.codec} codec; webdataset {version('webdataset')}, "
        f"transformers {version('transformers')}, torch {torch.__version__})"
    )


if __name__ == "__main__":
    main()
