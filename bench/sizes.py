"""Operations, memory traffic and peak memory at real sizes, counted without weights and without a GPU.

    python bench/sizes.py                  # Whisper large-v3, batch 32; a training step with an 8 B language model
    python bench/sizes.py --batch 8 --rows 4

Every tensor is a fake one (torch's FakeTensorMode): shapes and dtypes are computed by torch's own rules, nothing is
allocated. The encoder is this project's forward pass with the fused attention that it uses on a GPU. The language model
is transformers' Llama of the 8 B shape, frozen, between soft tokens that have a gradient and this project's loss in
pieces. Counted are the FLOP of products, convolutions and attention (torch's FlopCounterMode), the bytes that each
operation reads and writes by itself (fused kernels move less), and the peak of the bytes that live at once.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from pipeline.encoders import whisper
from pipeline.encoders.batching import output_bytes
from pipeline.encoders.whisper import WhisperEncoder, encoder_shapes, pass_bytes, window_flop
from train.lms.hf.adapters import enable_gradient_checkpointing
from train.lms.hf.model import HfLanguageModel
from train.lms.hf.scales import Scales, decoder

LARGE_V3 = {
    "d_model": 1280, "encoder_ffn_dim": 5120, "num_mel_bins": 128, "max_source_positions": 1500, "encoder_layers": 32,
    "encoder_attention_heads": 20,
}  # fmt: skip
LLAMA_8B = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip


def attention_flop(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, out_shape: Any = None, **more: Any) -> int:
    """Count what torch's counter leaves out: the attention kernel of a CPU."""
    count: int = sdpa_flop_count(q, k, v)
    return count


def attention_backward_flop(
    grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, out_shape: Any = None, **more: Any
) -> int:
    """Count its backward pass."""
    count: int = sdpa_backward_flop_count(grad, q, k, v)
    return count


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flop,
}


@dataclass(frozen=True)
class Count:
    """What a computation costs; ``peak`` and ``weights`` in bytes, ``peak`` without the weights."""

    flop: int
    moved: int
    peak: int
    weights: int


class Memory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations read and write, and the peak of the live ones made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._operations += 1
        if self._operations % 500 == 0:
            gc.collect()  # this mode keeps recomputed tensors in circles of references; without it there are none
        found = func(*args, **(kwargs or {}))
        read = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        made = [each for each in tree_leaves(found) if isinstance(each, torch.Tensor)]
        known = {each.untyped_storage()._cdata for each in read}
        new = [each for each in made if each.untyped_storage()._cdata not in known]
        if new or func is torch.ops.aten.copy_.default:
            self.moved += sum(each.numel() * each.element_size() for each in [*read, *new])
        for each in new:
            storage = each.untyped_storage()
            self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: pair for key, pair in self._live.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return found


def count(compute: Callable[[], object], weights: int) -> Count:
    """Count what ``compute`` costs; call it inside of a FakeTensorMode."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as flop, Memory() as memory:
        kept = compute()
    del kept
    return Count(flop.get_total_flops(), memory.moved, memory.peak, weights)


def fake_encoder(sizes: dict[str, int], dtype: str) -> WhisperEncoder:
    """Return an encoder of these sizes with fake weights; call it inside of a FakeTensorMode."""
    encoder = WhisperEncoder.__new__(WhisperEncoder)
    encoder.channels, encoder.positions = sizes["d_model"], sizes["max_source_positions"]
    encoder.n_layers, encoder.n_heads = sizes["encoder_layers"], sizes["encoder_attention_heads"]
    encoder.dtype, encoder._emulated, encoder._pool = dtype, False, None
    encoder._torch_device = torch.device("cpu")
    shapes = encoder_shapes(Path("large-v3"), sizes, {})
    encoder._weights = encoder._prepare_weights({name: torch.empty(shape) for name, shape in shapes.items()})
    return encoder


def fused_attention(qkv: torch.Tensor, n_heads: int, num_queries: int) -> torch.Tensor:
    """``whisper.self_attention`` as on a GPU; a fake tensor is on a CPU, where bfloat16 takes another way."""
    B, T, _ = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_heads, -1).permute(2, 0, 3, 1, 4)
    found = torch.nn.functional.scaled_dot_product_attention(q[:, :, :num_queries], k, v, scale=1.0)
    return found.transpose(1, 2).reshape(B, num_queries, -1)


def count_encoder(sizes: dict[str, int], batch: int, layers: list[int], dtype: str = "bfloat16") -> Count:
    """Count a pass over ``batch`` windows of 30 s that returns ``layers``."""
    with FakeTensorMode(), torch.no_grad(), mock.patch.object(whisper, "self_attention", fused_attention):
        encoder = fake_encoder(sizes, dtype)
        mel = torch.empty(batch, sizes["num_mel_bins"], 2 * encoder.positions)
        weights = sum(each.numel() * each.element_size() for each in encoder._weights.values())
        return count(lambda: encoder._forward(mel, layers, encoder.positions), weights)


def count_lm_step(sizes: dict[str, int], rows: int, length: int, targets: int, checkpointing: bool) -> Count:
    """Count forward and backward of a frozen LM in bfloat16: ``rows`` of ``length`` inputs, ``targets`` of each judged.

    The gradient goes to the inputs alone, as to soft tokens.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    with FakeTensorMode():
        model = LlamaForCausalLM._from_config(LlamaConfig(**sizes), dtype=torch.bfloat16).requires_grad_(False)
        if checkpointing:
            enable_gradient_checkpointing(model)
            model.train()
        lm = HfLanguageModel.__new__(HfLanguageModel)
        torch.nn.Module.__init__(lm)
        lm.model, lm.vocab_size, lm.dtype, lm.trainable = model, sizes["vocab_size"], torch.bfloat16, False
        lm._scales = Scales(1.0, 1.0, None)  # Llama has no factors
        soft = torch.empty(rows, length, sizes["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
        ids = torch.zeros(rows * targets, dtype=torch.int64)

        def step() -> torch.Tensor | None:
            hidden = decoder(model)(inputs_embeds=soft, use_cache=False).last_hidden_state
            lm._token_nll(hidden[:, -targets:].flatten(0, 1), ids).sum().backward()
            return soft.grad

        weights = sum(each.numel() * each.element_size() for each in model.parameters())
        return count(step, weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="windows of 30 s per pass of the encoder")
    parser.add_argument("--rows", type=int, default=8, help="rows of a training step")
    parser.add_argument("--length", type=int, default=512, help="inputs of a row: soft tokens, prompt and text")
    parser.add_argument("--targets", type=int, default=64, help="target tokens of a row")
    args = parser.parse_args()
    print(f"torch {torch.__version__}; counted on fake tensors, no weights, no GPU")
    print(f"{'':<44}{'TFLOP':>9}{'GB moved':>10}{'GB peak':>9}{'GB weights':>12}")

    def show(name: str, found: Count) -> None:
        numbers = found.flop / 1e12, found.moved / 1e9, found.peak / 1e9, found.weights / 1e9
        print(f"{name:<44}{numbers[0]:>9.2f}{numbers[1]:>10.1f}{numbers[2]:>9.2f}{numbers[3]:>12.2f}")

    positions, channels, inner = (LARGE_V3[key] for key in ("max_source_positions", "d_model", "encoder_ffn_dim"))
    for layers in ([32], [8, 16, 24, 32]):
        found = count_encoder(LARGE_V3, args.batch, layers)
        show(f"large-v3, {args.batch} windows, layers {', '.join(map(str, layers))}", found)
        estimate = pass_bytes(positions, channels, inner) + output_bytes(len(layers), positions, channels)
        print(
            f"  the estimate that sets the batch size: {args.batch * estimate / 1e9:.2f} GB, outputs in slots included"
        )
    flop = args.batch * window_flop(positions, channels, inner, LARGE_V3["num_mel_bins"], LARGE_V3["encoder_layers"])
    print(f"  operations by the formula that decides about torch.compile: {flop / 1e12:.2f} TFLOP")
    for checkpointing in (False, True):
        found = count_lm_step(LLAMA_8B, args.rows, args.length, args.targets, checkpointing)
        how = ", recomputing each layer" if checkpointing else ""
        show(f"8 B LM, {args.rows} × {args.length} inputs{how}", found)


if __name__ == "__main__":
    main()
