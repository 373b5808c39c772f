"""Whisper's encoder: a forward pass over the tensors of a transformers folder.

Maps float32 clips at 16 kHz to the hidden states of the requested layers, float32 [frames, channels] per clip and
layer. The decoder is never loaded. Layers above the highest requested one are not computed, and the highest one only
for the frames that are kept. bfloat16 on a CPU is faster than in transformers and closer to float32 (see
:func:`self_attention` and :meth:`WhisperEncoder._forward`).

On a CPU, each clip is encoded on one thread, and as many clips run in parallel as torch has threads. No thread waits at
a barrier inside a layer, so a busy core slows down only its own clip, and a clip's features depend neither on the batch
nor on the number of threads. On a GPU, an extraction launches batches of one shape per context, filled with silence, so
that the features of a clip do not depend on its companions (:meth:`WhisperEncoder.launch`).
:meth:`WhisperEncoder.encode` takes batches of any size, and the kernel chosen for another size may round differently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.cpu import has_bfloat16_units
from pipeline.encoders.base import CONTEXT_STEP_SECONDS, check_encode_args, context_samples, encoder_name, tensors_hash
from pipeline.encoders.batching import fitting_batch_size, output_bytes
from pipeline.encoders.compile import Forward
from pipeline.encoders.device import Batch, DeviceBatches, Window, WindowOutput, real_float32
from pipeline.encoders.logmel import LogMel, MelSettings
from pipeline.encoders.selfcheck import refuse_corrupt_values
from pipeline.threads import ThreadPool
from pipeline.weights.resolve import Weights, read_model_json
from pipeline.weights.tensors import (
    StoredTensor,
    read_tensors,
    refuse_quantized,
    require_tensors,
    select_prefix,
    stored_tensors,
)
from shards.errors import UserError
from shards.format.spec import WindowMode

if TYPE_CHECKING:
    import torch

QUERY_BLOCK = 500  # score rows that fit into a core's cache: the fastest of 125 to 1500 for 1500 frames
PREFIXES = ("model.encoder.", "encoder.")  # in WhisperForConditionalGeneration, in WhisperModel
MAX_LAYERS = 1000
FRAMES_STEP = 50  # frames of the last layer are rounded up to a multiple of this, to limit the number of shapes


class WhisperEncoder:
    """The encoder of an OpenAI Whisper (Radford et al., 2022, arXiv:2212.04356); see :class:`Encoder`.

    Raises:
        UserError: ``weights`` does not hold an unmodified Whisper encoder.
    """

    family = "whisper"

    def __init__(
        self,
        weights: Weights,
        *,
        device: str,
        dtype: str,
        batch_size: int | None,
        window: WindowMode = "full30",
        margin: float = 0.0,
    ) -> None:
        import torch

        config = read_model_json(weights.folder / "config.json")
        preprocessor = weights.folder / "preprocessor_config.json"
        tree = read_model_json(preprocessor) if preprocessor.is_file() else {}
        tensors = read_encoder_tensors(weights.folder, config)
        self.channels: int = tensors["conv2.weight"].shape[0]
        self.positions: int = tensors["embed_positions.weight"].shape[0]
        self.n_layers = sum(name.endswith(".fc1.weight") for name in tensors)
        self.n_heads: int = config["encoder_attention_heads"]
        mel = MelSettings.from_preprocessor(tree, preprocessor, tensors["conv1.weight"].shape[1])
        if config.get("activation_function", "gelu") != "gelu" or mel.frames != 2 * self.positions:
            raise UserError(f"'{weights.folder}' holds a modified Whisper encoder: name one with OpenAI's architecture")
        self.name = encoder_name(weights.reference)
        self.hop = 2 * mel.hop_length  # the second convolution has stride 2
        self.sampling_rate = mel.sampling_rate
        self.window_samples = mel.samples
        self.window, self.margin = window, margin
        self.tensors = tensors_hash(tensors)
        self.frontend = mel.frontend()
        self.was_checked = False
        self.dtype = dtype
        self.device = device
        self._pool = ThreadPool(torch.get_num_threads()) if device == "cpu" else None
        self._torch_device = torch.device(device)
        self._log_mel = LogMel(mel, self._torch_device)
        inner = tensors["layers.0.fc1.weight"].shape[0]
        self._emulated = device == "cpu" and dtype == "bfloat16" and not has_bfloat16_units()
        self._weights = self._prepare_weights(tensors)
        self.forward: Forward = self._forward  # replaced by a compiled one in pipeline/encoders/load.py
        positions, channels = self.positions, self.channels
        self.flop_per_window: float = window_flop(positions, channels, inner, mel.n_mels, self.n_layers)
        self._pass_bytes = pass_bytes(positions, channels, inner)
        self._fits = batch_size is None and self._torch_device.type == "cuda"
        self.batch_size = max(batch_size or 8, 4 * self._pool.num_threads if self._pool else 0)
        self.fit_batch(1)
        self.batches = DeviceBatches(self._torch_device, dtype) if self._torch_device.type == "cuda" else None

    def fit_batch(self, num_layers: int) -> None:
        """Set the batch size that fits into the device's free memory when ``num_layers`` layers are asked for.

        Nothing changes on a CPU, or if the size was configured.
        """
        import torch

        if self._fits:
            free = torch.cuda.mem_get_info(self._torch_device)[0]
            self.batch_size = fitting_batch_size(free, self.window_bytes(num_layers))

    def window_bytes(self, num_layers: int) -> int:
        """Return the bytes that a window takes on a GPU when ``num_layers`` layers are asked for: an estimate."""
        return self._pass_bytes + output_bytes(num_layers, self.positions, self.channels)

    def fix_addresses(self) -> None:
        """Tell torch.compile that the weights stay where they are: CUDA graphs then read them in place."""
        import torch._dynamo

        for value in self._weights.values():
            torch._dynamo.mark_static_address(value)

    def prepare(self, clip: np.ndarray) -> Window:
        """See :meth:`pipeline.encoders.base.DeviceEncoder.prepare`."""
        return Window(len(clip), clip)

    def group(self, samples: int) -> int:
        """Return the context of a clip, in samples: windows of one context are launched together."""
        return context_samples(samples, self)

    def launch(
        self, windows: Sequence[Window], layers: Sequence[int], trim: str, codec: str | None
    ) -> Future[list[WindowOutput]]:
        """See :meth:`pipeline.encoders.base.DeviceEncoder.launch`; the batch has ``batch_size`` rows in any case."""
        assert self.batches is not None
        context = self.group(windows[0].samples)
        positions, wanted = context // self.hop, sorted(set(layers))

        def fill(audio: np.ndarray) -> None:
            for row, window in zip(audio, windows, strict=False):
                row[: window.samples] = window.result()

        def forward(audio: torch.Tensor) -> dict[int, torch.Tensor]:
            return self.forward(self._log_mel(audio, 2 * positions), wanted, positions)

        counts = [-(-window.samples // self.hop) if trim == "valid" else positions for window in windows]
        return self.batches.launch(
            Batch((self.batch_size, context), fill, forward, positions, counts, self.channels, wanted, codec)
        )

    def encode(
        self, clips: Sequence[np.ndarray], layers: Sequence[int], trim: str = "valid"
    ) -> list[dict[int, np.ndarray]]:
        """See :meth:`Encoder.encode`. Raises ValueError for an invalid clip, layer or trim."""
        import torch

        check_encode_args(self, clips, layers, trim)
        results: list[dict[int, np.ndarray]] = [{} for _ in clips]

        def encode_batch(context: int, batch: Sequence[int]) -> None:
            positions = context // self.hop
            frames = [-(-len(clips[i]) // self.hop) if trim == "valid" else positions for i in batch]
            with torch.inference_mode(), real_float32(self.dtype if self._pool is None else ""):
                mel = self._log_mel(self._pad([clips[i] for i in batch]), 2 * positions)
                for layer, x_BTC in self._run_forward(mel, sorted(set(layers)), max(frames)).items():
                    values = x_BTC[: len(batch), : max(frames)].to("cpu", torch.float32).numpy()
                    for row, (i, count) in enumerate(zip(batch, frames, strict=True)):
                        results[i][layer] = values[row, :count].copy()  # a view would keep the whole batch alive

        batches = self._batches(clips, 1 if self._pool else self.batch_size)
        if self._pool:
            self._pool.run(encode_batch, batches)
        else:
            for context, batch in batches:
                encode_batch(context, batch)
        return results

    def _run_forward(self, mel: torch.Tensor, layers: Sequence[int], frames: int) -> dict[int, torch.Tensor]:
        """Run the forward pass.

        A compiled pass takes full batches only. It is used from half a batch up, and the batch is padded with zeros.
        """
        import torch.nn.functional as F

        compiled = self.forward != self._forward and 2 * len(mel) > self.batch_size
        step = CONTEXT_STEP_SECONDS * self.sampling_rate // self.hop if compiled else FRAMES_STEP
        num_frames = min(mel.shape[2] // 2, max(1, -(-frames // step)) * step)
        if not compiled:
            return self._forward(mel, layers, num_frames)
        return self.forward(F.pad(mel, (0, 0, 0, 0, 0, self.batch_size - len(mel))), layers, num_frames)

    def _batches(self, clips: Sequence[np.ndarray], size: int) -> list[tuple[int, list[int]]]:
        """Return (context in samples, indices of clips) of each forward pass, the longest contexts first."""
        contexts = [context_samples(len(clip), self) for clip in clips]
        batches = []
        for context in sorted(set(contexts), reverse=True):
            same = [i for i, other in enumerate(contexts) if other == context]
            batches += [(context, same[start : start + size]) for start in range(0, len(same), size)]
        return batches

    def _pad(self, clips: Sequence[np.ndarray]) -> torch.Tensor:
        import torch

        audio = np.zeros((len(clips), max(1, *(len(clip) for clip in clips))), np.float32)
        for row, clip in zip(audio, clips, strict=True):
            row[: len(clip)] = clip
        return torch.from_numpy(audio).to(self._torch_device)

    def _prepare_weights(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Move the tensors to the device.

        The matrices of the layers are cast to ``self.dtype``, with q, k and v stacked and q scaled. The rest stay in
        float32. Where bfloat16 is emulated, the matrices are rounded to it and kept in float32.
        """
        import torch

        scale = (self.channels // self.n_heads) ** -0.5  # a power of two in every Whisper: exact in any dtype
        ready = {name: value.float() for name, value in tensors.items()}
        for i in range(self.n_layers):
            attention = f"layers.{i}.self_attn"
            q, k, v = (ready.pop(f"{attention}.{part}_proj.weight") for part in "qkv")
            q_bias, v_bias = (ready.pop(f"{attention}.{part}_proj.bias") for part in "qv")
            ready[f"{attention}.qkv.weight"] = torch.cat([q * scale, k, v])
            ready[f"{attention}.qkv.bias"] = torch.cat([q_bias * scale, torch.zeros_like(q_bias), v_bias])
        dtype = getattr(torch, self.dtype)
        linear = re.compile(r"layers\..*\.(qkv|out_proj|fc1|fc2)\.|conv2\.")
        on_device = {
            name: value.to(self._torch_device, dtype if linear.match(name) else torch.float32).contiguous()
            for name, value in ready.items()
        }
        if self._emulated:
            return {name: value.float() for name, value in on_device.items()}
        if self._pool and dtype == torch.bfloat16 and _has_packed_linear():
            for name, value in on_device.items():
                if value.ndim == 2 and value.dtype == dtype:
                    on_device[name] = torch.ops.mkldnn._reorder_linear_weight(value, self.positions)
        return on_device

    def _forward(self, mel: torch.Tensor, layers: Sequence[int], num_frames: int) -> dict[int, torch.Tensor]:
        """Compute the hidden states of the sorted ``layers``, and nothing above the last of them.

        The large matrix products run in ``self.dtype``, everything else (first convolution, residual stream, norms) in
        float32. That costs 3 % of the time and makes the error of bfloat16 smaller than in a model cast as a whole.
        On a CPU without units for bfloat16, operands and results are rounded to it, and the products are float32.

        Args:
            mel: float32 [B, n_mels, 2T].
            layers: Layers to return, in ascending order.
            num_frames: Number of frames of the last layer to compute. The layers before it are computed in full,
                because all their frames are keys and values of the next.

        Returns:
            Layer -> [B, T, C], for the last layer [B, num_frames, C].
        """
        import torch
        import torch.nn.functional as F

        w = self._weights

        def rounded(x: torch.Tensor) -> torch.Tensor:
            return x.bfloat16().float() if self._emulated else x

        def linear(x: torch.Tensor, name: str, gelu: bool = False) -> torch.Tensor:
            weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
            if weight.is_mkldnn:  # packed once, where F.linear packs at every call; the results are identical
                activation, variant = ("gelu", "none") if gelu else ("none", "")  # "none": GELU with the error function
                z: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                    x.to(bias.dtype), weight, bias, activation, [], variant
                )
                return z
            y = rounded(F.linear(rounded(x).to(weight.dtype), weight, bias))
            return F.gelu(y) if gelu else y

        def norm(x: torch.Tensor, name: str) -> torch.Tensor:
            return F.layer_norm(x, (self.channels,), w[f"{name}.weight"], w[f"{name}.bias"])

        x = F.gelu(F.conv1d(mel, w["conv1.weight"], w["conv1.bias"], padding=1))
        x = rounded(x).to(w["conv2.weight"].dtype)
        x = F.conv1d(x, w["conv2.weight"], w["conv2.bias"], stride=2, padding=1)
        x = F.gelu(rounded(x.float())).transpose(1, 2).contiguous()
        x = x + w["embed_positions.weight"][: x.shape[1]]
        hidden = {0: x}
        for i in range(layers[-1]):
            layer = f"layers.{i}"
            qkv = linear(norm(x, f"{layer}.self_attn_layer_norm"), f"{layer}.self_attn.qkv")
            rows = num_frames if i + 1 == layers[-1] else x.shape[1]
            x = x[:, :rows] + linear(self_attention(qkv, self.n_heads, rows), f"{layer}.self_attn.out_proj")
            inner = linear(norm(x, f"{layer}.final_layer_norm"), f"{layer}.fc1", gelu=True)
            x = x + linear(inner, f"{layer}.fc2")
            if i + 1 in layers:
                hidden[i + 1] = x
        if layers[-1] == self.n_layers:
            hidden[self.n_layers] = norm(x, "layer_norm")
        return {layer: hidden[layer] for layer in layers}


def window_flop(positions: int, channels: int, inner: int, n_mels: int, n_layers: int) -> int:
    """Return the floating-point operations of a window's products, convolutions and attention, all layers."""
    stem = 6 * positions * channels * (2 * n_mels + channels)
    layer = 2 * positions * channels * (4 * channels + 2 * inner) + 4 * positions**2 * channels
    return stem + n_layers * layer


def pass_bytes(positions: int, channels: int, inner: int) -> int:
    """Return the bytes that a window takes during a pass: an estimate, which ``bench/sizes.py`` compares with a count.

    They are the stem's output and the residual stream in float32, the inner layer, q, k and v in 16 bits.
    """
    return positions * (4 * 6 * channels + 2 * (2 * inner + 4 * channels))


def self_attention(qkv: torch.Tensor, n_heads: int, num_queries: int | None = None) -> torch.Tensor:
    """Compute full self-attention.

    Args:
        qkv: Stacked q (already scaled), k and v: [B, T, 3C].
        n_heads: Number of heads.
        num_queries: Compute the first ``num_queries`` queries only; None: all T.

    Returns:
        [B, num_queries, C] in the dtype of ``qkv``.
    """
    import torch
    import torch.nn.functional as F

    B, T, _ = qkv.shape
    R = T if num_queries is None else num_queries
    q, k, v = qkv.view(B, T, 3, n_heads, -1).permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
    if qkv.device.type != "cpu" or qkv.dtype == torch.float32:
        return F.scaled_dot_product_attention(q[:, :, :R], k, v, scale=1.0).transpose(1, 2).reshape(B, R, -1)
    # torch's CPU attention kernel runs at a quarter of the speed of plain matrix products in low precision.
    out = qkv.new_empty(B, R, n_heads, q.shape[-1])
    scores, probabilities = qkv.new_empty(2, min(R, QUERY_BLOCK), T)  # reused: new memory must be mapped
    for b in range(B):
        for h in range(n_heads):
            for i in range(0, R, QUERY_BLOCK):
                block = min(QUERY_BLOCK, R - i)
                torch.mm(q[b, h, i : i + block], k[b, h].T, out=scores[:block])
                torch.softmax(scores[:block], -1, out=probabilities[:block])
                torch.mm(probabilities[:block], v[b, h], out=out[b, i : i + block, h])
    return out.view(B, R, -1)


def _has_packed_linear() -> bool:
    """Return whether torch has oneDNN's linear layer over packed bfloat16 weights, as it has on x86 servers."""
    import torch

    operations = torch.ops.mkldnn
    packed = all(hasattr(operations, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    return packed and bool(operations._is_mkldnn_bf16_supported())


def read_encoder_tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Read the encoder's tensors from a Whisper folder: as stored, on the CPU, named as in ``WhisperModel.encoder``.

    Raises:
        UserError: they are not exactly those of the encoder that ``config`` describes, quantized, or not finite.
    """
    stored = stored_tensors(folder)
    prefix = select_prefix(folder, stored, PREFIXES, "Whisper encoder")
    own = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    refuse_quantized(folder, config, own)
    require_tensors(folder, own, encoder_shapes(folder, config, own), "Whisper encoder", prefix)
    found: dict[str, torch.Tensor] = read_tensors(folder, prefix, own)
    refuse_corrupt_values(folder, found)
    return found


def encoder_shapes(
    folder: Path, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of the encoder that ``config`` describes.

    What ``config`` leaves out is taken from ``stored``: the shapes then only have to agree with each other.

    Raises:
        UserError: a size in ``config`` is not a positive number, or the width is not a multiple of the heads.
    """

    def size(key: str, name: str, axis: int) -> int:
        tensor = stored.get(name)
        value = config.get(key, tensor.shape[axis] if tensor and axis < len(tensor.shape) else 0)
        if type(value) is not int or value < 1:
            raise UserError(
                f"'{folder}' does not hold a Whisper encoder: config.json has no valid {key}, and there is no tensor "
                f"{name}; name another model"
            )
        return value

    width, inner = size("d_model", "conv2.weight", 0), size("encoder_ffn_dim", "layers.0.fc1.weight", 0)
    mels, positions = size("num_mel_bins", "conv1.weight", 1), size("max_source_positions", "embed_positions.weight", 0)
    layers = config.get("encoder_layers", sum(name.endswith(".fc1.weight") for name in stored))
    heads = config.get("encoder_attention_heads")
    if type(layers) is not int or not 1 <= layers <= MAX_LAYERS or type(heads) is not int or heads < 1 or width % heads:
        raise UserError(
            f"'{folder / 'config.json'}' does not describe a Whisper encoder (encoder_layers={layers}, "
            f"encoder_attention_heads={heads}, d_model={width}): copy it again or name another model"
        )
    shapes: dict[str, tuple[int, ...]] = {
        "conv1.weight": (width, mels, 3),
        "conv2.weight": (width, width, 3),
        "embed_positions.weight": (positions, width),
        **dict.fromkeys(("conv1.bias", "conv2.bias", "layer_norm.weight", "layer_norm.bias"), (width,)),
    }
    for layer in (f"layers.{i}" for i in range(layers)):
        shapes |= {f"{layer}.self_attn.{part}_proj.weight": (width, width) for part in ("q", "k", "v", "out")}
        shapes |= {f"{layer}.self_attn.{part}_proj.bias": (width,) for part in ("q", "v", "out")}
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{layer}.{norm}.{kind}": (width,) for kind in ("weight", "bias")}
        shapes |= {f"{layer}.fc1.weight": (inner, width), f"{layer}.fc1.bias": (inner,)}
        shapes |= {f"{layer}.fc2.weight": (width, inner), f"{layer}.fc2.bias": (width,)}
    return shapes
