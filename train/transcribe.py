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
    spec: FeatureSpec = about["spec"]
    ears = open_encoder(spec, encoder or about.get("encoder"), config.device)
    device = choose_device(config.device)
    model = load_model(run, config, device, choose_dtype(config.dtype, device))
    failures: list[str] = []
    for start in range(0, len(paths), batch_size):
        heard: list[tuple[Path, Features]] = []
        for path in paths[start : start + batch_size]:
            try:
                heard.append((path, features_of(decode(path.read_bytes()), ears, spec)))
            except (AudioError, OSError, NotFinite, codec.CodecError) as error:
                failures.append(f"'{path}' ({error})")
        if heard:
            features, mask = pad([frames for _, frames in heard])
            texts = model.generate(features, mask, config.max_new_tokens)
            yield from ((path, text.strip()) for (path, _), text in zip(heard, texts, strict=True))
    if failures:
        raise UserError(f"could not read {', '.join(failures)}: give audio that soundfile can decode")


def features_of(audio: npt.NDArray[np.float32], encoder: Encoder, spec: FeatureSpec) -> Features:
    """float32 [samples] at 16 kHz to the frames [frames, channels] that extraction would have stored and read back."""
    frames = encode_recording(audio, encoder, [spec.layer], overlap=spec.overlap, trim=spec.trim)[spec.layer]
    stored = codec.encode(spec.codec, frames)
    return codec.decode(spec.codec, stored.payload, stored.scale)
