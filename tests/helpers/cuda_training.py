"""Training runs on a pretended CUDA device, and the waits of their steps."""

from __future__ import annotations

import functools
import inspect
import json
import os
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pretended_cuda import counts
from tiny_run import forget_after, losses, make_config


def marks(device: Any, owner: Any, name: str) -> list[int]:
    """Note the number of waits at each call of ``owner.name`` and at its end, in turn."""
    found: list[int] = []
    function = inspect.unwrap(getattr(owner, name))

    def noted(*arguments: Any, **keys: Any) -> Any:
        found.append(len(device.waits))
        try:
            return function(*arguments, **keys)
        finally:
            found.append(len(device.waits))

    setattr(owner, name, functools.wraps(function)(noted))
    return found


def train(device: Any, root: str, lm: str, cache: str, keys: dict[str, Any], forget: int = 0) -> dict[str, Any]:
    """Train a run; return its losses, the waits of its second to last step and those of its last evaluation.

    Args:
        forget: the step from which the run is resumed after it is finished; 0: it is not.
    """
    import train.trainer.fit as fit
    import train.trainer.trainer as trainer

    steps, evaluations = marks(device, trainer, "next_batches"), marks(device, trainer, "evaluate_together")
    config = make_config(Path(root), cache, lm, **{"device": "cuda", **keys})
    run = fit.fit(config)
    found = {"losses": losses(run), "summary": json.loads((run / "summary.json").read_text())}
    found["waits"] = counts(device.waits[steps[-4] : steps[-2]])
    found["evaluation"] = counts(device.waits[slice(*evaluations[-2:])]) if evaluations else {}
    if forget:
        forget_after(run, forget)
        fit.fit(config, resume=run)
        found["resumed"] = losses(run)
    return found


def train_each(device: Any, root: str, lm: str, cache: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train a run of each of ``cases``, its keys by its name, in one process: most of its time it imports modules."""
    found = {}
    for name, keys in cases.items():
        try:
            found[name] = train(device, f"{root}/{name}", lm, cache, keys)
        except Exception:
            found[name] = {"error": traceback.format_exc()[-3000:]}
    return found


def gradients(device: Any, lm: str, cases: dict[str, dict[str, Any]], dtype: str = "float32") -> dict[str, Any]:
    """Return the losses and the gradients of a projector with a model of each of ``cases``, options by name.

    On the device, and under "cpu: NAME" on the CPU.
    """
    import cuda_flash
    import torch

    from train.config.model import LmConfig
    from train.lms.load import load_lm

    cuda_flash.install()
    features = torch.randn(4, 7, 8, generator=torch.Generator().manual_seed(0))
    weight = 0.1 * torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(7) < torch.tensor([[3], [7], [1], [0]])
    rows = [[5, 6], [7], [], [9]], [[8], [], [6], []], [[20, 21, 2], [22], [5, 2], [2, 2, 2, 2]]
    found: dict[str, Any] = {}
    for place in ("cuda", "cpu"):
        for name, options in cases.items():
            own = load_lm(lm, device=place, dtype=getattr(torch, dtype), options=LmConfig(**options))
            projector = weight.clone().to(place).requires_grad_()
            placed = features.to(place)
            before = len(device.waits)
            cuda_flash.calls.clear()
            nats = own.target_nll((placed @ projector.T).to(own.dtype), mask, *rows)
            nats.sum().backward()
            waits = counts(device.waits[before:])
            assert projector.grad is not None
            grad = projector.grad.cpu().tolist()
            result = {"nats": nats.tolist(), "grad": grad, "waits": waits, "kernel calls": list(cuda_flash.calls)}
            found[name if place == "cuda" else f"cpu: {name}"] = result
    return found


def evaluation_batches(device: Any, caches: list[str]) -> list[dict[str, Any]]:
    """Read the held-out rows of each cache for a model on the device; return what crossed and what arrived."""
    import torch

    import train.evaluation.batches as batches
    from train.data.caches import open_utterances
    from train.data.padding import pad
    from train.data.text import AS_STORED
    from train.distributed.group import ProcessGroup

    plain, found = batches.to_device, []
    for cache in caches:
        crossed: list[torch.Tensor] = []
        batches.to_device = lambda tensor, where, crossed=crossed: plain((crossed.append(tensor), tensor)[1], where)
        utterances = open_utterances([cache])
        arguments: list[Any] = [utterances, 4, None, lambda: False, ProcessGroup(), AS_STORED, None]
        reader = batches.UtteranceReader(*arguments, SimpleNamespace(device=torch.device("cuda")))  # type: ignore[arg-type]
        device.waits.clear()
        features, mask = reader.read([5, 0, 11])
        waits = counts(device.waits)
        wanted, wanted_mask = pad([utterances.features(index) for index in (5, 0, 11)])
        same = torch.equal(features.cpu(), wanted) and features.dtype == wanted.dtype and torch.equal(mask, wanted_mask)
        where = [features.device.type, mask.device.type]
        dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in crossed]
        found.append({"waits": waits, "bits": same, "on": where, "crossed": dtypes})
    batches.to_device = plain
    return found


def sweep(device: Any, root: str, lm: str, cache: str, keys: list[dict[str, Any]]) -> dict[str, Any]:
    """Train experiments in lockstep; return the losses of each and the waits of the second to last step of all."""
    import train.sweeps.group as group
    from train.distributed.signals import StopRequest

    steps = marks(device, group, "next_batches")
    configs = [make_config(Path(root), cache, lm, **{"device": "cuda", **own}) for own in keys]
    group.LockstepTrainer(configs, group.LmCache(), "batched", StopRequest(), log=lambda line: None).run()
    return {
        "losses": [losses(Path(root) / "runs" / own["name"]) for own in keys],
        "waits": counts(device.waits[steps[-4] : steps[-2]]),
    }


def diverge(device: Any, root: str, lm: str, cache: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Train a run that fails; return its error and whether weights and optimizer are finite nevertheless."""
    import torch

    import train.trainer.fit as fit
    from shards.errors import WorkFailed

    states: list[Any] = []
    remember: Callable[..., Any] = fit.RunState

    def state(*arguments: Any) -> Any:
        states.append(remember(*arguments))
        return states[-1]

    fit.RunState = state  # type: ignore[assignment,misc]
    with pytest.raises(WorkFailed) as error:
        fit.fit(make_config(Path(root), cache, lm, **{"device": "cuda", **keys}))
    kept = [*states[0].parameters, *(each for own in states[0].optimizer.state.values() for each in own.values())]
    return {"error": str(error.value), "finite": [bool(torch.isfinite(each).all()) for each in kept]}


def launched(device: Any, root: str, lm: str, cache: str, keys: dict[str, Any]) -> dict[str, Any]:
    """As :func:`train`, started by a launcher as the only process; gloo adds what NCCL would."""
    import torch.distributed as dist

    from train.distributed.group import open_process_group
    from train.trainer import fit, trainer

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    start, add = dist.init_process_group, dist.all_reduce
    calls: list[str] = []

    def all_reduce(tensor: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(tensor.device.type)
        return add(getattr(tensor, "_host", tensor), *arguments, **options)

    dist.init_process_group = lambda backend, **options: start("gloo", **options)
    dist.all_reduce = all_reduce
    steps = marks(device, trainer, "next_batches")
    with open_process_group() as group:
        run = fit.fit(make_config(Path(root), cache, lm, **{"device": "auto", **keys}), group=group)
    waits = counts(device.waits[steps[-4] : steps[-2]])
    return {"losses": losses(run), "waits": waits, "nccl": calls.count("cuda")}


def lost_rank(device: Any, root: str, lm: str, cache: str, keys: dict[str, Any], step: int) -> dict[str, Any]:
    """A run whose group loses a rank while the GPU waits for the sum of ``step``, and the same run resumed.

    gloo stands for NCCL: the sum blocks until the monitor's thread has aborted it, and then holds other numbers.
    """
    import torch.distributed as dist

    from train.distributed.group import RankLost, open_process_group
    from train.trainer import fit, trainer

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    start, begin = dist.init_process_group, trainer.Trainer.__init__
    backend: Any = dist.distributed_c10d.ProcessGroupGloo
    found: dict[str, Any] = {"sums": 0, "aborted": []}

    def all_reduce(tensor: Any, *_: Any, **__: Any) -> None:
        if tensor.device.type == "cuda":
            found["sums"] += 1
            if found["sums"] == step:
                lost = threading.Thread(target=group._liveness_monitor._handle_lost_rank, args=(1,))
                lost.start()
                lost.join()
                tensor.fill_(3.0)
        elif found["aborted"]:
            raise RuntimeError("Connection closed by peer")

    def as_one_of_many(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        self._reads_late = False

    dist.init_process_group = lambda backend, **options: start("gloo", **options)
    config = make_config(Path(root), cache, lm, **{"device": "cuda", **keys})
    with open_process_group() as group, pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", all_reduce)
        patch.setattr(trainer.Trainer, "__init__", as_one_of_many)
        patch.setattr(backend, "abort", lambda self: found["aborted"].append(threading.current_thread().name))
        with pytest.raises(RankLost) as error:
            fit.fit(config, group=group)
    run = Path(root) / "runs" / "run"
    found |= {"error": str(error.value), "main thread": threading.current_thread().name}
    found["saved"] = max(path.stem for path in (run / "checkpoints").iterdir())
    fit.fit(config, resume=run)
    return {**found, "losses": losses(run)}
