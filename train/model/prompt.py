"""Prompts: what the language model reads around the soft tokens, and what it is asked to say.

In: a ``PromptConfig``, a tokenizer, the text of an utterance. Out: token ids before and after the soft tokens, and
target ids (text, then eos). The loss counts targets alone.

| template | the model reads | from |
|---|---|---|
| ``plain`` | ``<|audio|>{text}`` | LLaVA's first stage; W1 |
| ``slam`` | ``<|audio|> USER: {instruction} ASSISTANT: {text}`` | SLAM-LLM |
| ``chat`` | the model's chat template, the user saying ``{instruction}`` and ``<|audio|>`` | Ultravox, tiny-audio |
| your own string | what stands around ``<|audio|>`` in it; ``{instruction}`` is filled in | |
"""

from __future__ import annotations

from array import array
from functools import lru_cache
from typing import TYPE_CHECKING

from shards.errors import UserError
from train.config.model import AUDIO_PLACEHOLDER, PromptConfig

if TYPE_CHECKING:
    from train.lms.base import Tokenizer

MAX_KEPT = 4096  # texts whose ids stay in memory: a step and an evaluation ask several times for each of theirs
TEMPLATES = {
    "plain": AUDIO_PLACEHOLDER,
    "slam": f"{AUDIO_PLACEHOLDER} USER: {{instruction}} ASSISTANT: ",
    "chat": f"{{instruction}}\n{AUDIO_PLACEHOLDER}",  # the user turn; the tokenizer's template goes around it
}


class Prompt:
    """Token ids of one template: ``before`` and ``after`` the soft tokens, and ``target(text)``."""

    def __init__(self, config: PromptConfig, tokenizer: Tokenizer) -> None:
        """Tokenise ``config.template``.

        Raises:
            UserError: the template does not hold ``<|audio|>`` exactly once, or ``chat`` meets a tokenizer without one.
        """
        text = TEMPLATES.get(config.template, config.template).replace("{instruction}", config.instruction).lstrip("\n")
        if config.template == "chat":
            text = tokenizer.chat(text)
        if text.count(AUDIO_PLACEHOLDER) != 1:
            raise UserError(
                f"prompt.template {config.template!r} holds {AUDIO_PLACEHOLDER} {text.count(AUDIO_PLACEHOLDER)} times "
                f"and must hold it once: write it where the audio belongs, or name one of {', '.join(TEMPLATES)}"
            )
        prefix, suffix = text.split(AUDIO_PLACEHOLDER)
        self.text = text  # with the mark, as a report shows it
        self.prefix = tokenizer.encode(prefix, special=True) if prefix else []
        self.suffix = tokenizer.encode(suffix, special=True) if suffix else []
        self._targets = lru_cache(MAX_KEPT)(lambda text: array("i", [*tokenizer.encode(text), tokenizer.eos]))

    def target_ids(self, text: str) -> list[int]:
        """Ids of ``text`` and eos. Those of the last ``MAX_KEPT`` texts are kept (4 bytes an id)."""
        return self._targets(text).tolist()
