"""Recordings of a few hundred milliseconds, and a LibriSpeech tree of them, for tests of sources."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from pipeline.audio import encode_wav


def flac(samples: int = 1600, seed: int = 0) -> bytes:
    """Return seeded noise at 16 kHz as FLAC."""
    file = io.BytesIO()
    noise = np.random.RandomState(seed).uniform(-0.3, 0.3, samples)
    soundfile.write(file, noise, 16_000, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def wav(samples: int = 1600, seed: int = 0, channels: int = 1) -> bytes:
    shape = samples if channels == 1 else (samples, channels)
    return encode_wav((np.random.RandomState(seed).uniform(-0.3, 0.3, shape) * 32767).astype(np.int16), 16_000)


def librispeech_files(splits: Sequence[str] = ("dev-clean", "train-clean-100")) -> dict[str, bytes]:
    """Return ``{path below LibriSpeech: content}``: 2 splits × 3 speakers × 2 chapters × 2 utterances."""
    files: dict[str, bytes] = {"README.TXT": b"a file beside the splits"}
    for number, split in enumerate(splits):
        for speaker in (10 * number + 1, 10 * number + 2, 10 * number + 3):
            for chapter in (100, 200):
                stem = f"{speaker}-{chapter}"
                lines = []
                for index in range(2):
                    files[f"{split}/{speaker}/{chapter}/{stem}-{index:04d}.flac"] = flac(
                        1600 + speaker + index, speaker
                    )
                    lines.append(f"{stem}-{index:04d} TEXT OF {speaker} {chapter} {index}\n")
                files[f"{split}/{speaker}/{chapter}/{stem}.trans.txt"] = "".join(lines).encode()
    return files


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
    """Write ``path`` (.tar.gz) with the files below ``LibriSpeech/``, in the given order."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"LibriSpeech/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path
