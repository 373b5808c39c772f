"""What the pretended CUDA device does; runs on it (``tests/device/test_pretended_cuda.py``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pretended_cuda import counts


def values(device: Any) -> dict[str, Any]:
    """A small model trained for a step on ``cuda`` and on the CPU."""
    found = {}
    for where in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2)).to(where)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        torch.manual_seed(1)
        loss = model(torch.randn(3, 4).to(where)).square().mean()
        loss.backward()
        optimizer.step()
        found[where] = [loss.item(), *model[0].weight.detach().cpu().flatten().tolist()]
    return found


def waits(device: Any) -> dict[str, int]:
    """One of each."""
    x = torch.arange(4.0, device="cuda")
    pinned, other = torch.empty(4, pin_memory=True), torch.ones(4).pin_memory()
    device.waits.clear()
    pinned.copy_(x, non_blocking=True)
    x.copy_(other, non_blocking=True)
    assert not device.waits
    x.sum().item()
    x.cpu()
    x[x > 1]
    torch.ones(4).to("cuda")
    torch.ones(4).to("cuda", non_blocking=True)
    pinned.double().copy_(x, non_blocking=True)
    x.nonzero()
    torch.cuda.Event().synchronize()
    torch.cuda.synchronize()
    return counts(device.waits)


def late_copies(device: Any) -> dict[str, Any]:
    """What is read before and after an event, on two streams, and what pinned memory written too early does."""
    pinned, x = torch.zeros(4, pin_memory=True), torch.arange(4.0, device="cuda")
    work, other = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(work):
        pinned.copy_(x, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
    other.wait_event(copied)
    before = bool(np.isnan(pinned.numpy()).all())
    other.synchronize()
    after = pinned.tolist()
    with torch.cuda.stream(work):
        x.copy_(pinned, non_blocking=True)
        copied.record(work)
    pinned.fill_(7)
    try:
        copied.synchronize()
        raced = ""
    except RuntimeError as error:
        raced = str(error)
    return {"before": before, "after": after, "raced": raced}


def mixed_devices(device: Any) -> str:
    """The error of a sum over two devices."""
    try:
        torch.ones(2, device="cuda") + torch.ones(2)
    except RuntimeError as error:
        return str(error)
    return ""
