"""The model of a run: features -> projector -> soft tokens -> prompt -> frozen language model -> loss or text.

In: features [B, T, C] of the encoder, their mask, and texts. Out: a :class:`BatchLoss` (the loss of a batch is
``out.nll.sum() / out.tokens.sum()``), or decoded texts. Only the projector has gradients, unless the LM trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from train.lms.base import LanguageModel, LmRequest, SeparatePasses
from train.model.prompt import Prompt
from train.projectors import Projector


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """The loss of one batch as tensors: one value for each utterance, summed over its targets."""

    nll: Tensor  # [B] float32, negative log-likelihood in nats; carries the gradient
    tokens: Tensor  # [B] int64 on the CPU, targets: the text's tokens and eos
    soft_rms: Tensor  # scalar float32, RMS of the valid soft tokens; detached
    auxiliary: dict[str, Tensor] = field(default_factory=dict)  # [B] by the names of metrics.jsonl; carry the gradient


def batch_loss(request: LmRequest, nll: Tensor, auxiliary: dict[str, Tensor] | None = None) -> BatchLoss:
    """``nll`` [B] of the rows of ``request``, beside what is known of them."""
    tokens = torch.tensor([len(ids) for ids in request.targets])
    soft_rms = request.soft.detach()[request.soft_mask].float().square().mean().sqrt()
    return BatchLoss(nll, tokens, soft_rms, auxiliary or {})


class AudioLM(nn.Module):
    """A projector, a language model and a prompt; ``nll`` for training and evaluation, ``generate`` for decoding."""

    def __init__(self, projector: Projector, lm: LanguageModel, prompt: Prompt) -> None:
        super().__init__()
        self.projector, self.lm, self.prompt = projector, lm, prompt

    def soft_tokens(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, T, C] of any float dtype, mask [B, T] bool -> soft [B, S, D] in the LM's dtype, soft_mask."""
        features = features.to(self.lm.device).to(self.lm.dtype)  # in this order: the device casts faster than a CPU
        soft, soft_mask = self.projector(features, mask.to(self.lm.device))
        return soft.to(self.lm.dtype), soft_mask

    def request(self, features: Tensor, mask: Tensor, texts: Sequence[str] | None = None) -> LmRequest:
        """The rows that the LM reads: soft tokens of the audio inside the prompt, and ``texts`` [B] as targets."""
        soft, soft_mask = self.soft_tokens(features, mask)
        rows = len(soft)
        targets = [[]] * rows if texts is None else [self.prompt.target_ids(text) for text in texts]
        return LmRequest(soft, soft_mask, [self.prompt.prefix] * rows, [self.prompt.suffix] * rows, targets)

    def nll(self, features: Tensor, mask: Tensor, texts: Sequence[str]) -> BatchLoss:
        """The loss of ``texts`` [B] given the audio. Padding frames and the other rows of the batch change nothing."""
        return ModelList([self]).nll(features, mask, texts)[0]

    @torch.no_grad()
    def candidate_nll(self, features: Tensor, mask: Tensor, texts: Sequence[str]) -> Tensor:
        """Nats of each of ``texts`` given the one utterance of features [1, T, C]: float32 [len(texts)]."""
        soft, soft_mask = self.soft_tokens(features, mask)
        targets = [self.prompt.target_ids(text) for text in texts]
        return self.lm.candidate_nll(soft[soft_mask], self.prompt.prefix, self.prompt.suffix, targets)

    @torch.no_grad()
    def generate(
        self,
        features: Tensor,
        mask: Tensor,
        max_new_tokens: int = 64,
        on_token: Callable[[list[str]], None] | None = None,
    ) -> list[str]:
        """The LM's greedy answer to each utterance, without eos. ``told`` gets the texts so far after every token."""
        if on_token is None:
            return ModelList([self]).generate(features, mask, max_new_tokens)[0]
        request, decode, eos = self.request(features, mask), self.lm.tokenizer.decode, self.lm.tokenizer.eos
        generated_ids: list[list[int]] = [[] for _ in request.soft]

        def step(tokens: list[int]) -> None:
            for ids, token in zip(generated_ids, tokens, strict=True):
                ids += [token] if token != eos else []
            on_token([decode(ids) for ids in generated_ids])

        rows = self.lm.generate(request.soft, request.soft_mask, request.prefix, request.suffix, max_new_tokens, step)
        return [decode(ids) for ids in rows]


class ModelList:
    """Models that share one language model, which reads the rows of all of them in the passes of ``passes``."""

    def __init__(self, models: Sequence[AudioLM], passes: SeparatePasses | None = None) -> None:
        """``passes``: by default a pass for each model."""
        self.models, self.passes = models, passes or SeparatePasses(models[0].lm)

    def nll(self, features: Tensor, mask: Tensor, texts: Sequence[str]) -> list[BatchLoss]:
        """As :meth:`AudioLM.nll`, for each model."""
        requests = [model.request(features, mask, texts) for model in self.models]
        return [batch_loss(*each) for each in zip(requests, self.passes.nll(requests), strict=True)]

    @torch.no_grad()
    def generate(self, features: Tensor, mask: Tensor, max_new_tokens: int) -> list[list[str]]:
        """As :meth:`AudioLM.generate`, for each model."""
        rows = self.passes.generate([model.request(features, mask) for model in self.models], max_new_tokens)
        return [[model.lm.tokenizer.decode(ids) for ids in own] for model, own in zip(self.models, rows, strict=True)]
