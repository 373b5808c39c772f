"""Several processes that train one run: who is who, what they add up, how they end together.

In: a launcher's environment (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``, ``MASTER_PORT``), or none of
it. Out: a :class:`Group`; without a launcher it is a group of one and every operation returns what it was given, so the
training loop has one text for both. Importing this loads no torch.

Gradients are summed on the run's device (NCCL on GPUs, gloo on CPUs). All else is a few numbers or JSON between CPUs
over a gloo group of its own, which may wait as long as an evaluation or a checkpoint takes: nothing but the end of a
process (``train/distributed/liveness.py``) ends that wait.

    torchrun --nproc-per-node 4 -m train fit --config configs/train/demo.yaml
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from shards.errors import UserError, WorkFailed
from train.distributed.liveness import LivenessMonitor

if TYPE_CHECKING:
    import torch

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_RENDEZVOUS_TIMEOUT = timedelta(minutes=10)  # for all processes to come up, and for a sum of gradients
_CONTROL_TIMEOUT = timedelta(days=30)  # for the slowest rank, whatever it does
_SHUTDOWN_TIMEOUT = 60.0  # seconds that the others leave rank 0 to save and tell: a launcher ends all when one has left


class RankLost(WorkFailed):
    """Another process of the run ended before the run did."""


class ProcessGroup:
    """The processes of a run; this class is a group of one."""

    rank, world_size = 0, 1

    @property
    def is_main_process(self) -> bool:
        """Rank 0 alone writes and speaks."""
        return self.rank == 0

    def local_device(self, name: str) -> str:
        """The ``device`` key of a run as this process's own device."""
        return name

    def all_gather(self, tree: Any) -> list[Any]:
        """The value of each rank, in order of rank; ``tree`` is any value that pickle can hold."""
        return [tree]

    def broadcast(self, tree: Any) -> Any:
        """What rank 0 gave."""
        return self.all_gather(tree if self.is_main_process else None)[0]

    def broadcast_tensors(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Rank 0's tensors, on the CPU where there are other ranks; what those gave is ignored."""
        return tensors

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks, in float64; every rank gives as many values and gets the same sums."""
        return list(values)

    def any(self, flag: bool) -> bool:
        """Whether any rank gave True."""
        return self.all_reduce_sum([float(flag)])[0] > 0

    def all_reduce_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace each ``grad`` by its sum over the ranks; it stays None where no rank has one."""

    def raise_if_rank_lost(self) -> None:
        """Raises RankLost when a rank is known to be gone."""

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Leave the block on every rank or on none: what one rank raises in it, all raise after it.

        For UserError and WorkFailed, in blocks without collective operations.
        """
        yield

    def assert_same(self, values: Mapping[str, Any]) -> None:
        """UserError, on every rank, unless all ranks give equal facts."""

    def abort(self, error: Exception, exit_status: int) -> NoReturn:
        """End all ranks by ``error``, which every rank has: rank 0 raises it, the others exit with ``status``."""
        raise error


class DistributedProcessGroup(ProcessGroup):
    """One process of a launcher's; built by :func:`join`."""

    def __init__(self) -> None:
        import torch
        import torch.distributed as dist

        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, rank=self.rank, world_size=self.world_size, timeout=_RENDEZVOUS_TIMEOUT)
            self._control = dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT)
        except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"rank {self.rank} of {self.world_size} did not meet the others at {where} ({reason}): start all "
                "processes with the same address and port, by torchrun"
            ) from None
        self._liveness_monitor: LivenessMonitor | None = None
        self._liveness_monitor = LivenessMonitor(self.rank, self.broadcast, self._rank_lost_message)
        unreachable = [
            str(rank) for rank, hears in enumerate(self.all_gather(self._liveness_monitor.connected)) if not hears
        ]
        if unreachable and self.is_main_process:
            print(
                f"warning: rank {', '.join(unreachable)} of {self.world_size} cannot reach rank 0: a process that dies "
                "may be noticed late; open the ports between the machines",
                file=sys.stderr,
            )

    def local_device(self, name: str) -> str:
        import torch

        kind, _, index = name.partition(":")
        if kind not in ("auto", "cuda") or not torch.cuda.is_available():
            return name
        if index and self.world_size > 1:
            raise UserError(f"device={name} names one GPU for {self.world_size} processes: set device=auto")
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise UserError(
                f"process {self.local_rank} of this machine finds {count} GPUs: start one process a GPU by "
                f"--nproc-per-node {count}, or set device=cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    def all_gather(self, tree: Any) -> list[Any]:
        import torch.distributed as dist

        parts: list[Any] = [None] * self.world_size
        with self._rank_loss_detected():
            dist.all_gather_object(parts, tree, group=self._control)
        return parts

    def broadcast_tensors(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        import torch
        import torch.distributed as dist

        shapes = self.broadcast({name: [list(t.shape), str(t.dtype)] for name, t in tensors.items()})
        received = {}
        for name, (shape, dtype) in shapes.items():
            if self.is_main_process:
                tensor = tensors[name].detach().cpu().contiguous()
            else:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
            with self._rank_loss_detected():
                dist.broadcast(tensor, 0, group=self._control)
            received[name] = tensor
        return received

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        import torch
        import torch.distributed as dist

        sums = torch.tensor(values, dtype=torch.float64)
        with self._rank_loss_detected():
            dist.all_reduce(sums, group=self._control)
        return sums.tolist()

    def all_reduce_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """One all-reduce of one flat buffer: the gradients, and one number a parameter that says who has one."""
        import torch
        import torch.distributed as dist

        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        has = torch.tensor([float(p.grad is not None) for p in parameters], device=parts[0].device)
        flat = torch.cat([*(part.flatten() for part in parts), has])
        with self._rank_loss_detected():
            dist.all_reduce(flat)
            *sums, has = torch.split(flat, [*(p.numel() for p in parameters), len(parameters)])
            anywhere = (has > 0).tolist()
        for parameter, gradient, exists in zip(parameters, sums, anywhere, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if exists else None

    def raise_if_rank_lost(self) -> None:
        if self._liveness_monitor is not None and self._liveness_monitor.lost is not None:
            self._raise_rank_lost(self._liveness_monitor.lost)

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        failed: UserError | WorkFailed | None = None
        try:
            yield
        except (UserError, WorkFailed) as error:
            failed = error
        local_failure = None if failed is None else ["user" if isinstance(failed, UserError) else "work", str(failed)]
        failures = [(rank, *found) for rank, found in enumerate(self.all_gather(local_failure)) if found is not None]
        if failures:
            rank, kind, text = failures[0]
            whose = "" if rank == 0 else f"rank {rank}: "
            failure, status = (UserError, 2) if kind == "user" else (WorkFailed, 1)
            self.abort(failure(f"{whose}{text}"), status)

    def assert_same(self, values: Mapping[str, Any]) -> None:
        first, *others = self.all_gather(dict(values))
        for rank, theirs in enumerate(others, 1):
            for name in sorted(first.keys() | theirs.keys()):
                if first.get(name) != theirs.get(name):
                    error = UserError(
                        f"rank {rank} has another {name} than rank 0 ({theirs.get(name)}, not {first.get(name)}): "
                        "start every process with the same command, caches and hardware"
                    )
                    self.abort(error, 2)

    def abort(self, error: Exception, exit_status: int) -> NoReturn:
        if self.is_main_process:
            raise error
        if self._liveness_monitor is not None:
            self._liveness_monitor.wait_for_rank_0(_SHUTDOWN_TIMEOUT)
        raise SystemExit(exit_status)

    def shut_down(self) -> None:
        """After a run that ended well."""
        import torch.distributed as dist

        if self._liveness_monitor is not None:
            self._liveness_monitor.close()
        dist.destroy_process_group()

    @contextmanager
    def _rank_loss_detected(self) -> Iterator[None]:
        """A collective that breaks becomes the loss of the rank that broke it."""
        try:
            yield
        except RuntimeError as error:
            lost = None if self._liveness_monitor is None else self._liveness_monitor.wait_for_loss(2.0)
            if lost is None:
                reason = " ".join(str(error).split())[:200]
                raise RankLost(f"rank {self.rank} of {self.world_size} lost the others ({reason})") from None
            self._raise_rank_lost(lost)

    def _raise_rank_lost(self, rank: int) -> NoReturn:
        if self._liveness_monitor is not None:
            self._liveness_monitor.leave_exit_to_main_thread()
        # Nobody waits here: rank 0 may stand in a collective that only the end of this process breaks.
        sentence = self._rank_lost_message(rank)
        if sentence:
            raise RankLost(sentence)
        raise SystemExit(1)

    def _rank_lost_message(self, lost: int) -> str:
        """One process speaks: rank 0, or, when it is the one that is gone, one of each machine that is left."""
        speaks = self.is_main_process or (lost == 0 and (self.rank == 1 or self.local_rank == 0))
        return f"rank {lost} of {self.world_size} ended before the run did" if speaks else ""


@contextmanager
def open_process_group() -> Iterator[ProcessGroup]:
    """The group of this process: a launcher's, or of one.

    Raises:
        UserError: the launcher's processes did not meet.
    """
    if not all(name in os.environ for name in _LAUNCHER_VARIABLES):
        yield ProcessGroup()
        return
    group = DistributedProcessGroup()
    yield group
    group.shut_down()
