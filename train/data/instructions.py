"""Instructions to draw from: the file of the key ``prompt.prompts``.

| file | content |
|---|---|
| ``.json``, ``.yaml``, ``.yml`` | a mapping of tasks to lists of instructions, or one list for all tasks |
| any other | one instruction per line; empty lines are skipped |

One instruction is drawn for each row by a hash, so that every world size and every resumed run draws the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shards.errors import UserError

ALL_TASKS = ""  # the entry of a file without tasks


@dataclass(frozen=True)
class Instructions:
    """Instructions by task; those of :data:`ALL_TASKS` are for every task that is not listed."""

    by_task: Mapping[str, Sequence[str]]

    @property
    def sha256(self) -> str:
        """Hash of the instructions, 64 hex digits: a file that says the same in another format has the same hash."""
        tree = {task: list(listed) for task, listed in self.by_task.items()}
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def draw(self, seed: int, epoch: int | None, key: str, task: str) -> str | None:
        """Return one of the instructions of ``task``, drawn by a hash of the arguments; None if there are none."""
        listed = self.by_task.get(task) or self.by_task.get(ALL_TASKS)
        if not listed:
            return None
        digest = hashlib.sha256(json.dumps([seed, epoch, key, task]).encode()).digest()
        return listed[int.from_bytes(digest[:8], "big") % len(listed)]


def read_instructions(path: str | Path) -> Instructions:
    """Read the file at ``path``.

    Raises:
        UserError: the file cannot be read, has no instructions, or is not one of the formats above.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"prompt.prompts '{path}' cannot be read ({reason}): correct the path") from None
    tree: Any = [line.strip() for line in text.splitlines() if line.strip()]
    if path.suffix.lower() in (".json", ".yaml", ".yml"):
        try:
            # not YAML for both: it takes the two escapes of an emoji in JSON for two characters
            tree = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist
            kind, reason = path.suffix[1:].upper(), " ".join(str(error).split())
            raise UserError(f"prompt.prompts '{path}' is not {kind} ({reason}): correct the file") from None
    by_task = tree if isinstance(tree, dict) else {ALL_TASKS: tree}
    valid = all(
        isinstance(task, str) and isinstance(listed, list) and listed and all(_is_instruction(each) for each in listed)
        for task, listed in by_task.items()
    )
    if not by_task or not valid:
        raise UserError(
            f"prompt.prompts '{path}' holds no instructions, or something else than instructions: write one per line, "
            "or a mapping such as {transcribe: ['Write down what is said.']} in JSON or YAML"
        )
    return Instructions(by_task)


def _is_instruction(value: Any) -> bool:
    if not isinstance(value, str) or not value.strip():
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)  # half of a surrogate pair
