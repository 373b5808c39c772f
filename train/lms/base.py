"""The interface of language models that take soft tokens as input.

A language model takes the soft tokens [B, S, D] of a projector with prompt and target token ids, and returns the
negative log-likelihood of the targets in nats, or generated ids. ``train/lms/hf/`` wraps Hugging Face causal LMs that
take ``inputs_embeds``; ``train/lms/nanochat/`` implements nanochat's GPT; ``load.py`` loads either from a reference.

Letters: B rows, S soft tokens, T positions, D the LM's width, N target tokens of the batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute  # this package has a module of that name

from train.distributed.group import ProcessGroup
from train.lms.packing import Ids, PackedInputs, pack_inputs, valid_soft

# Logits in memory at a time: of float32 128 MiB to 1 GiB, and three times as much for what is computed from them.
MIN_LOGITS, MAX_LOGITS = 2**25, 2**28
_LOGITS_SHARE = 16  # of the free memory of a GPU, one part


def choose_max_logits(device: torch.device) -> int:
    """Return how many logits may be in memory at a time: on a GPU a share of what is free now, as a power of two."""
    if device.type != "cuda":
        return MIN_LOGITS
    free: int = torch.cuda.mem_get_info(device)[0]
    bits = (free // (4 * _LOGITS_SHARE)).bit_length()
    return max(MIN_LOGITS, min(MAX_LOGITS, 1 << max(0, bits - 1)))


class Tokenizer(Protocol):
    """Converts text to token ids and back.

    Attributes:
        eos: the token that ends a text.
        ends: the tokens that end an answer, ``eos`` among them.
        bos: the token that begins a text.
        now: what a chat template shows as the date.
    """

    eos: int
    ends: frozenset[int]
    bos: int | None
    now: datetime

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the ids of ``text``; with ``special`` (for prompts), special tokens in the text are recognized."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids``."""
        ...

    def chat(self, user: str) -> str:
        """Return the user turn ``user`` and the start of the answer in the model's chat template."""
        ...

    def chat_end(self) -> int:
        """Return the token with which the chat template ends an answer; ``eos`` if it does not end one."""
        ...


class Decoding:
    """Rows that grow by one token at a time.

    Attributes:
        logits: float32 [R, V], scores of the next token of each row.
    """

    logits: Tensor

    def extend(self, tokens: Tensor, parents: Tensor | None = None) -> None:
        """Append ``tokens``, int64 [R'], to rows: the new row i continues row ``parents[i]`` (None: row i)."""
        raise NotImplementedError


class WholeRows(Decoding):
    """Rows of a language model that keeps no state: each token computes them again."""

    def __init__(self, lm: LanguageModel, soft: Tensor, soft_mask: Tensor, prefix: Ids, suffix: Ids) -> None:
        self._lm, self._soft, self._soft_mask, self._prefix = lm, soft, soft_mask, list(prefix)
        self._rows = [list(ids) for ids in suffix]
        self._read()

    def extend(self, tokens: Tensor, parents: Tensor | None = None) -> None:
        if parents is not None:
            kept = parents.tolist()
            self._soft, self._soft_mask = self._soft[parents], self._soft_mask[kept]
            self._prefix, self._rows = [self._prefix[i] for i in kept], [self._rows[i] for i in kept]
        self._rows = [[*row, token] for row, token in zip(self._rows, tokens.tolist(), strict=True)]
        self._read()

    def _read(self) -> None:
        packed = pack_inputs(self._soft_mask.sum(1), self._prefix, self._rows, device=self._soft.device)
        hidden = self._lm.hidden(packed, valid_soft(self._soft, self._soft_mask))
        self.logits = self._lm.logits(hidden[torch.arange(len(hidden), device=hidden.device), packed.last_positions])


class LanguageModel(nn.Module):
    """Base class of language models. Frozen (``eval()``, no gradients) unless ``trainable``.

    A subclass implements ``hidden``, ``logits`` and ``embed``, and ``decoding`` if it keeps state between tokens; this
    class packs inputs, selects target positions and sums their losses. A frozen model does not run under ``no_grad``,
    because the projector's gradient flows through it.
    """

    reference: str  # as the user wrote it
    identity: str  # recorded by a run; equal weights have equal identities
    files: dict[str, str]  # sha256 of the configs and the tokenizer's files, by name
    tokenizer: Tokenizer
    width: int  # D
    vocab_size: int  # V, of the logits
    embedding_rms: float  # RMS of the token embeddings; initial gain of a projector's output norm
    dtype: torch.dtype  # of the activations
    trainable: bool = False
    max_positions: int | None = None  # that the model was made for; None: unknown, or any number
    learned_positions: bool = False  # whether there are no embeddings of further positions
    padding_free: bool = False  # whether losses are computed of joined rows
    max_logits: int = MIN_LOGITS  # at a time; chosen once for a run, because its losses are rounded differently

    @property
    def soft_width(self) -> int:
        """D of the vectors that a projector makes for this model."""
        return self.width

    @property
    def soft_rms(self) -> float:
        """RMS at which they start, if the projector has an output norm."""
        return self.embedding_rms

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    def passes_together(self, group: ProcessGroup) -> AbstractContextManager[None]:
        """Context manager, entered by all ranks of ``group``, in which each may run any number of passes."""
        return nullcontext()

    def idle_request(self) -> LmRequest | None:
        """Return what a rank without utterances computes in a training step: nothing, unless ranks share the model."""
        return None

    def train(self, mode: bool = True) -> LanguageModel:
        """Set the training mode as ``nn.Module.train`` does; a frozen model stays in ``eval()``."""
        super().train(mode and self.trainable)
        return self

    def hidden(self, packed: PackedInputs, soft_ND: Tensor) -> Tensor:
        """Return the hidden states before the head, [B, T, D], for ``packed`` with ``soft_ND`` in its soft positions.

        Of joined rows, [1, T, D].
        ``soft_ND`` is [valid soft tokens of the batch, D].
        """
        raise NotImplementedError

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Map hidden states [N, D] to logits [N, V] float32."""
        raise NotImplementedError

    def embed(self, ids: Tensor) -> Tensor:
        """Map ids, int64 [..., T], to input embeddings [..., T, D] in the LM's dtype."""
        raise NotImplementedError

    def to_input_embeddings(self, soft: Tensor) -> Tensor:
        """Map soft tokens [..., D] to what the LM makes of them at its input [..., D], comparable with ``embed``."""
        return soft

    def target_nll(self, soft: Tensor, soft_mask: Tensor, prefix: Ids, suffix: Ids, targets: Ids) -> Tensor:
        """Return the negative log-likelihood of the targets, summed over each row; differentiable in ``soft``.

        Logits are computed only at target positions, and at most ``max_logits`` values at a time.

        Args:
            soft: [B, S, D].
            soft_mask: bool [B, S], on the CPU; other soft tokens are not read.
            prefix: ids before the soft tokens, per row.
            suffix: ids after the soft tokens, per row.
            targets: ids to predict after the suffix, per row.

        Returns:
            nats, float32 [B].
        """
        packed = self.pack(soft_mask, prefix, suffix, targets)
        hidden_BTD = self.hidden(packed, valid_soft(soft, soft_mask))
        return packed.sum_by_row(self._token_nll(packed.at_targets(hidden_BTD), packed.targets))

    def pack(self, soft_mask: Tensor, prefix: Ids, suffix: Ids, targets: Ids) -> PackedInputs:
        """Return the inputs of a loss; arguments are those of :meth:`target_nll`."""
        pad: Literal["right", "none"] = "none" if self.padding_free else "right"
        return pack_inputs(soft_mask.sum(1), prefix, suffix, targets, pad, self.device)

    def candidate_nll(self, soft_SD: Tensor, prefix: Sequence[int], suffix: Sequence[int], candidates: Ids) -> Tensor:
        """Return ``target_nll`` of each of ``candidates`` after the same soft tokens [S, D] and prompt.

        A subclass may compute soft tokens and prompt once for all candidates.

        Returns:
            nats, float32 [len(candidates)].
        """
        rows = len(candidates)
        soft, mask = soft_SD.expand(rows, -1, -1), torch.ones(rows, len(soft_SD), dtype=torch.bool)
        return self.target_nll(soft, mask, [prefix] * rows, [suffix] * rows, candidates)

    def _token_nll(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        """Map [N, D], [N] to the loss of each token in nats [N].

        If the logits exceed ``max_logits``, they are computed in pieces and recomputed in the backward pass.
        """

        def nll(hidden: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(self.logits(hidden), targets, reduction="none")

        rows = max(1, self.max_logits // self.vocab_size)
        if len(targets_N) <= rows:
            return nll(hidden_ND, targets_N)
        starts = range(0, len(targets_N), rows)
        pieces = [(hidden_ND[i : i + rows], targets_N[i : i + rows]) for i in starts]
        return torch.cat([recompute(nll, hidden, targets, use_reentrant=False) for hidden, targets in pieces])

    def decoding(self, soft: Tensor, soft_mask: Tensor, prefix: Ids, suffix: Ids, max_new_tokens: int) -> Decoding:
        """Return the state of rows [prefix | soft tokens | suffix] that are continued by up to ``max_new_tokens``.

        Args are those of :meth:`target_nll`. This implementation computes whole rows for each token.
        """
        return WholeRows(self, soft, soft_mask, prefix, suffix)

    @torch.no_grad()
    def generate(
        self,
        soft: Tensor,
        soft_mask: Tensor,
        prefix: Ids,
        suffix: Ids,
        max_new_tokens: int,
        on_token: Callable[[list[int]], None] = lambda tokens: None,
        ends: frozenset[int] | None = None,
    ) -> list[list[int]]:
        """Generate greedily until one of ``ends`` (not returned) or ``max_new_tokens``; return the ids of each row.

        ``on_token`` is called with the next token of each row, one of ``ends`` for rows that have ended. By default,
        ``ends`` are those of the tokenizer.
        """
        ends = ends or self.tokenizer.ends
        steps: list[list[int]] = []
        done = [False] * len(prefix)
        decoding = self.decoding(soft, soft_mask, prefix, suffix, max_new_tokens) if max_new_tokens else None
        while decoding is not None:
            chosen = decoding.logits.argmax(-1)
            tokens = [min(ends) if ended else token for token, ended in zip(chosen.tolist(), done, strict=True)]
            steps.append(tokens)
            on_token(tokens)
            done = [token in ends for token in tokens]
            if all(done) or len(steps) == max_new_tokens:
                break
            decoding.extend(chosen)
        return until_end(list(zip(*steps, strict=True)) if steps else [[] for _ in prefix], ends)


@dataclass(frozen=True, slots=True)
class LmRequest:
    """Input of a language model: rows [prefix | soft tokens | suffix | targets], one per utterance.

    ``soft`` is [B, S, D]; ``soft_mask`` is bool [B, S] on the CPU, so that no size has to be asked of a GPU. Generation
    ignores ``targets``; only generation uses ``ends``, see :meth:`LanguageModel.generate`.
    """

    soft: Tensor
    soft_mask: Tensor
    prefix: Ids
    suffix: Ids
    targets: Ids
    ends: frozenset[int] | None = None


class SeparatePasses:
    """Runs each :class:`LmRequest` in a separate pass of ``lm``."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm

    def nll(self, requests: Sequence[LmRequest]) -> list[Tensor]:
        """Return ``LanguageModel.target_nll`` of each request: nats, float32 [B]."""
        return [self.lm.target_nll(r.soft, r.soft_mask, r.prefix, r.suffix, r.targets) for r in requests]

    def generate(self, requests: Sequence[LmRequest], max_new_tokens: int) -> list[list[list[int]]]:
        """Return ``LanguageModel.generate`` of each request: the generated ids of each row."""
        return [
            self.lm.generate(r.soft, r.soft_mask, r.prefix, r.suffix, max_new_tokens, ends=r.ends) for r in requests
        ]


def until_end(rows: Ids, ends: frozenset[int]) -> list[list[int]]:
    """Return each of ``rows`` up to, and without, its first id that is one of ``ends``."""
    return [list(takewhile(lambda token: token not in ends, row)) for row in rows]
