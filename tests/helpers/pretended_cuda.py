"""A pretended CUDA device on a CPU build of torch: true numbers, true autograd, and a list of every wait for it.

A tensor on ``cuda`` is a wrapper around a CPU tensor; its operations run on the CPU. Mixing devices raises, as CUDA
would. What would make the host wait for a GPU is recorded with the function of the product that waits:

* a value read on the host: ``.item()``, ``bool()``, ``tolist()``, ``torch.equal``;
* a copy between host and device, unless it is non-blocking from or into pinned memory of the same dtype;
* a size that depends on values: ``nonzero``, ``masked_select``, boolean indexing;
* ``synchronize`` of an event, a stream or the device.

Non-blocking copies are kept as late as a GPU may run them. One into pinned memory fills it with 0xFF and delivers its
values when an event or a stream that follows it is synchronized, so whoever reads too early reads garbage. One from
pinned memory keeps what it copied, and the next such wait fails if the memory was written in between.

The library must be loaded before torch, so each call of the fixture ``pretended_cuda`` runs in another process::

    def test_waits(pretended_cuda):
        assert pretended_cuda("cuda_extraction:waits", {"codec": "f16"}) == ...

calls ``cuda_extraction.waits(device, codec="f16")`` (a module in ``tests/helpers``) within ``with device:``; arguments
and result are JSON. ``device.waits`` is the list of :class:`Wait`.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from pretended_device import ROOT, Wait, make_device

SOURCE = Path(__file__).with_suffix(".cpp")


def build(folder: Path) -> Path | None:
    """Return the library, built in ``folder`` once however many processes ask for it; None without g++."""
    if shutil.which("g++") is None:
        return None
    library = folder / "pretended_cuda.so"
    with open(folder / "pretended_cuda.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            torch = _torch_folder()
            options = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch}/include", f"-L{torch}/lib"]
            built = library.with_suffix(".part")
            command = ["g++", *options, "-o", built, SOURCE, "-lc10", "-ltorch_cpu"]
            subprocess.run(command, check=True, capture_output=True)
            built.rename(library)
    return library


class Server:
    """A process with the device loaded, which forks for each call; a context manager."""

    def __init__(self, library: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(library)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.__exit__(None, None, None)  # closes the pipes, waits

    def call(self, function: str, arguments: dict[str, Any]) -> Any:
        """Call ``module:function`` of ``tests/helpers`` within ``with device:``; return what it returns."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([function, arguments]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, "the process with the device died"
        found = json.loads(line)
        assert "error" not in found, found["error"][-6000:]
        return found["result"]


def counts(waits: list[Wait]) -> dict[str, int]:
    """Return how often each wait occurs, as JSON: ``kind | where`` or ``kind | where | via`` -> count."""
    found = Counter(" | ".join(part for part in wait if part) for wait in waits)
    return dict(sorted(found.items()))


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def _install(library: Path) -> type:
    """Load the library and then torch, replace what torch.cuda asks a driver; return the class of the device."""
    assert "torch" not in sys.modules, "the library must be loaded before torch"
    ctypes.CDLL(str(_torch_folder() / "lib/libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
    guards = ctypes.CDLL(str(library))
    import torch
    import torch._dynamo  # imported here once for all forks

    guards.install()
    return make_device(torch)


def _serve(library: str) -> None:
    """Answer each line of standard input, ``[function, arguments]``, in a fork of this process."""
    results, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    sys.path[:0] = [str(SOURCE.parent)]
    sys.modules["pretended_cuda"] = sys.modules["__main__"]
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # peft imports it where torch has CUDA: it has kernels
    device_class = _install(Path(library))
    for line in sys.stdin:
        function, arguments = json.loads(line)
        module, _, name = function.partition(":")
        found = getattr(importlib.import_module(module), name)  # imported here once for all forks
        child = os.fork()
        if child:
            if os.waitpid(child, 0)[1]:
                print(json.dumps({"error": "the call killed its process"}), file=results, flush=True)
            continue
        try:
            with device_class() as device:
                answer = {"result": found(device, **arguments)}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=results, flush=True)
        os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1])
