"""The group of processes that train one run: ranks, collective operations, and a common exit.

:func:`open_process_group` reads the environment of a launcher (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``,
``MASTER_ADDR``, ``MASTER_PORT``). Without a launcher it yields a group of one process, in which every operation returns
its argument, so that the training loop needs no special case. Importing this module does not import torch.

Gradients are summed on the run's device (NCCL on GPUs, gloo on CPUs). Everything else is a few numbers or JSON,
exchanged between CPUs over a separate gloo group. Its operations may wait as long as an evaluation or a checkpoint
takes; only the exit of a process (``train/distributed/liveness.py``) ends the wait. An operation of NCCL does not end
with a process that it waits for: it is aborted, and its step changes no weight (:meth:`_abort_nccl`).

    torchrun --nproc-per-node 4 -m train fit --config configs/train/demo.yaml
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from shards.errors import UserError, WorkFailed
from train.distributed.liveness import LivenessMonitor

if TYPE_CHECKING:
    import torch

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_RENDEZVOUS_TIMEOUT = timedelta(minutes=10)  # for all processes to start, and for an all-reduce of gradients
_CONTROL_TIMEOUT = timedelta(days=30)  # ranks wait for the slowest one, which may be evaluating
# Seconds that the other ranks wait for rank 0 to save and report: a launcher kills all processes when one exits.
_SHUTDOWN_TIMEOUT = 60.0


class RankLost(WorkFailed):
    """Another process of the run exited before the run finished."""


class ProcessGroup:
    """The processes of a run; this base class is a group of one process."""

    rank, world_size = 0, 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, the only rank that writes files and prints."""
        return self.rank == 0

    def local_device(self, name: str) -> str:
        """Return the device of this process for the ``device`` key of a run."""
        return name

    def all_gather(self, tree: Any) -> list[Any]:
        """Return the ``tree`` of each rank, in rank order. ``tree`` must be picklable."""
        return [tree]

    def broadcast(self, tree: Any) -> Any:
        """Return the ``tree`` of rank 0."""
        return self.all_gather(tree if self.is_main_process else None)[0]

    def broadcast_tensors(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Return the tensors of rank 0, on the CPU if there are other ranks; the arguments of those are ignored."""
        return tensors

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Sum over the ranks in float64; every rank passes the same number of values and gets the same sums."""
        return list(values)

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is True on any rank."""
        return self.all_reduce_sum([float(flag)])[0] > 0

    def all_reduce_gradients(self, parameters: Sequence[torch.nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
        """Replace each ``grad`` by its sum over the ranks; it stays None if no rank has one.

        Returns:
            The sum of the scalar ``loss`` over the ranks, in the dtype of the gradients if there are several.
        """
        return loss

    def raise_if_rank_lost(self) -> None:
        """Raise RankLost if a rank is known to have exited."""

    @contextmanager
    def rank_loss_explains_errors(self) -> Iterator[None]:
        """Context manager that turns a RuntimeError into RankLost if a rank has exited.

        For code in which collective operations of torch itself may fail.
        """
        yield

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Context manager after which all ranks raise the UserError or WorkFailed that any rank raised inside.

        The block must not contain collective operations.
        """
        yield

    def assert_same(self, values: Mapping[str, Any]) -> None:
        """Raise UserError on every rank unless all ranks pass equal ``values``."""

    def abort(self, error: Exception, exit_status: int) -> NoReturn:
        """End all ranks, which all must call this: rank 0 raises ``error``, the others exit with ``exit_status``."""
        raise error


class DistributedProcessGroup(ProcessGroup):
    """One of several processes started by a launcher; created by :func:`open_process_group`."""

    def __init__(self) -> None:
        import torch
        import torch.distributed as dist

        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # otherwise torch ends this process when another is lost, before rank 0 has saved
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        self._spoil: torch.Tensor | None = None  # on a GPU: added to each sum of gradients, 0 until a rank is lost
        self._abort_lock, self._aborted = threading.Lock(), False
        try:
            dist.init_process_group(backend, rank=self.rank, world_size=self.world_size, timeout=_RENDEZVOUS_TIMEOUT)
            self._control = dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT)
        except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"rank {self.rank} of {self.world_size} could not connect to the other ranks at {address} ({reason}): "
                "start all processes with torchrun and the same address and port"
            ) from None
        self._liveness_monitor: LivenessMonitor | None = None
        self._liveness_monitor = LivenessMonitor(
            self.rank, self.broadcast, self._rank_lost_message, on_loss=self._abort_nccl
        )
        self._handler_before = signal.signal(signal.SIGTERM, self._handle_sigterm)
        unreachable = [
            str(rank)
            for rank, connected in enumerate(self.all_gather(self._liveness_monitor.connected))
            if not connected
        ]
        if unreachable and self.is_main_process:
            print(
                f"warning: rank {', '.join(unreachable)} of {self.world_size} cannot connect to rank 0: the loss of a "
                "process may be detected late; open the ports between the machines",
                file=sys.stderr,
            )

    def local_device(self, name: str) -> str:
        import torch

        kind, _, index = name.partition(":")
        if kind not in ("auto", "cuda") or not torch.cuda.is_available():
            return name
        if index and self.world_size > 1:
            raise UserError(f"device={name} assigns one GPU to {self.world_size} processes: set device=auto")
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise UserError(
                f"local rank {self.local_rank} has no GPU, this machine has {count}: start one process per GPU with "
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

    def all_reduce_gradients(self, parameters: Sequence[torch.nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
        """All-reduce one flat buffer of the gradients and the loss; the host does not wait for a GPU."""
        import torch
        import torch.distributed as dist

        anywhere = self.all_reduce_sum([float(p.grad is not None) for p in parameters])
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(part.flatten() for part in parts), loss.to(parts[0].dtype)[None]])
        if flat.is_cuda and self._spoil is None:
            self._spoil = torch.zeros((), dtype=flat.dtype, device=flat.device)
        with self._rank_loss_detected():
            dist.all_reduce(flat)
        *sums, loss = torch.split(flat, [*(p.numel() for p in parameters), 1])
        for parameter, gradient, ranks in zip(parameters, sums, anywhere, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if ranks else None
        return loss[0] if self._spoil is None else loss[0] + self._spoil

    def raise_if_rank_lost(self) -> None:
        if self._liveness_monitor is not None and self._liveness_monitor.lost is not None:
            self._raise_rank_lost(self._liveness_monitor.lost)

    @contextmanager
    def rank_loss_explains_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            lost = None if self._liveness_monitor is None else self._liveness_monitor.wait_for_loss(2.0)
            if lost is None:
                raise
            self._raise_rank_lost(lost)

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
            prefix = "" if rank == 0 else f"rank {rank}: "
            failure, status = (UserError, 2) if kind == "user" else (WorkFailed, 1)
            self.abort(failure(f"{prefix}{text}"), status)

    def assert_same(self, values: Mapping[str, Any]) -> None:
        first, *others = self.all_gather(dict(values))
        for rank, other in enumerate(others, 1):
            for name in sorted(first.keys() | other.keys()):
                if first.get(name) != other.get(name):
                    error = UserError(
                        f"rank {rank} differs from rank 0 in {name} (expected {first.get(name)}, "
                        f"got {other.get(name)}): start every process with the same command, caches and hardware"
                    )
                    self.abort(error, 2)

    def abort(self, error: Exception, exit_status: int) -> NoReturn:
        if self.is_main_process:
            raise error
        if self._liveness_monitor is not None:
            self._liveness_monitor.wait_for_rank_0(_SHUTDOWN_TIMEOUT)
        raise SystemExit(exit_status)

    def _abort_nccl(self) -> None:
        """End the operation of NCCL that waits for a lost rank; the sum that it leaves has a loss that is not a number.

        The host launches a step and does not wait for its sum, so an update is queued behind the operation. It checks
        the loss on the GPU. May be called from any thread: the main thread may be waiting for the GPU.
        """
        import torch
        import torch.distributed as dist

        with self._abort_lock:
            if self._spoil is None or self._aborted:  # no GPU, no step so far, or done
                return
            self._aborted = True
            with torch.cuda.device(self._spoil.device):
                other = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # the operation blocks the current one
                with torch.cuda.stream(other):
                    self._spoil.fill_(float("nan"))
                other.synchronize()
            assert dist.group.WORLD is not None
            dist.group.WORLD._get_backend(self._spoil.device).abort()

    def shut_down(self) -> None:
        """Close the group after a run that finished normally."""
        import torch.distributed as dist

        if self._liveness_monitor is not None:
            self._liveness_monitor.close()
        signal.signal(signal.SIGTERM, self._handler_before)
        dist.destroy_process_group()

    def _handle_sigterm(self, number: int, frame: FrameType | None) -> None:
        """Ignore the SIGTERM with which a launcher ends the other ranks of a lost one; any other ends this process.

        The loss ends it with a sentence, which this signal would otherwise prevent at any moment up to its printing.
        """
        deadline = time.monotonic() + 2.0
        while self._liveness_monitor is not None and time.monotonic() < deadline:
            if self._liveness_monitor.lost is not None:  # not its event: the handler may have interrupted a wait for it
                return
            time.sleep(0.02)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    @contextmanager
    def _rank_loss_detected(self) -> Iterator[None]:
        """Turn the failure of a collective operation into RankLost for the rank that caused it."""
        try:
            yield
        except RuntimeError as error:
            lost = None if self._liveness_monitor is None else self._liveness_monitor.wait_for_loss(2.0)
            if lost is None:
                self._abort_nccl()
                reason = " ".join(str(error).split())[:200]
                raise RankLost(
                    f"rank {self.rank} of {self.world_size} lost connection to the other ranks ({reason})"
                ) from None
            self._raise_rank_lost(lost)

    def _raise_rank_lost(self, rank: int) -> NoReturn:
        if self._liveness_monitor is not None:
            self._liveness_monitor.leave_exit_to_main_thread()
        # Exit without waiting: rank 0 may be blocked in a collective that only the exit of this process breaks.
        message = self._rank_lost_message(rank)
        if message:
            raise RankLost(message)
        raise SystemExit(1)

    def _rank_lost_message(self, lost: int) -> str:
        """Return the error message; "" if another process reports it: rank 0, else one process per machine."""
        reports = self.is_main_process or (lost == 0 and (self.rank == 1 or self.local_rank == 0))
        return f"rank {lost} of {self.world_size} exited before the run finished" if reports else ""


@contextmanager
def open_process_group() -> Iterator[ProcessGroup]:
    """Context manager that yields the group of this process: that of its launcher, or a group of one.

    Raises:
        UserError: the processes of the launcher could not connect to each other.
    """
    if not all(name in os.environ for name in _LAUNCHER_VARIABLES):
        yield ProcessGroup()
        return
    group = DistributedProcessGroup()
    yield group
    group.shut_down()
