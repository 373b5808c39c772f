"""Connect to Ray: to the cluster at an address, or to a temporary cluster on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shards.errors import UserError, missing_package

OBJECT_STORE = 80 << 20  # bytes, for a local cluster: results are small, and Ray requires at least 75 MB


@contextmanager
def connect(option: str, address: str | None = None) -> Iterator[Any]:
    """Yield the connected ``ray`` module; disconnect when the block ends.

    Args:
        option: setting that requires Ray; named in the error when Ray is not installed.
        address: address of the cluster; None uses ``RAY_ADDRESS``, else starts a new cluster on this machine.

    Raises:
        UserError: Ray is not installed, or no cluster answers at the address.
    """
    try:
        import ray
    except ImportError:
        raise missing_package(option, "ray", "ray") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics leave this machine
    address = address or os.environ.get("RAY_ADDRESS")
    local = {"num_cpus": os.cpu_count(), "object_store_memory": OBJECT_STORE, "include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **({} if address else local))
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"no Ray cluster at '{address}' ({reason}): start one, or omit the address and unset RAY_ADDRESS"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()
