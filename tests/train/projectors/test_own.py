"""Custom projectors, and the mixer of layers."""

from __future__ import annotations

import sys

import pytest
import torch
from tiny_projectors import Holder, build, mask_of, shake

from shards.config.base import load_config
from shards.errors import UserError
from train.config.model import KINDS, LinearConfig, MoeConfig
from train.projectors import LayerMixer, MixedProjector, Projector

OWN = """
import torch
from torch import nn
from train.projectors import Projector

class Mine(Projector):
    def __init__(self, channels, width, embedding_rms, *, scale=1.0):
        super().__init__()
        self.linear, self.scale = nn.Linear(channels, width), scale * embedding_rms

    def soft_frames(self, frames):
        return frames

    def forward(self, features, mask):
        return self.scale * self.linear(features), mask

class Other:
    pass
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_projectors.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "own_projectors"
    sys.modules.pop("own_projectors", None)


def test_a_custom_projector_is_built_from_its_import_path(own_module):
    words = [f"projector.kind={own_module}:Mine", "projector.settings.scale=2.0"]
    config = load_config(Holder, None, words).projector
    torch.manual_seed(3)
    projector, follows = build(config, seed=5), torch.randn(2)
    torch.manual_seed(3)
    assert torch.equal(follows, torch.randn(2))
    assert isinstance(projector, Projector)
    assert projector.scale == 2.0 * 0.136
    assert torch.equal(projector.linear.weight, build(config, seed=5).linear.weight)
    assert not torch.equal(projector.linear.weight, build(config, seed=6).linear.weight)
    soft, mask = projector(torch.randn(2, 3, 6), mask_of([3, 2], 3))
    assert (soft.shape, mask.shape, projector.soft_frames(3)) == ((2, 3, 8), (2, 3), 3)


def test_plain_layers_of_a_custom_projector_run_in_the_runs_dtype_with_float32_weights(own_module):
    projector = build(load_config(Holder, None, [f"projector.kind={own_module}:Mine"]).projector)
    soft, _ = projector(torch.randn(2, 3, 6, dtype=torch.bfloat16), mask_of([3, 2], 3))
    soft.float().sum().backward()
    assert soft.dtype == torch.bfloat16
    assert projector.linear.weight.dtype == projector.linear.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("no_such_module:Mine", {}, "cannot be imported"),
        ("own_projectors:Absent", {}, "is not a subclass of"),
        ("own_projectors:Other", {}, "is not a subclass of"),
        ("own_projectors:Mine", {"size": 3}, "cannot be constructed with projector.settings"),
    ],
)
def test_an_invalid_custom_projector_is_reported_in_one_sentence(own_module, kind, settings, message):
    config = Holder.model_validate({"projector": {"kind": kind, "settings": settings}}).projector
    with pytest.raises(UserError, match=message):
        build(config)


@pytest.mark.parametrize("normalise", [False, True])
def test_a_mixer_starts_at_the_mean_of_its_layers_and_learns_their_weights(normalise):
    mixer, layers = LayerMixer(3, normalise), [torch.randn(2, 4, 6) * 10**i for i in range(3)]
    seen = [torch.nn.functional.layer_norm(x, (6,)) for x in layers] if normalise else layers
    torch.testing.assert_close(mixer(layers), sum(seen) / 3)
    torch.testing.assert_close(mixer.weights(), torch.full((3,), 1 / 3))
    with torch.no_grad():
        mixer.logits.copy_(torch.tensor([0.0, 50.0, 0.0]))
    torch.testing.assert_close(mixer(layers), seen[1])
    assert mixer([x.bfloat16() for x in layers]).dtype == torch.bfloat16
    optimizer = torch.optim.Adam(mixer.parameters(), lr=0.5)
    with torch.no_grad():
        mixer.logits.zero_()
    for _ in range(60):
        optimizer.zero_grad()
        (mixer(layers) - seen[0]).square().mean().backward()
        optimizer.step()
    assert mixer.weights().argmax() == 0
    assert mixer.weights()[0] > 0.9


def test_a_mixer_rejects_another_number_of_layers():
    with pytest.raises(ValueError, match="expected 2 layers to mix, got 1"):
        LayerMixer(2)([torch.randn(1, 2, 6)])
    with pytest.raises(ValueError, match="at least one layer"):
        LayerMixer(0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "posterior"])  # see test_ctc.py
def test_a_mixer_works_with_any_projector(kind):
    inner = build(KINDS[kind]()).eval()
    mixed, layers, mask = MixedProjector(LayerMixer(2), inner), torch.randn(2, 2, 9, 6), mask_of([9, 5], 9)
    mixed.eval()
    soft, soft_mask = mixed(torch.cat([*layers], -1), mask)
    expected, expected_mask = inner(layers.mean(0), mask)
    torch.testing.assert_close(soft, expected)
    assert torch.equal(soft_mask, expected_mask)
    assert mixed.soft_frames(9) == inner.soft_frames(9)
    shake(mixed).train()
    soft, soft_mask = mixed(torch.cat([*layers], -1), mask)
    (soft[soft_mask] * torch.randn(8)).sum().backward()
    assert mixed.mixer.logits.grad.abs().sum() > 0


def test_a_mixed_projector_returns_the_losses_of_its_projector():
    mixed = MixedProjector(LayerMixer(1), build(MoeConfig(routing="top2")))
    mixed(torch.randn(1, 8, 6), mask_of([8], 8))
    assert mixed.take_losses().keys() == {"balance", "router_z"}


def test_the_same_seed_initializes_a_projector_equally_with_and_without_a_mixer():
    mixed, alone = MixedProjector(LayerMixer(2), build(LinearConfig(hidden=24), seed=1)), build(LinearConfig(hidden=24))
    mixed.init_weights(torch.Generator().manual_seed(0))
    assert torch.equal(mixed.projector.fc1.weight, alone.fc1.weight)
