"""Whether a forward pass is compiled, and the pass that is: ``torch.compile`` with CUDA graphs for whole batches.

In: an encoder's forward pass, and how long the job is. Out: the same pass, compiled where that pays. Compiling takes
about a minute, a batch saves a fraction of its time: only a GPU's long job earns it. On a CPU clips pass alone through
packed kernels that a compiler does not improve (docs/decisions.md). The decision hangs on the plan, the encoder and the
machine alone, so that a job that goes on after a stop computes as it began.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    import torch


COMPILE_SECONDS = 60.0  # that compiling takes; this, RATE and GAIN are guesses until a GPU was measured (bench/gpu.py)
FLOP_PER_SECOND = 1e14  # FLOP a second of an uncompiled pass
TIME_SAVED_FRACTION = 0.2  # of its time that a compiled pass saves
MAX_COMPILED_SHAPES = (
    64  # batches are padded to one size, so contexts, layers and kept frames alone make further shapes
)

Forward = Callable[["torch.Tensor", Sequence[int], int], dict[int, "torch.Tensor"]]


def should_compile(
    setting: str, *, device: str, num_windows: int, flop_per_window: float, compiler_found: bool
) -> tuple[bool, str]:
    """Whether to compile, and a note for the user where that is not what they may expect ("" where it is).

    Args:
        wanted: the setting ``encoder.compile``: auto, always or never.
        device: the encoder's.
        windows: of the whole job, whether they are done already or not.
        flop: of one window.
        compiler: whether torch finds what it compiles with.
    """
    if setting == "never":
        return False, ""
    if not device.startswith("cuda"):
        return (
            False,
            "" if setting == "auto" else "not compiled: on a CPU the encoder's own kernels are the faster ones",
        )
    saved = num_windows * flop_per_window / FLOP_PER_SECOND * TIME_SAVED_FRACTION
    if setting == "auto" and saved < COMPILE_SECONDS:
        return (
            False,
            f"not compiled: {num_windows} windows would save about {saved:.0f} s and compiling takes "
            f"{COMPILE_SECONDS:.0f}",
        )
    if not compiler_found:
        return False, "not compiled: torch finds no Triton or no C compiler; install them for faster encoding"
    return True, ""


def has_compiler() -> bool:
    """Whether torch can compile for a GPU: Triton, and a C compiler for its launchers."""
    from torch.utils._triton import has_triton

    return bool(has_triton()) and any(shutil.which(name) for name in ("cc", "gcc", "clang"))


class CompiledForward:
    """``forward``, compiled once for each shape; the uncompiled one after the first shape that does not compile."""

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
                tqdm.write(f"note: the encoder is not compiled, that failed ({reason})", file=sys.stderr)
        return self._forward(mel, layers, num_frames)
