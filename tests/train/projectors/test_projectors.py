from __future__ import annotations

import pytest
import torch
from tiny_projectors import CONFIGS, Holder, build, mask_of, shake

from shards.config.base import load_config
from shards.errors import UserError
from train.config.model import (
    KINDS,
    ConvConfig,
    LinearConfig,
    MlpConfig,
    MoeConfig,
    PoolConfig,
    QformerConfig,
    ResidualConfig,
    SwigluConfig,
    TransformerConfig,
)
from train.projectors import build_projector
from train.projectors.mlp import MlpProjector, ResidualProjector

IDS = [f"{i}-{c.kind}-{c.norm}" for i, c in enumerate(CONFIGS)]


@pytest.fixture(autouse=True)
def _seed():
    """Random inputs do not depend on which tests ran before in the same process."""
    torch.manual_seed(0)


def test_w1_mlp_has_its_exact_initial_weights_and_parameter_count():
    projector = build_projector(MlpConfig(), 512, 384, 1.0)
    assert isinstance(projector, MlpProjector)
    assert {name: tuple(p.shape) for name, p in projector.named_parameters()} == {
        "fc1.weight": (384, 512),
        "fc2.weight": (384, 384),
    }
    bound = (3 / 512) ** 0.5
    assert projector.fc1.weight.abs().max() <= bound
    assert projector.fc1.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert not projector.fc2.weight.any()


def test_fc2_starts_small_but_not_zero_before_an_output_norm():
    projector = build(MlpConfig(norm="rms", hidden=512))
    assert isinstance(projector, MlpProjector)
    assert projector.fc2.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_residual_has_the_initial_weights_of_tiny_audio():
    projector = build_projector(ResidualConfig(), 128, 64, 1.0)
    assert isinstance(projector, ResidualProjector)
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
        (LinearConfig(), (30 + 1) * 2048 + 2049 * 8),
        (ConvConfig(), (30 + 1) * 6 + 7 * 2048 + 2049 * 8),
        (ConvConfig(variant="mosa", norm="layer"), 19 * 6 + 19 * 8 + 9 * 4096 + 4097 * 8 + 16),
        (ConvConfig(variant="mosa", stack=8, hidden=24), 2 * 19 * 6 + 19 * 8 + 9 * 24 + 25 * 8),
        (SwigluConfig(), 48 + 48 * 4096 + 2048 * 8 + 2048),
        (SwigluConfig(mid_norm=False, norm="rms", hidden=24), 48 + 48 * 24 + 12 * 8 + 8),
        (QformerConfig(), 3 * 6 + 12 + 2 * (8 * 7 * 6 + 7 * 24 + 25 * 6 + 36) + 7 * 8),
        (
            QformerConfig(stack=2, queries=2, layers=1, hidden=20, intermediate=12, norm="rms"),
            2 * 20 + 40 + (6 * 21 * 20 + 2 * 13 * 20 + 21 * 12 + 13 * 20 + 120) + 21 * 8 + 8,
        ),
        (MoeConfig(), 19 * 6 + 19 * 8 + 9 * 512 + 513 * 4 + 4 * (9 * 4096 + 4097 * 8)),
        (MoeConfig(routing="top2", norm="rms"), 24 + 24 * 4 + 5 * (25 * 8 + 9 * 8) + 8),
        (PoolConfig(), 7 * 8),
        (PoolConfig(stack=2, hidden=24, norm="layer"), 13 * 24 + 25 * 8 + 16),
        (TransformerConfig(), 25 * 1024 + 2 * (12 * 1024**2 + 13 * 1024) + 2048 + 1025 * 8),
    ],
)
def test_parameter_count_follows_the_formula(config, count):
    assert sum(p.numel() for p in build(config).parameters()) == count


# `posterior` needs embeddings, and decides by content how many soft tokens there are: test_ctc.py
PER_FRAME = [kind for kind in KINDS if kind != "posterior"]
DEFAULTS = [*(KINDS[kind]() for kind in PER_FRAME), ConvConfig(variant="mosa"), MoeConfig(routing="top2")]


def by_formula(config, projector):
    """The projector's ``formula``, up to its brackets, for 6 channels and width 8."""
    values = config.model_dump()
    wide = values.get("variant") == "mosa" or values.get("routing") == "dense"  # MOSA's hidden width
    hidden = {"mlp": 8, "residual": 32, "qformer": 6, "conv": 2048, "moe": 8}.get(config.kind, 0)
    h = values.get("hidden") or (4096 if wide else hidden)
    k = getattr(projector, "stack", 1)
    letters = {"C": 6, "D": 8, "k": k, "log2k": k.bit_length() - 1, "H": h, "M": values.get("intermediate") or 4 * h}
    letters |= {
        letter: values.get(key) for letter, key in zip("NLQE", ("blocks", "layers", "queries", "experts"), strict=True)
    }
    words = projector.formula.split(" [")[0].replace("log2 k", "log2k").replace("·", "*").replace("²", "**2")
    return eval(words.replace("/", "//"), letters)


@pytest.mark.parametrize(
    "config",
    [
        *DEFAULTS,
        ResidualConfig(stack=2, blocks=3, hidden=10),
        ConvConfig(variant="mosa", stack=8, hidden=24),
        SwigluConfig(stack=3, hidden=24),
        QformerConfig(stack=2, queries=2, layers=1, hidden=20, intermediate=12),
        MoeConfig(experts=3, stack=8, hidden=10),
        MoeConfig(routing="top2", experts=3, hidden=10),
        TransformerConfig(stack=3, layers=1, hidden=16),
    ],
)
def test_a_projectors_own_formula_counts_its_parameters(config):
    projector = build(config)
    assert by_formula(config, projector) == sum(p.numel() for p in projector.parameters())


@pytest.mark.parametrize("config", DEFAULTS)
def test_gradients_reach_all_of_a_fresh_projector_in_its_first_or_second_step(config):
    projector = build(config, channels=24).eval()  # with few channels a ReLU may be dead
    features, mask = torch.randn(2, 61, 24, generator=torch.Generator().manual_seed(0)), mask_of([61, 37], 61)
    direction = torch.randn(8, generator=torch.Generator().manual_seed(1))
    reached = []
    for _ in range(2):
        inputs = features.clone().requires_grad_()
        soft, soft_mask = projector(inputs, mask)
        projector.zero_grad()
        (soft[soft_mask] * direction).sum().backward()
        everywhere = torch.equal(inputs.grad.abs().sum(-1) > 0, mask)
        reached.append(everywhere and all(p.grad.isfinite().all() and p.grad.any() for p in projector.parameters()))
        with torch.no_grad():
            for parameter in projector.parameters():
                parameter.sub_(parameter.grad, alpha=1e-3)
    assert reached == [config.kind != "mlp", True]  # W1's second matrix starts at zero and hides the first


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_shapes_and_masks_are_right_for_odd_lengths(config):
    projector, lengths = build(config), [17, 1, 4, 16]
    soft, soft_mask = projector(torch.randn(4, 17, 6), mask_of(lengths, 17))
    assert soft.shape == (4, projector.soft_frames(17), 8)
    assert torch.equal(soft_mask, mask_of([projector.soft_frames(n) for n in lengths], soft.shape[1]))
    per_token = {"qformer": 5, "conv": 5, "pool": 2}.get(config.kind, config.stack)
    if config == type(config)():
        assert projector.soft_frames(30) == -(-30 // per_token)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_soft_tokens_do_not_depend_on_padding_or_its_values(config):
    projector = shake(build(config)).eval()
    features, lengths = torch.randn(2, 7, 6), [7, 4]
    soft, soft_mask = projector(features, mask_of(lengths, 7))
    filled = torch.cat([features, torch.full((2, 30, 6), 9.0)], 1)
    filled[1, 4:] = -5.0
    other, other_mask = projector(filled, mask_of(lengths, 37))
    torch.testing.assert_close(soft[soft_mask], other[other_mask])
    alone, alone_mask = projector(features[1:, :4], mask_of([4], 4))
    torch.testing.assert_close(soft[1][soft_mask[1]], alone[0][alone_mask[0]])


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_gradients_reach_every_parameter_and_exactly_the_valid_frames(config):
    # 24 channels: with 6, a convolution can have a soft token at which every ReLU, and so every gradient, is zero
    projector = shake(build(config, channels=24))
    features = torch.randn(2, 17, 24, requires_grad=True)
    soft, soft_mask = projector(features, mask_of([17, 14], 17))
    (soft[soft_mask] * torch.randn(8)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())
    assert all(p.grad.isfinite().all() for p in projector.parameters())
    assert torch.equal(features.grad.abs().sum(-1) > 0, mask_of([17, 14], 17))


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_weights_stay_float32_with_bfloat16_input(config):
    projector = build(config)
    soft, _ = projector(torch.randn(2, 7, 6).bfloat16(), mask_of([7, 4], 7))
    assert soft.dtype == torch.bfloat16
    assert {p.dtype for p in projector.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", PER_FRAME)
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_an_output_norm_starts_soft_tokens_at_the_embedding_rms(kind, norm):
    config = KINDS[kind](norm=norm, init="torch")
    soft, _ = build_projector(config, 6, 64, 0.136)(torch.randn(2, 8, 6), mask_of([8, 8], 8))
    assert soft.pow(2).mean().sqrt().item() == pytest.approx(0.136, rel=0.02)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_the_same_seed_always_gives_the_same_initial_weights(config):
    first = build(config, seed=3).state_dict()
    torch.randn(5)
    again, other = build(config, seed=3).state_dict(), build(config, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_building_does_not_change_the_global_generator(config):
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    build(config)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("kind", PER_FRAME)
@pytest.mark.parametrize(
    ("init", "std", "bias"),
    [("torch", (3 * 1024) ** -0.5, (3 * 1024) ** -0.5), ("normal", 0.02, 0), ("xavier", (2 / 1536) ** 0.5, 0)],
)
def test_init_applies_to_the_matrices_of_every_kind(kind, init, std, bias):
    keys = {"hidden": 512} if "hidden" in KINDS[kind].model_fields else {}
    with torch.no_grad():
        made = build_projector(KINDS[kind](init=init, **keys), 1024, 512, 1.0)
    square = [m for m in made.modules() if isinstance(m, torch.nn.Linear) and m.weight.shape == (512, 1024)]
    for linear in square:
        assert linear.weight.std().item() == pytest.approx(std, rel=0.02)
        if linear.bias is not None:
            assert linear.bias.std().item() == pytest.approx(bias, rel=0.2)
    drawn = [m for m in made.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv1d)]
    if init != "torch":
        assert not any(m.bias.any() for m in drawn if m.bias is not None)
    assert all(m.weight.std() > 0 for m in drawn)


@pytest.mark.parametrize(
    "config",
    [ResidualConfig(dropout=0.5), QformerConfig(dropout=0.5), TransformerConfig(dropout=0.5, hidden=32)],
    ids=lambda c: c.kind,
)
def test_dropout_acts_in_training_only(config):
    projector = shake(build(config))
    features, mask = torch.randn(1, 8, 6), mask_of([8], 8)
    assert not torch.equal(projector(features, mask)[0], projector(features, mask)[0])
    projector.eval()
    assert torch.equal(projector(features, mask)[0], projector(features, mask)[0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["projector.kind=residual", "projector.stak=4"], "did you mean 'projector.stack'?"),
        (["projector.kind=linear", "projector.bias=true"], "to drop the keys of another kind, set projector={kind: …}"),
        (["projector.bloks=4"], "allowed here: norm, init, kind, stack, hidden, bias, input_norm"),
        (
            ["projector.kind=lstm"],
            "'residual', 'linear', 'conv', 'swiglu', 'qformer', 'moe', 'pool', 'transformer', 'posterior', 'my_module:",
        ),
        (["projector.kind=conv", "projector.variant=mosa", "projector.stack=6"], "stack=6 must be a power of 2"),
        (["projector.kind=moe", "projector.stack=5"], "stack=5 must be a power of 2"),
        (["projector.kind=moe", "projector.router_aux_loss_coef=0.1"], "set routing=top2"),
        (["projector.kind=swiglu", "projector.hidden=5"], "multiple of 2"),
        (["projector.kind=transformer", "projector.heads=7"], "is not divisible by heads=7"),
        (["projector.kind=my_module:Mine", "projector.stack=2"], "allowed here: kind, settings; to drop"),
        (["projector.kind=my module:Mine"], "string should match"),
        (["projector.stack=0"], "key 'projector.stack' in the argument 'projector.stack=0' is 0: "),
        (["projector=5"], "is 5: expected a mapping of keys"),
        (["projector={kind: null}"], "key 'projector.kind' in the argument 'projector={kind: null}' is 'None'"),
    ],
)
def test_a_bad_projector_key_names_the_allowed_ones(overrides, message):
    with pytest.raises(UserError) as error:
        load_config(Holder, None, overrides)
    assert message in str(error.value)


def test_a_projector_without_channels_is_rejected():
    with pytest.raises(UserError, match="0 channels"):
        build_projector(MlpConfig(), 0, 8, 1.0)


def test_attention_heads_must_divide_the_width():
    with pytest.raises(UserError, match="5 heads"):
        build(QformerConfig(heads=5))


def test_a_top2_mixture_returns_its_losses_once_and_only_in_training():
    projector = build(
        MoeConfig(routing="top2", router_jitter_noise=0.0, router_aux_loss_coef=0.5, router_z_loss_coef=2.0)
    )
    features, mask = torch.randn(2, 9, 6), mask_of([9, 3], 9)
    projector(features, mask)
    losses = projector.take_losses()
    stacked = torch.nn.functional.pad(features.masked_fill(~mask[..., None], 0), (0, 0, 0, 3)).reshape(2, 3, 24)
    logits = projector.router(projector.input_norm(stacked[mask_of([3, 1], 3)]))
    spread = logits.softmax(-1).mean(0) - 0.25
    torch.testing.assert_close(losses["balance"], 0.5 * 4 * spread.square().mean())
    torch.testing.assert_close(losses["router_z"], 2.0 * logits.logsumexp(-1).square().mean())
    sum(losses.values()).backward()
    assert projector.router.weight.grad.any()
    assert projector.take_losses() == {}
    projector.eval()(features, mask)
    assert projector.take_losses() == {}


def test_an_expert_without_tokens_has_a_gradient_of_zero_not_none():
    projector = build(MoeConfig(routing="top2", stack=2, experts=8))
    projector(torch.randn(1, 2, 6), mask_of([2], 2))[0].sum().backward()
    grads = [expert.fc2.weight.grad for expert in projector.experts]
    assert all(grad is not None for grad in grads)
    assert sum(bool(grad.any()) for grad in grads) == 2


def test_most_projectors_have_no_losses_of_their_own():
    projector = build(MlpConfig())
    projector(torch.randn(1, 2, 6), mask_of([2], 2))
    assert projector.take_losses() == {}
