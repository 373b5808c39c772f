"""Prompts: the text around the soft tokens, and the targets of the language model.

From a ``PromptConfig`` and a tokenizer, a :class:`Prompt` makes token ids before and after the soft tokens, and the
target ids of a text (text, then eos). Only targets count in the loss.

| template | the model reads | source |
|---|---|---|
| ``plain`` | ``<|audio|>{text}`` | first stage of LLaVA; W1 |
| ``slam`` | ``<|audio|> USER: {instruction} ASSISTANT: {text}`` | SLAM-LLM |
| ``chat`` | the model's chat template with ``{instruction}`` and ``<|audio|>`` as user turn | Ultravox, tiny-audio |
| any other text | the text with ``{instruction}`` filled in and the audio at ``<|audio|>`` | |
"""

from __future__ import annotations

from array import array
from functools import lru_cache
from typing import TYPE_CHECKING

from shards.errors import UserError
from train.config.model import AUDIO_PLACEHOLDER, PromptConfig

if TYPE_CHECKING:
    from train.lms.base import Tokenizer

MAX_KEPT = 4096  # texts whose ids stay in memory: a step or an evaluation needs those of a text several times
TEMPLATES = {
    "plain": AUDIO_PLACEHOLDER,
    "slam": f"{AUDIO_PLACEHOLDER} USER: {{instruction}} ASSISTANT: ",
    "chat": f"{{instruction}}\n{AUDIO_PLACEHOLDER}",  # the user turn; the tokenizer's template goes around it
}


class Prompt:
    """Token ids of one template: ``prefix`` and ``suffix`` of the soft tokens, and ``target_ids(text)``."""

    def __init__(self, config: PromptConfig, tokenizer: Tokenizer) -> None:
        """Tokenize ``config.template``.

        Raises:
            UserError: the template does not contain ``<|audio|>`` exactly once, or it is ``chat`` and the tokenizer has
                no chat template.
        """
        text = TEMPLATES.get(config.template, config.template).replace("{instruction}", config.instruction).lstrip("\n")
        if config.template == "chat":
            text = tokenizer.chat(text)
        if text.count(AUDIO_PLACEHOLDER) != 1:
            raise UserError(
                f"prompt.template {config.template!r} contains {AUDIO_PLACEHOLDER} {text.count(AUDIO_PLACEHOLDER)} "
                f"times and must contain it once: put it where the audio belongs, or use one of {', '.join(TEMPLATES)}"
            )
        prefix, suffix = text.split(AUDIO_PLACEHOLDER)
        self.text = text  # with the placeholder, as a report shows it
        self.prefix = tokenizer.encode(prefix, special=True) if prefix else []
        self.suffix = tokenizer.encode(suffix, special=True) if suffix else []
        self._targets = lru_cache(MAX_KEPT)(lambda text: array("i", [*tokenizer.encode(text), tokenizer.eos]))

    def target_ids(self, text: str) -> list[int]:
        """Return the ids of ``text``, then eos. Those of the last ``MAX_KEPT`` texts are cached (4 bytes per id)."""
        return self._targets(text).tolist()
