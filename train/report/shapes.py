"""What the JSON files of a run or sweep folder must contain for a page to be made of them.

A folder may come from anyone. Each model lists the values that a page formats, with their types; other keys may hold
anything. What does not fit is refused with the name of the file and of the value.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError

from shards.errors import UserError, first_validation_error

MAX_NUMBER = 1e18  # larger finite numbers are no metric of a run, and overflow in the scales of charts


def _number(value: Any) -> Any:
    if type(value) not in (int, float) or MAX_NUMBER < abs(value) < math.inf:
        raise ValueError(f"expected a number up to {MAX_NUMBER:.0e}")
    return value


def _finite(value: Any) -> Any:
    if not math.isfinite(_number(value)):
        raise ValueError("expected a finite number")
    return value


Number = Annotated[float, BeforeValidator(_number)]  # also NaN and infinite, of a run that diverged
Finite = Annotated[float, BeforeValidator(_finite)]
Pair = Annotated[tuple[Number, Number], Strict(False)]  # a list in JSON
Count = Annotated[int, Field(ge=0, le=int(MAX_NUMBER))]


class Shape(BaseModel):
    """Base class: no value is converted, and other keys are not looked at."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Step(Shape):
    """A line of ``metrics.jsonl``."""

    step: Count
    loss: Number
    seconds: Finite
    frames: Finite
    data_wait: Finite
    projector_rms_ratio: Number | None = None


class Retrieval(Shape):
    """``retrieval`` of an evaluation."""

    by_likelihood: Number | None
    audio_by_likelihood: Number | None
    by_embedding: Number | None
    chance: Number
    candidates: Count
    utterances: Count


class Edits(Shape):
    """``word_edits`` and ``character_edits``."""

    insertions: Count
    deletions: Count
    substitutions: Count
    length: Count


class Hallucination(Shape):
    """``hallucination``."""

    inputs: Count
    words: Number
    texts: list[str]


class Listening(Shape):
    """``listening``."""

    steps: Count
    seconds: Finite = 0


class Sample(Shape):
    """One of ``samples``."""

    key: str
    reference: str
    hypothesis: str
    wer: Number | None
    task: str = ""


class Rates(Shape):
    """Metrics of all held-out utterances, or of those of one task."""

    val_loss: Number | None = None
    val_loss_shuffled: Number | None = None
    val_loss_silent: Number | None = None
    val_loss_text_only: Number | None = None
    audio_gain: Number | None = None
    silent_gain: Number | None = None
    text_only_gain: Number | None = None
    wer: Number | None = None
    cer: Number | None = None
    accuracy: Number | None = None
    intervals: dict[str, Pair | None] | None = None


class TaskRates(Rates):
    """One of ``tasks``."""

    n_val: Count


class Evaluation(Rates):
    """A line of ``evaluations.jsonl``, ``summary.json`` or ``figures.json``."""

    steps: Count = 0
    step: Count = 0
    seconds: Finite = 0
    elapsed: Finite = 0
    training_seconds: Finite = 0
    evaluation_seconds: Finite = 0
    frames_per_second: Number = 0
    data_wait_fraction: Number | None = None
    padding_fraction: Number | None = None
    train_loss_first: Number | None = None
    train_loss_last: Number | None = None
    hallucination_rate: Number | None = None
    trained_parameters: Count | None = None
    n_val: Count = 0
    tasks: dict[str, TaskRates] = {}
    retrieval: Retrieval | None = None
    word_edits: Edits | None = None
    character_edits: Edits | None = None
    decoding: str | None = None
    hallucination: Hallucination | None = None
    listening: Listening | None = None
    samples: list[Sample] = []


class OtherEvaluation(Evaluation):
    """``figures.json`` of an evaluation on other caches."""

    judged_on: list[str]


class Spec(Shape):
    """``spec`` of ``caches.json``."""

    hop: Annotated[Finite, Field(gt=0)] = 320
    sampling_rate: Annotated[Finite, Field(gt=0)] = 16_000


class Labels(Shape):
    """``labels`` of a cache."""

    name: str
    id: str


class CacheRecord(Shape):
    """One of ``caches`` in ``caches.json``."""

    path: str
    utterances: Count
    variants: Count = 0
    manifest_id: str
    labels: Labels | None = None
    generation: Any = None


class CacheInfo(Shape):
    """``caches.json``."""

    spec: Spec = Spec()
    caches: list[CacheRecord] = []


class NearestTokens(Shape):
    """One of ``tokens`` in ``space.json``."""

    reference: str
    nearest: list[Annotated[tuple[str, Number], Strict(False)]]


class Utterance(Shape):
    """One of ``utterances`` in the plane of ``space.json``."""

    key: str
    reference: str
    frames: Finite
    points: list[Pair]


class Plane(Shape):
    """``plane`` of ``space.json``."""

    vocabulary: list[Annotated[tuple[Number, Number, str], Strict(False)]]
    explained: Pair
    utterances: list[Utterance]


class EmbeddingSpace(Shape):
    """``space.json``."""

    tokens: list[NearestTokens] = []
    plane: Plane | None = None


class Experiment(Shape):
    """One of ``experiments`` in ``sweep.json``."""

    name: str
    reason: str | None = None


class SweepState(Shape):
    """``sweep.json``."""

    experiments: list[Experiment] = []


def require(shape: type[Shape], tree: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return ``tree``, which was read from ``path``, unchanged.

    Raises:
        UserError: it does not have ``shape``.
    """
    try:
        shape.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"'{path}' cannot be shown ({first_validation_error(error)}): copy the folder again") from None
    return tree
