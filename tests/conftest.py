"""Settings and fixtures of all tests: offline hubs, no deadlines (the machine may be busy), one OpenMP thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "earshard", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("earshard")

# Set before any hub library is imported, in this process and in those that tests start.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # threads slow tiny models, and split sums differ in the last bits


@pytest.fixture(scope="session")
def whisper(tmp_path_factory) -> Path:
    """A tiny Whisper in a folder with a space in its name."""
    from tiny_whisper import write_tiny_whisper

    return write_tiny_whisper(tmp_path_factory.mktemp("model") / "tiny whisper")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """24 short clips of noise with a manifest, in a folder with a space in its name; tests must not change it."""
    from extraction import write_corpus

    folder = tmp_path_factory.mktemp("some audio")
    write_corpus(folder, 24)
    return folder


@pytest.fixture(scope="session")
def pretended_cuda(tmp_path_factory) -> Iterator[Callable[[str, dict[str, Any]], Any]]:
    """Call a function of ``tests/helpers`` in a process with a pretended CUDA device (``pretended_cuda.py``)."""
    from pretended_cuda import Server, build

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # shared by the workers
    library = build(folder)
    if library is None:
        pytest.skip("the pretended CUDA device is built with g++, which is not installed")
    with Server(library) as server:
        yield server.call


def pytest_terminal_summary(terminalreporter) -> None:
    """Print how the golden tests compared: bit for bit, or within a tolerance if the arithmetic differs."""
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    for how in sorted({value for report in reports for key, value in report.user_properties if key == "golden"}):
        terminalreporter.write_line(f"golden: compared {how}")
