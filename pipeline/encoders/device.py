"""Batches on a GPU without waiting for it: the main thread launches, one thread collects.

```
main thread: pinned input -> [upload] -> [forward pass, codec] -> [download] -> pinned output -> collecting thread
```

Brackets are streams. A slot has the buffers of one batch; three slots keep the streams busy at the same time. The
collecting thread waits for the event that follows the download, copies each window's frames out and frees the slot:
that is the only wait of a batch, and no buffer is used again before it. All layers of a batch cross in one buffer,
encoded by the codec (``device_codec.py``) or as float32.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.encoders.device_codec import NUM_STATS, encode_batch
from shards.format.codec import SCALED, STORED_DTYPE, Encoded

if TYPE_CHECKING:
    import torch

NUM_SLOTS = 3
ALIGNMENT = 256  # bytes; of each part of the output
Array = npt.NDArray[Any]
WindowOutput = Mapping[int, "Array | Encoded"]  # layer -> float32 [frames, channels], or these encoded


class Window(NamedTuple):
    """A clip on its way to the device: its samples at the encoder's rate, and float32 values, perhaps to come."""

    samples: int
    values: Array | Future[Array]

    def result(self) -> Array:
        return self.values.result() if isinstance(self.values, Future) else self.values


@dataclass(frozen=True)
class Batch:
    """Windows to encode in one pass.

    Attributes:
        shape: of the input, [rows, ...]; the rows after the last window are silence.
        fill: writes the windows into the zeroed input, float32.
        forward: input on the device -> layer -> [rows, frames, channels].
        frames: frames of each row of ``forward``.
        counts: frames of each window that are kept.
        channels: features per frame.
        layers: the layers to return.
        codec: see ``shards/format/codec.py``; None: the frames themselves, float32.
    """

    shape: tuple[int, ...]
    fill: Callable[[Array], None]
    forward: Callable[[torch.Tensor], Mapping[int, torch.Tensor]]
    frames: int
    counts: Sequence[int]
    channels: int
    layers: Sequence[int]
    codec: str | None

    def parts(self) -> list[tuple[int, np.dtype[Any], tuple[int, ...]]]:
        """Return offset, dtype and shape of each part of the output: payload, scale and statistics of each layer."""
        rows, end, values = self.shape[0], 0, np.dtype(np.float32)
        parts: list[tuple[int, np.dtype[Any], tuple[int, ...]]] = []
        shapes: list[tuple[np.dtype[Any], tuple[int, ...]]] = []
        shapes += [(STORED_DTYPE[self.codec] if self.codec else values, (rows, self.frames, self.channels))]
        shapes += [(values, (rows, self.channels))] if self.codec in SCALED else []
        shapes += [(values, (rows, NUM_STATS))] if self.codec else []
        for dtype, shape in shapes * len(self.layers):
            parts.append((end, dtype, shape))
            end += -(-dtype.itemsize * int(np.prod(shape)) // ALIGNMENT) * ALIGNMENT
        return parts

    def output_bytes(self) -> int:
        offset, dtype, shape = self.parts()[-1]
        return offset + dtype.itemsize * int(np.prod(shape))


class _Slot:
    """The buffers of one batch, in pinned memory and on the device, and the events between its stages."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        event: Any = torch.cuda.Event
        self.uploaded, self.computed = event(), event()
        self.downloaded = event(blocking=True)  # the waiting thread leaves its core to others
        self._buffers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def buffers(self, name: str, num_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``num_bytes`` uint8 of pinned memory and of the device; they grow when they must."""
        import torch

        if name not in self._buffers or len(self._buffers[name][0]) < num_bytes:
            self._buffers.pop(name, None)
            pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            self._buffers[name] = pinned, torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        pinned, on_device = self._buffers[name]
        return pinned[:num_bytes], on_device[:num_bytes]


class DeviceBatches:
    """Runs batches on ``device``; :meth:`launch` is called from one thread."""

    def __init__(self, device: torch.device, dtype: str) -> None:
        import torch

        self._device, self._dtype = device, dtype
        stream: Any = torch.cuda.Stream
        self._upload, self._compute, self._download = (stream(device) for _ in range(3))
        self._free: SimpleQueue[_Slot] = SimpleQueue()
        for _ in range(NUM_SLOTS):
            self._free.put(_Slot(device))
        self._launched: SimpleQueue[tuple[_Slot, Batch, Future[list[WindowOutput]]]] = SimpleQueue()
        self._collector: threading.Thread | None = None
        self.timed: Callable[[], AbstractContextManager[None]] = nullcontext  # around each wait for the device

    def launch(self, batch: Batch) -> Future[list[WindowOutput]]:
        """Start ``batch``, as soon as a slot is free, and return its windows' outputs to come.

        Raises:
            RuntimeError: memory ran out; nothing of the batch is under way.
        """
        if self._collector is None:
            self._collector = threading.Thread(target=self._collect, name="collect", daemon=True)
            self._collector.start()
        slot = self._free.get()
        try:
            self._start(slot, batch)
        except BaseException:
            _synchronize(self._device)
            self._free.put(slot)
            raise
        future: Future[list[WindowOutput]] = Future()
        self._launched.put((slot, batch, future))
        return future

    def _start(self, slot: _Slot, batch: Batch) -> None:
        import torch

        rows = batch.shape[0]
        values = int(np.prod(batch.shape))
        pinned, on_device = slot.buffers("input", 4 * (values + rows))
        host: Array = pinned.numpy()
        audio = host[: 4 * values].view(np.float32).reshape(batch.shape)
        audio.fill(0.0)
        batch.fill(audio)
        counts = host[4 * values :].view(np.int32)
        counts[:] = [*batch.counts, *[0] * (rows - len(batch.counts))]
        output, device_output = slot.buffers("output", batch.output_bytes())
        with torch.cuda.stream(self._upload):
            on_device.copy_(pinned, non_blocking=True)
            slot.uploaded.record()
        with torch.inference_mode(), torch.cuda.stream(self._compute), real_float32(self._dtype):
            self._compute.wait_event(slot.uploaded)
            inputs = on_device[: 4 * values].view(torch.float32).view(batch.shape)
            hidden = batch.forward(inputs)
            parts = iter(batch.parts())
            for layer in batch.layers:
                frames = hidden[layer].float()
                if batch.codec is None:
                    found = [frames]
                else:
                    valid = on_device[4 * values :].view(torch.int32)
                    found = [each for each in encode_batch(batch.codec, frames, valid) if each is not None]
                for tensor in found:
                    offset, dtype, shape = next(parts)
                    size = dtype.itemsize * int(np.prod(shape))
                    device_output[offset : offset + size].view(tensor.dtype).view(shape).copy_(tensor)
            slot.computed.record()
        with torch.cuda.stream(self._download):
            self._download.wait_event(slot.computed)
            output.copy_(device_output, non_blocking=True)
            slot.downloaded.record()

    def _collect(self) -> None:
        while True:
            slot, batch, future = self._launched.get()
            try:
                with self.timed():
                    slot.downloaded.synchronize()
                found = _outputs(slot.buffers("output", batch.output_bytes())[0].numpy(), batch)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(found)
            self._free.put(slot)


def _outputs(host: Array, batch: Batch) -> list[WindowOutput]:
    """Copy the frames of each window out of the pinned output."""
    views = iter(
        host[offset : offset + dtype.itemsize * int(np.prod(shape))].view(dtype).reshape(shape)
        for offset, dtype, shape in batch.parts()
    )
    outputs: list[dict[int, Array | Encoded]] = [{} for _ in batch.counts]
    for layer in batch.layers:
        payload = next(views)
        scales = next(views) if batch.codec in SCALED else None
        stats = next(views) if batch.codec else None
        for row, count in enumerate(batch.counts):
            frames = payload[row, :count].copy()
            if stats is None:
                outputs[row][layer] = frames
                continue
            peak, gap, norm = map(float, stats[row])
            scale = None if scales is None else scales[row].copy()
            outputs[row][layer] = Encoded(frames, scale, gap / norm if norm else 0.0, peak)
    return [*outputs]


@contextmanager
def real_float32(dtype: str) -> Iterator[None]:
    """Within this context, products and convolutions of a float32 encoder are not rounded to TF32."""
    import torch

    if dtype != "float32":
        yield
        return
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def _synchronize(device: torch.device) -> None:
    import torch

    torch.cuda.synchronize(device)
