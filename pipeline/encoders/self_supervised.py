"""HuBERT, wav2vec 2.0, WavLM and w2v-BERT 2.0: encoders that take audio of any length.

In: float32 clips at 16 kHz. Out: the hidden states of chosen layers, float32 [frames, channels] a clip, by
transformers' own modules. A clip passes alone, as long as it is (``window: clip``): these encoders were not trained on
padding, and the older ones normalise over it. Zeros are added at the end until the last frame's receptive field is
full, so that a clip has ceil(samples / hop) frames and every sample is heard; hop and receptive field come from the
model's config.

Layers above the highest one asked for are not computed: a hook in front of the next one ends the pass.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.encoders.base import check_encode_args, encoder_name, tensors_hash
from pipeline.threads import ThreadPool
from pipeline.weights.resolve import Weights, read_model_json
from shards.errors import UserError
from shards.format.spec import WindowMode

if TYPE_CHECKING:
    import torch

MODEL_CLASSES = {  # config.json's model_type -> transformers' class
    "hubert": "HubertModel",
    "wav2vec2": "Wav2Vec2Model",
    "wavlm": "WavLMModel",
    "wav2vec2-bert": "Wav2Vec2BertModel",
}
WINDOW_SECONDS = 30  # seconds of a window, as Whisper's: attention over longer audio grows with its square
FILTERBANK_HOP, FILTERBANK_LENGTH = (
    160,
    400,
)  # samples of w2v-BERT's log-mel frames (transformers' SeamlessM4T extractor)
UNUSED_TENSOR_PREFIXES = ("masked_spec_embed", "adapter.", "intermediate_ffn.")  # of training, or behind the last layer


class _StopForward(Exception):
    """The highest layer asked for has its input."""


class SelfSupervisedEncoder:
    """See :class:`pipeline.encoders.base.Encoder`."""

    def __init__(self, weights: Weights, family: str, *, device: str, dtype: str, batch_size: int | None) -> None:
        import torch
        import transformers

        preprocessor = weights.folder / "preprocessor_config.json"
        tree = read_model_json(preprocessor) if preprocessor.is_file() else {}
        if tree.get("sampling_rate", 16000) != 16000:
            raise UserError(f"'{preprocessor}' says {tree['sampling_rate']} Hz: name an encoder of 16000 Hz audio")
        try:
            model, loading_info = getattr(transformers, MODEL_CLASSES[family]).from_pretrained(
                weights.folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"'{weights.folder}' does not load as a {family} model ({reason}): copy it again") from None
        missing = sorted(name for name in loading_info["missing_keys"] if not name.startswith(UNUSED_TENSOR_PREFIXES))
        if missing:
            raise UserError(f"'{weights.folder}' lacks the tensor {missing[0]} of a {family} model: copy it again")
        self.family = family
        self.name = encoder_name(weights.reference)
        self.n_layers: int = model.config.num_hidden_layers
        self.channels: int = model.config.hidden_size
        self.sampling_rate = 16000
        self.window_samples = WINDOW_SECONDS * self.sampling_rate
        self.window: WindowMode = "clip"
        self.margin = 0.0
        self.tensors = tensors_hash(_checkpoint_state_dict(model.state_dict()))
        self.dtype, self.device = dtype, device
        self._extractor: Any = None
        if family == "wav2vec2-bert":
            self._extractor = transformers.SeamlessM4TFeatureExtractor(**tree)  # type: ignore[no-untyped-call]
            stride = self._extractor.stride
            self.hop, self._receptive_field = FILTERBANK_HOP * stride, FILTERBANK_HOP * (stride - 1) + FILTERBANK_LENGTH
            self.frontend: dict[str, int | float | str | bool | None] = {
                "type": "seamless-log-mel",
                "n_mels": self._extractor.num_mel_bins,
                "stride": stride,
            }
        else:
            self.hop = math.prod(model.config.conv_stride)
            self._receptive_field = receptive_field(model.config.conv_kernel, model.config.conv_stride)
            self._normalize = bool(tree.get("do_normalize", True))
            self.frontend = {"type": "waveform", "do_normalize": self._normalize}
        if self.window_samples % self.hop:
            raise UserError(f"'{weights.folder}' makes a frame of {self.hop} samples, which does not divide a window")
        for name in ("adapter", "intermediate_ffn"):  # they make other frames of the last layer's
            if getattr(model, name, None) is not None:
                setattr(model, name, None)
        self._torch_device = torch.device(device)
        self._model = model.to(self._torch_device, getattr(torch, dtype)).eval()
        self._captured = threading.local()
        for index, layer in enumerate(self._model.encoder.layers):
            layer.register_forward_pre_hook(self._capture_hook(index), with_kwargs=True)
        self._pool = ThreadPool(torch.get_num_threads()) if device == "cpu" else None
        self.batch_size = (batch_size or 8) if self._pool is None else max(batch_size or 8, 4 * self._pool.num_threads)

    def encode(
        self, clips: Sequence[np.ndarray], layers: Sequence[int], trim: str = "valid"
    ) -> list[dict[int, np.ndarray]]:
        """See :meth:`pipeline.encoders.base.Encoder.encode`; both trims are the same where nothing is padded."""
        check_encode_args(self, clips, layers, trim)
        results: list[dict[int, np.ndarray]] = [{} for _ in clips]

        def encode_one(index: int) -> None:
            results[index] = self._encode(clips[index], set(layers))

        longest_first = sorted(range(len(clips)), key=lambda i: -len(clips[i]))
        if self._pool:
            self._pool.run(encode_one, [(i,) for i in longest_first])
        else:
            for i in longest_first:
                encode_one(i)
        return results

    def _encode(self, clip: np.ndarray, layers: set[int]) -> dict[int, np.ndarray]:
        import torch

        frames = -(-len(clip) // self.hop)
        if not frames:
            return {layer: np.zeros((0, self.channels), np.float32) for layer in layers}
        self._captured.layers, self._captured.found, self._captured.top = layers, {}, max(layers)
        with torch.inference_mode():
            try:
                last = self._model(self._input(clip, frames)).last_hidden_state
                if self.n_layers in layers:
                    self._captured.found[self.n_layers] = last
            except _StopForward:
                pass
        return {
            layer: x_1TC[0].to("cpu", torch.float32).numpy().copy() for layer, x_1TC in self._captured.found.items()
        }

    def _input(self, clip: np.ndarray, frames: int) -> torch.Tensor:
        """[1, samples] for convolutions, [1, frames, mels · stride] for w2v-BERT, in the run's dtype."""
        import torch

        length = (frames - 1) * self.hop + self._receptive_field
        if self._extractor is not None:
            padded = np.pad(clip, (0, length - len(clip)))
            values = self._extractor(padded, sampling_rate=self.sampling_rate, return_tensors="pt").input_features
        else:
            if self._normalize:  # as Wav2Vec2FeatureExtractor does, before the padding
                clip = (clip - clip.mean()) / np.sqrt(clip.var() + 1e-7)
            values = torch.from_numpy(np.pad(clip, (0, length - len(clip)))[None])
        placed: torch.Tensor = values.to(self._torch_device, getattr(torch, self.dtype))
        return placed

    def _capture_hook(self, index: int) -> Any:
        """A hook in front of layer ``index`` + 1: its input is hidden state ``index``."""

        def hook(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if index in self._captured.layers:
                self._captured.found[index] = args[0] if args else kwargs["hidden_states"]
            if index == self._captured.top:
                raise _StopForward

        return hook


def receptive_field(kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Samples that one frame of a stack of convolutions hears."""
    field, step = 1, 1
    for kernel, stride in zip(kernels, strides, strict=True):
        field, step = field + (kernel - 1) * step, step * stride
    return field


def _checkpoint_state_dict(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without what no frame depends on, and weight-normed tensors under the names that checkpoints give them."""
    renamed = {}
    for name, tensor in state.items():
        if not name.startswith(UNUSED_TENSOR_PREFIXES):
            name = name.replace("parametrizations.weight.original0", "weight_g")
            renamed[name.replace("parametrizations.weight.original1", "weight_v")] = tensor
    return renamed
