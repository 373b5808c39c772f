"""Decoding by the language model and a CTC head together, in one beam search over tokens.

The score of a text that has begun is

    w · log p(audio says a text that begins so) + (1 - w) · log p(language model writes these tokens)

with w = ``decode.ctc_weight``. The first probability sums all paths of the CTC head; where both end a text, it is that
of the whole text (Hori et al. 2017, arXiv 1706.02737; Watanabe et al. 2017, doi 10.1109/JSTSP.2017.2763455). A language
model alone may loop, invent or answer; a CTC head alone spells by ear. Hypotheses consist of the head's tokens.
The language model reads the prompt with the soft tokens, or ``decode.context`` instead: a model that copies what it
reads repeats the errors of soft tokens that come from the same head, and one that reads text alone corrects them.

With v = ``decode.spelling_weight``, v · log p(audio spells a text that begins so) is added, the probability of the
text's bytes under a head over bytes, and the language model's weight is 1 - w - v. The bytes of a token are one step
each, so only those of the likeliest hypotheses without them are scored.

Letters: B utterances, K hypotheses of each, S time steps, V tokens of the head, L bytes of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from train.config.model import DecodeConfig
from train.lms.base import Decoding
from train.projectors.ctc import BLANK

NOTHING = -1  # after the last class of a text
IMPOSSIBLE = -1e30  # log-probability: finite, so that differences of it are no NaN
SPELLED_PER_HYPOTHESIS = 3  # texts of which the bytes are scored, for each that is kept
MAX_CPU_ROWS, MAX_GPU_ROWS = 36, 512  # hypotheses decoded together: the key-value cache is copied at each token
SMALLEST = 1e-37  # relative probability below which a next token counts as that unlikely


class CtcPrefixes:
    """Log-probabilities of hypotheses under the scores of a CTC head; at first one of each utterance, the empty text.

    Args:
        scores: [B, S, 1 + V]; class 0 is the blank.
        mask: bool [B, S]; the valid steps of a row come first.
    """

    def __init__(self, scores: Tensor, mask: Tensor) -> None:
        silent = scores.new_full(scores.shape[-1:], IMPOSSIBLE)
        silent[0] = 0.0  # a padding step is a blank
        self._log = torch.where(mask.to(scores.device)[..., None], F.log_softmax(scores.float(), -1), silent)
        # paths through the first s steps, s = 0 … S, that say the hypothesis and end in its last token, or in a blank
        self._blank = F.pad(self._log[..., 0].double().cumsum(1), (1, 0))[:, None]
        self._token = torch.full_like(self._blank, IMPOSSIBLE)
        self._last: Tensor | None = None  # class of each hypothesis' last token, int64 [B, K]

    def whole(self) -> Tensor:
        """Return the log-probability that the audio says exactly each hypothesis, float64 [B, K]."""
        return torch.logaddexp(self._blank, self._token)[..., -1]

    def begun(self) -> Tensor:
        """Return the log-probability of texts that begin with each hypothesis and token, float64 [B, K, V]."""
        before = torch.logaddexp(self._blank, self._token)[..., :-1]  # [B, K, S], paths before step s
        largest = before.max(-1, keepdim=True).values
        found = (before - largest).exp().float() @ self._log[..., 1:].exp()
        log = found.clamp(min=SMALLEST).log().double() + largest
        if self._last is not None:  # a token follows itself only after a blank
            again = torch.logsumexp(self._blank[..., :-1] + self._of(self._last), -1)
            log.scatter_(2, self._last[..., None] - 1, again[..., None])
        return log

    def extend(self, parents: Tensor, classes: Tensor) -> None:
        """Let hypotheses be those of ``parents`` [B, K], each followed by a token: ``classes`` [B, K], from 1."""
        blank, token, last = self._select(parents)
        before = torch.logaddexp(blank, token)
        if last is not None:
            before = torch.where((last == classes)[..., None], blank, before)
        self._token = _sums(before, self._of(classes))
        self._blank = _sums(self._token, self._log[:, None, :, 0].double())
        self._last = classes

    def _select(self, parents: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the state of the hypotheses ``parents`` [B, K]."""
        index = parents[..., None].expand(-1, -1, self._blank.shape[-1])
        last = None if self._last is None else self._last.gather(1, parents)
        return self._blank.gather(1, index), self._token.gather(1, index), last

    def _of(self, classes: Tensor) -> Tensor:
        """Return the log-probability of ``classes`` [B, K] at each step, float64 [B, K, S]."""
        index = classes[:, None].expand(-1, self._log.shape[1], -1)
        return self._log.gather(2, index).transpose(1, 2).double()


class SpelledPrefixes(CtcPrefixes):
    """Log-probabilities of hypotheses under the scores of a CTC head over bytes, of which a token has several.

    Args:
        scores: [B, S, 257]; class 0 is the blank, class 1 + b the byte b.
        mask: as in :class:`CtcPrefixes`.
        spellings: the bytes of each token.
    """

    def __init__(self, scores: Tensor, mask: Tensor, spellings: Sequence[bytes]) -> None:
        super().__init__(scores, mask)
        self._spellings = _byte_classes(spellings).to(scores.device)
        # the first token of a text may begin with a space that the text does not have
        self._first = _byte_classes([own.removeprefix(b" ") for own in spellings]).to(scores.device)
        self.begun_so = self._blank.new_zeros(len(scores), 1)  # log-probability of texts that begin so [B, K]

    def spell(self, parents: Tensor, tokens: Tensor) -> None:
        """Let hypotheses be those of ``parents`` [B, K], each followed by the token ``tokens`` [B, K], from 0."""
        blank, token, last = self._select(parents)
        bytes_of = (self._first if last is None else self._spellings)[tokens].flatten(0, 1)  # [B·K, L]
        last = torch.zeros_like(tokens) if last is None else last
        begun = self.begun_so.gather(1, parents).flatten()
        row = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens).flatten()
        blank, token, last = blank.flatten(0, 1), token.flatten(0, 1), last.flatten()
        for classes in bytes_of.unbind(-1):
            on = classes.nonzero()[:, 0]  # texts whose token has another byte
            if not len(on):
                break
            says, before = self._log[row[on], :, classes[on]].double(), torch.logaddexp(blank[on], token[on])
            before = torch.where((last[on] == classes[on])[:, None], blank[on], before)
            begun[on] = torch.logsumexp(before[:, :-1] + says, -1)
            token[on], last[on] = _sums(before, says), classes[on]
            blank[on] = _sums(token[on], self._log[row[on], :, BLANK].double())
        shape = (*tokens.shape, -1)
        self._blank, self._token = blank.reshape(shape), token.reshape(shape)
        self._last, self.begun_so = last.reshape(tokens.shape), begun.reshape(tokens.shape)

    def keep(self, index: Tensor) -> None:
        """Let hypotheses be those at ``index`` [B, K]."""
        self._blank, self._token, self._last = self._select(index)
        self.begun_so = self.begun_so.gather(1, index)


def _byte_classes(spellings: Sequence[bytes]) -> Tensor:
    """Return the classes of the bytes, int64 [V, L], 0 after the last byte."""
    rows = [torch.tensor([1 + byte for byte in own], dtype=torch.int64) for own in spellings]
    return pad_sequence(rows, batch_first=True)


def token_bytes(decode: Callable[[list[int]], str], tokens: Sequence[int]) -> list[bytes]:
    """Return the bytes that each of ``tokens`` adds to a text that has begun."""
    start = decode([tokens[0]] * 2)
    texts = [(decode([tokens[0]] * 2 + [each]), decode([each])) for each in tokens]
    return [(text[len(start) :] if text.startswith(start) else alone).encode() for text, alone in texts]


def _sums(before: Tensor, step: Tensor) -> Tensor:
    """Return r [.., S + 1] with r[0] = 0 probability and r[s] = (r[s - 1] + before[s - 1]) · step[s], all in logs.

    With sums of ``step`` it is one cumulative sum: r[s] = step[1 … s] + log sum over u < s of before[u] / step[1 … u].
    Float64 [.., S + 1] and [.., S].
    """
    total = step.cumsum(-1)
    start = F.pad(total, (1, 0))[..., :-1]
    found = total + torch.logcumsumexp(before[..., :-1] - start, -1)
    return F.pad(found.clamp(min=IMPOSSIBLE), (1, 0), value=IMPOSSIBLE)


def max_utterances(config: DecodeConfig, device: torch.device) -> int:
    """Return how many utterances are decoded together on ``device``."""
    return max(1, (MAX_CPU_ROWS if device.type == "cpu" else MAX_GPU_ROWS) // config.beam_size)


@torch.no_grad()
def joint_decode(
    decoding: Decoding,
    prefixes: CtcPrefixes,
    tokens: Sequence[int],
    ends: frozenset[int],
    config: DecodeConfig,
    max_new_tokens: int,
    spelled: SpelledPrefixes | None = None,
) -> list[list[int]]:
    """Return the ids of the best text of each utterance, without its end.

    The search is over when nothing that has begun scores higher than the best text that has ended: scores only fall.
    A text of ``max_new_tokens`` may lack its end.

    Args:
        decoding: the state of the language model, a row for each utterance.
        prefixes: the state of the CTC head.
        tokens: id of each class of the head, from 1 [V].
        ends: ids that end a text.
        config: the weight and the number of hypotheses.
        max_new_tokens: most tokens of a text.
        spelled: the state of the head over bytes, for ``decode.spelling_weight``.
    """
    device, rows = decoding.logits.device, len(decoding.logits)
    ids, of_interest = torch.tensor(list(tokens)).to(device), torch.tensor([*tokens, *sorted(ends)]).to(device)
    w, v = config.ctc_weight, config.spelling_weight if spelled is not None else 0.0
    written = torch.zeros(rows, 1, dtype=torch.float64, device=device)  # log-probability by the language model
    texts = torch.zeros(rows, 1, 0, dtype=torch.int64, device=device)
    scores = torch.full_like(written, IMPOSSIBLE)
    best, best_texts = scores[:, 0], texts.new_full((rows, max_new_tokens), NOTHING)
    for _ in range(max_new_tokens):
        logits = decoding.logits.float()
        log = (logits[:, of_interest] - logits.logsumexp(-1, keepdim=True)).double().reshape(rows, -1, len(of_interest))
        ended = w * prefixes.whole() + (1 - w - v) * (written + log[..., len(ids) :].logsumexp(-1))
        if spelled is not None:
            ended = ended + v * spelled.whole()
        best = _keep_best(best, best_texts, ended, texts)
        written_next = written[..., None] + log[..., : len(ids)]
        begun = w * prefixes.begun() + (1 - w - v) * written_next
        count = min(config.beam_size, begun[0].numel())
        if spelled is None:
            scores, index = begun.flatten(1).topk(count)
        else:
            likely = (begun + v * spelled.begun_so[..., None]).flatten(1)
            index = likely.topk(min(SPELLED_PER_HYPOTHESIS * count, likely.shape[1])).indices
            spelled.spell(index // len(ids), index % len(ids))
            scores, kept = (begun.flatten(1).gather(1, index) + v * spelled.begun_so).topk(count)
            spelled.keep(kept)
            index = index.gather(1, kept)
        if bool((scores[:, 0] <= best).all()):
            break
        parents, chosen = index // len(ids), index % len(ids)
        prefixes.extend(parents, chosen + 1)
        written = written_next.flatten(1).gather(1, index)
        texts = torch.cat([texts.gather(1, parents[..., None].expand(-1, -1, texts.shape[2])), chosen[..., None]], 2)
        first = torch.arange(rows, device=device)[:, None] * log.shape[1]
        decoding.extend(ids[chosen].flatten(), (parents + first).flatten())
    else:
        _keep_best(best, best_texts, scores, texts)
    return [[tokens[each] for each in text if each != NOTHING] for text in best_texts.tolist()]


def _keep_best(best: Tensor, best_texts: Tensor, scores: Tensor, texts: Tensor) -> Tensor:
    """Write texts [B, K, N] with scores [B, K] above ``best`` [B] over shorter ones in ``best_texts`` [B, longest].

    Returns:
        the new best scores [B].
    """
    top, k = scores.max(1)
    own = texts.gather(1, k[:, None, None].expand(-1, 1, texts.shape[2]))[:, 0]
    kept = best_texts[:, : texts.shape[2]]
    kept.copy_(torch.where((top > best)[:, None], own, kept))
    return torch.maximum(best, top)
