"""Transcription of audio with the encoder and the trained model of a run.

```
file -> samples -> windows -> encoder of the run's feature spec -> stitched frames -> codec -> projector -> LM -> text
```

Audio is processed exactly as in extraction, including the codec. An encoder whose tensors differ from those of the
feature spec is refused, because the projector was not trained on its features.

    python -m train transcribe runs/demo one.wav two.flac
    ffmpeg -i talk.mp4 -f wav - | python -m train transcribe runs/demo --stream -
    arecord -f S16_LE -r 16000 -t raw | python -m train transcribe runs/demo --raw 16000 -
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import numpy.typing as npt

from pipeline.audio import AudioError, decode, to_mono
from pipeline.encoders.recording import NonFiniteFeaturesError, open_encoder
from shards.errors import UserError
from shards.format import codec
from train.config.model import INSTRUCTION
from train.config.train import TrainConfig
from train.data.live import Features, encode_features, feature_specs, require_one_encoder
from train.data.padding import pad
from train.distributed.device import choose_device, choose_dtype
from train.model.build import load_model
from train.model.prompt import PromptRow
from train.runs.folder import read_cache_info

STDIN = "-"


@dataclass(frozen=True, slots=True)
class Recording:
    """An audio file, or standard input.

    ``name`` is a path, or ``-`` for standard input. ``raw_rate`` is the sampling rate in Hz of headerless 16-bit
    little-endian mono samples; None for an audio file format.
    """

    name: str
    raw_rate: int | None = None

    def samples(self, rate: int) -> npt.NDArray[np.float32]:
        """Read and decode the recording: float32 [samples], mono at ``rate`` Hz.

        Raises:
            AudioError: the data cannot be decoded as audio.
            OSError: the file cannot be read.
        """
        data = sys.stdin.buffer.read() if self.name == STDIN else Path(self.name).read_bytes()
        if self.raw_rate is None:
            return decode(data, rate=rate)
        if len(data) % 2 or not data:
            raise AudioError(f"expected 16-bit samples, got {len(data)} bytes")
        return to_mono(np.frombuffer(data, "<i2").astype(np.float32)[:, None] / 32768, self.raw_rate, rate)


def find_recordings(paths: Sequence[str], raw_rate: int | None = None) -> list[Recording]:
    """Return the recordings at ``paths``; ``-`` is standard input.

    Args:
        raw_rate: sampling rate in Hz of headerless samples on standard input (``--raw``).

    Raises:
        UserError: a file does not exist, ``-`` is given twice, or ``raw_rate`` is out of range or given without ``-``.
    """
    if paths.count(STDIN) > 1:
        raise UserError("standard input is a single recording: pass - once")
    if raw_rate is not None and STDIN not in paths:
        raise UserError("--raw describes samples on standard input: pass - instead of a file")
    if raw_rate is not None and not 1000 <= raw_rate <= 384_000:
        raise UserError(f"--raw is {raw_rate}: expected a sampling rate in Hz from 1000 to 384000, such as 16000")
    for path in paths:
        if path != STDIN and not os.path.isfile(path):  # Path.is_file raises for a name that is too long
            raise UserError(f"the audio file '{path}' does not exist: correct the path")
    return [Recording(path, raw_rate if path == STDIN else None) for path in paths]


def transcribe(
    run: Path,
    config: TrainConfig,
    recordings: Sequence[Recording],
    encoder: str | None = None,
    *,
    instruction: str = "",
    batch_size: int = 8,
    on_token: Callable[[str, str], None] | None = None,
) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each recording that can be read, in the order given; each text is one line.

    Args:
        run: folder of a finished run.
        config: settings of the run.
        encoder: model reference to use instead of the one recorded by the run.
        instruction: text that replaces ``{instruction}`` in the template; "": as in an evaluation of the run.
        batch_size: number of recordings per batch.
        on_token: called with the name and the text so far after every token; recordings are then decoded one at a time.

    Raises:
        UserError: the encoder is not available or has other weights; the template has no place for ``instruction``; or,
            after all other recordings, one could not be read.
    """
    if instruction and not config.prompt.has_instruction:
        raise UserError(
            f"the prompt of '{run}' has no {INSTRUCTION} (prompt.template {config.prompt.template!r}): leave out "
            "--instruction"
        )
    cache_info = read_cache_info(run)
    specs = feature_specs(cache_info)
    require_one_encoder(specs)
    speech_encoder = open_encoder(specs[0], cache_info.get("encoder"), config.device, typed=encoder)
    device = choose_device(config.device)
    model = load_model(run, config, device, choose_dtype(config.dtype, device))
    failures: list[str] = []
    size = batch_size if on_token is None else 1
    for start in range(0, len(recordings), size):
        encoded: list[tuple[str, Features]] = []
        for recording in recordings[start : start + size]:
            try:
                samples = recording.samples(speech_encoder.sampling_rate)
                encoded.append((recording.name, encode_features(samples, speech_encoder, specs)))
            except (AudioError, OSError, NonFiniteFeaturesError, codec.CodecError) as error:
                failures.append(f"'{recording.name}' ({error})")
        if encoded:
            features, mask = pad([frames for _, frames in encoded])
            rows = [PromptRow(name, prompt=instruction) for name, _ in encoded]
            callback = _token_callback(encoded[0][0], on_token)
            texts = model.generate(features, mask, config.max_new_tokens, callback, rows)
            yield from ((name, one_line(text)) for (name, _), text in zip(encoded, texts, strict=True))
    if failures:
        raise UserError(f"could not read {', '.join(failures)}: pass whole recordings in a known audio format")


def _token_callback(name: str, on_token: Callable[[str, str], None] | None) -> Callable[[list[str]], None] | None:
    """Return the ``on_token`` argument of :meth:`AudioLM.generate` for a batch of one."""
    if on_token is None:
        return None
    return lambda texts: on_token(name, one_line(texts[0]))


def one_line(text: str) -> str:
    """Return ``text`` with each run of whitespace replaced by one space, and without leading or trailing whitespace."""
    return " ".join(text.split())


class TokenWriter:
    """Writes the text of a recording while it is decoded: ``name``, a tab, then the text that each token adds."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._name, self._written = out, "", ""

    def __call__(self, name: str, text: str) -> None:
        """Write what is new in ``text``; an incomplete character at its end is held back until the next token."""
        if name != self._name:
            self._out.write(f"{name}\t")
            self._name, self._written = name, ""
        self._write(text.rstrip("\ufffd"))

    def finish(self, name: str, text: str) -> None:
        """Write the rest of the complete ``text`` and end the line."""
        if name != self._name:
            self._out.write(f"{name}\t")
            self._written = ""
        self._write(text)
        self._out.write("\n")
        self._out.flush()
        self._name = ""

    def _write(self, text: str) -> None:
        if text.startswith(self._written) and len(text) > len(self._written):
            self._out.write(text[len(self._written) :])
            self._out.flush()
            self._written = text
