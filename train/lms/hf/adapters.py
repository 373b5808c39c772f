"""What can be done to a Hugging Face model before it is used: fewer bits, low-rank adapters, gradient checkpointing.

In: a model or a setting. Out: the same model, changed in place. peft and bitsandbytes are imported where they are asked
for, and one sentence says so where they are not installed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from shards.errors import UserError, missing_package
from train.config.model import LoraConfig


def quantization_config(bits: int, dtype: torch.dtype) -> Any:
    """transformers' setting for matrices of 8 bits (LLM.int8, arXiv 2208.07339) or 4 (NF4, arXiv 2305.14314).

    The matrices are read into ``bits`` as the model is loaded; activations stay in ``dtype``.
    """
    try:
        import accelerate  # noqa: F401 - by which transformers loads them
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise missing_package(f"lm.bits={bits}", "bitsandbytes", "bits") from None
    import transformers

    settings: Any = transformers.BitsAndBytesConfig
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a warning a layer and step
    if bits == 8:
        return settings(load_in_8bit=True)
    return settings(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def disable_bf16_packing(model: Any) -> None:
    """Turn off bitsandbytes' packing of 4-bit matrices for AVX-512, which a model in ``eval()`` on a CPU would get.

    Its kernel has no derivative, and autograd then drops the gradient of the projector with no more than a warning.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def add_lora(model: Any, config: LoraConfig, seed: int) -> None:
    """Put float32 adapters beside the linear layers of ``model``; they alone get gradients and at first add nothing.

    Their start values come from ``seed``; the global generator is left as it was.

    Raises:
        UserError: peft is not installed, or no layer has a name that ``targets`` tells.
    """
    try:
        import peft
    except ImportError:
        raise missing_package("lm.lora", "peft", "lora") from None
    scale: Any = config.alpha  # peft declares an int and takes any number
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
                f"lm.lora.target_modules={config.target_modules} fits no linear layer of this model: {reason}"
            ) from None
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def enable_gradient_checkpointing(model: Any) -> None:
    """Keep only the input of each decoder layer for the backward pass, which computes the rest again.

    Unlike transformers' own switch it works on a frozen model in ``eval()``, whose projector needs the gradient.
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
