"""load."""

from __future__ import annotations

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
    """The language model of ``reference``: ``nanochat:d<depth>`` (random, from ``seed``), ``nanochat:FOLDER`` or what
    ``weights`` resolves, with the other settings of ``options`` (its ``model`` and ``train`` are not read).

    ``dtype`` is that of the activations; a model that trains keeps float32 masters.

    Raises:
        UserError: the reference cannot be resolved, or the model lacks what a run needs (see ``hf.py``).
    """
    options = options or LmConfig()
    if reference.startswith("nanochat:"):
        from train.lms.nanochat.model import load_nanochat

        return load_nanochat(reference, device=device, dtype=dtype, train=train, seed=seed, options=options)
    if options.audio_value_embedding != "id0":
        raise UserError(
            f"lm.audio_value_embedding={options.audio_value_embedding}: '{reference}' has no value embeddings, only "
            "nanochat models have them"
        )
    from pipeline.weights.resolve import resolve_weights
    from train.lms.hf.model import hash_weights, load_hf

    weights = resolve_weights(reference, role="lm")
    lm: LanguageModel = load_hf(
        weights.folder,
        reference=reference,
        identity=hash_weights(weights.folder),
        device=device,
        dtype=dtype,
        train=train,
        seed=seed,
        options=options,
    )
    return lm
