from __future__ import annotations

import json
from collections import Counter

import pytest

from shards.errors import UserError
from train.data.instructions import Instructions, read_instructions


def test_lines_of_a_text_file_are_instructions_of_every_task(tmp_path):
    (tmp_path / "prompts.txt").write_text("Write it down.\n\n  What is said?  \n")
    assert read_instructions(tmp_path / "prompts.txt").by_task == {"": ["Write it down.", "What is said?"]}


@pytest.mark.parametrize("name", ["prompts.json", "prompts.yaml"])
def test_a_mapping_has_instructions_by_task_and_a_list_those_of_all(tmp_path, name):
    for tree, by_task in (({"count": ["How many?"]}, {"count": ["How many?"]}), (["A?", "B?"], {"": ["A?", "B?"]})):
        (tmp_path / name).write_text(json.dumps(tree))
        assert read_instructions(tmp_path / name).by_task == by_task


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gone.txt", None, "cannot be read"),
        ("empty.txt", "\n \n", "holds no instructions"),
        ("a.yaml", "count: How many?", "holds no instructions, or something else"),
        ("a.json", '{"count": [1]}', "holds no instructions, or something else"),
        ("a.yaml", "count: [", "is not YAML"),
        ("a.json", "{}", "holds no instructions"),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.yaml", "[" * 5_000, "is not YAML"),
        ("a.yaml", "2024-13-45", "is not YAML"),
        ("a.json", '["What is \\ud83d?"]', "holds no instructions, or something else"),
        ("x" * 300, None, "cannot be read"),
        ("a\0", None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_key(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"^prompt.prompts .*{message}"):
        read_instructions(tmp_path / name)


def test_an_emoji_that_json_writes_as_two_escapes_is_one_character(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(["Say 😀"]))
    assert read_instructions(tmp_path / "a.json").by_task == {"": ["Say 😀"]}


def test_a_draw_is_a_function_of_its_arguments_and_uses_all_instructions_evenly():
    instructions = Instructions({"": ["a", "b", "c"]})
    drawn = [instructions.draw(0, 0, f"utt-{i}", "") for i in range(3000)]
    assert drawn == [instructions.draw(0, 0, f"utt-{i}", "") for i in range(3000)]
    assert all(900 < count < 1100 for count in Counter(drawn).values())
    for other in ((1, 0, ""), (0, 1, ""), (0, None, ""), (0, 0, "count")):  # seed, epoch, task
        seed, epoch, task = other
        same = sum(instructions.draw(seed, epoch, f"utt-{i}", task) == drawn[i] for i in range(3000))
        assert 900 < same < 1100


def test_a_task_draws_from_its_own_instructions_and_another_from_those_of_all():
    instructions = Instructions({"count": ["How many?"], "": ["Write."]})
    assert instructions.draw(0, 0, "a", "count") == "How many?"
    assert instructions.draw(0, 0, "a", "transcribe") == "Write."
    assert Instructions({"count": ["How many?"]}).draw(0, 0, "a", "transcribe") is None


def test_the_hash_is_that_of_the_instructions_and_not_of_their_format(tmp_path):
    (tmp_path / "a.txt").write_text("A?\nB?\n")
    (tmp_path / "a.yaml").write_text("- A?\n- B?\n")
    (tmp_path / "b.txt").write_text("B?\nA?\n")
    same, also, other = (read_instructions(tmp_path / name).sha256 for name in ("a.txt", "a.yaml", "b.txt"))
    assert same == also != other
