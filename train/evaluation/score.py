"""Error rates of a finished run from its stored texts, without a model.

    python -m train score runs/demo --language hi

Takes the references and hypotheses of ``utterances.parquet``; the languages are those of the evaluation, or one for
all. Nothing is written.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from shards.errors import UserError
from train.evaluation.bootstrap import table_intervals
from train.evaluation.error_rates import corpus_edits, edit_columns, error_rates, make_sample
from train.evaluation.languages import language_code, language_metrics, text_languages
from train.evaluation.utterance_table import read_utterances, utterance_table

FILLED = ("key", "cache", "reference")  # columns that the recomputed table keeps


def score(folder: Path, language: str | None = None, default: str | None = None) -> dict[str, Any]:
    """Return the error rates of the decoded utterances in ``folder``, named as in ``summary.json``.

    Args:
        folder: a run folder, or the folder of an evaluation in it, with ``utterances.parquet``.
        language: of all texts; None: as in the evaluation that decoded them.
        default: ``eval.language`` of the run.

    Raises:
        UserError: the table is missing or corrupt, or no utterance was decoded.
    """
    table = read_utterances(folder)
    table = table.filter(table["hypothesis"].is_valid())
    if not len(table):
        raise UserError(f"'{folder}' has no decoded texts: run `python -m train evaluate {folder}`")
    columns = {name: table[name].to_pylist() for name in table.column_names}
    if language is not None:
        codes = [language_code(language)] * len(table)
    else:
        codes = columns.get("language") or text_languages([""] * len(table), columns["reference"], default)
    tasks = columns.get("task") or [""] * len(table)
    rows = zip(columns["key"], columns["reference"], columns["hypothesis"], tasks, codes, strict=True)
    samples = [make_sample(*row) for row in rows]
    scored = utterance_table({**{name: columns[name] for name in FILLED}, **edit_columns(samples)})
    wer, cer = error_rates(samples)
    words, characters = (corpus_edits([getattr(each, name) for each in samples]) for name in ("words", "characters"))
    by_task = {name: error_rates([each for each in samples if each.task == name]) for name in sorted(set(tasks))}
    return {
        "cer": cer,
        "wer": wer,
        "character_edits": characters and asdict(characters),
        "word_edits": words and asdict(words),
        "n_decoded": len(samples),
        "n_without_reference": sum(each.characters is None for each in samples),
        "intervals": {
            name: [each.low, each.high] for name, each in table_intervals(scored).items() if name in ("wer", "cer")
        },
        **language_metrics(codes),
        **({"tasks": {name: {"wer": w, "cer": c} for name, (w, c) in by_task.items()}} if len(by_task) > 1 else {}),
    }
