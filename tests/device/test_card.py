"""What a pretended GPU cannot show, on a real one and at small sizes; ``bench/gpu.py`` runs these tests, too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_encoders import load, noise, write_tiny

from pipeline.encoders.device_codec import encode_batch
from shards.format.codec import encode

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
DEVICE = "cuda"


@pytest.mark.parametrize("codec", ["f16", "bf16", "int8", "fp8"])
def test_a_batch_is_stored_with_the_bytes_of_the_codec_on_the_cpu(codec):
    frames, counts = torch.randn(3, 50, 16, generator=torch.Generator().manual_seed(0)) * 4, [50, 1, 23]
    payload, scale, _ = encode_batch(codec, frames.to(DEVICE), torch.tensor(counts, dtype=torch.int32, device=DEVICE))
    for row, count in enumerate(counts):
        expected = encode(codec, frames[row, :count].numpy())
        stored = payload[row, :count].cpu().contiguous().view(torch.uint8).numpy().tobytes()
        assert stored == expected.payload.tobytes()
        if scale is not None:
            np.testing.assert_array_equal(scale[row].cpu().numpy(), expected.scale)


@pytest.mark.parametrize("family", ["hubert", "wavlm", "wav2vec2-bert"])
def test_float32_frames_are_those_of_the_cpu_with_tf32_off(tmp_path, family):
    folder = write_tiny(tmp_path / family, family)
    clips = noise(16_000, 24_000, 16_000)
    expected = load(folder).encode(clips, [0, 2])
    for found, own in zip(load(folder, device=DEVICE).encode(clips, [0, 2]), expected, strict=True):
        for layer in (0, 2):
            np.testing.assert_allclose(found[layer], own[layer], atol=1e-4, rtol=1e-4)


def test_the_frames_of_a_clip_have_the_same_bits_whatever_is_encoded_with_it(tmp_path):
    encoder = load(write_tiny(tmp_path / "wavlm", "wavlm"), device=DEVICE, batch_size=4)
    clip, *others = noise(*[16_000] * 5)
    alone = encoder.encode([clip], [2])[0][2]
    for place in range(4):
        among = [*others[:place], clip, *others[place:]]
        assert np.array_equal(encoder.encode(among, [2])[place][2], alone)
