"""The tensors that a folder of weights holds: names, shapes and dtypes against those of an architecture.

A checkpoint that is quantized, or of another architecture, loads without an error in most libraries and computes noise.
Everything here but :func:`read_tensors` reads headers alone. Used by the encoders and, for quantization, by the
language models.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.weights.resolve import weight_files
from shards.errors import UserError

# as safetensors and as torch write them
FLOATS = {"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"}
MAX_WORDS = 120  # characters of a quantization_config in an error

Shape = tuple[int, ...]


class StoredTensor(NamedTuple):
    """A tensor as its file describes it; ``dtype`` is a name of safetensors (``F16``) or of torch (``float16``)."""

    dtype: str
    shape: Shape


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a checked folder by name, from the headers of its weight files.

    Raises:
        UserError: a PyTorch file cannot be read without running code or holds no tensors, or a file is corrupt.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="np") as file:
                    for name in file.keys():  # noqa: SIM118 - not a mapping
                        tensor = file.get_slice(name)
                        found[name] = StoredTensor(tensor.get_dtype(), tuple(tensor.get_shape()))
            except SafetensorError as error:
                reason = " ".join(str(error).split())[:100]
                raise UserError(f"'{path}' cannot be read ({reason}): copy it again") from None
        else:
            found.update(
                (name, StoredTensor(str(value.dtype).removeprefix("torch."), tuple(value.shape)))
                for name, value in read_torch_file(path).items()
            )
    return found


def read_torch_file(path: Path) -> dict[str, Any]:
    """Map the tensors of a PyTorch file by name, without running code.

    Raises:
        UserError: the file needs code, is corrupt, or is no dictionary of tensors.
    """
    import pickle

    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"'{path}' is not a file of tensors alone ({reason}): use safetensors of the model") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"'{path}' does not map names to tensors: use safetensors of the model")
    return state


def read_tensors(folder: Path, prefix: str, names: Collection[str]) -> dict[str, Any]:
    """Return the tensors ``names`` below ``prefix`` of a checked folder: as stored, on the CPU, without the prefix."""
    from safetensors import safe_open

    wanted, found = {f"{prefix}{name}" for name in names}, dict[str, Any]()
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                here = wanted & set(file.keys())
                found.update((name.removeprefix(prefix), file.get_tensor(name)) for name in here)
        else:
            state = read_torch_file(path)
            found.update((name.removeprefix(prefix), state[name]) for name in wanted & state.keys())
    return found


def refuse_quantized(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse weights that are numbers only together with scales or a codebook.

    Raises:
        UserError: ``config.json`` declares a quantization, or one of ``tensors`` is not stored in a float format.
    """
    for key in ("quantization_config", "compression_config"):
        declared = config.get(key)
        if declared:
            words = declared if isinstance(declared, dict) else {"": declared}
            shown = ", ".join(f"{name}={value}" if name else str(value) for name, value in words.items() if value)
            raise UserError(
                f"'{folder / 'config.json'}' says that the weights are quantized ({key}: {shown[:MAX_WORDS]}): name "
                "the same model with unquantized weights"
            )
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise UserError(
                f"'{folder}' stores the tensor {name} as {tensor.dtype}, so the weights are quantized: name the same "
                "model with unquantized weights (float32, float16 or bfloat16)"
            )


def select_prefix(folder: Path, names: Collection[str], prefixes: Sequence[str], model: str) -> str:
    """Return the first of ``prefixes`` that tensors in ``names`` have; "" stands for all of them.

    Raises:
        UserError: the tensors have two of the prefixes (other than ""), or none.
    """
    found = [prefix for prefix in prefixes if any(name.startswith(prefix) for name in names)]
    named = [prefix for prefix in found if prefix]
    if len(named) > 1:
        raise UserError(
            f"'{folder}' holds a {model} under {named[0]}* and again under {named[1]}*: keep one of the two"
        )
    if not found:
        raise UserError(
            f"'{folder}' does not hold a {model}: it has no tensor {' or '.join(f'{prefix}*' for prefix in prefixes)}"
            f"{_example(names)}; name another model, or save it without wrappers"
        )
    return found[0]


def require_tensors(
    folder: Path, found: Mapping[str, StoredTensor], expected: Mapping[str, Shape], model: str, prefix: str = ""
) -> None:
    """Require that ``found`` are exactly the tensors ``expected``: no other, none missing, each of its shape.

    Args:
        folder: for the message.
        found: stored tensors without their ``prefix``.
        expected: shape of each tensor of the architecture, as its config declares them.
        model: such as ``Whisper encoder``, for the message.
        prefix: for the message.

    Raises:
        UserError: they differ.
    """
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    shapes = sorted(name for name in expected.keys() & found.keys() if found[name].shape != expected[name])
    problem = ""
    if missing:
        wrapped = next((name for name in unexpected if name.endswith(f".{missing[0]}")), "")
        problem = f"lacks the tensor {prefix}{missing[0]}" + (f" and has {prefix}{wrapped} instead" if wrapped else "")
    elif unexpected:
        problem = f"has the tensor {prefix}{unexpected[0]}, which is no part"
    elif shapes:
        have, want = list(found[shapes[0]].shape), list(expected[shapes[0]])
        problem = f"has {prefix}{shapes[0]} of shape {have}, expected {want},"
    if problem:
        raise UserError(
            f"'{folder}' {problem} of a {model} with this config.json: copy it again, or name the plain model without "
            "adapters, wrappers and changes"
        )


def _example(names: Collection[str]) -> str:
    """Return `` (it has X, …)`` for the first weight of a layer, which shows a wrapper's prefix."""
    example = next((name for name in sorted(names) if re.search(r"\bconv1\.weight$", name)), min(names, default=""))
    return f", but {example}" if example else ""
