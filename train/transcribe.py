"""Audio files in, text out, through the encoder and the trained model of a run.

```
file -> 16 kHz -> windows -> encoder of the run's feature spec -> stitched frames -> codec -> projector -> LM -> text
```

Audio passes exactly the way it passed in extraction, codec included. An encoder whose tensors are not those of the spec
is refused: its features would be another language to the projector.

    python -m train transcribe runs/demo one.wav two.flac
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.audio import AudioError, decode
from pipeline.encoder import Encoder
from pipeline.frames import NotFinite, encode_recording, open_encoder
from shards import codec
from shards.errors import UserError
from shards.spec import FeatureSpec
from train.config import TrainConfig
from train.data import pad
from train.device import choose_device, choose_dtype
from train.runs import load_model, run_caches

Features = npt.NDArray[Any]


def transcribe(
    run: Path, config: TrainConfig, paths: Sequence[Path], encoder: str | None = None, batch_size: int = 8
) -> Iterator[tuple[Path, str]]:
    """(path, text) of each readable file, in the order given.

    ``encoder`` is a model reference to use instead of the one that the run recorded.

    Raises:
        UserError: a file does not exist (before anything is loaded) or could not be read (after all others are done);
            the encoder cannot be had or is another one.
    """
    for path in paths:
        if not path.is_file():
            raise UserError(f"there is no audio file at '{path}': correct the path")
    about = run_caches(run)
    specs = specs_of(about)
    require_one_encoder(specs)
    ears = open_encoder(specs[0], encoder or about.get("encoder"), config.device)
    device = choose_device(config.device)
    model = load_model(run, config, device, choose_dtype(config.dtype, device))
    failures: list[str] = []
    for start in range(0, len(paths), batch_size):
        heard: list[tuple[Path, Features]] = []
        for path in paths[start : start + batch_size]:
            try:
                heard.append((path, features_of(decode(path.read_bytes()), ears, specs)))
            except (AudioError, OSError, NotFinite, codec.CodecError) as error:
                failures.append(f"'{path}' ({error})")
        if heard:
            features, mask = pad([frames for _, frames in heard])
            texts = model.generate(features, mask, config.max_new_tokens)
            yield from ((path, text.strip()) for (path, _), text in zip(heard, texts, strict=True))
    if failures:
        raise UserError(f"could not read {', '.join(failures)}: give audio that soundfile can decode")


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
