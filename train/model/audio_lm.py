"""The model of a run: features -> projector -> soft tokens -> prompt -> frozen language model -> loss or text.

Takes features [B, T, C] of the encoder, their mask, and texts; returns a :class:`BatchLoss` (the loss of a batch is
``out.nll.sum() / out.tokens.sum()``) or decoded texts. Only the projector has gradients, unless the LM is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from train.config.model import DecodeConfig
from train.distributed.device import to_device
from train.lms.base import LanguageModel, LmRequest, SeparatePasses
from train.lms.packing import valid_soft
from train.model.joint_decoding import CtcPrefixes, SpelledPrefixes, joint_decode, max_utterances, token_bytes
from train.model.prompt import Prompt, PromptRow
from train.projectors.base import Projector
from train.projectors.codes import CodeEmbedding
from train.projectors.ctc import best_path, ctc_nll

Scores = dict[str, tuple[Tensor, Tensor]]  # see ``Projector.take_scores``


class CtcClasses(Protocol):
    """The classes of a CTC head; class c, from 1, is the token ``tokens[c - 1]``."""

    tokens: list[int]

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the classes of ``text``."""
        ...


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """The losses of one batch: one value per utterance, summed over its targets."""

    nll: Tensor  # [B] float32, negative log-likelihood in nats, with gradient
    tokens: Tensor  # [B] int64 on the CPU, number of targets: the tokens of the text and its end
    soft_rms: Tensor  # scalar float32, RMS of the valid soft tokens; detached
    auxiliary: dict[str, Tensor] = field(default_factory=dict)  # [B] by their names in metrics.jsonl, with gradient


def batch_loss(request: LmRequest, nll: Tensor, auxiliary: dict[str, Tensor] | None = None) -> BatchLoss:
    """Return the loss of ``request``, whose rows have the negative log-likelihoods ``nll`` [B]."""
    tokens = torch.tensor([len(ids) for ids in request.targets])
    soft_rms = valid_soft(request.soft.detach(), request.soft_mask).float().square().mean().sqrt()
    return BatchLoss(nll, tokens, soft_rms, auxiliary or {})


def projector_input(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``features`` in ``dtype``; integer codes as they are, because floats of 16 bits do not hold them."""
    return features.to(dtype) if features.is_floating_point() else features


class AudioLM(nn.Module):
    """A projector, a language model and a prompt. Use ``nll`` to train and evaluate, ``generate`` to decode."""

    def __init__(
        self,
        projector: Projector,
        lm: LanguageModel,
        prompt: Prompt,
        ctc_head: nn.Module | None = None,
        ctc_tokenizer: CtcClasses | None = None,
        decode: DecodeConfig | None = None,
    ) -> None:
        """Join the parts.

        Args:
            ctc_head: scores tokens of the LM for an auxiliary CTC loss and for decoding; it may be the projector's.
            ctc_tokenizer: the classes of ``ctc_head``.
            decode: whether the head takes part in decoding.
        """
        super().__init__()
        for module in projector.modules():
            if isinstance(module, CodeEmbedding):
                module.dtype = lm.dtype
        self.projector, self.lm, self.prompt = projector, lm, prompt
        self.ctc_head, self.ctc_tokenizer = ctc_head, ctc_tokenizer
        self.decode = decode or DecodeConfig()
        self._spellings: list[bytes] = []  # of the tokens of the head, once they are needed

    def soft_tokens(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map features [B, T, C] of any float dtype, or codes, on the CPU or the LM's device, to soft tokens.

        ``mask`` is bool [B, T] on the CPU.

        Returns:
            soft [B, S, D] in the LM's dtype on the LM's device, and soft_mask [B, S] bool on the CPU.
        """
        device, dtype = self.lm.device, self.lm.dtype
        features = projector_input(to_device(features, device), dtype)  # the device casts faster than the CPU
        soft, soft_mask = self.projector(features, to_device(mask, device))
        if device.type != "cpu":
            soft_mask = soft_mask.cpu() if self.projector.content_decides else self._soft_mask(mask, soft.shape[1])
        if self.projector.read_spelling:
            return self._after_spelling(soft.to(dtype), soft_mask)
        return soft.to(dtype), soft_mask

    def most_soft_tokens(self, frames: int) -> int:
        """Return the most soft tokens of an utterance of ``frames`` frames."""
        spelled = (
            -(-frames // 2) + 1 if self.projector.read_spelling else 0
        )  # a byte a step of two frames, a line break
        return self.projector.soft_frames(frames) + spelled

    def _after_spelling(self, soft: Tensor, soft_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Put the tokens of what the projector's bytes spell, and a line break, in front of the soft tokens.

        On a GPU the host waits for the likeliest path. The result has no gradient to the bytes.
        """
        paths = best_path(*self.projector.last_scores()["bytes"])
        texts = [bytes(each - 1 for each in path).decode(errors="ignore").strip() for path in paths]
        ids = [self.lm.tokenizer.encode(f"{text}\n") if text else [] for text in texts]
        flat = to_device(torch.tensor([each for row in ids for each in row], dtype=torch.int64), soft.device)
        spelled = torch.split(self.lm.embed(flat).to(soft.dtype), [len(row) for row in ids])
        counts = soft_mask.sum(1).tolist()
        rows = [torch.cat([own, row[:count]]) for own, row, count in zip(spelled, soft, counts, strict=True)]
        lengths = torch.tensor([len(row) for row in rows])
        return pad_sequence(rows, batch_first=True), torch.arange(int(lengths.max())) < lengths[:, None]

    def _soft_mask(self, mask: Tensor, width: int) -> Tensor:
        """Return the mask of the soft tokens, bool [B, ``width``] on the CPU, from that of the frames."""
        lengths = torch.tensor([self.projector.soft_frames(frames) for frames in mask.sum(1).tolist()])
        return torch.arange(width) < lengths[:, None]

    def request(
        self,
        features: Tensor,
        mask: Tensor,
        texts: Sequence[str] | None = None,
        rows: Sequence[PromptRow] | None = None,
    ) -> LmRequest:
        """Return the input of the LM: the soft tokens of the audio inside the prompt, with ``texts`` [B] as targets.

        ``rows`` [B] select the instructions; without them, each is ``prompt.instruction``.
        """
        soft, soft_mask = self.soft_tokens(features, mask)
        targets = [[]] * len(soft) if texts is None else [self.prompt.target_ids(text) for text in texts]
        prefix, suffix = self.prompt.ids(rows or [PromptRow()] * len(soft))
        return LmRequest(soft, soft_mask, prefix, suffix, targets, self.prompt.ends)

    def nll(
        self, features: Tensor, mask: Tensor, texts: Sequence[str], rows: Sequence[PromptRow] | None = None
    ) -> BatchLoss:
        """Return the loss of ``texts`` [B] given the audio. Padding and other rows of the batch do not affect a row."""
        return ModelList([self]).nll(features, mask, texts, rows)[0]

    def ctc_nll(self, request: LmRequest, scores: Scores, texts: Sequence[str]) -> Tensor:
        """Return the CTC loss of ``texts`` [B] in nats, float32 [B], for the soft tokens of ``request``.

        ``scores`` are those that the projector kept, if it merges time steps to soft tokens.
        """
        classes = [self._classes().encode(text) for text in texts]
        return ctc_nll(*self._ctc_scores(request, scores), classes)

    def _classes(self) -> CtcClasses:
        if self.ctc_tokenizer is None:
            raise ValueError("the model has no CTC head: set ctc.weight")
        return self.ctc_tokenizer

    def _ctc_scores(self, request: LmRequest, scores: Scores) -> tuple[Tensor, Tensor]:
        """Return the scores of the CTC head [B, S, 1 + V] and their mask [B, S]."""
        if self.ctc_head is None:
            raise ValueError("the model has no CTC head: set ctc.weight")
        return scores.get("tokens") or (self.ctc_head(request.soft), request.soft_mask)

    @torch.no_grad()
    def candidate_nll(
        self, features: Tensor, mask: Tensor, texts: Sequence[str], row: PromptRow | None = None
    ) -> Tensor:
        """Return the negative log-likelihood of each of ``texts`` given one utterance.

        Args:
            features: [1, T, C].
            mask: bool [1, T].
            texts: the candidates.
            row: selects the instruction, as in :meth:`request`.

        Returns:
            nats, float32 [len(texts)].
        """
        soft, soft_mask = self.soft_tokens(features, mask)
        targets = [self.prompt.target_ids(text) for text in texts]
        (prefix,), (suffix,) = self.prompt.ids([row or PromptRow()])
        return self.lm.candidate_nll(valid_soft(soft, soft_mask), prefix, suffix, targets)

    @torch.no_grad()
    def generate(
        self,
        features: Tensor,
        mask: Tensor,
        max_new_tokens: int = 64,
        on_token: Callable[[list[str]], None] | None = None,
        rows: Sequence[PromptRow] | None = None,
    ) -> list[str]:
        """Decode each utterance as ``decode`` says; the texts do not include the end.

        ``rows`` [B] select the instructions, as in :meth:`request`. ``on_token`` is called with the texts so far after
        every token; with a CTC head in decoding, once.
        """
        if self.decode.ctc_weight:
            texts = self._decode_jointly(self.request(features, mask, None, rows), max_new_tokens)
            (on_token or (lambda texts: None))(texts)
            return texts
        if on_token is None:
            return ModelList([self]).generate(features, mask, max_new_tokens, rows)[0]
        request, decode = self.request(features, mask, None, rows), self.lm.tokenizer.decode
        generated_ids: list[list[int]] = [[] for _ in request.soft]

        def step(tokens: list[int]) -> None:
            for ids, token in zip(generated_ids, tokens, strict=True):
                ids += [token] if token not in self.prompt.ends else []
            on_token([decode(ids) for ids in generated_ids])

        found = self.lm.generate(
            request.soft, request.soft_mask, request.prefix, request.suffix, max_new_tokens, step, request.ends
        )
        return [decode(ids) for ids in found]

    def _decode_jointly(self, request: LmRequest, max_new_tokens: int) -> list[str]:
        own = self.projector.take_scores()
        scores, mask = self._ctc_scores(request, own)
        spellings: list[bytes] = []
        if self.decode.spelling_weight:
            spellings = self._spellings = self._spellings or token_bytes(
                self.lm.tokenizer.decode, self._classes().tokens
            )
        tokens, size = self._classes().tokens, max_utterances(self.decode, self.lm.device)
        ends = request.ends or self.lm.tokenizer.ends
        if self.decode.context is not None:
            encode, rows = self.lm.tokenizer.encode, len(mask)
            ids = encode(self.decode.context)
            ends = ends | {ids[-1], encode("\n")[-1]}  # a tokenizer may join the line break with what precedes it
            request = LmRequest(request.soft[:, :0], request.soft_mask[:, :0], [ids] * rows, [[]] * rows, [], ends)
        texts: list[str] = []
        for start in range(0, len(mask), size):
            part = slice(start, start + size)
            prompt = request.prefix[part], request.suffix[part]
            decoding = self.lm.decoding(request.soft[part], request.soft_mask[part], *prompt, max_new_tokens)
            prefixes = CtcPrefixes(scores[part], mask[part])
            spelled = None
            if spellings:
                of_bytes, of_steps = own["bytes"]
                spelled = SpelledPrefixes(of_bytes[part], of_steps[part], spellings)
            found = joint_decode(decoding, prefixes, tokens, ends, self.decode, max_new_tokens, spelled)
            texts += [self.lm.tokenizer.decode(ids) for ids in found]
        return texts


class ModelList:
    """Models that share one language model; ``passes`` runs the requests of all of them through it."""

    def __init__(self, models: Sequence[AudioLM], passes: SeparatePasses | None = None) -> None:
        """By default each model gets a separate pass of the language model."""
        self.models, self.passes = models, passes or SeparatePasses(models[0].lm)

    def nll(
        self, features: Tensor, mask: Tensor, texts: Sequence[str], rows: Sequence[PromptRow] | None = None
    ) -> list[BatchLoss]:
        """As :meth:`AudioLM.nll`, for each model."""
        requests = [model.request(features, mask, texts, rows) for model in self.models]
        return [batch_loss(*each) for each in zip(requests, self.passes.nll(requests), strict=True)]

    @torch.no_grad()
    def generate(
        self, features: Tensor, mask: Tensor, max_new_tokens: int, rows: Sequence[PromptRow] | None = None
    ) -> list[list[str]]:
        """As :meth:`AudioLM.generate`, for each model."""
        if any(model.decode.ctc_weight for model in self.models):
            return [model.generate(features, mask, max_new_tokens, rows=rows) for model in self.models]
        requests = [model.request(features, mask, None, rows) for model in self.models]
        found = self.passes.generate(requests, max_new_tokens)
        return [[model.lm.tokenizer.decode(ids) for ids in own] for model, own in zip(self.models, found, strict=True)]
