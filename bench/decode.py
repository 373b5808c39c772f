"""Decoding on one core: this project beside soundfile alone, PyAV alone and, where installed, torchcodec.

    python bench/decode.py                              # 32 clips of 12 s of modulated noise: 2 minutes
    python bench/decode.py --before ../main             # also ``pipeline.audio`` of another checkout, alternating
    python bench/decode.py --json decode.json

Every clip goes from the bytes of a file to mono float32 at 16 kHz; ``soundfile``, ``PyAV`` and ``torchcodec`` stop at
the samples of the file, unchecked. Prints utterances a second of CPU time, the best of the rounds; ``×`` is this
project's rate divided by the other's. ``probe`` is the length for the plan. Also checks that another checkout gives
equal samples for WAV and FLAC.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import soundfile

RATE, SECONDS = 16_000, 12
FORMATS = {
    "FLAC": ("FLAC", "PCM_16"),
    "WAV": ("WAV", "PCM_16"),
    "MP3": ("MP3", None),
    "Opus": ("OGG", "OPUS"),
    "Vorbis": ("OGG", "VORBIS"),
}
Decoder = Callable[[bytes], Any]


def clips(form: str, subtype: str | None, count: int) -> list[bytes]:
    """Return ``count`` files of modulated noise."""
    made = []
    for seed in range(count):
        time_axis = np.arange(SECONDS * RATE) / RATE
        noise = np.random.default_rng(seed).normal(0, 0.1, len(time_axis))
        file = io.BytesIO()
        soundfile.write(file, noise * (1 + np.sin(8 * np.pi * time_axis)) / 2, RATE, format=form, subtype=subtype)
        made.append(file.getvalue())
    return made


def soundfile_alone(data: bytes) -> Any:
    return soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0]


def pyav_alone(data: bytes) -> Any:
    import av

    with av.open(io.BytesIO(data)) as container:
        return np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)


def torchcodec_alone(data: bytes) -> Any:
    from torchcodec.decoders import AudioDecoder

    return AudioDecoder(data).get_all_samples().data


def load_audio(folder: Path) -> ModuleType:
    """Import ``pipeline/audio.py`` of another checkout, and with it the rest of its ``pipeline``."""
    mine = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "pipeline"}
    for name in mine:
        del sys.modules[name]
    sys.path.insert(0, str(folder.resolve()))
    try:
        module = importlib.import_module("pipeline.audio")
    finally:
        sys.path.pop(0)
        for name in [name for name in sys.modules if name.split(".")[0] == "pipeline"]:
            del sys.modules[name]
        sys.modules.update(mine)
    assert Path(str(module.__file__)).is_relative_to(folder.resolve())
    return module


def rates(decoders: dict[str, Decoder], files: list[bytes], rounds: int) -> dict[str, float]:
    """Return utterances a second of each decoder: the best round; each is first in turn."""
    best = dict.fromkeys(decoders, 0.0)
    names = list(decoders)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            decode = decoders[name]
            start = time.process_time()
            for data in files:
                decode(data)
            best[name] = max(best[name], len(files) / (time.process_time() - start))
    return best


def usable(decode: Decoder, data: bytes) -> bool:
    try:
        decode(data)
    except Exception:  # a library that is missing, or lacks its own libraries
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, measured in the same run")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    from pipeline import audio

    before = load_audio(arguments.before) if arguments.before else None
    versions = {}
    for package in ("numpy", "soundfile", "av", "soxr", "torchcodec"):
        if importlib.util.find_spec(package):
            versions[package] = importlib.metadata.version(package)
    versions["libsndfile"] = soundfile.__libsndfile_version__
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    result: dict[str, Any] = {"versions": versions}
    for name, (form, subtype) in FORMATS.items():
        files = clips(form, subtype, arguments.clips)
        decoders: dict[str, Decoder] = {"this project": audio.decode}
        if before:
            decoders["before"] = before.decode
        decoders |= {"soundfile": soundfile_alone, "PyAV": pyav_alone, "torchcodec": torchcodec_alone}
        decoders = {label: decode for label, decode in decoders.items() if usable(decode, files[0])}
        found = rates(decoders, files, arguments.rounds)
        probed = rates({"probe": audio.probe}, files, arguments.rounds)["probe"]
        others = [f"{label} {rate:.0f} (× {found['this project'] / rate:.2f})" for label, rate in found.items()][1:]
        print(f"{name}: {found['this project']:.0f} utterances/s; {', '.join(others)}; probe {probed:.0f}", flush=True)
        if before and form in ("WAV", "FLAC"):
            assert all(np.array_equal(audio.decode(data), before.decode(data)) for data in files[:8])
        result[name] = {**found, "probe": probed}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
