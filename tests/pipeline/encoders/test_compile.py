"""When an encoder is compiled, and that the compiled pass returns the same features; the backends need no compiler."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from pipeline.encoders.compile import (
    COMPILE_SECONDS,
    FLOP_PER_SECOND,
    TIME_SAVED_FRACTION,
    CompiledForward,
    should_compile,
)
from pipeline.encoders.load import auto_dtype, load_encoder
from pipeline.weights.resolve import Weights

LONG = (
    int(COMPILE_SECONDS * FLOP_PER_SECOND / TIME_SAVED_FRACTION / 1e11) + 2
)  # windows of 1e11 FLOP that earn the compilation


@pytest.mark.parametrize(
    ("wanted", "device", "windows", "compiler", "use", "note"),
    [
        ("auto", "cuda:0", LONG, True, True, ""),
        ("auto", "cuda:0", LONG // 2, True, False, "compiling takes 60"),
        ("always", "cuda:0", 1, True, True, ""),
        ("auto", "cuda:0", LONG, False, False, "no Triton or no C compiler"),
        ("never", "cuda:0", LONG, True, False, ""),
        ("auto", "cpu", LONG, True, False, ""),
        ("always", "cpu", LONG, True, False, "kernels are faster"),
    ],
)
def test_compiling_is_for_long_jobs_on_a_gpu_with_a_compiler(wanted, device, windows, compiler, use, note):
    found = should_compile(wanted, device=device, num_windows=windows, flop_per_window=1e11, compiler_found=compiler)
    assert found[0] == use
    assert (note in found[1]) if note else not found[1]


@pytest.fixture
def batched(whisper):
    """The tiny encoder as on a GPU: batches of four, no threads."""
    encoder = load_encoder(Weights(whisper, f"path:{whisper}", ""), device="cpu", dtype="float32")
    encoder._pool, encoder.batch_size = None, 4
    return encoder


def clips(*samples: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.normal(0, 0.1, n).astype(np.float32) for n in samples]


def test_full_batches_run_compiled_in_one_shape_and_small_ones_uncompiled(batched):
    audio = clips(70_000, 50_000, 60_000, 30_000, 40_000, 20_000, 10_000, 5_000)  # 4 + 3, padded, and 1
    wanted = batched.encode(audio, [1, 2])
    shapes = []

    def spy(mel: torch.Tensor, layers, keep: int) -> dict[int, torch.Tensor]:
        shapes.append((tuple(mel.shape), keep))
        return batched._forward(mel, layers, keep)

    batched.forward = CompiledForward(spy, backend="eager")
    for part in (audio[:7], audio[7:]):
        found = batched.encode(part, [1, 2])
        for one, other in zip(found, wanted[: len(part)] if len(part) == 7 else wanted[7:], strict=True):
            np.testing.assert_allclose(one[2], other[2], atol=1e-5)
    assert {shape for shape, _ in shapes} == {(4, 80, 3000)}


@pytest.mark.slow
def test_a_traced_pass_equals_the_plain_one(batched):
    audio = clips(70_000, 50_000, 60_000, 30_000)
    wanted = batched.encode(audio, [0, 2])
    batched.forward = CompiledForward(batched._forward, backend="aot_eager")
    for one, other in zip(batched.encode(audio, [0, 2]), wanted, strict=True):
        np.testing.assert_allclose(one[0], other[0], atol=1e-5)
        np.testing.assert_allclose(one[2], other[2], atol=1e-5)


def test_a_failing_compiler_prints_a_note_and_the_plain_pass_continues(batched, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no such instruction")

    wanted = batched.encode(clips(20_000) * 4, [2])
    batched.forward = CompiledForward(batched._forward, backend=broken)
    for _ in range(2):
        for one, other in zip(batched.encode(clips(20_000) * 4, [2]), wanted, strict=True):
            np.testing.assert_allclose(one[2], other[2], atol=1e-5)
    (note,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert "no such instruction" in note


def test_a_gpu_without_bfloat16_computes_in_float16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    assert auto_dtype("cuda:0") == "float16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert auto_dtype("cuda") == "bfloat16"
