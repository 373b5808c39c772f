"""Prompts: the text around the soft tokens, and the targets of the language model.

From a ``PromptConfig`` and a tokenizer, a :class:`Prompt` makes token ids before and after the soft tokens, and the
target ids of a text (text, then the token that ends an answer). Only targets count in the loss. With ``chat`` that is
the token with which the chat template ends an answer, such as Gemma's ``<end_of_turn>``; otherwise it is the
tokenizer's end-of-sequence token. Decoding stops at it and at every end that the tokenizer or
``generation_config.json`` names.

``{instruction}`` is the ``prompt`` of the row in the label set; if it is empty, one drawn from the file
``prompt.prompts``; and without that file, ``prompt.instruction``.

| template | the model reads | BOS | source |
|---|---|---|---|
| ``plain`` | ``<|audio|>{text}`` | none | first stage of LLaVA; W1 |
| ``slam`` | ``<|audio|> USER: {instruction} ASSISTANT: {text}`` | none | SLAM-LLM |
| ``chat`` | the model's chat template, ``{instruction}`` and ``<|audio|>`` as user turn | the template's | Ultravox |
| any other text | the text with ``{instruction}`` filled in and the audio at ``<|audio|>`` | the text's | |

A tokenizer's habit of adding BOS does not apply: a BOS is read only where the text of the template contains the token,
such as ``<s><|audio|>``.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from shards.errors import UserError
from train.config.model import AUDIO_PLACEHOLDER, INSTRUCTION, PromptConfig
from train.data.instructions import Instructions

if TYPE_CHECKING:
    from shards.stream.batch import Batch
    from train.lms.base import Tokenizer

MAX_KEPT = 4096  # texts whose ids stay in memory: a step or an evaluation needs those of a text several times
TEMPLATES = {
    "plain": AUDIO_PLACEHOLDER,
    "slam": f"{AUDIO_PLACEHOLDER} USER: {{instruction}} ASSISTANT: ",
    "chat": f"{{instruction}}\n{AUDIO_PLACEHOLDER}",  # the user turn; the tokenizer's template goes around it
}


class PromptRow(NamedTuple):
    """What the instruction of a row depends on; ``epoch`` is None in an evaluation."""

    key: str = ""
    task: str = ""
    prompt: str = ""
    epoch: int | None = None


def prompt_rows(batch: Batch) -> list[PromptRow]:
    """Return the rows of a training batch."""
    return [PromptRow(*each, batch.epoch) for each in zip(batch.keys, batch.tasks, batch.prompts, strict=True)]


class Prompt:
    """Token ids of one template: those before and after the soft tokens, and ``target_ids(text)``.

    ``end`` is the token that ends an answer in the targets, ``ends`` are all at which decoding stops. ``text``,
    ``prefix`` and ``suffix`` are those of the instruction ``prompt.instruction``.
    """

    def __init__(
        self,
        config: PromptConfig,
        tokenizer: Tokenizer,
        instructions: Instructions | None = None,
        seed: int = 0,
        val_seed: int = 0,
        end: int | None = None,
    ) -> None:
        """Tokenize ``config.template``.

        Args:
            instructions: the content of ``config.prompts``.
            seed, val_seed: seeds of the instructions drawn in training and in an evaluation.
            end: see above; None: that of the template.

        Raises:
            UserError: the template does not contain ``<|audio|>`` exactly once, or it is ``chat`` and the tokenizer has
                no chat template.
        """
        self.config, self._tokenizer, self.instructions = config, tokenizer, instructions
        self._seeds = seed, val_seed
        self.text = self._fill(config.instruction)  # with the placeholder, as a report shows it
        self._parts = lru_cache(MAX_KEPT)(self._tokenize)  # rows with one instruction share their lists
        self.prefix, self.suffix = self._parts(config.instruction)
        template_end = tokenizer.chat_end() if config.template == "chat" else tokenizer.eos
        self.end = template_end if end is None else end
        self.ends = tokenizer.ends | {self.end, template_end}
        self._targets = lru_cache(MAX_KEPT)(lambda text: array("i", [*tokenizer.encode(text), self.end]))

    def instruction(self, row: PromptRow) -> str:
        """Return what replaces ``{instruction}`` for ``row``."""
        drawn = None
        if not row.prompt and self.instructions is not None:
            seed = self._seeds[row.epoch is None]
            drawn = self.instructions.draw(seed, row.epoch, row.key, row.task)
        return row.prompt or drawn or self.config.instruction

    def ids(self, rows: Sequence[PromptRow]) -> tuple[list[list[int]], list[list[int]]]:
        """Return the prefix and the suffix of each of ``rows``; do not change them.

        Raises:
            UserError: an instruction contains ``<|audio|>``.
        """
        parts = [self._parts(self.instruction(row)) for row in rows]
        return [prefix for prefix, _ in parts], [suffix for _, suffix in parts]

    def _fill(self, instruction: str) -> str:
        template = TEMPLATES.get(self.config.template, self.config.template)
        text = template.replace(INSTRUCTION, instruction).lstrip("\n")
        if self.config.template == "chat":
            text = self._tokenizer.chat(text)
        if text.count(AUDIO_PLACEHOLDER) != 1:
            raise UserError(
                f"prompt.template {self.config.template!r} contains {AUDIO_PLACEHOLDER} "
                f"{text.count(AUDIO_PLACEHOLDER)} times and must contain it once: put it where the audio belongs, or "
                f"use one of {', '.join(TEMPLATES)}"
            )
        return text

    def _tokenize(self, instruction: str) -> tuple[list[int], list[int]]:
        prefix, suffix = self._fill(instruction).split(AUDIO_PLACEHOLDER)
        encode = self._tokenizer.encode
        return encode(prefix, special=True) if prefix else [], encode(suffix, special=True) if suffix else []

    def target_ids(self, text: str) -> list[int]:
        """Return the ids of ``text``, then ``end``. Those of the last ``MAX_KEPT`` texts are cached."""
        return self._targets(text).tolist()
