"""What ``bench/sizes.py`` counts on fake tensors agrees with the formulas that the pipeline uses."""

from __future__ import annotations

import pytest
from scripts import load_script

from pipeline.encoders.batching import output_bytes
from pipeline.encoders.whisper import pass_bytes, window_flop

sizes = load_script("bench/sizes.py")
SHAPES = sizes.LARGE_V3 | {"encoder_layers": 3}  # large-v3 but for its depth, which changes neither estimate per layer
ARGS = SHAPES["max_source_positions"], SHAPES["d_model"], SHAPES["encoder_ffn_dim"]


@pytest.mark.parametrize("layers", [[3], [1, 2, 3]])
def test_the_memory_estimate_of_an_encoder_is_not_below_what_a_pass_holds_at_once(layers):
    found = sizes.count_encoder(SHAPES, 4, layers)
    assert found.peak <= 4 * (pass_bytes(*ARGS) + output_bytes(len(layers), *ARGS[:2]))


def test_the_formula_for_operations_is_what_torch_counts():
    found = sizes.count_encoder(SHAPES, 2, [3])
    assert found.flop == 2 * window_flop(*ARGS, SHAPES["num_mel_bins"], 3)
