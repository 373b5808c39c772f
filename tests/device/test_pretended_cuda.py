"""The pretended CUDA device computes as the CPU, sees every wait, and is as late as a GPU may be."""

from __future__ import annotations


def test_a_training_step_has_the_values_of_the_cpu(pretended_cuda):
    found = pretended_cuda("cuda_selftest:values", {})
    assert found["cuda"] == found["cpu"]


def test_each_kind_of_wait_is_seen(pretended_cuda):
    found = pretended_cuda("cuda_selftest:waits", {})
    assert {name.partition(" | ")[0]: count for name, count in found.items()} == {
        "D2H copy": 1,
        "D2H float32->float32": 1,
        "H2D float32": 2,
        "boolean index": 1,
        "event.synchronize": 1,
        "nonzero": 1,
        "read local_scalar_dense": 1,
        "torch.cuda.synchronize": 1,
    }


def test_copies_are_late_and_pinned_memory_written_too_early_is_seen(pretended_cuda):
    found = pretended_cuda("cuda_selftest:late_copies", {})
    assert found == {
        "before": True,
        "after": [0.0, 1.0, 2.0, 3.0],
        "raced": "pinned memory was written while it was copied to the device",
    }


def test_devices_do_not_mix(pretended_cuda):
    assert "Expected all tensors to be on the same device" in pretended_cuda("cuda_selftest:mixed_devices", {})
