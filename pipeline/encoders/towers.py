"""Audio encoders of larger models: Qwen2-Audio, Voxtral, Audio Flamingo 3, GLM-ASR, Moonshine and Parakeet.

Maps float32 clips at 16 kHz to the hidden states of the requested layers, float32 [frames, channels] per clip and
layer, with the modules of transformers and each family's own preprocessing. Only the tensors of the encoder, those
under its prefix, are read from the checkpoint. On a CPU each clip is encoded alone; on a GPU together with others: with
any, where all are padded to 30 s, otherwise with those of equal length.

Qwen2-Audio and Audio Flamingo 3 average two frames before the last norm; their inner layers are averaged alike, so that
all layers have one rate. Attention does not see the padding in these two, as in their models. Zeros are appended where
the last frame would lack samples, so that a clip has ceil(samples / hop) frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.encoders.base import check_encode_args, encoder_name, tensors_hash
from pipeline.encoders.capture import LayerCapture
from pipeline.encoders.device import Batch, DeviceBatches, Window, WindowOutput, real_float32
from pipeline.encoders.logmel import MelSettings
from pipeline.encoders.self_supervised import FRONTEND_THREADS, receptive_field
from pipeline.encoders.selfcheck import refuse_corrupt_values
from pipeline.threads import ThreadPool
from pipeline.weights.pretrained import forbid_hub_kernels, load_pretrained
from pipeline.weights.resolve import Weights, read_model_json
from pipeline.weights.tensors import read_tensors, refuse_quantized, require_tensors, select_prefix, stored_tensors
from shards.errors import UserError
from shards.format.spec import WindowMode

if TYPE_CHECKING:
    import torch

WINDOW_SECONDS = 30
MOONSHINE_CONVOLUTIONS = (127, 7, 3), (64, 3, 2)  # kernels and strides of modeling_moonshine.py
COUNTER = "num_batches_tracked"  # of a batch norm; no frame depends on it


@dataclass(frozen=True)
class Tower:
    """A family of encoders: its classes in transformers and how samples become frames.

    Attributes:
        config: Class of the whole model's config.
        model: Class of the encoder.
        part: The encoder's config in that of the whole model; "" if they are one.
        prefixes: Of the encoder's tensors in a checkpoint.
        hop: Samples per frame.
        frontend: ``whisper`` (log-mel), ``parakeet`` (log-mel) or ``waveform``.
        window: ``full30`` pads each clip to 30 s.
        pools: Whether frames are averaged in pairs before the last norm.
        mask: How the encoder is told what is padding: ``qwen``, ``mel`` or "".
    """

    config: str
    model: str
    part: str
    prefixes: tuple[str, ...]
    hop: int
    frontend: str = "whisper"
    window: WindowMode = "full30"
    pools: bool = False
    mask: str = ""


_AUDIO, _ENCODER = ("audio_tower.", "model.audio_tower."), ("model.encoder.", "encoder.")
FAMILIES = {  # config.json's model_type
    "qwen2_audio": Tower("Qwen2AudioConfig", "Qwen2AudioEncoder", "audio_config", _AUDIO, 640, pools=True, mask="qwen"),
    "voxtral": Tower("VoxtralConfig", "VoxtralEncoder", "audio_config", _AUDIO, 320),
    "audioflamingo3": Tower(
        "AudioFlamingo3Config", "AudioFlamingo3Encoder", "audio_config", _AUDIO, 640, pools=True, mask="mel"
    ),
    "glmasr": Tower("GlmAsrConfig", "GlmAsrEncoder", "audio_config", _AUDIO, 320, window="clip"),
    "moonshine": Tower("MoonshineConfig", "MoonshineEncoder", "", _ENCODER, 384, "waveform", "clip"),
    **{
        f"parakeet_{kind.lower()}": Tower(
            f"Parakeet{kind}Config", "ParakeetEncoder", "encoder_config", _ENCODER, 1280, "parakeet", "clip", mask="mel"
        )
        for kind in ("CTC", "RNNT", "TDT")
    },
}


class TowerEncoder:
    """An encoder of ``FAMILIES``; see :class:`pipeline.encoders.base.Encoder`.

    Raises:
        UserError: ``weights`` does not load as ``family``, has other tensors, or other settings of its input.
    """

    def __init__(self, weights: Weights, family: str, *, device: str, dtype: str, batch_size: int | None) -> None:
        import torch

        self._tower = tower = FAMILIES[family]
        model, tensors = load_tower(weights.folder, family)
        self.family, self.name = family, encoder_name(weights.reference)
        self.n_layers = len(model.layers)
        self.channels: int = model.config.hidden_size
        self.hop, self.sampling_rate = tower.hop, 16_000
        self.window_samples = WINDOW_SECONDS * self.sampling_rate
        self.window: WindowMode = tower.window
        self.margin = 0.0
        self.tensors = tensors_hash(tensors)
        self.dtype, self.device, self.was_checked = dtype, device, False
        self.frontend: dict[str, int | float | str | bool | None] = {}
        self._extractor = self._make_extractor(weights.folder, getattr(model.config, "num_mel_bins", 0))
        self._torch_device = torch.device(device)
        self._model = model.to(self._torch_device, getattr(torch, dtype)).eval()
        self._capture = LayerCapture(self._model, self._model.layers)
        self._pool = ThreadPool(torch.get_num_threads()) if device == "cpu" else None
        self.batch_size = max(batch_size or 8, 4 * self._pool.num_threads if self._pool else 0)
        self._frontend: ThreadPoolExecutor | None = None
        self.batches = DeviceBatches(self._torch_device, dtype) if self._torch_device.type == "cuda" else None

    def prepare(self, clip: np.ndarray) -> Window:
        """See :meth:`pipeline.encoders.base.DeviceEncoder.prepare`."""
        if self._frontend is None:
            self._frontend = ThreadPoolExecutor(FRONTEND_THREADS, thread_name_prefix="frontend")
        return Window(len(clip), self._frontend.submit(self._values, clip))

    def group(self, samples: int) -> int:
        """Return a number that is equal for clips whose inputs have the same length."""
        if self.window == "full30":
            return 0
        return self._length(samples)

    def launch(
        self, windows: Sequence[Window], layers: Sequence[int], trim: str, codec: str | None
    ) -> Future[list[WindowOutput]]:
        """See :meth:`pipeline.encoders.base.DeviceEncoder.launch`.

        A batch of windows of 30 s has ``batch_size`` rows in any case, so that the same kernels run for each window.
        """
        assert self.batches is not None
        values, wanted, padded = [window.result() for window in windows], sorted(set(layers)), self.window == "full30"
        counts = [self._frames(window.samples, trim) for window in windows]
        frames = self.window_samples // self.hop if padded else counts[0]

        def fill(rows: np.ndarray) -> None:
            for row, value in zip(rows, values, strict=False):
                row[:] = value
            rows[len(values) :] = values[0]  # a mask must not be empty

        def forward(rows: torch.Tensor) -> dict[int, torch.Tensor]:
            return self._forward(rows, set(wanted), frames)

        shape = (self.batch_size if padded else len(values), *values[0].shape)
        return self.batches.launch(Batch(shape, fill, forward, frames, counts, self.channels, wanted, codec))

    def encode(
        self, clips: Sequence[np.ndarray], layers: Sequence[int], trim: str = "valid"
    ) -> list[dict[int, np.ndarray]]:
        """See :meth:`pipeline.encoders.base.Encoder.encode`; without padding, both values of ``trim`` are the same."""
        check_encode_args(self, clips, layers, trim)
        results: list[dict[int, np.ndarray]] = [{} for _ in clips]

        def encode_one(index: int) -> None:
            results[index] = self._encode(clips[index], set(layers), trim)

        calls = [(i,) for i in sorted(range(len(clips)), key=lambda i: -len(clips[i]))]
        if self._pool:
            self._pool.run(encode_one, calls)
        else:
            for call in calls:
                encode_one(*call)
        return results

    def _encode(self, clip: np.ndarray, layers: set[int], trim: str) -> dict[int, np.ndarray]:
        import torch

        frames = self._frames(len(clip), trim)
        if not frames:
            return {layer: np.zeros((0, self.channels), np.float32) for layer in layers}
        with torch.inference_mode(), real_float32(self.dtype if self._pool is None else ""):
            rows = torch.from_numpy(self._values(clip)[None]).to(self._torch_device)
            found = self._forward(rows, layers, frames)
        return {layer: x_1TC[0].to("cpu", torch.float32).numpy().copy() for layer, x_1TC in found.items()}

    def _frames(self, samples: int, trim: str) -> int:
        padded = self.window == "full30" and trim == "none"
        return self.window_samples // self.hop if padded else -(-samples // self.hop)

    def _forward(self, rows: torch.Tensor, layers: set[int], frames: int) -> dict[int, torch.Tensor]:
        """Map inputs as of :meth:`_values`, float32 [B, …] on the device, to layer -> [B, ``frames``, channels]."""
        import torch.nn.functional as F

        found = {}
        for layer, x_BTC in self._capture.run(layers, **self._inputs(rows)).items():
            if self._tower.pools and layer < self.n_layers:
                x_BTC = F.avg_pool1d(x_BTC.transpose(1, 2), 2).transpose(1, 2)
            found[layer] = x_BTC[:, :frames]
        return found

    def _length(self, samples: int) -> int:
        """Return the number of samples that a clip is padded to, if that is not the whole window."""
        hops = -(-samples // self.hop)
        if self._tower.frontend == "waveform":
            return (hops - 1) * self.hop + receptive_field(*MOONSHINE_CONVOLUTIONS)
        if self._tower.frontend == "parakeet":  # its variance is over at least two spectra
            return max(320, -(-samples // 160) * 160)
        return hops * self.hop

    def _values(self, clip: np.ndarray) -> np.ndarray:
        """Return the encoder's input for one clip, float32: [samples], [n_mels, T], or for Parakeet [T, n_mels].

        For a tower that is told what is padding, one more channel holds 1 where there is audio, and 0 elsewhere.
        """
        tower = self._tower
        options: dict[str, Any] = {"padding": "max_length", "return_attention_mask": True}
        if self.window == "clip":
            clip = np.pad(clip, (0, self._length(len(clip)) - len(clip)))
            options = {} if tower.frontend == "parakeet" else {"padding": "longest"}
        if tower.frontend == "waveform":
            return clip
        found = self._extractor(clip, sampling_rate=self.sampling_rate, return_tensors="pt", **options)
        values = np.asarray(found["input_features"][0], np.float32)
        if not tower.mask:
            return values
        mask = np.asarray(found["attention_mask"][0], np.float32)
        axis = self._channel_axis
        return np.concatenate([values, np.expand_dims(mask, axis)], axis)

    @property
    def _channel_axis(self) -> int:
        return 1 if self._tower.frontend == "parakeet" else 0

    def _inputs(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the arguments of the model's ``forward`` for the inputs ``rows``; the host waits for nothing."""
        import torch

        dtype, tower, axis = getattr(torch, self.dtype), self._tower, self._channel_axis + 1
        if tower.frontend == "waveform":
            return {"input_values": rows.to(dtype)}
        if not tower.mask:
            return {"input_features": rows.to(dtype)}
        values, mask = rows.narrow(axis, 0, rows.shape[axis] - 1), rows.select(axis, -1)
        inputs = {"input_features": values.to(dtype).contiguous()}
        if tower.frontend == "parakeet":
            inputs["attention_mask"] = mask.bool()
        elif tower.mask == "mel":
            inputs["input_features_mask"] = mask.int()
        else:
            positions = torch.arange(self._model.config.max_source_positions, device=rows.device)
            seen = positions < ((mask.sum(1, keepdim=True).int() - 1) // 2 + 1)
            unseen = torch.zeros(seen.shape, dtype=dtype, device=rows.device).masked_fill(~seen, torch.finfo(dtype).min)
            inputs["attention_mask"] = unseen[:, None, None]
        return inputs

    def _make_extractor(self, folder: Path, n_mels: int) -> Any:
        """Return what turns a clip into the model's input, and set ``frontend``."""
        import transformers

        module: Any = transformers  # its extractors are not typed
        both = (folder / "preprocessor_config.json", folder / "processor_config.json")
        path = next((each for each in both if each.is_file()), both[0])
        tree = read_model_json(path) if path.is_file() else {}
        if isinstance(tree.get("feature_extractor"), dict):
            tree = tree["feature_extractor"]
        kind = self._tower.frontend
        if kind == "whisper":
            mel = MelSettings.from_preprocessor(tree, path, n_mels)
            if mel.chunk_length != WINDOW_SECONDS or mel.hop_length != 160:
                raise UserError(f"'{path}' does not describe windows of 30 s in steps of 10 ms: copy it again")
            self.frontend = {**mel.frontend(), "padding": self.window, "mask": self._tower.mask}
            return module.WhisperFeatureExtractor(
                mel.n_mels, mel.sampling_rate, mel.hop_length, mel.chunk_length, mel.n_fft
            )
        wanted: dict[str, Any] = {"sampling_rate": 16_000, "padding_value": 0.0}
        if kind == "parakeet":
            wanted |= {"hop_length": 160, "n_fft": 512, "win_length": 400, "preemphasis": 0.97, "feature_size": n_mels}
        else:
            wanted |= {"do_normalize": False}
        for key, value in wanted.items():
            if tree.get(key, value) != value:
                raise UserError(
                    f"'{path}' sets {key} to {tree[key]!r:.40}, and a {self.family} encoder is read with {value!r} "
                    "only: copy the file again, or name another encoder"
                )
        self.frontend = {"type": kind, **wanted}
        return module.ParakeetFeatureExtractor(feature_size=n_mels) if kind == "parakeet" else None


def load_tower(folder: Path, family: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the encoder of ``folder`` in float32 on the CPU, and its tensors by their names in the encoder.

    Raises:
        UserError: the folder has other tensors than its config describes, quantized or corrupt ones, or another config.
    """
    forbid_hub_kernels()  # before the first import of transformers
    import torch
    import transformers

    tower, stored = FAMILIES[family], stored_tensors(folder)
    prefix = select_prefix(folder, stored, tower.prefixes, f"{family} encoder")
    own = {
        name.removeprefix(prefix): tensor
        for name, tensor in stored.items()
        if name.startswith(prefix) and not name.endswith(COUNTER)
    }
    refuse_quantized(folder, read_model_json(folder / "config.json"), own)
    module: Any = transformers
    try:
        config = load_pretrained(getattr(module, tower.config), folder)
        model_class = _encoder_class(tower)
        with torch.device("meta"):  # sizes are compared before memory is taken
            expected = model_class(getattr(config, tower.part) if tower.part else config).state_dict()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"'{folder / 'config.json'}' is not a config of {family} ({reason}): copy it again") from None
    shapes = {name: tuple(each.shape) for name, each in expected.items() if not name.endswith(COUNTER)}
    require_tensors(folder, own, shapes, f"{family} encoder", prefix)
    tensors = read_tensors(folder, prefix, own)
    refuse_corrupt_values(folder, tensors)
    sizes = getattr(config, tower.part) if tower.part else config
    for name, value in (("max_source_positions", 1500), ("subsampling_factor", 8)):
        sized = tower.window == "full30" or tower.frontend == "parakeet"
        if sized and getattr(sizes, name, value) != value:
            raise UserError(f"'{folder}' has {name}={getattr(sizes, name)}, expected {value}: name another encoder")
    with torch.random.fork_rng(devices=[]):
        model = model_class(sizes).float()
    model.load_state_dict(tensors, strict=False)  # all but the counters, as compared above
    return model, tensors


def _encoder_class(tower: Tower) -> Any:
    from importlib import import_module

    package = tower.config.removesuffix("Config").removesuffix("CTC").removesuffix("RNNT").removesuffix("TDT")
    name = {"Qwen2Audio": "qwen2_audio"}.get(package, package.lower())
    return getattr(import_module(f"transformers.models.{name}.modeling_{name}"), tower.model)
