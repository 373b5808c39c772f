"""HuBERT, wav2vec 2.0, WavLM, w2v-BERT 2.0 and MERT: encoders that take audio of any length.

Maps float32 clips at 16 kHz, for MERT at 24 kHz, to the hidden states of the requested layers, float32
[frames, channels] per clip and layer, with the modules of transformers. Each clip is encoded at its own length
(``window: clip``), on a CPU alone and on a GPU together with clips of equal length, because these encoders were not
trained on padding and the older ones normalize over it. Zeros are appended until the receptive field of the last frame
is full, so that a clip has ceil(samples / hop) frames and every sample contributes; the hop and the receptive field
come from the model's config.

MERT (arXiv 2306.00107) is a HuBERT for music at 24 kHz. Its hub's code is not run: without the options of
``NOT_HUBERT``, which are refused, its network and its tensors are those of transformers' HubertModel.

Layers above the highest requested one are not computed: a pre-hook of the next layer ends the forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pipeline.encoders.base import check_encode_args, encoder_name, tensors_hash
from pipeline.encoders.batching import fitting_batch_size, output_bytes
from pipeline.encoders.capture import LayerCapture
from pipeline.encoders.device import Batch, DeviceBatches, Window, WindowOutput, real_float32
from pipeline.encoders.selfcheck import refuse_corrupt_values
from pipeline.threads import ThreadPool
from pipeline.weights.pretrained import forbid_hub_kernels, load_pretrained
from pipeline.weights.resolve import Weights, read_model_json
from pipeline.weights.tensors import refuse_quantized, require_tensors, select_prefix, stored_tensors
from shards.errors import UserError
from shards.format.spec import WindowMode

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
MODEL_CLASSES = {  # config.json's model_type -> transformers' class
    "hubert": "HubertModel",
    "wav2vec2": "Wav2Vec2Model",
    "wavlm": "WavLMModel",
    "wav2vec2-bert": "Wav2Vec2BertModel",
    "mert_model": "HubertModel",
}
RATES = {"mert_model": 24_000}  # of clips, if not 16 kHz
# MERT's options, and their values when they are off
NOT_HUBERT = {"feature_extractor_cqt": False, "deepnorm": False, "attention_relax": -1.0}
WINDOW_SECONDS = 30  # as in Whisper: the cost of attention grows with the square of the length
# w2v-BERT's log-mel frames, in samples (SeamlessM4TFeatureExtractor)
FILTERBANK_HOP, FILTERBANK_LENGTH = 160, 400
FRONTEND_THREADS = 2  # of normalization and filterbanks, before a GPU
# used in training only, or applied after the last layer
UNUSED_TENSOR_PREFIXES = ("masked_spec_embed", "adapter.", "intermediate_ffn.")


class SelfSupervisedEncoder:
    """A HuBERT, wav2vec 2.0, WavLM, w2v-BERT 2.0 or MERT encoder; see :class:`pipeline.encoders.base.Encoder`.

    Raises:
        UserError: ``weights`` does not load as ``family``, has other tensors, or is for another sampling rate.
    """

    def __init__(self, weights: Weights, family: str, *, device: str, dtype: str, batch_size: int | None) -> None:
        forbid_hub_kernels()  # before the first import of transformers
        import torch
        import transformers

        preprocessor, rate = weights.folder / "preprocessor_config.json", RATES.get(family, 16_000)
        tree = read_model_json(preprocessor) if preprocessor.is_file() else {}
        if tree.get("sampling_rate", rate) != rate:
            raise UserError(
                f"expected {rate} Hz in '{preprocessor}', got {tree['sampling_rate']} Hz: name an encoder for "
                f"{rate // 1000} kHz audio"
            )
        if family == "mert_model":
            _require_plain_mert(weights.folder)
        check_stored_tensors(weights.folder, family)
        try:
            model_class, config = getattr(transformers, MODEL_CLASSES[family]), _config(weights.folder, family)
            model = load_pretrained(model_class, weights.folder, dtype=torch.float32, config=config)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"cannot load '{weights.folder}' as a {family} model ({reason}): copy it again") from None
        self.hop: int
        self.family = family
        self.name = encoder_name(weights.reference)
        self.n_layers: int = model.config.num_hidden_layers
        self.channels: int = model.config.hidden_size
        self.sampling_rate = rate
        self.window_samples = WINDOW_SECONDS * self.sampling_rate
        self.window: WindowMode = "clip"
        self.margin = 0.0
        tensors = _checkpoint_state_dict(model.state_dict())
        refuse_corrupt_values(weights.folder, tensors)
        self.tensors = tensors_hash(tensors)
        self.was_checked = False
        self.dtype, self.device = dtype, device
        self._extractor: Any = None
        if family == "wav2vec2-bert":
            self._extractor = transformers.SeamlessM4TFeatureExtractor(**tree)  # type: ignore[no-untyped-call]
            stride = self._extractor.stride
            self.hop = FILTERBANK_HOP * stride
            self._receptive_field = FILTERBANK_HOP * (stride - 1) + FILTERBANK_LENGTH
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
            raise UserError(
                f"the hop of '{weights.folder}' is {self.hop} samples, which does not divide a window: name another "
                "encoder"
            )
        for name in ("adapter", "intermediate_ffn"):  # they change the frames of the last layer
            if getattr(model, name, None) is not None:
                setattr(model, name, None)
        self._torch_device = torch.device(device)
        self._model = model.to(self._torch_device, getattr(torch, dtype)).eval()
        self._frontend: ThreadPoolExecutor | None = None
        self._capture = LayerCapture(self._model, self._model.encoder.layers)
        self._pool = ThreadPool(torch.get_num_threads()) if device == "cpu" else None
        self._fits = batch_size is None and self._torch_device.type == "cuda"
        self.batch_size = max(batch_size or 8, 4 * self._pool.num_threads if self._pool else 0)
        self.batches = DeviceBatches(self._torch_device, dtype) if self._torch_device.type == "cuda" else None
        self.fit_batch(1)

    def fit_batch(self, num_layers: int) -> None:
        """See :meth:`pipeline.encoders.base.DeviceEncoder.fit_batch`."""
        import torch

        if not self._fits:
            return
        config, frames = self._model.config, self.window_samples // self.hop
        inner = 2 * 4 * frames * (6 * self.channels + 2 * config.intermediate_size)
        # the first convolution has the most values; its output, normalized and activated, is kept three times
        stem = 3 * 4 * (self.window_samples // config.conv_stride[0]) * config.conv_dim[0] if not self._extractor else 0
        free = torch.cuda.mem_get_info(self._torch_device)[0]
        self.batch_size = fitting_batch_size(free, stem + inner + output_bytes(num_layers, frames, self.channels))

    def prepare(self, clip: np.ndarray) -> Window:
        """See :meth:`pipeline.encoders.base.DeviceEncoder.prepare`."""
        if self._frontend is None:
            self._frontend = ThreadPoolExecutor(FRONTEND_THREADS, thread_name_prefix="frontend")
        return Window(len(clip), self._frontend.submit(self._values, clip))

    def group(self, samples: int) -> int:
        """Return the number of frames: clips with as many are padded to the same length."""
        return -(-samples // self.hop)

    def launch(
        self, windows: Sequence[Window], layers: Sequence[int], trim: str, codec: str | None
    ) -> Future[list[WindowOutput]]:
        """See :meth:`pipeline.encoders.base.DeviceEncoder.launch`. The batch has as many rows as there are windows."""
        import torch

        assert self.batches is not None
        values = [window.result() for window in windows]
        frames, dtype, wanted = self.group(windows[0].samples), getattr(torch, self.dtype), set(layers)

        def fill(rows: np.ndarray) -> None:
            for row, value in zip(rows, values, strict=True):
                row[:] = value

        def forward(rows: torch.Tensor) -> dict[int, torch.Tensor]:
            return self._capture.run(wanted, rows.to(dtype))

        shape, counts = (len(values), *values[0].shape), [frames] * len(values)
        return self.batches.launch(Batch(shape, fill, forward, frames, counts, self.channels, sorted(wanted), codec))

    def encode(
        self, clips: Sequence[np.ndarray], layers: Sequence[int], trim: str = "valid"
    ) -> list[dict[int, np.ndarray]]:
        """See :meth:`pipeline.encoders.base.Encoder.encode`; without padding, both values of ``trim`` are the same."""
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

        if not len(clip):
            return {layer: np.zeros((0, self.channels), np.float32) for layer in layers}
        with torch.inference_mode(), real_float32(self.dtype if self._pool is None else ""):
            values = torch.from_numpy(self._values(clip)[None])
            found = self._capture.run(layers, values.to(self._torch_device, getattr(torch, self.dtype)))
        return {layer: x_1TC[0].to("cpu", torch.float32).numpy().copy() for layer, x_1TC in found.items()}

    def _values(self, clip: np.ndarray) -> np.ndarray:
        """Return the model's input, float32: [samples], or [frames, n_mels * stride] for w2v-BERT."""
        length = (self.group(len(clip)) - 1) * self.hop + self._receptive_field
        if self._extractor is not None:
            padded = np.pad(clip, (0, length - len(clip)))
            found = self._extractor(padded, sampling_rate=self.sampling_rate, return_tensors="np").input_features
            return np.asarray(found[0], np.float32)
        if self._normalize:  # as Wav2Vec2FeatureExtractor does, before the padding
            clip = (clip - clip.mean()) / np.sqrt(clip.var() + 1e-7)
        return np.pad(clip, (0, length - len(clip)))


def receptive_field(kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Return the receptive field of a stack of convolutions, in samples."""
    field, step = 1, 1
    for kernel, stride in zip(kernels, strides, strict=True):
        field, step = field + (kernel - 1) * step, step * stride
    return field


def check_stored_tensors(folder: Path, family: str) -> None:
    """Require that ``folder`` holds exactly the tensors of the model that its ``config.json`` describes.

    Tensors beside the model, such as the head of a recognizer, and those that no frame depends on are not looked at.

    Raises:
        UserError: they differ, or are quantized; or the config is not one of ``family``.
    """
    import torch
    import transformers

    model_class, stored = getattr(transformers, MODEL_CLASSES[family]), stored_tensors(folder)
    prefix = select_prefix(folder, stored, (f"{model_class.base_model_prefix}.", ""), f"{family} model")
    own = _checkpoint_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    )
    refuse_quantized(folder, read_model_json(folder / "config.json"), own)
    try:
        with torch.device("meta"):
            model = model_class(_config(folder, family))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"'{folder / 'config.json'}' is not a config of {family} ({reason}): copy it again") from None
    expected = {name: tuple(each.shape) for name, each in _checkpoint_state_dict(model.state_dict()).items()}
    require_tensors(folder, own, expected, f"{family} model", prefix)


def _config(folder: Path, family: str) -> Any:
    """Return the config of ``folder``, an object of transformers; MERT's as that of a HuBERT."""
    import transformers

    kind = getattr(transformers, MODEL_CLASSES[family]).config_class
    if family != "mert_model":
        return load_pretrained(kind, folder)
    tree = read_model_json(folder / "config.json")
    return kind.from_dict({name: value for name, value in tree.items() if name not in ("model_type", "auto_map")})


def _require_plain_mert(folder: Path) -> None:
    """Raise UserError unless the network of a MERT is that of a HuBERT, for 24 kHz audio."""
    tree = read_model_json(folder / "config.json")
    for name, off in {**NOT_HUBERT, "sample_rate": 24_000}.items():
        found = tree.get(name, off)
        on = found != off if name != "attention_relax" else not isinstance(found, int | float) or found > 0
        if on:
            raise UserError(
                f"'{folder / 'config.json'}' has {name}={found!r:.40}, which needs the code of its hub, and that is "
                "not run: name m-a-p/MERT-v1-95M, or another encoder"
            )


def _checkpoint_state_dict(state: Mapping[str, T]) -> dict[str, T]:
    """Drop the tensors that no frame depends on and rename weight-normed ones as in checkpoints."""
    renamed = {}
    for name, tensor in state.items():
        if not name.startswith(UNUSED_TENSOR_PREFIXES):
            name = name.replace("parametrizations.weight.original0", "weight_g")
            renamed[name.replace("parametrizations.weight.original1", "weight_v")] = tensor
    return renamed
