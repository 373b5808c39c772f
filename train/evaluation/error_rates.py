"""Decoded text against what was said: word and character errors by kind, after normalisation.

In: an utterance's reference and hypothesis. Out: a :class:`Sample` with counts of insertions, deletions and
substitutions (jiwer's alignment), both sides through Whisper's English normalizer. Rates are of the corpus: all errors
over all reference words. A reference that normalises to nothing has no counts and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Edits:
    """What turns a reference of ``length`` words (or characters) into the hypothesis."""

    length: int
    insertions: int
    deletions: int
    substitutions: int

    @property
    def rate(self) -> float:
        """All errors over the reference's length."""
        return (self.insertions + self.deletions + self.substitutions) / self.length


@dataclass(frozen=True)
class Sample:
    """One decoded utterance; ``words`` and ``characters`` are None where the normalised reference is empty."""

    key: str
    reference: str
    hypothesis: str
    words: Edits | None
    characters: Edits | None

    @property
    def wer(self) -> float | None:
        """Its own word error rate."""
        return None if self.words is None else self.words.rate

    def record(self) -> dict[str, Any]:
        """What ``evaluations.jsonl`` keeps of it."""
        return {"key": self.key, "reference": self.reference, "hypothesis": self.hypothesis, "wer": self.wer}


def make_sample(key: str, reference: str, hypothesis: str) -> Sample:
    """A sample with its errors counted."""
    import jiwer

    normalize = normalizer()
    ref, hyp = normalize(reference), normalize(hypothesis)
    if not has_words(ref):
        return Sample(key, reference, hypothesis, None, None)
    words, characters = jiwer.process_words(ref, hyp), jiwer.process_characters(ref, hyp)
    return Sample(key, reference, hypothesis, _edits(words), _edits(characters))


def has_words(normalized: str) -> bool:
    """Whether normalised text says anything: the normalizer makes "…" a lone point."""
    return any(letter.isalnum() for letter in normalized)


def corpus_edits(edits: Sequence[Edits | None]) -> Edits | None:
    """The sums over those that have counts; None without any."""
    known = [each for each in edits if each is not None]
    if not known:
        return None
    return Edits(*(sum(getattr(each, name) for each in known) for name in Edits.__dataclass_fields__))


def error_rates(samples: Sequence[Sample]) -> tuple[float | None, float | None]:
    """Corpus WER and CER of the samples that have a reference after normalisation; None without any."""
    words = corpus_edits([sample.words for sample in samples])
    characters = corpus_edits([sample.characters for sample in samples])
    return (None if words is None else words.rate), (None if characters is None else characters.rate)


def edit_columns(samples: Sequence[Sample | None]) -> dict[str, list[Any]]:
    """Columns of ``utterances.parquet`` from one sample (or none) an utterance."""
    columns: dict[str, list[Any]] = {"hypothesis": [None if s is None else s.hypothesis for s in samples]}
    for name, prefix in (("words", "word"), ("characters", "character")):
        edits = [None if s is None else getattr(s, name) for s in samples]
        columns[name] = [None if e is None else e.length for e in edits]
        for kind in ("insertions", "deletions", "substitutions"):
            columns[f"{prefix}_{kind}"] = [None if e is None else getattr(e, kind) for e in edits]
    return columns


def _edits(output: Any) -> Edits:
    """jiwer's alignment of one pair as counts."""
    length = output.hits + output.substitutions + output.deletions
    return Edits(length, output.insertions, output.deletions, output.substitutions)


_NORMALIZER: list[Callable[[str], str]] = []


def normalizer() -> Callable[[str], str]:
    """Whisper's English normalizer, built once: it reads a table of spellings."""
    if not _NORMALIZER:
        from whisper_normalizer.english import EnglishTextNormalizer

        _NORMALIZER.append(EnglishTextNormalizer())
    return _NORMALIZER[0]
