"""A trained projector in a few lines of plain PyTorch, for the card of an export.

In: the settings of a projector. Out: Python text that needs torch and safetensors alone: it loads
``projector.safetensors`` and turns ``x``, float32 [1, frames, channels] of one utterance, into ``soft``, float32
[1, soft tokens, width], the same bits that earshard computes. For the last of them the tensors are copied
(products with one row differ with where the weights stand in memory) and parameters (torch folds batches of those
otherwise). The tests run every kind's text.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from train.config.model import (
    ConvConfig,
    LinearConfig,
    MlpConfig,
    MoeConfig,
    PoolConfig,
    ProjectorConfig,
    QformerConfig,
    ResidualConfig,
    SwigluConfig,
    TransformerConfig,
)

LOAD = """\
import torch, torch.nn.functional as F
from safetensors.torch import load_file
w = {name: torch.nn.Parameter(value.clone()) for name, value in load_file("projector.safetensors").items()}
linear = lambda x, name: F.linear(x, w[name + ".weight"], w.get(name + ".bias"))
"""
RMS = 'rms = lambda x, name: F.rms_norm(x, x.shape[-1:], w[name + ".weight"], 1e-6)\n'
LAYER = 'layer = lambda x, name, eps=1e-5: F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps)\n'


def plain(config: ProjectorConfig, layers: int = 1, normalise_layers: bool = False) -> str | None:
    """The text for ``config``, behind a mixer of ``layers`` where there are several; None for a projector of a user's.

    ``projector.safetensors`` names a mixed projector's tensors ``projector.…`` and ``mixer.logits``.
    """
    write = WRITERS.get(config.kind)
    if write is None:
        return None
    body = write(config)
    if layers > 1:
        parts = f"x.chunk({layers}, -1)"
        if normalise_layers:
            parts = f"(F.layer_norm(y, y.shape[-1:]) for y in {parts})"
        body = (
            f'x = sum(a * y for a, y in zip(w["mixer.logits"].softmax(0), {parts}))\n'
            'w = {name.removeprefix("projector."): value for name, value in w.items()}\n' + body
        )
    used = "import math\n" if "math." in body else ""
    used += "".join(text for text, name in ((RMS, "rms"), (LAYER, "layer")) if re.search(rf"\b{name}\b", body))
    return LOAD + used + body


def _stack(k: int) -> str:
    return "" if k == 1 else f"x = F.pad(x, (0, 0, 0, -x.shape[1] % {k})).reshape(1, -1, {k} * x.shape[2])\n"


def _normed(kind: str, text: str, name: str = "norm") -> str:
    """``text`` inside the norm of ``kind`` that is called ``name``."""
    return text if kind == "none" else f'{kind}({text}, "{name}")'


def _soft(kind: str, text: str) -> str:
    """The last line."""
    return f"soft = {_normed(kind, text)}\n"


def _mlp(config: MlpConfig) -> str:
    inputs = _normed(config.input_norm, "x", "input_norm")
    body = f'x = F.gelu(linear({inputs}, "fc1"))\n'
    return _stack(config.stack) + body + _soft(config.norm, 'linear(x, "fc2")')


def _residual(config: ResidualConfig) -> str:
    norm = "rms" if config.norm != "layer" else f"(layer if i == {config.blocks - 1} else rms)"
    return (
        _stack(config.stack)
        + 'soft = rms(linear(x, "fc"), "norm")\n'
        + f"for i in range({config.blocks}):\n"
        + '    y = linear(F.gelu(linear(soft, f"blocks.{i}.fc1")), f"blocks.{i}.fc2")\n'
        + f'    soft = {norm}(soft + y, f"blocks.{{i}}.norm")\n'
    )


def _linear(config: LinearConfig) -> str:
    return _stack(config.stack) + _head(config.norm)


def _head(norm: str) -> str:
    """fc1 -> ReLU -> fc2 -> norm."""
    return _soft(norm, 'linear(F.relu(linear(x, "fc1")), "fc2")')


def _swiglu(config: SwigluConfig) -> str:
    middle = 'rms(a * F.silu(b), "mid_norm")' if config.mid_norm else "a * F.silu(b)"
    return (
        _stack(config.stack)
        + 'a, b = linear(rms(x, "input_norm"), "fc1").chunk(2, -1)\n'
        + _soft(config.norm, f'linear({middle}, "fc2")')
    )


def _pool(config: PoolConfig) -> str:
    text = ""
    if config.pool > 1:
        p = config.pool
        text = (
            f"fill = lambda y: F.pad(y, (0, 0, 0, -y.shape[1] % {p})).reshape(1, -1, {p}, y.shape[2])\n"
            "x = fill(x).sum(-2) / fill(torch.ones(1, x.shape[1], 1)).sum(-2)\n"
        )
    inner = 'F.gelu(linear(x, "fc1"))' if config.hidden else "x"
    return text + _stack(config.stack) + _soft(config.norm, f'linear({inner}, "fc2")')


def _downsampler(stack: int, name: str) -> str:
    weights = f'w[f"{name}.convs.{{i}}.weight"], w[f"{name}.convs.{{i}}.bias"]'
    return (
        f"for i in range({stack.bit_length() - 1}):\n"
        f"    y = F.conv1d(x.transpose(1, 2), {weights}, stride=2, padding=1)\n"
        "    x = F.gelu(y.transpose(1, 2))\n"
    )


def _conv(config: ConvConfig) -> str:
    if config.variant == "slam":
        return _stack(config.stack or 5) + 'x = F.relu(linear(x, "conv.fc"))\n' + _head(config.norm)
    return _downsampler(config.stack or 4, "conv") + _head(config.norm)


def _moe(config: MoeConfig) -> str:
    if config.routing == "dense":
        return (
            _downsampler(config.stack, "down")
            + 'p = linear(F.relu(linear(x, "router.0")), "router.2").softmax(-1)\n'
            + 'expert = lambda i: linear(F.relu(linear(x, f"experts.{i}.fc1")), f"experts.{i}.fc2")\n'
            + f"x = sum(p[..., i, None] * expert(i) for i in range({config.experts}))\n"
            + _soft(config.norm, "x")
        )
    return (
        _stack(config.stack)
        + 'x = rms(x, "input_norm")[0]\n'
        + 'expert = lambda x, name: linear(F.gelu(linear(x, name + ".fc1")), name + ".fc2")\n'
        + 'p = linear(x, "router").softmax(-1)\n'
        + "best, chosen = p.topk(2, -1)\n"
        + "p = torch.zeros_like(p).scatter(-1, chosen, best / best.sum(-1, keepdim=True))\n"
        + 'y = expert(x, "shared")\n'
        + f"for i in range({config.experts}):\n"
        + "    rows = (chosen == i).any(-1).nonzero()[:, 0]\n"
        + '    y = y.index_add(0, rows, p[rows, i, None] * expert(x[rows], f"experts.{i}"))\n'
        + f"soft = {_normed(config.norm, 'y')}[None]\n"
    )


_FC = 'linear(q, "fc")'


def _qformer(config: QformerConfig) -> str:
    heads = str(config.heads) if config.heads else "max(1, w['queries'].shape[1] // 64)"
    window = config.window
    return (
        _stack(config.stack)
        + f"n, tail = x.shape[1], -x.shape[1] % {window}\n"
        + f"x = F.pad(x, (0, 0, 0, tail)).reshape(-1, {window}, x.shape[2])\n"
        + f"seen = F.pad(torch.ones(1, n, dtype=torch.bool), (0, tail)).reshape(-1, 1, 1, {window})\n"
        + f"split = lambda x, name: linear(x, name).unflatten(-1, ({heads}, -1)).transpose(1, 2)\n"
        + "def attend(x, to, name, mask=None):\n"
        + '    q, k, v = (split(y, name + part) for y, part in ((x, ".q"), (to, ".k"), (to, ".v")))\n'
        + "    y = F.scaled_dot_product_attention(q, k, v, mask)\n"
        + '    return linear(y.transpose(1, 2).flatten(2), name + ".out")\n'
        + 'q = layer(w["queries"], "query_norm", 1e-12).expand(len(x), -1, -1)\n'
        + f'for i in (f"layers.{{i}}." for i in range({config.layers})):\n'
        + '    q = layer(q + attend(q, q, i + "own"), i + "own_norm", 1e-12)\n'
        + '    q = layer(q + attend(q, x, i + "cross", seen), i + "cross_norm", 1e-12)\n'
        + '    q = layer(q + linear(F.gelu(linear(q, i + "fc1")), i + "fc2"), i + "norm", 1e-12)\n'
        + f"q = {_normed(config.norm, _FC)}\n"
        + 'soft = q.reshape(1, -1, w["fc.weight"].shape[0])\n'
    )


def _transformer(config: TransformerConfig) -> str:
    hidden = config.hidden
    return (
        _stack(config.stack)
        + 'x = linear(x, "fc1")\n'
        + f"rates = torch.exp(torch.arange(0, {hidden}, 2) * (-math.log(10_000) / {hidden}))\n"
        + "angles = torch.outer(torch.arange(x.shape[1]), rates)\n"
        + "x = x + torch.stack([angles.sin(), angles.cos()], -1).flatten(1)\n"
        + f"split = lambda x, name: linear(x, name).unflatten(-1, ({config.heads}, -1)).transpose(1, 2)\n"
        + "seen = torch.ones(1, 1, 1, x.shape[1], dtype=torch.bool)\n"
        + f'for i in (f"layers.{{i}}." for i in range({config.layers})):\n'
        + '    y = layer(x, i + "attention_norm")\n'
        + '    y = F.scaled_dot_product_attention(*(split(y, f"{i}attention.{part}") for part in "qkv"), seen)\n'
        + '    x = x + linear(y.transpose(1, 2).flatten(2), i + "attention.out")\n'
        + '    x = x + linear(F.gelu(linear(layer(x, i + "mlp_norm"), i + "fc1")), i + "fc2")\n'
        + _soft(config.norm, 'linear(layer(x, "last_norm"), "fc2")')
    )


WRITERS: dict[str, Callable[..., str]] = {
    "mlp": _mlp,
    "residual": _residual,
    "linear": _linear,
    "conv": _conv,
    "swiglu": _swiglu,
    "qformer": _qformer,
    "moe": _moe,
    "pool": _pool,
    "transformer": _transformer,
}
