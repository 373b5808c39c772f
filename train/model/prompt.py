"""Prompts: what the language model reads around the soft tokens, and what it is asked to say.

In: a ``PromptConfig``, a tokenizer, the text of an utterance. Out: token ids before and after the soft tokens, and
target ids (text, then eos). The loss counts targets alone. Everything is tokenised once.

| template | the model reads | from |
|---|---|---|
| ``plain`` | ``<|audio|>{text}`` | LLaVA's first stage; W1 |
| ``slam`` | ``<|audio|> USER: {instruction} ASSISTANT: {text}`` | SLAM-LLM |
| ``chat`` | the model's chat template, the user saying ``{instruction}`` and ``<|audio|>`` | Ultravox, tiny-audio |
| your own string | what stands around ``<|audio|>`` in it; ``{instruction}`` is filled in | |
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from shards.errors import UserError
from train.config.model import AUDIO_MARK, PromptConfig

if TYPE_CHECKING:
    from train.lms.base import Tokenizer

TEMPLATES = {
    "plain": AUDIO_MARK,
    "slam": f"{AUDIO_MARK} USER: {{instruction}} ASSISTANT: ",
    "chat": f"{{instruction}}\n{AUDIO_MARK}",  # the user turn; the tokenizer's template goes around it
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
        if text.count(AUDIO_MARK) != 1:
            raise UserError(
                f"prompt.template {config.template!r} holds {AUDIO_MARK} {text.count(AUDIO_MARK)} times and must hold "
                f"it once: write it where the audio belongs, or name one of {', '.join(TEMPLATES)}"
            )
        before, after = text.split(AUDIO_MARK)
        self.text = text  # with the mark, as a report shows it
        self.before = tokenizer.encode(before, special=True) if before else []
        self.after = tokenizer.encode(after, special=True) if after else []
        self._tokenizer = tokenizer
        self._targets: dict[str, array[int]] = {}

    def target(self, text: str) -> list[int]:
        """Ids of ``text`` and eos; remembered (4 bytes an id), for every epoch asks again."""
        ids = self._targets.get(text)
        if ids is None:
            ids = self._targets[text] = array("i", [*self._tokenizer.encode(text), self._tokenizer.eos])
        return ids.tolist()
