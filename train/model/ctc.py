"""Stage 1: a projector trained by CTC over the language model's tokens, without the language model.

A run whose ``lm.model`` is ``ctc:REFERENCE`` is an ordinary run of which only the last part differs:

```
features -> projector -> vectors [B, S, D] -> CTC head -> scores [B, S, 1 + V] -> CTC loss of the text's tokens
                                  |                                '-> likeliest path, merged: decoded text
                                  '-> cosine with the input embeddings of V tokens, and a blank
```

The scores take the place of soft tokens and :class:`CtcLanguageModel` that of the language model, so that the loop,
exact resume, sweeps, evaluation and reports are those of every run. Of the language model at REFERENCE, the tokenizer
and V rows of the embedding matrix are read. V tokens: those of the training labels, and ``pretrain.negatives`` further
ones. Their ids are kept in ``tokens.json`` of the run. The loss counts the end of a text as a target, as that of a
language model does.

Sources: CTC (Graves et al. 2006); over an LM's vocabulary and embeddings: LegoSLM (arXiv 2505.11352); before the LM is
used at all: SpeechMapper (arXiv 2601.20417).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shards.errors import UserError
from train.config.train import CTC, STAGE_ONE, TrainConfig
from train.data.caches import TrainData, Utterances
from train.data.text import apply_text_rules
from train.distributed.device import to_device
from train.lms.base import LanguageModel, Tokenizer
from train.lms.embeddings import TokenEmbeddings, read_embeddings
from train.lms.packing import Ids
from train.model.audio_lm import AudioLM
from train.model.checkpoint import restore_parameters
from train.projectors import Projector
from train.projectors.ctc import BLANK, CtcHead, HeadTokens, best_path, ctc_nll, needed_steps, spellings
from train.runs.folder import SUMMARY, read_json, write_json

TOKENS_FILE = "tokens.json"
MAX_TOKENS = 2**20  # no vocabulary is larger; a file that says otherwise is not believed
MAX_UNALIGNABLE = 0.05  # share of training rows whose text has more tokens than the projector has time steps


def uses_tokens(config: TrainConfig) -> bool:
    """Return whether the model of ``config`` has a CTC head, and therefore needs the tokens of its labels."""
    return config.lm.model.startswith(CTC) or config.projector.kind == "posterior" or bool(config.ctc.weight)


def token_embeddings(config: TrainConfig) -> TokenEmbeddings:
    """Read tokenizer and embeddings of the language model of ``config``; see :func:`read_embeddings`."""
    return read_embeddings(config.lm.model.removeprefix(CTC), config.lm, config.seed)


def label_tokens(data: TrainData, config: TrainConfig, tokenizer: Tokenizer, count: int) -> list[int]:
    """Return the ids of the tokens in the training texts and of ``pretrain.negatives`` further ones, ascending.

    The further ones are the first of the vocabulary that consist of characters of the training texts: in vocabularies
    of byte pairs, the most frequent. They may occur in other texts.

    Args:
        count: tokens of the vocabulary.
    """
    texts = Utterances(data.caches, data.train_rows).columns("text")["text"]
    texts = [apply_text_rules(text, config.text) for text in texts]
    found = {token for text in texts for token in tokenizer.encode(text)}
    letters = {" ", *"".join(texts)}
    missing = config.pretrain.negatives
    for token in range(count) if missing else ():
        text = tokenizer.decode([token])
        if missing and token not in found and text and letters.issuperset(text):
            found.add(token)
            missing -= 1
    return sorted(found)


def write_tokens(run: Path, tokens: Sequence[int]) -> None:
    """Write ``tokens.json`` into the folder of a new run."""
    write_json(run / TOKENS_FILE, {"tokens": list(tokens)})


def read_tokens(run: Path) -> list[int]:
    """Return the ids in ``tokens.json`` of a run.

    Raises:
        UserError: the file is missing, or holds anything but ascending ids.
    """
    tokens: Any = read_json(run / TOKENS_FILE).get("tokens")
    valid = isinstance(tokens, list) and 0 < len(tokens) <= MAX_TOKENS and all(type(each) is int for each in tokens)
    if not valid or tokens != sorted(set(tokens)) or not 0 <= tokens[0] <= tokens[-1] < MAX_TOKENS:
        raise UserError(f"'{run / TOKENS_FILE}' does not list token ids: copy the run again, or train it again")
    return list(tokens)


def run_tokens(config: TrainConfig, data: TrainData, run: Path | None = None) -> list[int]:
    """Return the tokens of the CTC head of ``run``: its own, those of the stage 1 it starts from, or of its labels.

    Raises:
        UserError: a file is corrupt, or the language model cannot be read.
    """
    if run is not None and (run / TOKENS_FILE).exists():
        return read_tokens(run)
    if config.pretrain.start is not None or (run is not None and (run / STAGE_ONE / TOKENS_FILE).exists()):
        return read_tokens(stage_one_folder(config, run or Path()))
    embeddings = token_embeddings(config)
    return label_tokens(data, config, embeddings.tokenizer, embeddings.count)


def stage_one_folder(config: TrainConfig, run: Path) -> Path:
    """Return the folder of the stage 1 that ``run`` starts from.

    Raises:
        UserError: ``pretrain.start`` names none.
    """
    if config.pretrain.start is None:
        return run / STAGE_ONE
    named = Path(config.pretrain.start)
    for folder in (named / STAGE_ONE, named):
        if (folder / TOKENS_FILE).is_file() and (folder / SUMMARY).is_file():
            return folder
    raise UserError(
        f"pretrain.start: '{named}' has no finished stage 1: name a run with pretrain.steps, or remove the key"
    )


def rows_of(embeddings: TokenEmbeddings, tokens: Sequence[int], run: Path | None = None) -> Tensor:
    """Return the embeddings of ``tokens`` float32 [V, D]; UserError if the model has fewer tokens."""
    if tokens and tokens[-1] >= embeddings.count:
        where = TOKENS_FILE if run is None else str(run / TOKENS_FILE)
        raise UserError(
            f"'{where}' names the token {tokens[-1]} and '{embeddings.reference}' has {embeddings.count}: restore "
            "the language model that the run was trained with"
        )
    return embeddings.rows(tokens)


class CtcTokenizer:
    """The language model's tokenizer with classes of a CTC head instead of ids; the end of a text is the blank.

    Tokens that the head does not have are left out of a text: they can only be in held-out texts.

    Attributes:
        tokens: id of each class, from 1.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[int]) -> None:
        self._tokenizer, self.tokens = tokenizer, list(tokens)
        self._classes = {token: index + 1 for index, token in enumerate(tokens)}
        self.eos, self.ends = BLANK, frozenset({BLANK})
        self.bos: int | None = None
        self.now: datetime = tokenizer.now

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the classes of ``text``, from 1."""
        classes = (self._classes.get(token) for token in self._tokenizer.encode(text, special))
        return [each for each in classes if each is not None]

    def decode(self, ids: list[int]) -> str:
        """Return the text of classes."""
        return self._tokenizer.decode([self.tokens[each - 1] for each in ids if each != BLANK])

    def chat(self, user: str) -> str:
        """Stage 1 has no prompt."""
        raise NotImplementedError

    def chat_end(self) -> int:
        """Return the blank."""
        return BLANK


class CtcLanguageModel(LanguageModel):
    """Takes the scores of a CTC head for soft tokens, the CTC loss for theirs, and the likeliest path for their text.

    It has no parameters: experiments of a sweep share it. Prompts are not read.

    Attributes:
        token_embeddings: float32 [V, D], what a CTC head compares with.
    """

    token_embeddings: Tensor

    def __init__(self, embeddings: TokenEmbeddings, tokens: Sequence[int], device: str | torch.device) -> None:
        super().__init__()
        self.register_buffer("token_embeddings", rows_of(embeddings, tokens).to(device))
        digest = hashlib.sha256(f"{embeddings.identity} {list(tokens)}".encode()).hexdigest()[:16]
        self.reference, self.identity, self.files = f"{CTC}{embeddings.reference}", f"ctc-{digest}", embeddings.files
        self.tokenizer = CtcTokenizer(embeddings.tokenizer, tokens)
        self.width = self.vocab_size = 1 + len(tokens)
        self._soft = embeddings.width, embeddings.rms()
        self.embedding_rms, self.dtype = 1.0, torch.float32

    @property
    def soft_width(self) -> int:
        return self._soft[0]

    @property
    def soft_rms(self) -> float:
        return self._soft[1]

    @property
    def device(self) -> torch.device:
        return self.token_embeddings.device

    def target_nll(self, soft: Tensor, soft_mask: Tensor, prefix: Ids, suffix: Ids, targets: Ids) -> Tensor:
        """Return the CTC loss of each row in nats, float32 [B]; ``soft`` are scores [B, S, 1 + V].

        A text that does not fit its time steps costs log(1 + V) a token, that of guessing, and has no gradient.
        """
        classes = [[each for each in row if each != BLANK] for row in targets]
        steps = torch.tensor([needed_steps(row) for row in classes])
        guess = to_device(torch.tensor([len(row) * math.log(self.vocab_size) for row in classes]), soft.device)
        fits = to_device(steps <= soft_mask.sum(1), soft.device)
        return torch.where(fits, ctc_nll(soft, soft_mask, classes), guess)

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
        """Return the classes of each row's likeliest path; ``max_new_tokens`` does not bound them."""
        return best_path(soft, soft_mask)


class ScoringProjector(Projector):
    """A projector and a CTC head, which is the projector's own if it has one: features -> scores [B, S, 1 + V]."""

    def __init__(self, projector: Projector, tokens: HeadTokens) -> None:
        super().__init__()
        self.projector = projector
        self.head = None if projector.ctc_head() is not None else CtcHead(tokens)

    def soft_frames(self, frames: int) -> int:
        return self.projector.soft_frames(frames)

    def take_losses(self) -> dict[str, Tensor]:
        return self.projector.take_losses()

    def take_scores(self) -> dict[str, tuple[Tensor, Tensor]]:
        return self.projector.take_scores()

    def take_metrics(self) -> dict[str, Tensor]:
        return self.projector.take_metrics()

    def summary(self) -> dict[str, Any]:
        return self.projector.summary()

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map features [B, T, C], mask [B, T] bool to scores [B, S, 1 + V] float32, their mask [B, S] bool."""
        vectors, soft_mask = self.projector.token_vectors(features, mask)
        head = self.projector.ctc_head() or self.head
        assert head is not None
        return head(vectors), soft_mask


def load_ctc(config: TrainConfig, tokens: Sequence[int], device: torch.device) -> CtcLanguageModel:
    """Load what stage 1 needs of the language model of ``config``, a ``ctc:…``.

    Raises:
        UserError: see :func:`read_embeddings`.
    """
    return CtcLanguageModel(token_embeddings(config), tokens, device)


@torch.no_grad()
def find_head_tokens(lm: LanguageModel, tokens: Sequence[int]) -> HeadTokens:
    """Return embeddings and spellings of ``tokens``, with which a CTC head compares.

    Raises:
        UserError: the language model has fewer tokens.
    """
    if isinstance(lm, CtcLanguageModel):
        return HeadTokens(lm.token_embeddings, _spellings(lm.tokenizer, range(1, lm.width), lm.device))
    if tokens[-1] >= lm.vocab_size:
        raise UserError(
            f"{TOKENS_FILE} names the token {tokens[-1]} and '{lm.reference}' has {lm.vocab_size}: restore the "
            "language model that the run was trained with"
        )
    rows = lm.embed(torch.tensor(tokens, device=lm.device)).float()
    return HeadTokens(rows, _spellings(lm.tokenizer, tokens, lm.device))


def _spellings(tokenizer: Tokenizer, ids: Sequence[int], device: torch.device) -> Tensor:
    return spellings([tokenizer.decode([each]) for each in ids]).to(device)


def ctc_head(projector: Projector, tokens: HeadTokens) -> nn.Module:
    """Return the CTC head of ``projector``, or a new one."""
    return projector.ctc_head() or CtcHead(tokens)


def start_from_stage_one(model: AudioLM, folder: Path) -> float:
    """Copy the projector and the CTC head of the finished stage 1 in ``folder`` to ``model``; return its seconds.

    Raises:
        UserError: a file cannot be read, or holds another projector or tokens.
    """
    weights = folder / "projector.safetensors"
    seconds: Any = read_json(folder / SUMMARY).get("seconds")
    if type(seconds) not in (int, float):
        raise UserError(f"'{folder / SUMMARY}' does not say how many seconds stage 1 took: copy the folder again")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{weights}' cannot be read ({error}): train stage 1 again") from None
    parts = nn.ModuleDict({"projector": model.projector})
    if model.ctc_head is not None:
        parts["ctc_head"] = model.ctc_head
    renamed = {name.replace("projector.head.", "ctc_head."): value for name, value in stored.items()}
    renamed |= {name.removeprefix("projector."): value for name, value in stored.items()}
    restore_parameters(parts, renamed, str(weights), "stage 1 was trained with another projector or other tokens")
    return float(seconds)


def alignment_note(projector: Projector, data: TrainData, config: TrainConfig, tokenizer: Tokenizer) -> list[str]:
    """Compare tokens with time steps in the training rows; return a note if some texts have more tokens.

    Raises:
        UserError: more than ``MAX_UNALIGNABLE`` of the rows do.
    """
    columns = Utterances(data.caches, data.train_rows).columns("frames", "text", "key")
    texts = [apply_text_rules(text, config.text) for text in columns["text"]]
    needed = [needed_steps(tokenizer.encode(text)) for text in texts]
    steps = [projector.soft_frames(frames) for frames in columns["frames"]]
    over = [i for i, (need, has) in enumerate(zip(needed, steps, strict=True)) if need > has]
    if not over:
        return []
    worst = max(over, key=lambda i: needed[i] - steps[i])
    found = (
        f"{len(over):,} of {len(texts):,} texts have more tokens than their audio has time steps, such as "
        f"'{columns['key'][worst]}' with {needed[worst]} and {steps[worst]}"
    )
    if len(over) > MAX_UNALIGNABLE * len(texts):
        raise UserError(
            f"{found}, and CTC cannot align them: stack fewer frames into a soft token, or set pretrain.steps=0"
        )
    return [f"{found}; stage 1 does not learn from them"]
