from __future__ import annotations

import pytest
import torch

from shards.config import Config, load_config
from shards.errors import UserError
from train.options import MlpConfig, ProjectorConfig, ResidualConfig
from train.projectors import Mlp, Residual, build_projector, list_kinds

CONFIGS = [
    MlpConfig(),
    MlpConfig(stack=5, hidden=24, input_norm="layer", norm="rms"),
    MlpConfig(stack=3, hidden=24, bias=True, norm="layer"),
    ResidualConfig(),
    ResidualConfig(stack=1, blocks=1, hidden=20, norm="rms"),
    ResidualConfig(stack=2, norm="layer"),
]
IDS = [f"{c.kind}-{c.stack}-{c.norm}" for c in CONFIGS]


class Holder(Config):
    projector: ProjectorConfig = MlpConfig()


def build(config, channels=6, width=8, seed=0):
    return build_projector(config, channels, width, 0.136, seed=seed)


def shake(projector):
    """Move every weight off its start, so that no output is zero or at rest."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.3, generator=generator))
    return projector


def mask_of(lengths, frames):
    return torch.arange(frames) < torch.tensor(lengths)[:, None]


def test_w1_mlp_has_its_exact_start_and_parameter_count():
    projector = build_projector(MlpConfig(), 512, 384, 1.0)
    assert isinstance(projector, Mlp)
    assert {name: tuple(p.shape) for name, p in projector.named_parameters()} == {
        "fc1.weight": (384, 512),
        "fc2.weight": (384, 384),
    }
    bound = (3 / 512) ** 0.5
    assert projector.fc1.weight.abs().max() <= bound
    assert projector.fc1.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert not projector.fc2.weight.any()


def test_fc2_starts_small_and_not_zero_behind_an_output_norm():
    projector = build(MlpConfig(norm="rms", hidden=512))
    assert isinstance(projector, Mlp)
    assert projector.fc2.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_residual_starts_as_tiny_audio_does():
    projector = build_projector(ResidualConfig(), 128, 64, 1.0)
    assert isinstance(projector, Residual)
    assert projector.fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for block in projector.blocks:
        assert block.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert block.fc2.weight.std().item() == pytest.approx(0.002, rel=0.05)
        assert torch.equal(block.norm.weight, torch.ones(64))
        assert not block.fc1.bias.any()


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (MlpConfig(), 6 * 8 + 8 * 8),
        (MlpConfig(stack=5, hidden=24, input_norm="layer", norm="rms"), 30 * 24 + 24 * 8 + 2 * 30 + 8),
        (MlpConfig(stack=3, hidden=24, bias=True, norm="layer"), 18 * 24 + 24 * 8 + 24 + 8 + 2 * 8),
        (ResidualConfig(), (24 + 1) * 8 + 8 + 2 * (2 * 8 * 32 + 32 + 2 * 8)),
        (ResidualConfig(stack=2, norm="layer"), (12 + 1) * 8 + 8 + 2 * (2 * 8 * 32 + 32 + 2 * 8) + 8),
    ],
)
def test_parameter_count_follows_the_formula(config, count):
    assert sum(p.numel() for p in build(config).parameters()) == count


def test_kinds_are_listed_with_the_counts_that_are_built():
    kinds = {kind.name: kind for kind in list_kinds(6, 8)}
    assert set(kinds) == {"mlp", "residual"}
    for kind in kinds.values():
        built = build(load_config(Holder, None, [f"projector.kind={kind.name}"]).projector)
        assert kind.parameters == sum(p.numel() for p in built.parameters())
        assert (kind.stack, bool(kind.formula)) == (built.stack, True)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_shapes_and_masks_are_right_for_odd_lengths(config):
    projector, lengths = build(config), [7, 1, 4]
    soft, soft_mask = projector(torch.randn(3, 7, 6), mask_of(lengths, 7))
    assert soft.shape == (3, projector.soft_frames(7), 8)
    assert soft_mask.sum(1).tolist() == [projector.soft_frames(n) for n in lengths]
    assert projector.soft_frames(7) == -(-7 // config.stack)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_soft_tokens_do_not_depend_on_padding_or_on_what_stands_in_it(config):
    projector = shake(build(config))
    features, lengths = torch.randn(2, 7, 6), [7, 4]
    soft, soft_mask = projector(features, mask_of(lengths, 7))
    filled = torch.cat([features, torch.full((2, 6, 6), 9.0)], 1)
    filled[1, 4:] = -5.0
    other, other_mask = projector(filled, mask_of(lengths, 13))
    torch.testing.assert_close(soft[soft_mask], other[other_mask])


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_gradient_reaches_every_parameter(config):
    projector = shake(build(config))
    soft, soft_mask = projector(torch.randn(2, 7, 6), mask_of([7, 4], 7))
    (soft[soft_mask] * torch.randn(8)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_masters_stay_float32_while_bfloat16_flows_through(config):
    projector = build(config)
    soft, _ = projector(torch.randn(2, 7, 6).bfloat16(), mask_of([7, 4], 7))
    assert soft.dtype == torch.bfloat16
    assert {p.dtype for p in projector.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["mlp", "residual"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_an_output_norm_starts_soft_tokens_at_the_embedding_rms(kind, norm):
    model = {"mlp": MlpConfig, "residual": ResidualConfig}[kind]
    soft, _ = build_projector(model(norm=norm), 6, 64, 0.136)(torch.randn(2, 8, 6), mask_of([8, 8], 8))
    assert soft.pow(2).mean().sqrt().item() == pytest.approx(0.136, rel=0.02)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_the_same_seed_gives_the_same_start_whatever_ran_before(config):
    first = build(config, seed=3).state_dict()
    torch.randn(5)
    again, other = build(config, seed=3).state_dict(), build(config, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    build(ResidualConfig())
    assert torch.equal(torch.randn(3), expected)


def test_dropout_acts_in_training_only():
    projector = shake(build(ResidualConfig(dropout=0.5)))
    features, mask = torch.randn(1, 8, 6), mask_of([8], 8)
    assert not torch.equal(projector(features, mask)[0], projector(features, mask)[0])
    projector.eval()
    assert torch.equal(projector(features, mask)[0], projector(features, mask)[0])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["projector.kind=residual", "projector.stak=4"], "the residual projector takes kind, stack, blocks"),
        (["projector.bloks=4"], "the mlp projector takes kind, stack, hidden, bias, input_norm, norm"),
        (["projector.kind=lstm"], "the kinds are mlp, residual"),
        (["projector.stack=0"], "key 'projector.stack' in 'projector.stack=0' on the command line"),
        (["projector=5"], "a mapping"),
    ],
)
def test_a_bad_projector_key_names_the_allowed_ones(words, told):
    with pytest.raises(UserError) as error:
        load_config(Holder, None, words)
    assert told in str(error.value)


def test_a_projector_without_channels_is_refused():
    with pytest.raises(UserError, match="0 channels"):
        build_projector(MlpConfig(), 0, 8, 1.0)
