"""Projectors: encoder frames in, soft tokens (rows of a language model's input) out.

In: features [B, T, C] in the run's dtype and their mask [B, T]. Out: soft tokens [B, S, D] in the same dtype and their
mask [B, S]. Weights are float32 masters, cast to the input's dtype in ``forward``. ``base.py`` says what a projector is
and how one of yours comes in; ``mixer.py`` puts several layers in front of one. An export carries the files of its
projector as they are, so these import torch and each other alone, relatively; ``standalone.py`` loads them there.

Letters: B utterances, T frames, C encoder channels, k frames stacked, S soft tokens, H hidden width, D the LM's width.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

import torch

from shards.errors import UserError
from train.config.model import CustomConfig, ProjectorConfig
from train.projectors.base import Projector, init_linear_layers, under_autocast
from train.projectors.conv import ConvProjector
from train.projectors.mixer import LayerMixer, MixedProjector
from train.projectors.mlp import LinearProjector, MlpProjector, PoolProjector, ResidualProjector, SwigluProjector
from train.projectors.moe import make_moe
from train.projectors.qformer import QformerProjector
from train.projectors.transformer import TransformerProjector

__all__ = ["REGISTRY", "LayerMixer", "MixedProjector", "Projector", "build_projector"]

# each takes its own configuration model, C, D and the RMS of the LM's embeddings
REGISTRY: dict[str, Callable[..., Projector]] = {
    "mlp": MlpProjector,
    "residual": ResidualProjector,
    "linear": LinearProjector,
    "conv": ConvProjector,
    "swiglu": SwigluProjector,
    "qformer": QformerProjector,
    "moe": make_moe,
    "pool": PoolProjector,
    "transformer": TransformerProjector,
}


def build_projector(
    config: ProjectorConfig, channels: int, width: int, embedding_rms: float, *, seed: int = 0
) -> Projector:
    """The projector of ``config`` from ``channels`` to ``width``; an output norm's gain starts at ``embedding_rms``.

    Start values come from a generator of their own: the same seed gives the same bytes, whatever ran before.

    Raises:
        UserError: the sizes cannot be, or a projector of the user's cannot be found or made.
    """
    if channels < 1 or width < 1:
        raise UserError(f"a projector from {channels} channels to width {width} cannot be: both must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    if isinstance(config, CustomConfig):
        projector = _build_custom(config, channels, width, embedding_rms, seed)
        projector.init_weights(generator)
        return projector
    try:
        projector = REGISTRY[config.kind](config, channels, width, embedding_rms)
    except ValueError as error:
        raise UserError(f"projector.kind={config.kind}: {error}") from None
    projector.init_weights(generator)
    if config.init != "source":
        init_linear_layers(projector, config.init, generator)
    return projector


def _build_custom(config: CustomConfig, channels: int, width: int, embedding_rms: float, seed: int) -> Projector:
    """The user's class at ``module:Class``, constructed under ``seed``; the global generator is left as it was."""
    module, name = config.kind.split(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that it hides nothing; console scripts do not have it
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise UserError(f"projector.kind={config.kind}: '{module}' cannot be imported ({error})") from None
    if not (isinstance(found, type) and issubclass(found, Projector)):
        raise UserError(f"projector.kind={config.kind} is no class derived from train.projectors.Projector")
    make = under_autocast(found)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            made: Projector = make(channels, width, embedding_rms, **config.settings)
            return made
        except TypeError as error:
            raise UserError(f"projector.kind={config.kind} cannot be made with projector.settings: {error}") from None
