"""What makes a language model's ids besides its weights: ``lm.json`` in a run folder and in an export.

The ids of a prompt and of a text depend on the tokenizer's files, on the model's configs, on the version of the
library, and with a chat template that shows the date on the day. A run records all of that before its first step, and
how many logits it computes at a time, which depends on the memory that was free and rounds its losses.
Whoever uses the run later replays the day, and is refused, naming the file, when something else differs. A run from
before this record is used as it was trained: its targets end with the tokenizer's end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.errors import UserError

if TYPE_CHECKING:
    from train.lms.base import LanguageModel
    from train.model.prompt import Prompt

LM_RECORD = "lm.json"
# digits, case, accents, marks, scripts, an emoji, spaces: tokenizers that agree on it split alike
PROBE = "Hello, wörld! 12345 it's  naïve — हिन्दी 中文 العربية ไทย 🎧\n\tend"


def lm_record(lm: LanguageModel, prompt: Prompt) -> dict[str, Any]:
    """Return the content of ``lm.json``."""
    return {
        "language_model": lm.identity,
        "files": lm.files,
        "date": lm.tokenizer.now.isoformat(timespec="seconds"),
        "probe": lm.tokenizer.encode(PROBE),
        "prefix": list(prompt.prefix),
        "suffix": list(prompt.suffix),
        "end": prompt.end,
        "ends": sorted(prompt.ends),
        "max_logits": lm.max_logits,
    }


def write_lm_record(run: Path, lm: LanguageModel, prompt: Prompt) -> None:
    """Write ``lm.json`` into the folder of a new run."""
    from train.runs.folder import write_json

    write_json(run / LM_RECORD, lm_record(lm, prompt))


def read_lm_record(run: Path) -> dict[str, Any] | None:
    """Return the content of ``lm.json``; None if the run is older than this record.

    Raises:
        UserError: the file is corrupt.
    """
    from train.lms.base import MAX_LOGITS, MIN_LOGITS
    from train.runs.folder import read_json

    path = run / LM_RECORD
    if not path.is_file():
        return None
    record = read_json(path)
    kinds = {"files": dict, "date": str, "probe": list, "prefix": list, "suffix": list, "end": int, "ends": list}
    wrong = [name for name, kind in kinds.items() if not isinstance(record.get(name), kind)]
    if record.get("max_logits", MIN_LOGITS) not in range(MIN_LOGITS, MAX_LOGITS + 1):
        wrong.append("max_logits")
    if wrong:
        raise UserError(f"'{path}' has no valid '{wrong[0]}': copy the run again, or train it again")
    return record


def replay_lm(lm: LanguageModel, run: Path) -> dict[str, Any] | None:
    """Make chat templates of ``lm`` show the day on which ``run`` was created, and compute its losses as ``run`` does.

    Returns:
        The run's record, if any.

    Raises:
        UserError: the record is corrupt.
    """
    from train.lms.base import MIN_LOGITS

    record = read_lm_record(run)
    lm.max_logits = (record or {}).get("max_logits", MIN_LOGITS)  # runs from before that number had this one
    if record is None:
        return None
    try:
        lm.tokenizer.now = datetime.fromisoformat(record["date"])
    except ValueError:
        raise UserError(f"'{run / LM_RECORD}' has no valid 'date': copy the run again, or train it again") from None
    return record


def require_same_ids(lm: LanguageModel, prompt: Prompt, record: dict[str, Any], run: Path) -> None:
    """Require that ``lm`` is the one that the run was trained with, and makes with ``prompt`` the same ids.

    Raises:
        UserError: names the file that changed, or what of the ids; or says that the weights changed.
    """
    now, restore = lm_record(lm, prompt), "restore it, or train a new run"
    for name in sorted(now["files"].keys() | record["files"].keys()):
        if now["files"].get(name) != record["files"].get(name):
            change = "is gone" if name not in now["files"] else "is new" if name not in record["files"] else "changed"
            raise UserError(
                f"{name} of the language model '{lm.reference}' {change} since '{run}' was trained, so its ids or "
                f"logits would be others: {restore}"
            )
    if now["language_model"] != record.get("language_model"):
        raise UserError(
            f"the weights of the language model '{lm.reference}' changed since '{run}' was trained: {restore}"
        )
    for name, what in _IDS:
        if now[name] != record[name]:
            raise UserError(
                f"the {what} of '{run}' changed although the files of '{lm.reference}' did not (expected "
                f"{_shown(record[name])}, got {_shown(now[name])}): install the versions of transformers and "
                "tokenizers that it was trained with, or train a new run"
            )


_IDS = (
    ("probe", "tokenization"),
    ("prefix", "prompt before the audio"),
    ("suffix", "prompt after the audio"),
    ("end", "end of an answer"),
    ("ends", "ends of an answer"),
)


def _shown(ids: Sequence[int] | int) -> str:
    return str(ids if isinstance(ids, int) or len(ids) <= 16 else [*ids[:16], "…"])
