"""Extraction on a pretended CUDA device (``tests/device/test_extraction.py``)."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretended_cuda import counts


def extract(device: Any, argv: list[str], room: int | None = None, folder: str = ".") -> dict[str, Any]:
    """Run ``python -m pipeline extract`` with ``argv`` in ``folder``; return its exit status and its waits.

    With ``room``, a pass over more windows than that runs out of memory.
    """
    os.chdir(folder)
    from pipeline.__main__ import command
    from pipeline.encoders.whisper import WhisperEncoder
    from shards.errors import run_command

    warnings.simplefilter("ignore")
    plain, switches = WhisperEncoder._forward, set[tuple[bool, bool]]()

    def forward(self: Any, mel: Any, *args: Any) -> Any:
        switches.add((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        if room is not None and len(mel) > room:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return plain(self, mel, *args)

    WhisperEncoder._forward = forward  # type: ignore[method-assign]
    before = torch.backends.cudnn.allow_tf32
    status = run_command(command, ["extract", *argv])
    return {
        "status": status,
        "waits": counts(device.waits),
        "devices_set": device.devices_set,
        "tf32": sorted(switches),
        "kept": torch.backends.cudnn.allow_tf32 == before,
    }


def codecs(device: Any) -> dict[str, list[Any]]:
    """For each codec, compare a batch encoded on the device with ``shards/format/codec.py``."""
    from pipeline.encoders.device_codec import encode_batch
    from shards.format import codec

    rng = np.random.default_rng(0)
    frames = rng.normal(0, 1, (6, 40, 24)).astype(np.float32)
    frames[:, :, 3] *= 300  # an outlier channel
    frames[1, :, 5], frames[2, :, 6] = 0, -0.0
    frames[3] *= 1e-30
    frames[4] *= 1e-5
    frames[5] = 0
    counts = [40, 17, 1, 40, 33, 5]
    found: dict[str, list[Any]] = {}
    for name in ("f16", "bf16", "int8", "fp8"):
        on_device = torch.from_numpy(frames).to("cuda"), torch.tensor(counts, dtype=torch.int32, device="cuda")
        device.waits.clear()
        payload, scale, stats = encode_batch(name, *on_device)
        waited = len(device.waits)
        stored = payload.view(torch.uint8 if payload.element_size() == 1 else torch.int16).cpu().numpy()
        peaks, gaps, norms = stats.cpu().double().numpy().T
        same, worst = [], 0.0
        for i, count in enumerate(counts):
            wanted = codec.encode(name, frames[i, :count])
            same.append(stored[i, :count].tobytes() == wanted.payload.tobytes())
            same.append(scale is None or scale[i].cpu().numpy().tobytes() == wanted.scale.tobytes())
            same.append(bool(not stored[i, count:].any() and float(np.float32(peaks[i])) == wanted.peak))
            error = gaps[i] / norms[i] if norms[i] else 0.0
            worst = max(worst, abs(error - wanted.error) / (wanted.error or 1.0))
        found[name] = [all(same), bool(worst < 1e-4), waited]
    for bad in (np.nan, np.inf, -np.inf):
        frames[0, 3, 2] = bad
        _, _, stats = encode_batch("f16", torch.from_numpy(frames).to("cuda"), on_device[1])
        found[str(bad)] = np.isfinite(stats[:, 0].cpu().numpy()).tolist()
    return found


def companions(device: Any, model: str, dtype: str) -> list[bool]:
    """Whether a clip has the same bytes alone, at other places and among other clips."""
    from pipeline.encoders.load import load_encoder
    from pipeline.weights.resolve import Weights

    encoder: Any = load_encoder(Weights(Path(model), f"path:{model}", ""), device="cuda", dtype=dtype, batch_size=4)
    rng = np.random.default_rng(3)
    clip, *others = [rng.normal(0, 0.1, 3000 + 777 * i).astype(np.float32) for i in range(6)]

    def stored(clips: list[Any], place: int) -> bytes:
        outputs = encoder.launch([encoder.prepare(each) for each in clips], [1, 2], "valid", "int8").result()
        return b"".join(outputs[place][layer].payload.tobytes() for layer in (1, 2))

    alone = stored([clip], 0)
    return [stored([*before, clip, *others[3 : 6 - len(before)]], len(before)) == alone for before in ([], others[:3])]


def fitted(device: Any, model: str, free: int) -> list[int]:
    """The batch size for 1 and for 3 layers on a card with ``free`` bytes."""
    from pipeline.encoders.load import load_encoder
    from pipeline.weights.resolve import Weights

    torch.cuda.mem_get_info = lambda device=None: (free, free)  # type: ignore[assignment]
    encoder: Any = load_encoder(Weights(Path(model), f"path:{model}", ""), device="cuda", dtype="float32")
    sizes = []
    for layers in (1, 3):
        encoder.fit_batch(layers)
        sizes.append(encoder.batch_size)
    return sizes


def slots(device: Any, model: str) -> list[bool]:
    """Launch four batches while no wait for the device ends: whether the fourth waited, and whether all came out."""
    from pipeline.encoders.load import load_encoder
    from pipeline.weights.resolve import Weights

    encoder: Any = load_encoder(Weights(Path(model), f"path:{model}", ""), device="cuda", dtype="float32", batch_size=1)
    windows, goes_on = [encoder.prepare(np.full(4000, 0.1, np.float32))], threading.Event()

    @contextmanager
    def timed() -> Iterator[None]:
        goes_on.wait(60)
        yield

    encoder.batches.timed = timed
    launched = [encoder.launch(windows, [2], "valid", "f16") for _ in range(3)]
    late = threading.Thread(target=lambda: launched.append(encoder.launch(windows, [2], "valid", "f16")))
    late.start()
    late.join(3)
    waited = late.is_alive()
    goes_on.set()
    late.join(60)
    return [waited, len({each.result()[0][2].payload.tobytes() for each in launched}) == 1, len(launched) == 4]
