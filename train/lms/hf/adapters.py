"""Changes to a Hugging Face model before it is used: quantization, low-rank adapters, gradient checkpointing.

Models are changed in place. peft and bitsandbytes are optional and imported only when needed; without them, a
``UserError`` names the package to install.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from shards.errors import UserError, missing_package
from train.config.model import LoraConfig

PACKAGES = {"lora": ("peft",), "bits": ("bitsandbytes", "accelerate")}  # that a setting of ``lm`` needs


def quantization_config(bits: int, dtype: torch.dtype) -> Any:
    """Return transformers' configuration for matrices of 8 bits (LLM.int8, arXiv 2208.07339) or 4 (NF4, 2305.14314).

    Matrices are quantized while the model is loaded; activations stay in ``dtype``.

    Raises:
        UserError: bitsandbytes or accelerate is not installed.
    """
    try:
        import accelerate  # noqa: F401 - transformers needs it to load quantized models
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise missing_package(f"lm.bits={bits}", "bitsandbytes", "bits") from None
    import transformers

    settings: Any = transformers.BitsAndBytesConfig
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # it warns per layer and step
    if bits == 8:
        return settings(load_in_8bit=True)
    return settings(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def disable_bf16_packing(model: Any) -> None:
    """Turn off bitsandbytes' packing of 4-bit matrices for AVX-512, which applies to a model in ``eval()`` on a CPU.

    Its kernel has no derivative; autograd would drop the gradient of the projector with only a warning.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def add_lora(model: Any, config: LoraConfig, seed: int) -> None:
    """Add float32 LoRA adapters to linear layers of ``model``. Only they get gradients; initially they output zero.

    Initial weights are drawn from ``seed``; the global generator does not change.

    Raises:
        UserError: peft is not installed, or no layer matches ``config.target_modules``.
    """
    try:
        import peft
    except ImportError:
        raise missing_package("lm.lora", "peft", "lora") from None
    scale: Any = config.alpha  # peft declares an int and accepts any number
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=scale, target_modules=config.target_modules or "all-linear", lora_dropout=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(settings, model)
        except ValueError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"lm.lora.target_modules={config.target_modules} matches no linear layer of this model: {reason}"
            ) from None
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def enable_gradient_checkpointing(model: Any) -> None:
    """Keep only the input of each decoder layer for the backward pass and recompute the rest there.

    Unlike the option of transformers, this works on a frozen model in ``eval()``, through which the gradient of the
    projector flows.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = _recomputed(layer.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
