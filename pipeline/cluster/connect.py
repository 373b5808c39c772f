"""A connection to Ray: to the cluster of an address, or to one of this machine that ends with the command."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shards.errors import UserError, missing_package

OBJECT_STORE = 80 << 20  # bytes, of a local cluster: only small results travel, and Ray requires 75 MB


@contextmanager
def connect(option: str, address: str | None = None) -> Iterator[Any]:
    """The module ``ray``, connected; disconnected when the block ends.

    Args:
        option: the setting that asks for Ray, for the error when it is not installed.
        address: of the cluster; None is ``RAY_ADDRESS``, else a new cluster of this machine alone.

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
            f"no Ray cluster at '{address}' ({reason}): start one, or leave the address out (RAY_ADDRESS too)"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()
