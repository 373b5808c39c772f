"""This rank's batches of a run: a ``FeatureStream`` over its caches, with the channels of all its layers.

In: settings and opened data. Out: what a training loop iterates and a checkpoint remembers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from shards.batch import Batch
from shards.stream import FeatureStream
from train.config import TrainConfig
from train.data import Data
from train.device import choose_device
from train.distributed import Group
from train.layers import Layers

AHEAD = 2  # batches whose further layers are read while the loop works


class LayeredStream:
    """A ``FeatureStream`` over the first caches whose batches carry all layers; iterate it once.

    A thread reads the further layers ahead. The state is that of the last batch taken.
    """

    def __init__(self, stream: FeatureStream, layers: Layers) -> None:
        self.stream, self.layers = stream, layers
        self._state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """As ``FeatureStream.state_dict``."""
        return self.stream.state_dict() if self._state is None else self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As ``FeatureStream.load_state_dict``."""
        self.stream.load_state_dict(state)
        self._state = None

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.stream)
        executor = ThreadPoolExecutor(1, thread_name_prefix="earshard-layers")

        def read() -> Batch | None:
            batch = next(batches, None)
            return None if batch is None else self.layers.widen(batch)

        waiting: deque[Future[Batch | None]] = deque(executor.submit(read) for _ in range(AHEAD))
        try:
            while (batch := waiting.popleft().result()) is not None:
                waiting.append(executor.submit(read))
                self._state = batch.state
                yield batch
        finally:
            executor.shutdown(wait=True, cancel_futures=True)  # first: a generator cannot end while it runs
            batches.close()  # type: ignore[attr-defined]


Stream = FeatureStream | LayeredStream


def open_stream(config: TrainConfig, data: Data, group: Group) -> Stream:
    """This rank's batches of a run, with all layers of it."""
    stream = FeatureStream(
        data.caches,
        config.batch.rules(),
        config.order_seed,
        rows=data.train_rows,
        rank=group.rank,
        world=group.world,
        pinned=data.layers is None and choose_device(config.device).type == "cuda",
    )
    return stream if data.layers is None else LayeredStream(stream, data.layers)
