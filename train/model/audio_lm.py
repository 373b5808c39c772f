"""The model of a run: features -> projector -> soft tokens -> prompt -> frozen language model -> nats of the text.

In: features [B, T, C] of the encoder, their mask, and texts. Out: nats and token counts per utterance (the caller's
loss is ``out.nats.sum() / out.tokens.sum()``), or decoded texts. Gradients exist in the projector
alone, unless the LM trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.lms.base import LanguageModel
from train.model.prompt import Prompt
from train.projectors import Projector


@dataclass(frozen=True, slots=True)
class NatsOutput:
    """What one batch costs."""

    nats: Tensor  # [B] float32, summed over an utterance's targets; carries the gradient
    tokens: Tensor  # [B] int64, targets of each utterance: text and eos
    soft_rms: Tensor  # scalar float32, RMS of the valid soft tokens; detached


class AudioLM(nn.Module):
    """A projector, a language model and a prompt; ``nats`` for training and evaluation, ``generate`` for decoding."""

    def __init__(self, projector: Projector, lm: LanguageModel, prompt: Prompt) -> None:
        super().__init__()
        self.projector, self.lm, self.prompt = projector, lm, prompt

    def soft_tokens(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, T, C] of any float dtype, mask [B, T] bool -> soft [B, S, D] in the LM's dtype, soft_mask."""
        features = features.to(self.lm.device).to(self.lm.dtype)  # in this order: the device casts faster than a CPU
        soft, soft_mask = self.projector(features, mask.to(self.lm.device))
        return soft.to(self.lm.dtype), soft_mask

    def nats(self, features: Tensor, mask: Tensor, texts: Sequence[str]) -> NatsOutput:
        """Nats of ``texts`` [B] given the audio. Padding frames and the other rows of the batch change nothing."""
        soft, soft_mask = self.soft_tokens(features, mask)
        before, after, targets = self.sides(texts)
        nats = self.lm.target_nats(soft, soft_mask, before, after, targets)
        tokens = torch.tensor([len(ids) for ids in targets], device=nats.device)
        return NatsOutput(nats, tokens, self.rms(soft, soft_mask))

    def sides(self, texts: Sequence[str]) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """Ids before and after the soft tokens of each row, and its targets."""
        return *self._around(len(texts)), [self.prompt.target(text) for text in texts]

    @staticmethod
    def rms(soft: Tensor, soft_mask: Tensor) -> Tensor:
        """RMS of the valid soft tokens, a float32 scalar without gradient."""
        return soft.detach()[soft_mask].float().square().mean().sqrt()

    @torch.no_grad()
    def candidates(self, features: Tensor, mask: Tensor, texts: Sequence[str]) -> Tensor:
        """Nats of each of ``texts`` given the one utterance of features [1, T, C]: float32 [len(texts)]."""
        soft, soft_mask = self.soft_tokens(features, mask)
        targets = [self.prompt.target(text) for text in texts]
        return self.lm.candidate_nats(soft[soft_mask], self.prompt.before, self.prompt.after, targets)

    @torch.no_grad()
    def generate(
        self,
        features: Tensor,
        mask: Tensor,
        max_new_tokens: int = 64,
        told: Callable[[list[str]], None] | None = None,
    ) -> list[str]:
        """What the LM says to each utterance, greedily, without its eos. ``told`` hears the texts after every token."""
        soft, soft_mask = self.soft_tokens(features, mask)
        around, decode, eos = self._around(len(soft)), self.lm.tokenizer.decode, self.lm.tokenizer.eos
        if told is None:
            return [decode(ids) for ids in self.lm.generate(soft, soft_mask, *around, max_new_tokens)]
        said: list[list[int]] = [[] for _ in soft]

        def step(tokens: list[int]) -> None:
            for ids, token in zip(said, tokens, strict=True):
                ids += [token] if token != eos else []
            told([decode(ids) for ids in said])

        return [decode(ids) for ids in self.lm.generate(soft, soft_mask, *around, max_new_tokens, step)]

    def _around(self, batch: int) -> tuple[list[list[int]], list[list[int]]]:
        return [self.prompt.before] * batch, [self.prompt.after] * batch
