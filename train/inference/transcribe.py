"""Audio in, text out, through the encoder and the trained model of a run.

```
file -> 16 kHz -> windows -> encoder of the run's feature spec -> stitched frames -> codec -> projector -> LM -> text
```

Audio passes exactly the way it passed in extraction, codec included. An encoder whose tensors are not those of the spec
is refused: its features would be another language to the projector.

    python -m train transcribe runs/demo one.wav two.flac
    ffmpeg -i talk.mp4 -f wav - | python -m train transcribe runs/demo --stream -
    arecord -f S16_LE -r 16000 -t raw | python -m train transcribe runs/demo --raw 16000 -
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import numpy.typing as npt

from pipeline.audio import AudioError, decode, to_mono_16k
from pipeline.encoders.recording import NonFiniteFeaturesError, open_encoder
from shards.errors import UserError
from shards.format import codec
from train.config.train import TrainConfig
from train.data.caches import pad
from train.data.live import Features, encode_features, feature_specs, require_one_encoder
from train.distributed.device import choose_device, choose_dtype
from train.model.build import load_model
from train.runs.folder import read_cache_info

STDIN = "-"


@dataclass(frozen=True, slots=True)
class Recording:
    """Audio by its name, a path or ``-``; ``raw`` is the rate in Hz of headerless 16-bit little-endian mono samples."""

    name: str
    raw_rate: int | None = None

    def samples(self) -> npt.NDArray[np.float32]:
        """float32 [samples], mono, 16 kHz.

        Raises:
            AudioError: no audio can be decoded from it.
            OSError: it cannot be read.
        """
        data = sys.stdin.buffer.read() if self.name == STDIN else Path(self.name).read_bytes()
        if self.raw_rate is None:
            return decode(data)
        if len(data) % 2 or not data:
            raise AudioError(f"{len(data)} bytes are no 16-bit samples")
        return to_mono_16k(np.frombuffer(data, "<i2").astype(np.float32)[:, None] / 32768, self.raw_rate)


def find_recordings(paths: Sequence[str], raw_rate: int | None = None) -> list[Recording]:
    """The recordings that ``words`` name; ``raw`` is the sampling rate in Hz of the samples on standard input.

    Raises:
        UserError: a file does not exist, ``-`` is given twice, or ``raw`` is out of range or given without ``-``.
    """
    if paths.count(STDIN) > 1:
        raise UserError("standard input is one recording: write - once")
    if raw_rate is not None and STDIN not in paths:
        raise UserError("--raw describes samples on standard input: write - in place of a file")
    if raw_rate is not None and not 1000 <= raw_rate <= 384_000:
        raise UserError(f"--raw is {raw_rate}: give the sampling rate in Hz, such as 16000")
    for word in paths:
        if word != STDIN and not Path(word).is_file():
            raise UserError(f"there is no audio file at '{word}': correct the path")
    return [Recording(word, raw_rate if word == STDIN else None) for word in paths]


def transcribe(
    run: Path,
    config: TrainConfig,
    recordings: Sequence[Recording],
    encoder: str | None = None,
    *,
    batch_size: int = 8,
    on_token: Callable[[str, str], None] | None = None,
) -> Iterator[tuple[str, str]]:
    """(name, text) of each recording that can be read, in the order given; texts are one line.

    Args:
        encoder: a model reference to use instead of the one that the run recorded.
        told: hears name and text so far after every token; recordings then pass one at a time.

    Raises:
        UserError: the encoder cannot be had or is another one; after all others are done: a recording that could not
            be read.
    """
    cache_info = read_cache_info(run)
    specs = feature_specs(cache_info)
    require_one_encoder(specs)
    speech_encoder = open_encoder(specs[0], encoder or cache_info.get("encoder"), config.device)
    device = choose_device(config.device)
    model = load_model(run, config, device, choose_dtype(config.dtype, device))
    failures: list[str] = []
    size = batch_size if on_token is None else 1
    for start in range(0, len(recordings), size):
        encoded: list[tuple[str, Features]] = []
        for recording in recordings[start : start + size]:
            try:
                encoded.append((recording.name, encode_features(recording.samples(), speech_encoder, specs)))
            except (AudioError, OSError, NonFiniteFeaturesError, codec.CodecError) as error:
                failures.append(f"'{recording.name}' ({error})")
        if encoded:
            features, mask = pad([frames for _, frames in encoded])
            texts = model.generate(features, mask, config.max_new_tokens, *_token_callbacks(encoded[0][0], on_token))
            yield from ((name, one_line(text)) for (name, _), text in zip(encoded, texts, strict=True))
    if failures:
        raise UserError(f"could not read {', '.join(failures)}: give audio that soundfile can decode")


def _token_callbacks(name: str, on_token: Callable[[str, str], None] | None) -> list[Callable[[list[str]], None]]:
    """What :meth:`AudioLM.generate` is to call after every token of a batch of one, if anything."""
    if on_token is None:
        return []
    return [lambda texts: on_token(name, one_line(texts[0]))]


def one_line(text: str) -> str:
    """``text`` with every run of white space as one space; what begins a text begins its line."""
    return " ".join(text.split())


class TokenWriter:
    """Writes a recording's text as it grows: ``name``, a tab, then what each token added."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._name, self._written = out, "", ""

    def __call__(self, name: str, text: str) -> None:
        """``text`` so far; an unfinished character at its end (a token may be part of one) waits for the next token."""
        if name != self._name:
            self._out.write(f"{name}\t")
            self._name, self._written = name, ""
        self._write(text.rstrip("\ufffd"))

    def finish(self, name: str, text: str) -> None:
        """``text`` is complete."""
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
