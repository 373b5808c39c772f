from __future__ import annotations

import subprocess
import sys

import pytest
from tiny_lm import save_tiny_tokenizer
from transformers import AutoTokenizer

import train.model.prompt
from shards.errors import UserError
from train.config.model import PromptConfig
from train.data.instructions import Instructions
from train.lms.hf.model import HfTokenizer
from train.lms.nanochat.model import ByteTokenizer
from train.model.prompt import Prompt, PromptRow


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(folder)
    return HfTokenizer(AutoTokenizer.from_pretrained(folder), "tiny")


def words(prompt, tokenizer):
    return tokenizer.decode(prompt.prefix), tokenizer.decode(prompt.suffix)


def test_plain_is_audio_and_then_the_text(tokenizer):
    prompt = Prompt(PromptConfig(), tokenizer)
    assert (prompt.prefix, prompt.suffix) == ([], [])
    assert prompt.target_ids("six") == [*tokenizer.encode("six"), tokenizer.eos]


def test_slam_is_its_template(tokenizer):
    prompt = Prompt(PromptConfig(template="slam", instruction="Write it down."), tokenizer)
    assert words(prompt, tokenizer) == ("", " USER: Write it down. ASSISTANT: ")


def test_chat_puts_the_audio_in_the_user_turn_with_the_models_own_special_tokens(tokenizer):
    prompt = Prompt(PromptConfig(template="chat", instruction="Write."), tokenizer)
    assert prompt.text == "<|im_start|>user\nWrite.\n<|audio|><|im_end|>\n<|im_start|>assistant\n"
    assert prompt.prefix == [1, *tokenizer.encode("user\nWrite.\n")]
    assert prompt.suffix == [2, *tokenizer.encode("\n"), 1, *tokenizer.encode("assistant\n")]


def test_chat_without_an_instruction_is_only_the_audio(tokenizer):
    prompt = Prompt(PromptConfig(template="chat", instruction=""), tokenizer)
    assert prompt.text.startswith("<|im_start|>user\n<|audio|><|im_end|>")


def test_a_custom_template_is_split_at_the_placeholder(tokenizer):
    prompt = Prompt(PromptConfig(template="Q: {instruction} <|audio|> A:", instruction="What?"), tokenizer)
    assert words(prompt, tokenizer) == ("Q: What? ", " A:")


@pytest.mark.parametrize("template", ["no mark", "<|audio|> and <|audio|>", "Plain"])
def test_a_template_without_exactly_one_placeholder_is_rejected(template, tokenizer):
    with pytest.raises(UserError, match="must contain it once"):
        Prompt(PromptConfig(template=template), tokenizer)


def test_an_instruction_with_the_placeholder_is_rejected(tokenizer):
    with pytest.raises(UserError, match="2 times"):
        Prompt(PromptConfig(template="slam", instruction="Write <|audio|>."), tokenizer)


def test_chat_needs_a_chat_template(tmp_path):
    save_tiny_tokenizer(tmp_path, chat=False)
    for tokenizer in (HfTokenizer(AutoTokenizer.from_pretrained(tmp_path), "tiny"), ByteTokenizer()):
        with pytest.raises(UserError, match="no chat template"):
            Prompt(PromptConfig(template="chat"), tokenizer)


def test_the_last_texts_are_tokenized_once_and_their_cached_ids_cannot_be_changed(monkeypatch):
    monkeypatch.setattr(train.model.prompt, "MAX_KEPT", 2)
    calls = []

    class Counting(ByteTokenizer):
        def encode(self, text, special=False):
            calls.append(text)
            return super().encode(text, special)

    prompt = Prompt(PromptConfig(), Counting())
    prompt.target_ids("six").append(99)
    assert prompt.target_ids("six") == [*b"six", 256]
    assert calls == ["six"]
    for text in ("one", "two", "six"):
        prompt.target_ids(text)
    assert calls == ["six", "one", "two", "six"]


def test_the_byte_tokenizer_recognizes_bos_in_the_template():
    prompt = Prompt(PromptConfig(template="<|audio|><|bos|>"), ByteTokenizer())
    assert prompt.suffix == [256]


def test_options_and_prompt_are_imported_without_torch():
    code = "import sys, train.config.model, train.model.prompt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_row_shows_its_own_prompt_else_a_drawn_instruction_else_that_of_the_settings(tokenizer):
    config = PromptConfig(template="slam", instruction="Write.")
    drawn = Prompt(config, tokenizer, Instructions({"count": ["How many?"]}))
    rows = [PromptRow("a", "count", "Is it red?", 0), PromptRow("a", "count", "", 0), PromptRow("a", "other", "", 0)]
    assert [drawn.instruction(row) for row in rows] == ["Is it red?", "How many?", "Write."]
    prefixes, suffixes = drawn.ids(rows)
    assert prefixes == [[], [], []]
    assert [tokenizer.decode(ids) for ids in suffixes] == [
        " USER: Is it red? ASSISTANT: ", " USER: How many? ASSISTANT: ", " USER: Write. ASSISTANT: "
    ]  # fmt: skip


def test_instructions_are_drawn_again_in_each_epoch_of_training_and_never_in_evaluations(tokenizer):
    def drawn(seed, val_seed, epoch):
        listed = Instructions({"": ["a", "b", "c", "d"]})
        prompt = Prompt(PromptConfig(template="slam"), tokenizer, listed, seed, val_seed)
        return [prompt.instruction(PromptRow(f"utt-{i}", epoch=epoch)) for i in range(40)]

    assert drawn(0, 0, 0) == drawn(0, 1, 0)
    assert drawn(0, 0, 0) != drawn(0, 0, 1)
    assert drawn(0, 0, None) == drawn(1, 0, None)
    assert drawn(0, 0, None) != drawn(0, 1, None)


def test_rows_with_one_instruction_share_its_ids(tokenizer):
    prompt = Prompt(PromptConfig(template="slam"), tokenizer)
    _, suffixes = prompt.ids([PromptRow("a", prompt="Count."), PromptRow("b"), PromptRow("c", prompt="Count.")])
    assert suffixes[0] is suffixes[2]
    assert suffixes[1] is prompt.suffix


def test_instructions_to_draw_from_need_a_template_that_shows_them():
    with pytest.raises(ValueError, match=r"prompts needs a template with {instruction}"):
        PromptConfig(prompts="prompts.txt")
    assert [PromptConfig(template=name).has_instruction for name in ("plain", "slam", "chat")] == [False, True, True]
