"""Whole extractions on a pretended CUDA device (``tests/device/test_extraction.py``)."""

from __future__ import annotations

import warnings
from typing import Any

from pretended_cuda import counts


def extract(device: Any, argv: list[str]) -> dict[str, Any]:
    """Run ``python -m pipeline extract`` with ``argv`` in this process; return its exit status and its waits."""
    from pipeline.__main__ import command
    from shards.errors import run_command

    warnings.simplefilter("ignore")
    status = run_command(command, ["extract", *argv])
    return {"status": status, "waits": counts(device.waits), "devices_set": device.devices_set}
