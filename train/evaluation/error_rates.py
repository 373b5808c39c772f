"""Word and character errors of decoded text, by kind, after normalization.

Takes the reference and the hypothesis of an utterance; returns a :class:`Sample` with counts of insertions, deletions
and substitutions (jiwer's alignment). Both texts are normalized by the rules of their language (``languages.py``);
where words are not separated by spaces, only characters are counted. Rates are corpus rates: all errors divided by all
reference words. A reference that is empty after normalization has no counts and is excluded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from train.evaluation import languages
from train.evaluation.languages import ENGLISH


@dataclass(frozen=True)
class Edits:
    """Counts of the edits that turn a reference of ``length`` words (or characters) into the hypothesis."""

    length: int
    insertions: int
    deletions: int
    substitutions: int

    @property
    def rate(self) -> float:
        """Error rate: all edits divided by the length of the reference."""
        return (self.insertions + self.deletions + self.substitutions) / self.length


@dataclass(frozen=True)
class Sample:
    """One decoded utterance.

    ``characters`` is None if the normalized reference is empty, ``words`` also if its language does not separate words.
    """

    key: str
    reference: str
    hypothesis: str
    words: Edits | None
    characters: Edits | None
    task: str = ""

    @property
    def wer(self) -> float | None:
        """Word error rate of this utterance; None if it has none."""
        return None if self.words is None else self.words.rate

    def record(self) -> dict[str, Any]:
        """Return the entry of this sample in ``evaluations.jsonl``."""
        task = {"task": self.task} if self.task else {}
        return {"key": self.key, **task, "reference": self.reference, "hypothesis": self.hypothesis, "wer": self.wer}


def make_sample(key: str, reference: str, hypothesis: str, task: str = "", language: str = ENGLISH) -> Sample:
    """Count the errors of ``hypothesis``; both texts are normalized first, by the rules of ``language`` (a code)."""
    import jiwer

    ref, hyp = (languages.normalize_text(text, language) for text in (reference, hypothesis))
    if not has_words(ref):
        return Sample(key, reference, hypothesis, None, None, task)
    words = _edits(jiwer.process_words(ref, hyp)) if languages.separates_words(language) else None
    return Sample(key, reference, hypothesis, words, _edits(jiwer.process_characters(ref, hyp)), task)


def has_words(normalized: str) -> bool:
    """Return whether normalized text has a word: the normalizer turns "…" into a lone period."""
    return any(letter.isalnum() for letter in normalized)


def corpus_edits(edits: Sequence[Edits | None]) -> Edits | None:
    """Return the sums over the entries that are not None; None if there are none."""
    known = [each for each in edits if each is not None]
    if not known:
        return None
    return Edits(*(sum(getattr(each, name) for each in known) for name in Edits.__dataclass_fields__))


def error_rates(samples: Sequence[Sample]) -> tuple[float | None, float | None]:
    """Return corpus WER and CER over the samples whose normalized reference is not empty; None if there are none."""
    words = corpus_edits([sample.words for sample in samples])
    characters = corpus_edits([sample.characters for sample in samples])
    return (None if words is None else words.rate), (None if characters is None else characters.rate)


def edit_columns(samples: Sequence[Sample | None]) -> dict[str, list[Any]]:
    """Return columns of ``utterances.parquet`` from one sample (or None) per utterance."""
    columns: dict[str, list[Any]] = {"hypothesis": [None if s is None else s.hypothesis for s in samples]}
    for name, prefix in (("words", "word"), ("characters", "character")):
        edits = [None if s is None else getattr(s, name) for s in samples]
        columns[name] = [None if e is None else e.length for e in edits]
        for kind in ("insertions", "deletions", "substitutions"):
            columns[f"{prefix}_{kind}"] = [None if e is None else getattr(e, kind) for e in edits]
    return columns


def _edits(output: Any) -> Edits:
    """Counts of jiwer's alignment of one pair."""
    length = output.hits + output.substitutions + output.deletions
    return Edits(length, output.insertions, output.deletions, output.substitutions)
