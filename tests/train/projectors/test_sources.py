"""Each projector compared with its source, reimplemented here with modules of PyTorch or transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from train.config.model import (
    ConvConfig,
    LinearConfig,
    MlpConfig,
    MoeConfig,
    PoolConfig,
    QformerConfig,
    SwigluConfig,
    TransformerConfig,
)
from train.projectors import build_projector
from train.projectors.transformer import sinusoidal_positions

C, D = 12, 16


def build(config, **sizes):
    projector = build_projector(config, sizes.get("channels", C), D, 0.136).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
    return projector


def run(projector, frames, channels=C):
    x = torch.randn(2, frames, channels, generator=torch.Generator().manual_seed(2))
    return x, projector(x, torch.ones(2, frames, dtype=torch.bool))[0]


def test_linear_is_slam_llms():
    projector = build(LinearConfig(hidden=20))
    x, soft = run(projector, 10)
    torch.testing.assert_close(soft, projector.fc2(F.relu(projector.fc1(x.view(2, 2, 5 * C)))))


def test_slams_convolution_is_a_conv1d_of_equal_width_and_stride():
    projector = build(ConvConfig(hidden=20))
    conv = nn.Conv1d(C, C, 5, 5)
    with torch.no_grad():
        conv.weight.copy_(projector.conv.fc.weight.view(C, 5, C).transpose(1, 2))
        conv.bias.copy_(projector.conv.fc.bias)
    x, soft = run(projector, 10)
    hidden = F.relu(conv(x.transpose(1, 2)).transpose(1, 2))
    torch.testing.assert_close(soft, projector.fc2(F.relu(projector.fc1(hidden))))


def mosa_downsampled(down, x):
    sequence = []
    for ours in down.convs:
        conv = nn.Conv1d(ours.in_channels, ours.out_channels, 3, 2, 1)
        conv.load_state_dict(ours.state_dict())
        sequence += [conv, nn.GELU()]
    return nn.Sequential(*sequence)(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("frames", [8, 9, 11])
def test_mosas_convolution_halves_twice(frames):
    projector = build(ConvConfig(variant="mosa", hidden=20))
    x, soft = run(projector, frames)
    hidden = mosa_downsampled(projector.conv, x)
    assert hidden.shape == (2, -(-frames // 4), D)
    torch.testing.assert_close(soft, projector.fc2(F.relu(projector.fc1(hidden))))


def test_the_dense_mixture_is_mosas():
    projector = build(MoeConfig(hidden=20, experts=3))
    x, soft = run(projector, 9)
    hidden = mosa_downsampled(projector.down, x)
    router = projector.router
    weights = router[2](F.relu(router[0](hidden))).softmax(-1)
    outs = torch.stack([e.fc2(F.relu(e.fc1(hidden))) for e in projector.experts], -1)
    torch.testing.assert_close(soft, (outs * weights[..., None, :]).sum(-1))


def test_the_sparse_mixture_is_the_best_two_and_the_shared_one():
    projector = build(MoeConfig(routing="top2", hidden=20))
    x, soft = run(projector, 8)
    normed = F.rms_norm(x.view(2, 2, 4 * C), (4 * C,), projector.input_norm.weight, 1e-6)
    probabilities = projector.router(normed).softmax(-1)
    for row in range(2):
        for t in range(2):
            best, chosen = probabilities[row, t].topk(2)
            expected = projector.shared(normed[row, t])
            for weight, i in zip(best / best.sum(), chosen.tolist(), strict=True):
                expected = expected + weight * projector.experts[i](normed[row, t])
            torch.testing.assert_close(soft[row, t], expected)


@pytest.mark.parametrize("mid_norm", [True, False])
def test_swiglu_is_ultravoxes(mid_norm):
    config = SwigluConfig(hidden=20, mid_norm=mid_norm, norm="none" if mid_norm else "rms")
    start = build_projector(config, C, D, 0.136)
    assert torch.equal(start.input_norm.weight, torch.full((8 * C,), 0.4))
    projector = build(config)
    x, soft = run(projector, 16)
    h = projector.fc1(F.rms_norm(x.view(2, 2, 8 * C), (8 * C,), projector.input_norm.weight, 1e-6))
    h = h[..., :10] * F.silu(h[..., 10:])
    if mid_norm:
        h = F.rms_norm(h, (10,), projector.mid_norm.weight, 1e-6)
    h = h @ projector.fc2.weight.T
    torch.testing.assert_close(soft, h if mid_norm else F.rms_norm(h, (D,), projector.norm.weight, 1e-6))


def test_qformer_is_granites():
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    projector = build(QformerConfig(heads=4, intermediate=20))
    theirs = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=C, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20, encoder_hidden_size=C,
            cross_attention_frequency=1, hidden_act="gelu", layer_norm_eps=1e-12, use_qformer_text_input=False,
        )
    ).eval()  # fmt: skip
    names = {
        "own.q": "attention.attention.query", "own.k": "attention.attention.key", "own.v": "attention.attention.value",
        "own.out": "attention.output.dense", "own_norm": "attention.output.LayerNorm",
        "cross.q": "crossattention.attention.query", "cross.k": "crossattention.attention.key",
        "cross.v": "crossattention.attention.value", "cross.out": "crossattention.output.dense",
        "cross_norm": "crossattention.output.LayerNorm", "fc1": "intermediate_query.dense",
        "fc2": "output_query.dense", "norm": "output_query.LayerNorm",
    }  # fmt: skip
    ours, state = projector.state_dict(), {}
    for kind in ("weight", "bias"):
        state[f"layernorm.{kind}"] = ours[f"query_norm.{kind}"]
        for i in range(2):
            for mine, its in names.items():
                state[f"encoder.layer.{i}.{its}.{kind}"] = ours[f"layers.{i}.{mine}.{kind}"]
    theirs.load_state_dict(state)
    x, soft = run(projector, 30)
    queries = projector.queries[None].expand(4, -1, -1)
    out = theirs(query_embeds=queries, encoder_hidden_states=x.view(4, 15, C)).last_hidden_state
    torch.testing.assert_close(soft, projector.fc(out.reshape(2, 6, C)), rtol=1e-4, atol=1e-5)


def test_salmonns_qformer_is_one_query_for_seventeen_frames():
    projector = build_projector(QformerConfig(window=17, queries=1, query_std=0.02), 512, D, 1.0)
    assert projector.soft_frames(1500) == 89
    assert projector.queries.std().item() == pytest.approx(0.02, rel=0.2)
    assert build_projector(QformerConfig(), 512, D, 1.0).queries.std().item() == pytest.approx(1, rel=0.1)
    assert {layer.own.heads for layer in projector.layers} == {8}


def test_pool_is_qwen2_audios_average_and_linear():
    projector = build(PoolConfig())
    x, soft = run(projector, 8)
    pooled = nn.AvgPool1d(2, stride=2)(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(soft, projector.fc2(pooled))


def test_an_odd_tail_is_the_mean_of_its_valid_frames():
    projector = build(PoolConfig(pool=3))
    x = torch.randn(1, 5, C)
    soft, _ = projector(x, torch.ones(1, 5, dtype=torch.bool))
    torch.testing.assert_close(soft[0, 1], projector.fc2(x[0, 3:].mean(0)))


def test_pool_with_a_hidden_layer_is_audio_flamingos():
    projector = build(PoolConfig(hidden=D))
    x, soft = run(projector, 8)
    torch.testing.assert_close(soft, projector.fc2(F.gelu(projector.fc1(x.view(2, 4, 2, C).mean(2)))))


def test_mlp_of_four_frames_is_voxtrals():
    projector = build(MlpConfig(stack=4))
    x, soft = run(projector, 8)
    expected = F.gelu(x.reshape(2, 2, 4 * C) @ projector.fc1.weight.T) @ projector.fc2.weight.T
    torch.testing.assert_close(soft, expected)


def test_transformer_layers_are_pytorchs_pre_norm_layers():
    projector = build(TransformerConfig(hidden=32, heads=4))
    x, soft = run(projector, 12)
    h = projector.fc1(x.view(2, 3, 4 * C)) + sinusoidal_positions(3, 32, x.device)
    for ours in projector.layers:
        layer = nn.TransformerEncoderLayer(32, 4, 128, 0.0, F.gelu, batch_first=True, norm_first=True)
        a = ours.attention
        with torch.no_grad():
            layer.self_attn.in_proj_weight.copy_(torch.cat([a.q.weight, a.k.weight, a.v.weight]))
            layer.self_attn.in_proj_bias.copy_(torch.cat([a.q.bias, a.k.bias, a.v.bias]))
            for mine, its in [
                (a.out, layer.self_attn.out_proj), (ours.fc1, layer.linear1), (ours.fc2, layer.linear2),
                (ours.attention_norm, layer.norm1), (ours.mlp_norm, layer.norm2),
            ]:  # fmt: skip
                its.load_state_dict(mine.state_dict())
        h = layer(h)
    torch.testing.assert_close(soft, projector.fc2(projector.last_norm(h)), rtol=1e-4, atol=1e-5)


def test_positions_are_sines_and_cosines_of_falling_frequency():
    table = sinusoidal_positions(3, 4, torch.device("cpu"))
    torch.testing.assert_close(
        table[2],
        torch.tensor([2.0, 2.0, 0.02, 0.02])
        .sin()
        .where(torch.tensor([True, False, True, False]), torch.tensor([2.0, 2.0, 0.02, 0.02]).cos()),
    )
