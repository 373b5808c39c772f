"""Loads a language model from a model reference."""

from __future__ import annotations

from pathlib import Path

import torch

from shards.errors import UserError
from train.config.model import LmConfig
from train.lms.base import LanguageModel


def load_lm(
    reference: str,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    train: bool = False,
    seed: int = 0,
    options: LmConfig | None = None,
) -> LanguageModel:
    """Load the language model of ``reference``.

    Args:
        reference: ``nanochat:d<depth>`` (random weights from ``seed``), ``nanochat:FOLDER``, or a model reference that
            ``pipeline.weights.resolve`` resolves.
        device: device of the weights.
        dtype: dtype of activations and frozen weights; trained weights are float32.
        train: train all weights; otherwise they are frozen.
        seed: seed of random weights and of LoRA adapters.
        options: the other settings; its ``model`` and ``train`` are not read.

    Raises:
        UserError: the reference cannot be resolved, the model cannot be loaded, or ``options`` do not apply to it.
    """
    options = options or LmConfig()
    if reference.startswith("nanochat:"):
        from train.lms.nanochat.model import load_nanochat

        return load_nanochat(reference, device=device, dtype=dtype, train=train, seed=seed, options=options)
    if options.audio_value_embedding != "id0":
        raise UserError(
            f"lm.audio_value_embedding={options.audio_value_embedding} is only for nanochat models, and '{reference}' "
            "is not one: remove it"
        )
    from train.lms.hf.model import hash_weights, load_hf

    folder = resolve_lm(reference)
    lm: LanguageModel = load_hf(
        folder,
        reference=reference,
        identity=hash_weights(folder),
        device=device,
        dtype=dtype,
        train=train,
        seed=seed,
        options=options,
    )
    return lm


def resolve_lm(reference: str) -> Path:
    """Return the folder of a Hugging Face model, whose matrices are numbers and not codes.

    Raises:
        UserError: the reference cannot be resolved, or a matrix is quantized and the config does not say how.
    """
    from pipeline.weights.resolve import read_model_json, resolve_weights
    from pipeline.weights.tensors import refuse_quantized, stored_tensors

    folder = resolve_weights(reference, role="lm").folder
    if not read_model_json(folder / "config.json").get("quantization_config"):  # which transformers applies
        matrices = {name: each for name, each in stored_tensors(folder).items() if name.endswith(".weight")}
        refuse_quantized(folder, {}, matrices)
    return folder
