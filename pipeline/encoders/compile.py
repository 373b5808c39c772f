"""Decide whether to compile a forward pass, and compile it: ``torch.compile`` with CUDA graphs for full batches.

Compiling takes about a minute and saves a fraction of each batch's time, so it only pays off for long jobs on a GPU. On
a CPU, clips are encoded one by one with packed kernels that a compiler does not improve (docs/decisions.md). The
decision depends only on the plan, the encoder and the machine, so a resumed job computes exactly as it started.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    import torch


# Estimates, not yet measured on a GPU (bench/gpu.py)
COMPILE_SECONDS = 60.0
FLOP_PER_SECOND = 1e14  # of an uncompiled pass
TIME_SAVED_FRACTION = 0.2  # of the time of an uncompiled pass
# batches are padded to one size, so only contexts, layers and frame counts add shapes
MAX_COMPILED_SHAPES = 64

Forward = Callable[["torch.Tensor", Sequence[int], int], dict[int, "torch.Tensor"]]


def should_compile(
    setting: str, *, device: str, num_windows: int, flop_per_window: float, compiler_found: bool
) -> tuple[bool, str]:
    """Return whether to compile, and a note for the user when the answer may surprise them (else "").

    Args:
        setting: The value of ``encoder.compile``: auto, always or never.
        device: The encoder's torch device.
        num_windows: Windows of the whole job, including those already encoded.
        flop_per_window: Floating-point operations per window.
        compiler_found: Whether torch finds a compiler, see :func:`has_compiler`.
    """
    if setting == "never":
        return False, ""
    if not device.startswith("cuda"):
        return (
            False,
            "" if setting == "auto" else "not compiled: on a CPU the encoder's own kernels are faster",
        )
    saved = num_windows * flop_per_window / FLOP_PER_SECOND * TIME_SAVED_FRACTION
    if setting == "auto" and saved < COMPILE_SECONDS:
        return (
            False,
            f"not compiled: {num_windows} windows would save about {saved:.0f} s and compiling takes "
            f"{COMPILE_SECONDS:.0f} s",
        )
    if not compiler_found:
        return False, "not compiled: torch found no Triton or no C compiler; install both for faster encoding"
    return True, ""


def has_compiler() -> bool:
    """Return whether torch can compile for a GPU, which takes Triton and a C compiler for its launchers."""
    from torch.utils._triton import has_triton

    return bool(has_triton()) and any(shutil.which(name) for name in ("cc", "gcc", "clang"))


class CompiledForward:
    """``forward``, compiled once per shape. Falls back to the uncompiled pass after the first failure to compile."""

    def __init__(self, forward: Forward, *, mode: str | None = None, backend: str = "inductor") -> None:
        import torch
        import torch._dynamo

        torch._dynamo.config.recompile_limit = max(MAX_COMPILED_SHAPES, torch._dynamo.config.recompile_limit)
        self._forward = forward
        self._compiled: Forward | None = torch.compile(forward, backend=backend, dynamic=False, mode=mode)

    def __call__(self, mel: torch.Tensor, layers: Sequence[int], num_frames: int) -> dict[int, torch.Tensor]:
        """See :meth:`pipeline.encoders.whisper.WhisperEncoder._forward`."""
        from torch._dynamo.exc import TorchDynamoException

        if self._compiled is not None:
            try:
                return self._compiled(mel, layers, num_frames)
            except TorchDynamoException as error:
                self._compiled = None
                reason = " ".join(str(error).split())[:160]
                tqdm.write(f"note: the encoder is not compiled: torch.compile failed ({reason})", file=sys.stderr)
        return self._forward(mel, layers, num_frames)
