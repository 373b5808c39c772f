"""Loads nanochat checkpoints: ``model_000500.pt`` and ``meta_000500.json``, with the tokenizer of their training.

A folder, or one ``model_*.pt`` in it, becomes a ``GPT`` of the generation of nanochat that wrote the file. No code in
the files is run: tensors are read by ``torch.load(weights_only=True)``, the tokenizer by ``tokenizers.py``.

    lm.model=nanochat:~/.cache/nanochat/chatsft_checkpoints/d20        the newest step
    lm.model=nanochat:…/d20/model_000500.pt                            that step

The generation is detected from keys and shapes:

| nanochat of | resid, x0 | value embeddings | smear, backout | |
|---|---|---|---|---|
| 2026-03-14 on | yes | gate of width 12 | yes | ``TODAY`` |
| 2026-03-09 | yes | gate of width 12 | | ``EARLY_MARCH`` |
| 2026-01-16 | yes | gate of width 32 | | rejected: its softcap (15, or 20 from 2026-03-02 on) is not in the file |
| 2026-01-11 | yes | | | ``FIRST`` |
| 2025-10-13 | | | | ``FIRST`` |
"""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards.errors import UserError
from train.lms.nanochat.config import EARLY_MARCH, FIRST, TODAY, Generation, GPTConfig
from train.lms.nanochat.gpt import GPT

_MODEL = re.compile(r"model_(\d+)\.pt")
_SMEAR = {"smear_gate.weight", "smear_lambda", "backout_lambda"}
_LAMBDAS = {"resid_lambdas", "x0_lambdas"}


def find_model(path: Path) -> Path:
    """Return ``path`` if it is a ``model_*.pt``, or the one of the newest step in the folder ``path``.

    Raises:
        UserError: there is none.
    """
    if path.is_file() and _MODEL.fullmatch(path.name):
        return path
    found = {int(match[1]): file for file in path.glob("model_*.pt") if (match := _MODEL.fullmatch(file.name))}
    if not found:
        raise UserError(
            f"'{path}' has no nanochat checkpoint (model_000500.pt and meta_000500.json): name a folder in "
            "base_checkpoints, chatsft_checkpoints or chatrl_checkpoints"
        )
    return found[max(found)]


def load_gpt(path: Path) -> GPT:
    """Load the model of ``path`` on the CPU in float32.

    Parameters that its generation lacks get values without effect and are listed in ``missing_parameters``, so that
    they are not trained.

    Raises:
        UserError: a file is missing or corrupt, or no supported generation of nanochat wrote it.
    """
    config = read_config(path)
    state = read_tensors(path)
    generation = detect_generation(state, config, path)
    neutral = {
        "resid_lambdas": torch.ones(config.n_layer),
        "x0_lambdas": torch.zeros(config.n_layer),
        "smear_gate.weight": torch.zeros(1, 24),
        "smear_lambda": torch.zeros(1),
        "backout_lambda": torch.zeros(1),
    }
    missing = neutral.keys() - state.keys()
    with torch.device("meta"):
        gpt = GPT(config, generation, rows=len(state["transformer.wte.weight"]))
    gpt.load_state_dict({**neutral, **{name: x.float() for name, x in state.items()}}, assign=True)
    gpt.missing_parameters = frozenset(missing)
    return gpt


def read_config(path: Path) -> GPTConfig:
    """Read ``model_config`` of the ``meta_*.json`` next to ``path``.

    Before 2026-01-11 it had no ``window_pattern``, which is then "L".

    Raises:
        UserError: the file is missing or corrupt, or of an unsupported nanochat.
    """
    meta = path.with_name(f"meta_{path.stem.removeprefix('model_')}.json")
    try:
        model_config = json.loads(meta.read_text(encoding="utf-8"))["model_config"]
    except FileNotFoundError:
        raise UserError(f"'{meta}' does not exist: nanochat writes it next to {path.name}; copy both files") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{meta}' is not a meta file of nanochat ({type(error).__name__}: {error})") from None
    known = {field.name: type(field.default) for field in fields(GPTConfig)}
    model_config = {"window_pattern": "L", **model_config} if isinstance(model_config, dict) else {}
    wrong = [name for name in known if type(model_config.get(name)) is not known[name]] + sorted(
        model_config.keys() - known.keys()
    )
    if wrong:
        raise UserError(f"'{meta}' is of an unsupported version of nanochat (model_config: {', '.join(wrong)})")
    config = GPTConfig(**model_config)
    sizes = [getattr(config, name) for name in known if name != "window_pattern"]
    divides = min(sizes) > 0 and not config.n_embd % (2 * config.n_head) and not config.n_head % config.n_kv_head
    # a bound, because tables and layers of these sizes are created before the tensors are checked
    huge = config.n_layer > 1000 or config.sequence_len > 2**20
    if huge or not divides or not config.window_pattern or set(config.window_pattern.upper()) - {"S", "L"}:
        raise UserError(f"'{meta}' has an invalid model_config ({model_config})")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the state dict of ``path``, without the prefix ``_orig_mod.`` that torch.compile adds to its keys.

    Raises:
        UserError: the file is missing or corrupt, or holds anything but tensors.
    """
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist: correct lm.model") from None
    except Exception as error:  # torch.load raises many types of exceptions
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"'{path}' is not a file of tensors only ({type(error).__name__}: {reason})") from None
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise UserError(f"'{path}' is not a state dict of tensors")
    return {str(name).removeprefix("_orig_mod."): tensor for name, tensor in state.items()}


def detect_generation(state: dict[str, Tensor], config: GPTConfig, path: Path) -> Generation:
    """Return the generation of nanochat whose models have exactly these keys and shapes.

    Raises:
        UserError: there is none, or its constants cannot be determined from them.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    table = shapes.get("transformer.wte.weight", (0,))
    gates = {shape[-1] for name, shape in shapes.items() if name.endswith("ve_gate.weight")}
    if gates == {32}:
        raise UserError(
            f"'{path}' was written by nanochat between 2026-01-16 and 2026-03-09, and the file does not record its "
            "softcap: train it again with a newer nanochat"
        )
    for generation, keys in ((TODAY, _LAMBDAS | _SMEAR), (EARLY_MARCH, _LAMBDAS), (FIRST, _LAMBDAS), (FIRST, set())):
        if shapes == expected_shapes(config, generation, keys, table[0]) and table[0] in possible_embedding_rows(
            config
        ):
            return generation
    today = expected_shapes(config, TODAY, _LAMBDAS | _SMEAR, max(possible_embedding_rows(config)))
    odd = sorted(name for name in today.keys() | shapes.keys() if today.get(name) != shapes.get(name))
    raise UserError(
        f"'{path}' is not of a supported version of nanochat: {len(odd)} tensors differ from the newest, such as "
        f"{odd[0]} (expected {today.get(odd[0], 'no such tensor')}, got {shapes.get(odd[0], 'no such tensor')})"
    )


def possible_embedding_rows(config: GPTConfig) -> set[int]:
    """Return the possible numbers of rows of token tables: padded to a multiple of 64, or not (before 2025-12-09)."""
    return {config.vocab_size, -(-config.vocab_size // 64) * 64}


def expected_shapes(
    config: GPTConfig, generation: Generation, scalars: set[str], table: int
) -> dict[str, tuple[int, ...]]:
    """Return keys and shapes of a model of ``generation`` with ``table`` token rows; of ``_LAMBDAS`` and ``_SMEAR`` it
    has only ``scalars``."""
    with torch.device("meta"):
        gpt = GPT(config, generation, rows=table)
    shapes = {name: tuple(tensor.shape) for name, tensor in gpt.state_dict().items()}
    return {name: shape for name, shape in shapes.items() if name not in (_LAMBDAS | _SMEAR) - scalars}
