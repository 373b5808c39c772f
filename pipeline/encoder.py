"""Frozen speech encoder: 30 s windows of audio in, frames of chosen layers out.

In: a :class:`pipeline.weights.Weights` folder and float32 mono clips at 16 kHz. Out: for each clip a float32 array
[frames, channels] per layer. The forward pass is written here over the encoder's own tensors: the decoder is never
loaded, layers above the highest one asked for are not computed, and bfloat16 on a CPU is faster and nearer to float32
than transformers' (see ``attend`` and ``_forward``).

On a CPU a clip's features do not depend on what else is in the batch: clips pass one at a time, which costs nothing
there (a clip already is a matrix of 1500 rows). On a GPU clips pass in batches, and a kernel chosen for another batch
size may round differently.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipeline.logmel import LogMel, MelSettings
from pipeline.weights import Weights, read_json, weight_files
from shards.errors import UserError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
QUERY_BLOCK = 500  # rows of scores that stay in a core's cache: fastest of 128 to 1500 for 1500 frames


class Encoder(Protocol):
    """What extraction needs of an encoder; sizes in samples at ``sampling_rate`` Hz.

    Attributes:
        family: architecture, part of the feature spec.
        name: part of a cache folder's name, ``[A-Za-z0-9_-]+``.
        n_layers: layer 0 is the input of the first layer, ``n_layers`` the output after the final norm.
        channels: width of a frame.
        hop: samples a frame stands for.
        window_samples: longest clip.
        tensors: sha256 of the encoder's tensors, see :func:`tensors_hash`.
        frontend: settings of the spectrogram, part of the feature spec.
        dtype: arithmetic, one of ``DTYPES``.
        device: torch's name of it.
    """

    family: str
    name: str
    n_layers: int
    channels: int
    hop: int
    sampling_rate: int
    window_samples: int
    tensors: str
    frontend: dict[str, int | float | str | bool | None]
    dtype: str
    device: str

    def encode(
        self, clips: Sequence[np.ndarray], layers: Sequence[int], trim: str = "valid"
    ) -> list[dict[int, np.ndarray]]:
        """Features of ``clips`` (float32 [samples], at most ``window_samples``), each padded to a full window.

        Returns a dict for each clip: layer -> float32 [frames, channels], where frames is ceil(samples / hop) with
        ``trim="valid"`` and the whole window's with ``trim="none"``. NaN and Inf are passed on, not checked.
        """
        ...


def load_encoder(weights: Weights, *, device: str = "auto", dtype: str = "auto", batch_size: int = 8) -> Encoder:
    """The encoder in ``weights``, ready on ``device``.

    Args:
        device: ``auto`` is ``cuda`` where there is one, else ``cpu``.
        dtype: ``auto`` is bfloat16 where the device computes it natively, else float16 on a GPU, float32 on a CPU.
        batch_size: most clips in one forward pass on a GPU.

    Raises:
        UserError: no Whisper, a damaged folder, or a device or dtype that is not there.
    """
    import torch

    if batch_size < 1:
        raise UserError(f"encoder.batch_size is {batch_size}: set it to 1 or more")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"encoder.device '{device}' is not available here: set encoder.device=auto or cpu") from None
    if dtype == "auto":
        dtype = fast_dtype(device)
    if dtype not in DTYPES:
        raise UserError(f"encoder.dtype is '{dtype}': set it to auto, {', '.join(DTYPES)}")
    return WhisperEncoder(weights, device=device, dtype=dtype, batch_size=batch_size)


def fast_dtype(device: str) -> str:
    """The dtype that ``auto`` stands for on ``device``: depends on the hardware, not on the model."""
    import torch

    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    except OSError:
        return "float32"
    return "bfloat16" if flags & {"amx_bf16", "avx512_bf16", "bf16"} else "float32"


def encoder_name(reference: str) -> str:
    """``hf:openai/whisper-tiny.en@main`` -> ``whisper-tiny-en``: a part of a folder's name."""
    last = reference.partition("@")[0].rstrip("/").replace(":", "/").rpartition("/")[2]
    return re.sub(r"[^a-z0-9_-]+", "-", last.lower()).strip("-") or "encoder"


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over the tensors sorted by name: name, shape, values as little-endian float32; 64 hex digits.

    The same weights stored as float16, bfloat16 or float32, in a folder of an encoder or of a whole model, agree.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].to(torch.float32).contiguous().numpy().astype("<f4", copy=False)
        digest.update(json.dumps([name, list(values.shape)]).encode() + b"\n")
        digest.update(values.data)
    return digest.hexdigest()


def read_encoder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The encoder's tensors (as stored, on the CPU) of a Whisper folder, named as in ``WhisperModel.encoder``."""
    import torch
    from safetensors import safe_open

    found: dict[str, torch.Tensor] = {}
    prefixes = re.compile(r"^(?:model\.)?encoder\.")  # WhisperForConditionalGeneration, WhisperModel
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    if prefixes.match(name):
                        found[prefixes.sub("", name)] = file.get_tensor(name)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            found.update({prefixes.sub("", name): value for name, value in state.items() if prefixes.match(name)})
    return found


class WhisperEncoder:
    """Any OpenAI Whisper's encoder (Radford et al., 2022, arXiv:2212.04356); see :class:`Encoder`."""

    family = "whisper"

    def __init__(self, weights: Weights, *, device: str, dtype: str, batch_size: int) -> None:
        import torch

        config = read_json(weights.folder / "config.json")
        preprocessor = weights.folder / "preprocessor_config.json"
        tree = read_json(preprocessor) if preprocessor.is_file() else {}
        tensors = read_encoder_tensors(weights.folder)
        try:
            self.channels: int = tensors["conv2.weight"].shape[0]
            self.positions: int = tensors["embed_positions.weight"].shape[0]
            self.n_layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))
            self.heads: int = config["encoder_attention_heads"]
            mel = MelSettings.from_preprocessor(tree, preprocessor, tensors["conv1.weight"].shape[1])
        except (KeyError, ValueError) as error:
            raise UserError(
                f"'{weights.folder}' holds no Whisper encoder ({error} is missing): name another model"
            ) from None
        if config.get("activation_function", "gelu") != "gelu" or mel.frames != 2 * self.positions:
            raise UserError(f"'{weights.folder}' holds an encoder unlike OpenAI's Whisper: name an unmodified Whisper")
        self.name = encoder_name(weights.reference)
        self.hop = 2 * mel.hop_length  # the second convolution has stride 2
        self.sampling_rate = mel.sampling_rate
        self.window_samples = mel.samples
        self.tensors = tensors_hash(tensors)
        self.frontend = mel.frontend()
        self.dtype = dtype
        self.device = device
        self.batch_size = 1 if device == "cpu" else batch_size
        self._torch_device = torch.device(device)
        self._log_mel = LogMel(mel, self._torch_device)
        self._weights = self._prepare(tensors)

    def encode(
        self, clips: Sequence[np.ndarray], layers: Sequence[int], trim: str = "valid"
    ) -> list[dict[int, np.ndarray]]:
        """See :meth:`Encoder.encode`. Raises ValueError for a clip, layer or trim that is out of range."""
        import torch

        if not layers or min(layers) < 0 or max(layers) > self.n_layers:
            raise ValueError(f"layers {list(layers)} are not in 0 … {self.n_layers}")
        if trim not in ("valid", "none"):
            raise ValueError(f"trim is {trim!r}, not 'valid' or 'none'")
        for clip in clips:
            if clip.ndim != 1 or clip.shape[0] > self.window_samples:
                raise ValueError(f"a clip has shape {clip.shape}, not [samples <= {self.window_samples}]")
        results: list[dict[int, np.ndarray]] = []
        with torch.inference_mode():
            for start in range(0, len(clips), self.batch_size):
                batch = clips[start : start + self.batch_size]
                frames = [-(-len(clip) // self.hop) if trim == "valid" else self.positions for clip in batch]
                hidden = self._forward(self._log_mel(self._pad(batch)), sorted(set(layers)))
                found: list[dict[int, np.ndarray]] = [{} for _ in batch]
                for layer, x_BTC in hidden.items():
                    values = x_BTC[:, : max(frames)].to("cpu", torch.float32).numpy()
                    for row, count in enumerate(frames):
                        found[row][layer] = values[row, :count].copy()  # a view would keep the whole batch alive
                results += found
        return results

    def _pad(self, clips: Sequence[np.ndarray]) -> torch.Tensor:
        import torch

        audio = np.zeros((len(clips), max(1, *(len(clip) for clip in clips))), np.float32)
        for row, clip in zip(audio, clips, strict=True):
            row[: len(clip)] = clip
        return torch.from_numpy(audio).to(self._torch_device)

    def _prepare(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """On the device: the layers' matrices in the run's dtype (q, k, v stacked, q scaled), the rest in float32."""
        import torch

        scale = (self.channels // self.heads) ** -0.5  # a power of two in every Whisper: exact in any dtype
        ready = {name: value.float() for name, value in tensors.items()}
        for i in range(self.n_layers):
            attention = f"layers.{i}.self_attn"
            q, k, v = (ready.pop(f"{attention}.{part}_proj.weight") for part in "qkv")
            q_bias, v_bias = (ready.pop(f"{attention}.{part}_proj.bias") for part in "qv")
            ready[f"{attention}.qkv.weight"] = torch.cat([q * scale, k, v])
            ready[f"{attention}.qkv.bias"] = torch.cat([q_bias * scale, torch.zeros_like(q_bias), v_bias])
        dtype = getattr(torch, self.dtype)
        linear = re.compile(r"layers\..*\.(qkv|out_proj|fc1|fc2)\.")
        return {
            name: value.to(self._torch_device, dtype if linear.match(name) else torch.float32).contiguous()
            for name, value in ready.items()
        }

    def _forward(self, mel: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Mel [B, n_mels, 2T] -> hidden states [B, T, C] of the sorted ``layers``; nothing above the last is computed.

        Matrix products of the layers run in the run's dtype, everything else (stem, residual stream, norms) in float32:
        that costs 5 % of the time and makes bfloat16's error smaller than that of a model cast as a whole.
        """
        import torch.nn.functional as F

        w = self._weights

        def linear(x: torch.Tensor, name: str) -> torch.Tensor:
            return F.linear(x.to(w[f"{name}.weight"].dtype), w[f"{name}.weight"], w[f"{name}.bias"])

        def norm(x: torch.Tensor, name: str) -> torch.Tensor:
            return F.layer_norm(x, (self.channels,), w[f"{name}.weight"], w[f"{name}.bias"])

        x = F.gelu(F.conv1d(mel, w["conv1.weight"], w["conv1.bias"], padding=1))
        x = F.gelu(F.conv1d(x, w["conv2.weight"], w["conv2.bias"], stride=2, padding=1))
        x = x.transpose(1, 2) + w["embed_positions.weight"]
        hidden = {0: x}
        for i in range(layers[-1]):
            layer = f"layers.{i}"
            qkv = linear(norm(x, f"{layer}.self_attn_layer_norm"), f"{layer}.self_attn.qkv")
            x = x + linear(attend(qkv, self.heads), f"{layer}.self_attn.out_proj")
            inner = F.gelu(linear(norm(x, f"{layer}.final_layer_norm"), f"{layer}.fc1"))
            x = x + linear(inner, f"{layer}.fc2")
            if i + 1 in layers:
                hidden[i + 1] = x
        if layers[-1] == self.n_layers:
            hidden[self.n_layers] = norm(x, "layer_norm")
        return {layer: hidden[layer] for layer in layers}


def attend(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """Full self-attention of stacked q (already scaled), k, v: [B, T, 3C] -> [B, T, C], in the dtype of ``qkv``."""
    import torch
    import torch.nn.functional as F

    B, T, _ = qkv.shape
    q, k, v = qkv.view(B, T, 3, heads, -1).permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
    if qkv.device.type != "cpu" or qkv.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).reshape(B, T, -1)
    # torch's CPU kernel computes low-precision attention at a quarter of the speed of low-precision products.
    out = qkv.new_empty(B, T, heads, q.shape[-1])
    for b in range(B):
        for h in range(heads):
            for i in range(0, T, QUERY_BLOCK):
                scores = q[b, h, i : i + QUERY_BLOCK] @ k[b, h].T
                out[b, i : i + QUERY_BLOCK, h] = scores.softmax(-1) @ v[b, h]
    return out.view(B, T, -1)
