"""Builds a model from the configuration of a run or loads it from the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import UserError
from train.config.train import TrainConfig
from train.data.instructions import Instructions, read_instructions
from train.model.replay import replay_lm, require_same_ids
from train.runs.folder import read_cache_info, read_run_instructions

if TYPE_CHECKING:
    import torch

    from train.lms.base import LanguageModel
    from train.model.audio_lm import AudioLM


def load_run_lm(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, tokens: Sequence[int] | None = None
) -> LanguageModel:
    """Load the language model of ``config``, or for stage 1 what takes its place.

    Args:
        tokens: those of the CTC head, for stage 1.

    Raises:
        UserError: it cannot be loaded.
    """
    from train.lms.load import load_lm

    options = config.lm
    if config.is_stage_one:
        from train.model.ctc import load_ctc

        return load_ctc(config, tokens or [], device)
    return load_lm(options.model, device=device, dtype=dtype, train=options.train, seed=config.seed, options=options)


def build_model(
    config: TrainConfig,
    channels: int,
    device: torch.device,
    dtype: torch.dtype,
    lm: LanguageModel | None = None,
    instructions: Instructions | None = None,
    run: Path | None = None,
    tokens: Sequence[int] | None = None,
    codebook_size: int = 0,
) -> AudioLM:
    """Build the model of ``config`` with its initial weights on ``device``.

    Args:
        config: the configuration of the run.
        channels: channels of the features, per layer.
        device: device of the model.
        dtype: dtype of activations and frozen weights.
        lm: the language model of ``config.lm``, if it is already loaded.
        instructions: the content of the file ``config.prompt.prompts``, if it is already read.
        run: an existing run of ``config``, whose ids are replayed.
        codebook_size: number of values of a code, for features that are integer codes; 0: they are floats.
        tokens: ids of the tokens of a CTC head; None: those of ``run``, if the model has a head.

    Raises:
        UserError: the language model cannot be loaded, or makes other ids than ``run`` was trained with.
    """
    import torch

    from train.model.audio_lm import AudioLM
    from train.model.ctc import CtcTokenizer, ScoringProjector, ctc_head, find_head_tokens, read_tokens, uses_tokens
    from train.model.prompt import Prompt
    from train.projectors import LayerMixer, MixedProjector, build_projector, embed_codes

    torch.manual_seed(config.seed)  # dropout draws from the global generator
    if tokens is None and run is not None and uses_tokens(config):
        tokens = read_tokens(run)
    if lm is None:
        lm = load_run_lm(config, device, dtype, tokens)
    head_tokens = None if tokens is None else find_head_tokens(lm, tokens)
    width, rms = lm.soft_width, lm.soft_rms
    inner = config.code_dim if codebook_size else channels
    projector = build_projector(config.projector, inner, width, rms, seed=config.seed, head_tokens=head_tokens)
    if config.layers > 1:
        projector = MixedProjector(LayerMixer(config.layers, config.normalise_layers), projector)
    if codebook_size:
        projector = embed_codes(projector, channels, codebook_size, config.code_dim, seed=config.seed)
    has_head = config.ctc.weight or config.decode.ctc_weight
    head = ctc_head(projector, head_tokens) if head_tokens is not None and has_head else None
    if config.is_stage_one and head_tokens is not None:
        projector = ScoringProjector(projector, head_tokens)
    if instructions is None and config.prompt.prompts is not None:
        instructions = read_instructions(config.prompt.prompts)
    record = None if run is None else replay_lm(lm, run)
    end = lm.tokenizer.eos if run is not None and record is None else None  # what older runs were taught
    prompt = Prompt(config.prompt, lm.tokenizer, instructions, config.order_seed, config.val.seed, end)
    if run is not None and record is not None:
        require_same_ids(lm, prompt, record, run)
    classes = None if head is None else CtcTokenizer(lm.tokenizer, tokens or [])
    return AudioLM(projector, lm, prompt, head, classes, config.decode).to(device)


def load_model(run: Path, config: TrainConfig, device: torch.device, dtype: torch.dtype) -> AudioLM:
    """Load the trained model of the folder ``run``, in evaluation mode.

    Raises:
        UserError: the run is not finished, or its weights do not match the model of its config.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from train.model.checkpoint import restore_parameters

    weights = run / "projector.safetensors"
    if not weights.is_file():
        raise UserError(f"'{run}' has no trained projector yet: finish it with python -m train fit --resume {run}")
    spec, given = read_cache_info(run)["spec"], read_run_instructions(run)
    model = build_model(
        config, spec.channels, device, dtype, instructions=given, run=run, codebook_size=spec.codebook_size
    )
    try:
        restore_parameters(model, load_file(weights), str(weights))
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{weights}' cannot be read ({error}): train the run again") from None
    return model.eval()
