"""Silence as projector input, and how often the LM hallucinates words from it.

Takes held-out utterances; returns a :class:`Silence`: the features of digital silence from the run's encoder. Silence
is encoded once: zero samples, as long as the longest utterance but at most 30 s, pass through encoder, trimming and
codec as in extraction. An utterance with fewer frames uses the first of them; one with more repeats them. Evaluation
downloads nothing: the encoder must be on this machine already (a folder, a wheel, a hub's cache). If it is not, the
features are zeros, and the metric ``silence`` records the reason.

:class:`Hallucination` counts how often the LM answers silence with words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shards.errors import UserError
from shards.format.codec import CODE_DTYPE, CODES, CodecError, decoded_dtype
from train.data.caches import Utterances
from train.distributed.group import ProcessGroup
from train.evaluation.batches import Features, UtteranceReader
from train.evaluation.error_rates import has_words
from train.evaluation.languages import normalize_text
from train.model.audio_lm import ModelList

if TYPE_CHECKING:
    from shards.format.spec import FeatureSpec
    from shards.read.cache import Cache

MAX_SECONDS = 30.0  # maximum duration of the encoded silence
NUM_INPUTS = 16  # number of silent inputs that are decoded
MAX_TEXTS = 4  # decoded texts in summary.json
ENCODED = "digital silence through the encoder"


@dataclass(frozen=True)
class Silence:
    """Features of silence [frames, channels], float32, or int32 codes; ``source`` describes their origin for people."""

    features: Features
    source: str

    def features_of_length(self, frames: int) -> Features:
        """Return features [frames, channels]: the encoded silence, cut or repeated to ``frames``."""
        return self.features[np.arange(frames) % len(self.features)]


def encode_silence(utterances: Utterances, device: str, group: ProcessGroup) -> Silence:
    """Encode silence with the encoder of the caches; rank 0 encodes it for all ranks."""
    features, source = np.zeros((1, 0), decoded_dtype(utterances.specs[0].codec)), ""
    if group.is_main_process:
        features, source = _encode_or_zeros(utterances, device)
    source = group.broadcast(source)
    return Silence(group.broadcast_tensors({"silence": torch.from_numpy(features)})["silence"].numpy(), source)


def _encode_or_zeros(utterances: Utterances, device: str) -> tuple[Features, str]:
    """(features [frames, channels], their source); one frame of zeros, or of no codes, without the encoder."""
    specs = utterances.specs
    from pipeline.encoders.recording import NonFiniteFeaturesError

    longest = max(utterances.columns("samples")["samples"])
    samples = min(longest, round(MAX_SECONDS * specs[0].sampling_rate))
    try:
        return _encode(utterances.caches[0], specs, samples, device), ENCODED
    except (UserError, NonFiniteFeaturesError, CodecError) as error:
        channels = sum(spec.channels for spec in specs)
        if specs[0].codec == CODES:
            return np.full((1, channels), -1, CODE_DTYPE), f"no codes: {error}"
        return np.zeros((1, channels), np.float32), f"zeros: {error}"


def _encode(cache: Cache, specs: list[FeatureSpec], samples: int, device: str) -> Features:
    """Features of zero samples, [frames, channels of all layers]; UserError if the encoder is not available."""
    from pipeline.encoders.recording import open_encoder
    from train.data.live import encode_features, require_one_encoder

    require_one_encoder(specs)
    recorded = (cache.provenance.get("encoder") or {}).get("reference")
    encoder = open_encoder(specs[0], _on_this_machine(recorded), device)
    return encode_features(np.zeros(samples, np.float32), encoder, specs).astype(decoded_dtype(specs[0].codec))


def _on_this_machine(reference: str | None) -> str | None:
    """Return ``reference``, or the local folder of a hub's model; UserError if it would have to be downloaded."""
    if reference is None or not reference.startswith(("hf:", "modelscope:")):
        return reference
    from pipeline.weights.hubs import cached_folder

    folder = cached_folder(reference)
    if folder is None:
        raise UserError(f"the encoder {reference} is not on this machine")
    return f"path:{folder}"


@dataclass(frozen=True)
class Hallucination:
    """Words that the LM generates from silence."""

    rate: float  # share of the silent inputs whose normalized output has at least one word
    inputs: int  # number of silent inputs
    words: float  # mean number per input
    texts: list[str]  # the first MAX_TEXTS outputs

    def metrics(self) -> dict[str, Any]:
        """Return the metrics, named as in ``summary.json``."""
        return {"hallucination_rate": self.rate,
                "hallucination": {"inputs": self.inputs, "words": self.words, "texts": self.texts}}  # fmt: skip


def measure_hallucination(
    models: ModelList, reader: UtteranceReader, silence: Silence, max_new_tokens: int
) -> list[Hallucination]:
    """Decode silence of up to NUM_INPUTS different lengths, spread evenly over the lengths of the utterances."""
    by_length = sorted({frames: index for index, frames in enumerate(reader.frames)}.items())
    positions = np.linspace(0, len(by_length) - 1, min(NUM_INPUTS, len(by_length))).round().astype(int)
    chosen = [by_length[position][1] for position in positions.tolist()]

    def decode_batch(text_indices: list[int], features: Tensor, mask: Tensor) -> list[list[str]]:
        return models.generate(features, mask, max_new_tokens, [reader.rows[i] for i in text_indices])

    batches = reader.map_batches(
        chosen,
        chosen,
        decode_batch,
        lambda index: silence.features_of_length(reader.frames[index]),
        what="decode silence",
    )
    language = max(sorted(set(reader.languages)), key=reader.languages.count)
    texts = [[text.strip() for batch in own for text in batch] for own in zip(*batches, strict=True)]
    return [_hallucination(own, language) for own in texts]


def _hallucination(texts: list[str], language: str) -> Hallucination:
    counts = [sum(map(has_words, normalize_text(text, language).split())) for text in texts]
    return Hallucination(
        rate=sum(count > 0 for count in counts) / len(counts),
        inputs=len(counts),
        words=sum(counts) / len(counts),
        texts=texts[:MAX_TEXTS],
    )
