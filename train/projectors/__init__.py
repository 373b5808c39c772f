"""Projectors: map encoder frames to soft tokens, vectors in a language model's input.

A projector takes features [B, T, C] in the run's dtype and their mask [B, T], and returns soft tokens [B, S, D] in the
same dtype and their mask [B, S]. Weights are float32 and cast to the input's dtype in ``forward``. ``base.py`` defines
the interface and shows how to write a projector of your own; ``mixer.py`` mixes several layers in front of a projector,
``codes.py`` embeds the integer codes of a codec.
An export contains copies of the files of its projector, so these import only torch and, relatively, each other;
``standalone.py`` loads them there.

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
from train.projectors.codes import CodeEmbedding, CodesProjector
from train.projectors.conv import ConvProjector
from train.projectors.ctc import HeadTokens
from train.projectors.mixer import LayerMixer, MixedProjector
from train.projectors.mlp import LinearProjector, MlpProjector, PoolProjector, ResidualProjector, SwigluProjector
from train.projectors.moe import make_moe
from train.projectors.posterior import PosteriorProjector
from train.projectors.qformer import QformerProjector
from train.projectors.transformer import TransformerProjector

__all__ = [
    "REGISTRY",
    "CodesProjector",
    "LayerMixer",
    "MixedProjector",
    "Projector",
    "build_projector",
    "embed_codes",
]

# arguments of each: its configuration model, C, D and the RMS of the LM's embeddings
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
    "posterior": PosteriorProjector,
}


def build_projector(
    config: ProjectorConfig,
    channels: int,
    width: int,
    embedding_rms: float,
    *,
    seed: int = 0,
    head_tokens: HeadTokens | None = None,
) -> Projector:
    """Build the projector of ``config`` from ``channels`` to ``width``.

    The gain of an output norm starts at ``embedding_rms``. Initial weights are drawn from a separate generator: the
    same seed always produces the same bytes.

    Args:
        head_tokens: the tokens of a CTC head; ``posterior`` needs them.

    Raises:
        UserError: a size is invalid, or a user's class cannot be imported or constructed.
    """
    if channels < 1 or width < 1:
        raise UserError(
            f"a projector from {channels} channels to width {width} is not possible: both must be at least 1"
        )
    generator = torch.Generator().manual_seed(seed)
    if isinstance(config, CustomConfig):
        projector = _build_custom(config, channels, width, embedding_rms, seed)
        projector.init_weights(generator)
        return projector
    own: tuple[HeadTokens, ...] = ()
    if config.kind == "posterior":
        if head_tokens is None:
            raise ValueError("projector.kind=posterior needs the tokens of its head")
        own = (head_tokens,)
    try:
        projector = REGISTRY[config.kind](config, channels, width, embedding_rms, *own)
    except ValueError as error:
        raise UserError(f"projector.kind={config.kind}: {error}") from None
    projector.init_weights(generator)
    if config.init != "source":
        init_linear_layers(projector, config.init, generator)
    return projector


def embed_codes(projector: Projector, codebooks: int, size: int, dim: int, *, seed: int = 0) -> CodesProjector:
    """Return ``projector``, of ``dim`` channels, behind initial embeddings of codes [B, T, ``codebooks``]."""
    embedding = CodeEmbedding(codebooks, size, dim)
    embedding.init_weights(torch.Generator().manual_seed(seed))
    return CodesProjector(embedding, projector)


def _build_custom(config: CustomConfig, channels: int, width: int, embedding_rms: float, seed: int) -> Projector:
    """Construct the user's class at ``module:Class`` under ``seed``; the global generator does not change."""
    module, name = config.kind.split(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that it shadows nothing; console scripts do not have it
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise UserError(f"projector.kind={config.kind}: '{module}' cannot be imported ({error})") from None
    if not (isinstance(found, type) and issubclass(found, Projector)):
        raise UserError(f"projector.kind={config.kind} is not a subclass of train.Projector")
    projector_class = under_autocast(found)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            projector: Projector = projector_class(channels, width, embedding_rms, **config.settings)
            return projector
        except TypeError as error:
            raise UserError(
                f"projector.kind={config.kind} cannot be constructed with projector.settings: {error}"
            ) from None
