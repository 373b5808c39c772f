"""Whisper's encoder: the forward pass, written over the tensors of a transformers folder.

In: float32 clips at 16 kHz. Out: the hidden states of chosen layers, float32 [frames, channels] a clip. The decoder is
never loaded, layers above the highest one asked for are not computed, and bfloat16 on a CPU is faster and nearer to
float32 than transformers' (see ``attend`` and ``_forward``).

On a CPU a clip's features do not depend on what else is in the batch: clips pass one at a time, which costs nothing
there (a clip already is a matrix of 1500 rows). On a GPU clips pass in batches, and a kernel chosen for another batch
size may round differently.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.encoder import context_samples, encoder_name, read_encoder_tensors, tensors_hash
from pipeline.logmel import LogMel, MelSettings
from pipeline.weights import Weights, read_json
from shards.errors import UserError
from shards.spec import Window

if TYPE_CHECKING:
    import torch

QUERY_BLOCK = 500  # rows of scores that stay in a core's cache: fastest of 128 to 1500 for 1500 frames


class WhisperEncoder:
    """Any OpenAI Whisper's encoder (Radford et al., 2022, arXiv:2212.04356); see :class:`Encoder`."""

    family = "whisper"

    def __init__(
        self,
        weights: Weights,
        *,
        device: str,
        dtype: str,
        batch_size: int,
        window: Window = "full30",
        margin: float = 0.0,
    ) -> None:
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
        self.window, self.margin = window, margin
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
        results: list[dict[int, np.ndarray]] = [{} for _ in clips]
        with torch.inference_mode():
            for context, batch in self._batches(clips):
                positions = context // self.hop
                mel = self._log_mel(self._pad([clips[i] for i in batch]), 2 * positions)
                for layer, x_BTC in self._forward(mel, sorted(set(layers))).items():
                    frames = [-(-len(clips[i]) // self.hop) if trim == "valid" else positions for i in batch]
                    values = x_BTC[:, : max(frames)].to("cpu", torch.float32).numpy()
                    for row, (i, count) in enumerate(zip(batch, frames, strict=True)):
                        results[i][layer] = values[row, :count].copy()  # a view would keep the whole batch alive
        return results

    def _batches(self, clips: Sequence[np.ndarray]) -> Iterator[tuple[int, list[int]]]:
        """(samples of context, indices of clips) of each forward pass: one context, at most ``batch_size`` clips."""
        contexts = [context_samples(len(clip), self) for clip in clips]
        for context in sorted(set(contexts)):
            same = [i for i, found in enumerate(contexts) if found == context]
            for start in range(0, len(same), self.batch_size):
                yield context, same[start : start + self.batch_size]

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
        x = x.transpose(1, 2)
        x = x + w["embed_positions.weight"][: x.shape[1]]
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
