"""What a transcription listens to: audio files, or one recording on standard input.

In: words of a command line, paths or ``-``. Out: :class:`Recording` objects, which read and decode when they are asked.

    arecord -f S16_LE -r 16000 -t raw | python -m train transcribe runs/demo --raw 16000 -
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.audio import AudioError, decode, to_mono_16k
from shards.errors import UserError

STDIN = "-"


@dataclass(frozen=True, slots=True)
class Recording:
    """Audio by its name, a path or ``-``; ``raw`` is the rate in Hz of headerless 16-bit little-endian mono samples."""

    name: str
    raw: int | None = None

    def samples(self) -> npt.NDArray[np.float32]:
        """float32 [samples], mono, 16 kHz.

        Raises:
            AudioError: no audio can be decoded from it.
            OSError: it cannot be read.
        """
        data = sys.stdin.buffer.read() if self.name == STDIN else Path(self.name).read_bytes()
        if self.raw is None:
            return decode(data)
        if len(data) % 2 or not data:
            raise AudioError(f"{len(data)} bytes are no 16-bit samples")
        return to_mono_16k(np.frombuffer(data, "<i2").astype(np.float32)[:, None] / 32768, self.raw)


def find_recordings(words: Sequence[str], raw: int | None = None) -> list[Recording]:
    """The recordings that ``words`` name; ``raw`` is of what comes on standard input.

    Raises:
        UserError: a file does not exist, ``-`` stands twice, or ``raw`` is no rate or has no ``-`` to be of.
    """
    if words.count(STDIN) > 1:
        raise UserError("standard input is one recording: write - once")
    if raw is not None and STDIN not in words:
        raise UserError("--raw is of samples on standard input: write - where the recording belongs")
    if raw is not None and not 1000 <= raw <= 384_000:
        raise UserError(f"--raw is {raw}: give the sampling rate in Hz, such as 16000")
    for word in words:
        if word != STDIN and not Path(word).is_file():
            raise UserError(f"there is no audio file at '{word}': correct the path")
    return [Recording(word, raw if word == STDIN else None) for word in words]
