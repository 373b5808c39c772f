"""The decoder layers of a frozen model divided among the processes of a run (FSDP2, ``torch.distributed.fsdp``).

Each process keeps a part of every layer's weights; a pass gathers one layer at a time, also backward. Embeddings, norms
and output matrix stay whole, because they are used outside of passes, too.

All processes must run equally many passes, in the same order. Training steps do (:meth:`Shards.idle_request`); in an
evaluation a process has other batches and decodes other numbers of tokens (:meth:`Shards.passes_together`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shards.errors import UserError
from train.distributed.group import ProcessGroup
from train.lms.base import LmRequest


def can_shard() -> bool:
    """Whether this process is one of several that train a run."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Shards:
    """The division of a model; creating it divides the model and moves it to a device.

    Args:
        model: a transformers model on the CPU.
        decoder: the module below its output matrix.
        embed: maps ids to inputs of ``decoder``.
        device: that of this process.

    Raises:
        UserError: the model has no decoder layers that transformers knows as such.
    """

    def __init__(self, model: Any, decoder: Any, embed: Callable[[Tensor], Tensor], device: torch.device) -> None:
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from transformers.modeling_layers import GradientCheckpointingLayer

        self._decoder, self._embed, self._device = decoder, embed, device
        self._before_pass: Callable[[], object] | None = None
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise UserError(f"lm.shard=true: {type(model).__name__} has no layers to divide: set lm.shard=false")
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
        whole = {parameter for parameter in decoder.parameters() if id(parameter) not in in_layers}
        fully_shard(decoder, mesh=mesh, ignored_params=whole)  # gathers nothing; orders what its layers gather
        model.to(device)
        decoder.register_forward_pre_hook(self._announce, prepend=True)

    def _announce(self, *_: object) -> None:
        if self._before_pass is not None:
            self._before_pass()

    @contextmanager
    def passes_together(self, group: ProcessGroup) -> Iterator[None]:
        """Context manager in which a process may run any number of passes: at its end it joins those of the others.

        Each pass begins with a sum over the processes, in which those that are done add 0.
        """
        # weights gathered in inference mode could not take part in a backward pass later
        with torch.inference_mode(False), torch.no_grad():
            self._before_pass = lambda: group.all_reduce_sum([1.0])
            try:
                yield
            finally:
                self._before_pass = None
            while group.any(False):
                self._decoder(inputs_embeds=self._embed(torch.zeros(1, 1, dtype=torch.int64, device=self._device)))

    def idle_request(self, width: int, dtype: torch.dtype) -> LmRequest:
        """Return a row with which a process without utterances takes part in a training step."""
        soft = torch.zeros(1, 1, width, dtype=dtype, device=self._device, requires_grad=True)
        return LmRequest(soft, torch.ones(1, 1, dtype=torch.bool), [[0]], [[0]], [[0]])
