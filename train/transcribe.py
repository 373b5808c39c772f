"""Audio in, text out, through the encoder and the trained model of a run.

```
file -> 16 kHz -> windows -> encoder of the run's feature spec -> stitched frames -> codec -> projector -> LM -> text
```

Audio passes exactly the way it passed in extraction, codec included. An encoder whose tensors are not those of the spec
is refused: its features would be another language to the projector.

    python -m train transcribe runs/demo one.wav two.flac
    ffmpeg -i talk.mp4 -f wav - | python -m train transcribe runs/demo --stream -
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from pipeline.audio import AudioError
from pipeline.encoder import Encoder
from pipeline.frames import NotFinite, encode_recording, open_encoder
from shards import codec
from shards.errors import UserError
from shards.spec import FeatureSpec
from train.config import TrainConfig
from train.data import pad
from train.device import choose_device, choose_dtype
from train.recordings import Recording
from train.runs import load_model, run_caches

Features = npt.NDArray[Any]


def transcribe(
    run: Path,
    config: TrainConfig,
    recordings: Sequence[Recording],
    encoder: str | None = None,
    *,
    batch_size: int = 8,
    told: Callable[[str, str], None] | None = None,
) -> Iterator[tuple[str, str]]:
    """(name, text) of each recording that can be read, in the order given; texts are one line.

    Args:
        encoder: a model reference to use instead of the one that the run recorded.
        told: hears name and text so far after every token; recordings then pass one at a time.

    Raises:
        UserError: the encoder cannot be had or is another one; after all others are done: a recording that could not
            be read.
    """
    about = run_caches(run)
    specs = specs_of(about)
    require_one_encoder(specs)
    ears = open_encoder(specs[0], encoder or about.get("encoder"), config.device)
    device = choose_device(config.device)
    model = load_model(run, config, device, choose_dtype(config.dtype, device))
    failures: list[str] = []
    size = batch_size if told is None else 1
    for start in range(0, len(recordings), size):
        heard: list[tuple[str, Features]] = []
        for recording in recordings[start : start + size]:
            try:
                heard.append((recording.name, features_of(recording.samples(), ears, specs)))
            except (AudioError, OSError, NotFinite, codec.CodecError) as error:
                failures.append(f"'{recording.name}' ({error})")
        if heard:
            features, mask = pad([frames for _, frames in heard])
            texts = model.generate(features, mask, config.max_new_tokens, *_listeners(heard[0][0], told))
            yield from ((name, one_line(text)) for (name, _), text in zip(heard, texts, strict=True))
    if failures:
        raise UserError(f"could not read {', '.join(failures)}: give audio that soundfile can decode")


def _listeners(name: str, told: Callable[[str, str], None] | None) -> list[Callable[[list[str]], None]]:
    """What :meth:`AudioLM.generate` is to call after every token of a batch of one, if anything."""
    if told is None:
        return []
    return [lambda texts: told(name, one_line(texts[0]))]


def one_line(text: str) -> str:
    """``text`` with every run of white space as one space; what begins a text begins its line."""
    return " ".join(text.split())


class Typist:
    """Writes a recording's text as it grows: ``name``, a tab, then what each token added."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._name, self._written = out, "", ""

    def __call__(self, name: str, text: str) -> None:
        """``text`` so far; an unfinished character at its end (a token may be part of one) waits for the next token."""
        if name != self._name:
            self._out.write(f"{name}\t")
            self._name, self._written = name, ""
        self._write(text.rstrip("\ufffd"))

    def end(self, name: str, text: str) -> None:
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


def specs_of(about: dict[str, Any]) -> list[FeatureSpec]:
    """The features that a run hears, one spec a layer; ``about`` is its ``caches.json``."""
    return [FeatureSpec.parse(each, "caches.json") for each in about.get("layers", [])] or [about["spec"]]


def require_one_encoder(specs: Sequence[FeatureSpec]) -> None:
    """UserError unless ``specs`` are of layers of one encoder, which one pass of it gives."""
    for other in specs:
        same = other.model_copy(update={"layer": specs[0].layer, "codec": specs[0].codec})
        if same != specs[0]:
            raise UserError(
                f"the run hears several encoders ({'; '.join(same.differences(specs[0]))}) and one pass of one encoder "
                "is all there is for audio: extract features of it and use python -m train evaluate --cache"
            )


def features_of(audio: npt.NDArray[np.float32], encoder: Encoder, specs: Sequence[FeatureSpec]) -> Features:
    """float32 [samples] at 16 kHz to the frames that extraction would have stored and read back, by one encoder pass.

    [frames, channels] of one spec, [frames, layers · channels] of several.
    """
    spec = specs[0]
    frames = encode_recording(audio, encoder, [each.layer for each in specs], overlap=spec.overlap, trim=spec.trim)
    parts = []
    for each in specs:
        stored = codec.encode(each.codec, frames[each.layer])
        parts.append(codec.decode(each.codec, stored.payload, stored.scale))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
