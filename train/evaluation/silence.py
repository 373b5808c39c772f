"""What silence is to a projector: the features of digital silence, as the run's own encoder gives them.

In: held-out utterances. Out: a :class:`Silence`, whose ``audio(frames)`` stands for an utterance of as many frames.
Silence is recorded once: zero samples, as long as the longest utterance but at most 30 s, through encoder, trimming
and codec as in extraction. A shorter utterance hears the first of its frames, a longer one hears it again and again.
Only an encoder that is on this machine already is used (a folder, a wheel, a hub's cache): judging downloads nothing.
Where there is none, silence is zeros, and the figures say so.

Out, too: how often the LM answers silence with words (:class:`Hallucination`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shards.errors import UserError
from shards.format.codec import CodecError
from train.data.caches import Utterances
from train.distributed.group import ProcessGroup
from train.evaluation.batches import Features, UtteranceReader
from train.evaluation.error_rates import has_words, normalizer
from train.model.audio_lm import ModelList

if TYPE_CHECKING:
    from shards.format.spec import FeatureSpec
    from shards.read.cache import Cache

MAX_SECONDS = 30.0  # seconds of silence that are encoded
NUM_INPUTS = 16  # silent inputs that are decoded
MAX_TEXTS = 4  # decoded texts that are kept
ENCODED = "digital silence through the encoder"


@dataclass(frozen=True)
class Silence:
    """``features`` [frames, channels] float32; ``source`` says for people what they are."""

    features: Features
    source: str

    def features_of_length(self, frames: int) -> Features:
        """[frames, channels]"""
        return self.features[np.arange(frames) % len(self.features)]


def encode_silence(utterances: Utterances, device: str, group: ProcessGroup) -> Silence:
    """The silence of the caches' encoder; rank 0 makes it for all."""
    features, source = np.zeros((1, 0), np.float32), ""
    if group.is_main_process:
        features, source = _record(utterances, device)
    source = group.broadcast(source)
    return Silence(group.broadcast_tensors({"silence": torch.from_numpy(features)})["silence"].numpy(), source)


def _record(utterances: Utterances, device: str) -> tuple[Features, str]:
    specs = utterances.specs
    from pipeline.encoders.recording import NonFiniteFeaturesError

    longest = max(utterances.columns("samples")["samples"])
    samples = min(longest, round(MAX_SECONDS * specs[0].sampling_rate))
    try:
        return _encode(utterances.caches[0], specs, samples, device), ENCODED
    except (UserError, NonFiniteFeaturesError, CodecError) as error:
        return np.zeros((1, sum(spec.channels for spec in specs)), np.float32), f"zeros: {error}"


def _encode(cache: Cache, specs: list[FeatureSpec], samples: int, device: str) -> Features:
    """[frames, channels of all layers] float32 of zero samples; UserError without the one encoder of all."""
    from pipeline.encoders.recording import open_encoder
    from train.data.live import encode_features, require_one_encoder

    require_one_encoder(specs)
    recorded = ((cache.info.get("provenance") or {}).get("encoder") or {}).get("reference")
    encoder = open_encoder(specs[0], _on_this_machine(recorded), device)
    return encode_features(np.zeros(samples, np.float32), encoder, specs).astype(np.float32)


def _on_this_machine(reference: str | None) -> str | None:
    """``reference``, or the folder that a hub's library keeps for it; UserError when it would have to be fetched."""
    if reference is None or not reference.startswith(("hf:", "modelscope:")):
        return reference
    from pipeline.weights.hubs import cached_folder

    folder = cached_folder(reference)
    if folder is None:
        raise UserError(f"the encoder {reference} is not on this machine")
    return f"path:{folder}"


@dataclass(frozen=True)
class Hallucination:
    """What the LM says to silence."""

    rate: float  # share of the silent inputs to which it says at least one word after normalisation
    inputs: int
    words: float  # mean over the inputs
    texts: list[str]  # the first few

    def metrics(self) -> dict[str, Any]:
        """By the names of ``summary.json``."""
        return {"hallucination_rate": self.rate,
                "hallucination": {"inputs": self.inputs, "words": self.words, "texts": self.texts}}  # fmt: skip


def measure_hallucination(
    models: ModelList, reader: UtteranceReader, silence: Silence, max_new_tokens: int
) -> list[Hallucination]:
    """Decode silence of up to NUM_INPUTS different lengths, spread evenly over those of the utterances."""
    by_length = sorted({frames: index for index, frames in enumerate(reader.frames)}.items())
    places = np.linspace(0, len(by_length) - 1, min(NUM_INPUTS, len(by_length))).round().astype(int)
    chosen = [by_length[place][1] for place in places.tolist()]

    def work(readers: list[int], features: Tensor, mask: Tensor) -> list[list[str]]:
        return models.generate(features, mask, max_new_tokens)

    batches = reader.map_batches(chosen, chosen, work, lambda index: silence.features_of_length(reader.frames[index]))
    return [_hallucination([text.strip() for batch in own for text in batch]) for own in zip(*batches, strict=True)]


def _hallucination(texts: list[str]) -> Hallucination:
    normalize = normalizer()
    counts = [sum(map(has_words, normalize(text).split())) for text in texts]
    return Hallucination(
        rate=sum(count > 0 for count in counts) / len(counts),
        inputs=len(counts),
        words=sum(counts) / len(counts),
        texts=texts[:MAX_TEXTS],
    )
