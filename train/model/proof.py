"""What would fail, or teach nonsense, after hours: shown before the first step of a run.

- rows that are longer than the language model's positions,
- texts that the tokenizer cannot write, so that targets and references are not the text,
- a path from features to text that does not work: one utterance is decoded for three tokens, and its loss computed.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from shards.errors import UserError
from train.config.train import TrainConfig
from train.data.caches import TrainData, Utterances
from train.data.padding import pad
from train.data.text import apply_text_rules
from train.lms.base import Tokenizer
from train.model.audio_lm import AudioLM, projector_input
from train.model.prompt import PromptRow

MAX_TEXTS = 10_000  # texts that are encoded and decoded, evenly spaced over the training rows
MAX_ROWS = 64  # longest rows whose tokens are counted
PROOF_TOKENS = 3


def prove(model: AudioLM, data: TrainData, config: TrainConfig) -> list[str]:
    """Check a run that is about to start; return notes for its user.

    The global random state and the modes of the modules do not change.

    Raises:
        UserError: a row is too long, too many texts are lossy, or the model returns NaN.
    """
    rows = Utterances(data.caches, data.train_rows, data.layers)
    require_positions(model, rows, config)
    notes = check_texts(model.lm.tokenizer, rows, config)
    decode_one(model, rows, config)
    return notes


def require_positions(model: AudioLM, utterances: Utterances, config: TrainConfig) -> None:
    """Require that the longest rows, and those that are decoded, fit the positions of the language model.

    Raises:
        UserError: they do not, and the model cannot exceed them or ``lm.exceed_context`` is not set.
    """
    limit = model.lm.max_positions
    if limit is None or (config.lm.exceed_context and not model.lm.learned_positions):
        return
    columns = utterances.columns("text")
    frames = np.concatenate([cache.max_frames(config.variants) for cache in utterances.caches])[utterances.rows]
    unique, inverse = np.unique(frames, return_inverse=True)
    soft = np.array([model.most_soft_tokens(int(frames)) for frames in unique])[inverse]
    size = soft + np.array([len(text.encode()) for text in columns["text"]])
    longest = np.argsort(-size, kind="stable")[:MAX_ROWS]
    own = Utterances(utterances.caches, utterances.rows[longest]).columns("key", "task", "prompt", "text")
    prompts = model.prompt.ids([*map(PromptRow, own["key"], own["task"], own["prompt"])])
    for i, index in enumerate(longest.tolist()):
        text = apply_text_rules(own["text"][i], config.text)
        answer = max(len(model.prompt.target_ids(text)), config.max_new_tokens)
        length = len(prompts[0][i]) + int(soft[index]) + len(prompts[1][i]) + answer
        if length > limit:
            fix = "" if model.lm.learned_positions else ", or set lm.exceed_context=true"
            raise UserError(
                f"'{own['key'][i]}' needs {length} positions (prompt, {int(soft[index])} soft tokens, text or "
                f"max_new_tokens) and '{model.lm.reference}' has {limit}: stack more frames into a soft token, filter "
                f"long utterances{fix}"
            )


def check_texts(tokenizer: Tokenizer, utterances: Utterances, config: TrainConfig) -> list[str]:
    """Encode and decode texts; return a note with the number that changed and one of them.

    Raises:
        UserError: more changed than ``max_lossy_texts`` allows.
    """
    step = -(-len(utterances) // MAX_TEXTS)
    texts = Utterances(utterances.caches, utterances.rows[::step]).columns("text")["text"]
    lossy = lossy_texts(tokenizer, [apply_text_rules(text, config.text) for text in texts])
    if not lossy:
        return []
    shown, back = lossy[0]
    found = (
        f"{len(lossy):,} of {len(texts):,} texts do not survive the tokenizer of the language model, such as "
        f"{shown[:60]!r}, which becomes {back[:60]!r}"
    )
    limit = config.max_lossy_texts
    if len(lossy) > (limit * len(texts) if limit < 1 else limit):
        raise UserError(f"{found}: choose an lm.model for these texts, or raise max_lossy_texts={limit:g}")
    return [found]


def lossy_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Return the texts, and what becomes of them, that lose a character other than space, case and Unicode form."""
    pairs = ((text, tokenizer.decode(tokenizer.encode(text))) for text in texts)
    return [(text, back) for text, back in pairs if _letters(text) != _letters(back)]


def _letters(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def decode_one(model: AudioLM, utterances: Utterances, config: TrainConfig) -> None:
    """Compute the loss of the first utterance and decode it for three tokens.

    Raises:
        UserError: the loss is NaN or infinite, the language model fails, or the projector makes another number of soft
            tokens than it says.
    """
    first = Utterances(utterances.caches, utterances.rows[:1], utterances.layers)
    columns: dict[str, Any] = first.columns("key", "task", "prompt", "text")
    row = [PromptRow(columns["key"][0], columns["task"][0], columns["prompt"][0])]
    text = [apply_text_rules(columns["text"][0], config.text)]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():  # not inference mode: see train/lms/hf/sharding.py
            features, mask = pad([first.features(0)])
            require_soft_frames(model, features, mask)
            loss = float(model.nll(features, mask, text, row).nll.sum())
            model.generate(features, mask, PROOF_TOKENS, rows=row)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"'{model.lm.reference}' ({type(model.lm).__name__}) cannot decode soft tokens ({type(error).__name__}: "
            f"{reason}): choose another lm.model"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not np.isfinite(loss):
        raise UserError(
            f"the loss of '{columns['key'][0]}' is {loss} before training: set dtype=float32 or another lm.model"
        )


def require_soft_frames(model: AudioLM, features: torch.Tensor, mask: torch.Tensor) -> None:
    """Require that the number of soft tokens of one utterance is that of ``Projector.soft_frames``, which a GPU uses.

    Raises:
        UserError: it is another, and the projector does not say that the content decides.
    """
    projector, device = model.projector, model.lm.device
    _, soft_mask = projector(projector_input(features.to(device), model.lm.dtype), mask.to(device))
    frames, found = features.shape[1], int(soft_mask.sum())
    if not projector.content_decides and found != projector.soft_frames(frames):
        raise UserError(
            f"the projector {type(projector).__name__} makes {found} soft tokens of {frames} frames, and its "
            f"soft_frames says {projector.soft_frames(frames)}: correct it, or set content_decides = True in the class"
        )
