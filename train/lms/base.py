"""Language models that read soft tokens: what a run asks of one, and how a reference becomes one.

In: soft tokens [B, S, D] of a projector, prompt and target token ids. Out: nats of the targets, or generated ids.
``hf.py`` wraps any Hugging Face causal LM that takes ``inputs_embeds``; ``nanochat.py`` holds nanochat's GPT.

Letters: B rows, S soft tokens, T positions, D the LM's width, N target tokens of the batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute  # this package has a module of that name

from train.lms.packing import Ids, PackedInputs, pack_inputs

MAX_LOGITS = 2**25  # float32 numbers held at once: 128 MiB, and as much again for their gradient


class Tokenizer(Protocol):
    """Text to ids and back. With ``special``, special tokens written in the text count as such (prompts alone)."""

    eos: int
    bos: int | None

    def encode(self, text: str, special: bool = False) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def chat(self, user: str) -> str:
        """One user turn and the opening of the answer, as this model's chat template writes them."""
        ...


class LanguageModel(nn.Module):
    """Base of the language models. Frozen (``eval()``, no gradients) unless ``trainable``.

    A subclass computes ``hidden``, ``logits`` and ``embed``; this class splices, selects the target positions and sums
    the nats. There is no ``no_grad`` around a frozen model: the projector's gradient flows through it.
    """

    reference: str  # as the user wrote it
    identity: str  # what a run records: equal weights, equal identity
    tokenizer: Tokenizer
    width: int  # D
    vocab_size: int  # V, of the logits
    embedding_rms: float  # RMS of the rows that tokens become; where an output norm's gain starts
    dtype: torch.dtype  # of the activations
    trainable: bool = False

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> LanguageModel:
        """As ``nn.Module.train``, but a frozen model stays in ``eval()`` when its owner enters training."""
        super().train(mode and self.trainable)
        return self

    def hidden(self, packed: PackedInputs, soft_ND: Tensor) -> Tensor:
        """The rows of ``layout`` with ``soft_ND`` [all valid soft tokens, D] in place -> [B, T, D] before the head."""
        raise NotImplementedError

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, D] -> [N, V] float32."""
        raise NotImplementedError

    def embed(self, ids: Tensor) -> Tensor:
        """int64 [..., T] -> [..., T, D] in the LM's dtype: what tokens become where soft tokens join them."""
        raise NotImplementedError

    def to_input_embeddings(self, soft: Tensor) -> Tensor:
        """[..., D] -> [..., D]: soft tokens as they stand beside the rows of ``embed``."""
        return soft

    def target_nll(self, soft: Tensor, soft_mask: Tensor, prefix: Ids, suffix: Ids, targets: Ids) -> Tensor:
        """Summed cross-entropy of each row's targets, in nats, float32 [B]; differentiable in ``soft``.

        soft [B, S, D], soft_mask [B, S] bool (soft tokens that it excludes are never read). Logits exist at target
        positions only, and of those at most ``MAX_LOGITS`` numbers at a time.
        """
        packed = pack_inputs(soft_mask.sum(1), prefix, suffix, targets)
        nll_N = self._token_nll(self.hidden(packed, soft[soft_mask])[packed.predicts_target], packed.targets)
        return sum_by_row(nll_N, packed)

    def candidate_nll(self, soft_SD: Tensor, prefix: Sequence[int], suffix: Sequence[int], candidates: Ids) -> Tensor:
        """What each of several targets costs after one audio: nats, float32 [len(candidates)], as ``target_nll``.

        soft_SD [S, D]. A subclass may let audio and prompt pass once for all of them.
        """
        rows = len(candidates)
        soft, mask = soft_SD.expand(rows, -1, -1), soft_SD.new_ones(rows, len(soft_SD), dtype=torch.bool)
        return self.target_nll(soft, mask, [prefix] * rows, [suffix] * rows, candidates)

    def _token_nll(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        """[N, D], [N] -> [N] nats. Pieces whose logits would be too many are computed again in the backward pass."""

        def nats(hidden: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(self.logits(hidden), targets, reduction="none")

        rows = max(1, MAX_LOGITS // self.vocab_size)
        if len(targets_N) <= rows:
            return nats(hidden_ND, targets_N)
        starts = range(0, len(targets_N), rows)
        pieces = [(hidden_ND[i : i + rows], targets_N[i : i + rows]) for i in starts]
        return torch.cat([recompute(nats, hidden, targets, use_reentrant=False) for hidden, targets in pieces])

    @torch.no_grad()
    def generate(
        self,
        soft: Tensor,
        soft_mask: Tensor,
        prefix: Ids,
        suffix: Ids,
        max_new_tokens: int,
        on_token: Callable[[list[int]], None] = lambda tokens: None,
    ) -> list[list[int]]:
        """Greedy continuation of each row until eos (not returned) or ``max_new_tokens``; a step reads whole rows.

        ``step`` is told each row's next token as it comes, eos for rows that have ended.
        """
        flat, lengths = soft[soft_mask], soft_mask.sum(1)
        rows, done = [list(ids) for ids in suffix], [False] * len(suffix)
        for _ in range(max_new_tokens):
            packed = pack_inputs(lengths, prefix, rows)
            hidden = self.hidden(packed, flat)
            chosen = (
                self.logits(hidden[torch.arange(len(rows), device=hidden.device), packed.last_positions])
                .argmax(-1)
                .tolist()
            )
            for i, token in enumerate(chosen):
                done[i] = done[i] or token == self.tokenizer.eos
                if not done[i]:
                    rows[i].append(token)
            on_token([self.tokenizer.eos if ended else row[-1] for row, ended in zip(rows, done, strict=True)])
            if all(done):
                break
        return [row[len(ids) :] for row, ids in zip(rows, suffix, strict=True)]


@dataclass(frozen=True, slots=True)
class LmRequest:
    """Rows for a language model: [prefix | soft tokens | suffix | targets], one row for each utterance.

    soft [B, S, D], soft_mask [B, S] bool. Generation ignores ``targets``.
    """

    soft: Tensor
    soft_mask: Tensor
    prefix: Ids
    suffix: Ids
    targets: Ids


class SeparatePasses:
    """Answers each :class:`LmRequest` with a pass of ``lm`` of its own."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm

    def nll(self, requests: Sequence[LmRequest]) -> list[Tensor]:
        """Negative log-likelihood of each row's targets in nats, float32 [B] for each request; see ``target_nll``."""
        return [self.lm.target_nll(r.soft, r.soft_mask, r.prefix, r.suffix, r.targets) for r in requests]

    def generate(self, requests: Sequence[LmRequest], max_new_tokens: int) -> list[list[list[int]]]:
        """Greedy continuations: the ids of each row, for each request; see ``LanguageModel.generate``."""
        return [self.lm.generate(r.soft, r.soft_mask, r.prefix, r.suffix, max_new_tokens) for r in requests]


def sum_by_row(values_N: Tensor, packed: PackedInputs) -> Tensor:
    """A number for each target position of ``layout`` [N] -> their sum in each row [B]."""
    counts = packed.predicts_target.sum(1)
    slots = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
    return values_N.new_zeros(slots.shape).masked_scatter(slots, values_N).sum(1)
