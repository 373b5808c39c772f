"""Windows on their way through the encoder: they wait until a batch is full, then their outputs are to come.

On a CPU, and by an encoder of the user's own, a batch is encoded at once, by the calling thread. On a GPU it is
launched, and the calling thread goes on. A Whisper's batches have one shape per context, so that the features of a
window do not depend on its companions: windows of several shards share a batch, and silence fills the last ones.
Encoders without padding batch windows of equal length; there the shape depends on how many there are, so their batches
end with the shard.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from pipeline.encoders.base import DeviceEncoder, Encoder
from pipeline.encoders.batching import check_encoder, encode_in_batches, halve_batch_size, is_out_of_memory
from pipeline.profile import StageTimes

if TYPE_CHECKING:
    from pipeline.encoders.device import Window, WindowOutput

MAX_WAITING = 8  # batches of windows that wait for companions on a GPU
Clip = npt.NDArray[np.float32]


class BatchSizeReducedError(Exception):
    """Memory ran out: the batch size is smaller now, and what is under way must be encoded again with it."""


class WindowBatches(Protocol):
    """What the extraction of a shard requires.

    Attributes:
        max_waiting: windows that may wait at a time.
    """

    max_waiting: int

    def add(self, shard: int, clips: Sequence[Clip], layers: Sequence[int]) -> list[Future[WindowOutput]]:
        """Add the windows of an utterance of ``shard``; return what each will be.

        Raises:
            BatchSizeReducedError: also by :meth:`end_shard` and :meth:`flush`.
        """
        ...

    def end_shard(self) -> None:
        """Note that the windows of a shard are complete."""

    def flush(self, shard: int) -> None:
        """Encode every window of ``shard``, or with batches that do it."""

    def cancel(self) -> None:
        """Drop the windows that wait; their futures are cancelled."""


def open_batches(encoder: Encoder, trim: str, codec: str, stage_times: StageTimes) -> WindowBatches:
    """Return the batches of a loaded ``encoder``."""
    if hasattr(encoder, "launch") and encoder.device.startswith("cuda"):
        return _DeviceBatches(cast(DeviceEncoder, encoder), trim, codec, stage_times)
    return _HostBatches(encoder, trim, stage_times)


class _HostBatches:
    """Encodes multiples of the encoder's batch size, in the calling thread."""

    def __init__(self, encoder: Encoder, trim: str, stage_times: StageTimes) -> None:
        self._encoder, self._trim, self._stage_times = encoder, trim, stage_times
        self._waiting: list[tuple[Clip, Future[WindowOutput]]] = []
        self._layers: Sequence[int] = ()
        self.max_waiting = encoder.batch_size

    def add(self, shard: int, clips: Sequence[Clip], layers: Sequence[int]) -> list[Future[WindowOutput]]:
        self._layers = layers
        added = [(clip, Future[Any]()) for clip in clips]
        self._waiting += added
        size = self._encoder.batch_size
        self._encode(len(self._waiting) // size * size)
        return [future for _, future in added]

    def end_shard(self) -> None:
        self._encode(len(self._waiting))

    def flush(self, shard: int) -> None:
        self._encode(len(self._waiting))

    def cancel(self) -> None:
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()

    def _encode(self, count: int) -> None:
        if not count:
            return
        with self._stage_times.timed("encode"):
            clips = [clip for clip, _ in self._waiting[:count]]
            outputs = encode_in_batches(self._encoder, clips, self._layers, self._trim)
        for (_, future), output in zip(self._waiting[:count], outputs, strict=True):
            future.set_result(output)
        del self._waiting[:count]


@dataclass(frozen=True)
class _Waiting:
    shard: int
    window: Window
    future: Future[WindowOutput] = field(default_factory=Future)


Group = tuple[int, tuple[int, ...], str | None]  # the encoder's group, layers, codec


class _DeviceBatches:
    """Launches a batch as soon as it is full."""

    def __init__(self, encoder: DeviceEncoder, trim: str, codec: str, stage_times: StageTimes) -> None:
        self._encoder, self._trim, self._codec, self._stage_times = encoder, trim, codec, stage_times
        self._groups: defaultdict[Group, list[_Waiting]] = defaultdict(list)
        self._across_shards = encoder.window != "clip"
        self.max_waiting = MAX_WAITING * encoder.batch_size
        encoder.batches.timed = partial(stage_times.timed, "encode")

    def add(self, shard: int, clips: Sequence[Clip], layers: Sequence[int]) -> list[Future[WindowOutput]]:
        check_encoder(self._encoder, clips)
        codec = self._codec if len(clips) == 1 else None  # scales and errors are those of the joined windows
        futures = []
        for clip in clips:
            waiting = _Waiting(shard, self._encoder.prepare(clip))
            futures.append(waiting.future)
            group = (self._encoder.group(len(clip)), tuple(layers), codec)
            self._groups[group].append(waiting)
            if len(self._groups[group]) >= self._encoder.batch_size:
                self._launch(group)
        while sum(map(len, self._groups.values())) > self.max_waiting:
            if self._across_shards:
                self._launch(next(iter(self._groups)))
            else:  # which batches there are must depend on the shard alone
                self.end_shard()
        return futures

    def end_shard(self) -> None:
        if not self._across_shards:
            for group in list(self._groups):
                self._launch(group)

    def flush(self, shard: int) -> None:
        for group in [group for group, all_ in self._groups.items() if any(each.shard == shard for each in all_)]:
            self._launch(group)

    def cancel(self) -> None:
        for waiting in self._groups.values():
            for each in waiting:
                each.future.cancel()
        self._groups.clear()

    def _launch(self, group: Group) -> None:
        _, layers, codec = group
        waiting = self._groups.pop(group)
        try:
            with self._stage_times.timed("launch"):
                batch = self._encoder.launch([each.window for each in waiting], layers, self._trim, codec)
        except (RuntimeError, MemoryError) as error:
            self._groups[group] = waiting
            if not is_out_of_memory(error):
                raise
        else:
            batch.add_done_callback(partial(_distribute, waiting))
            return
        before = self._encoder.batch_size if self._across_shards else len(waiting)
        halve_batch_size(self._encoder, before)
        tqdm.write("note: the shards under way are encoded again with this size", file=sys.stderr)
        raise BatchSizeReducedError


def _distribute(waiting: Sequence[_Waiting], batch: Future[list[WindowOutput]]) -> None:
    error = batch.exception()
    for number, each in enumerate(waiting):
        if error is not None:
            each.future.set_exception(error)
        else:
            each.future.set_result(batch.result()[number])
