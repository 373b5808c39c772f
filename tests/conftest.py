"""Settings that every test shares: no network beyond loopback, no deadline on a shared machine, a home of its own."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "earshard", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("earshard")

# Set before any hub library is imported, in this process and in those that tests start.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models lose by threads, and a sum split over threads has other last bits
