"""nanochat's checkpoint folders: ``model_000500.pt`` and ``meta_000500.json``, with the tokenizer of its training.

In: a folder, or one ``model_*.pt`` in it. Out: a ``GPT`` of the generation whose code wrote the file. No code that
a file names is run: tensors come through ``torch.load(weights_only=True)``, the tokenizer through ``tokenizers.py``.

    lm.model=nanochat:~/.cache/nanochat/chatsft_checkpoints/d20        the newest step
    lm.model=nanochat:…/d20/model_000500.pt                            that step

Generations are told by keys and shapes:

| nanochat of | resid, x0 | value embeddings | smear, backout | |
|---|---|---|---|---|
| 2026-03-14 on | yes | gate 12 wide | yes | ``TODAY`` |
| 2026-03-09 | yes | gate 12 wide | | ``EARLY_MARCH`` |
| 2026-01-16 | yes | gate 32 wide | | refused: its softcap (15, from 2026-03-02 on 20) left no trace |
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


def find_model(place: Path) -> Path:
    """The ``model_*.pt`` that ``place`` names: itself, or the one of the newest step in a folder.

    Raises:
        UserError: there is none.
    """
    if place.is_file() and _MODEL.fullmatch(place.name):
        return place
    found = {int(match[1]): path for path in place.glob("model_*.pt") if (match := _MODEL.fullmatch(path.name))}
    if not found:
        raise UserError(
            f"'{place}' holds no nanochat checkpoint (model_000500.pt and meta_000500.json): name a folder below "
            "base_checkpoints, chatsft_checkpoints or chatrl_checkpoints"
        )
    return found[max(found)]


def load_gpt(path: Path) -> GPT:
    """The model of ``path`` on the CPU, float32; what its generation lacks is neutral and marked not to train.

    Raises:
        UserError: a file is missing or damaged, or no known generation of nanochat wrote it.
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
    absent = neutral.keys() - state.keys()
    with torch.device("meta"):
        gpt = GPT(config, generation, rows=len(state["transformer.wte.weight"]))
    gpt.load_state_dict({**neutral, **{name: x.float() for name, x in state.items()}}, assign=True)
    gpt.missing_parameters = frozenset(absent)
    return gpt


def read_config(path: Path) -> GPTConfig:
    """``model_config`` of the ``meta_*.json`` beside ``path``; before 2026-01-11 it had no window_pattern: "L"."""
    meta = path.with_name(f"meta_{path.stem.removeprefix('model_')}.json")
    try:
        model_config = json.loads(meta.read_text(encoding="utf-8"))["model_config"]
    except FileNotFoundError:
        raise UserError(f"'{meta}' is missing: nanochat writes it beside {path.name}, copy it too") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{meta}' is no meta file of nanochat ({type(error).__name__}: {error})") from None
    known = {field.name: type(field.default) for field in fields(GPTConfig)}
    model_config = {"window_pattern": "L", **model_config} if isinstance(model_config, dict) else {}
    wrong = [name for name in known if type(model_config.get(name)) is not known[name]] + sorted(
        model_config.keys() - known.keys()
    )
    if wrong:
        raise UserError(f"'{meta}' describes another nanochat than is known here (model_config: {', '.join(wrong)})")
    config = GPTConfig(**model_config)
    sizes = [getattr(config, name) for name in known if name != "window_pattern"]
    divides = min(sizes) > 0 and not config.n_embd % (2 * config.n_head) and not config.n_head % config.n_kv_head
    huge = (
        config.n_layer > 1000 or config.sequence_len > 2**20
    )  # tables and layers are made before the file is believed
    if huge or not divides or not config.window_pattern or set(config.window_pattern.upper()) - {"S", "L"}:
        raise UserError(f"'{meta}' describes no model that could be ({model_config})")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict of ``path``, without torch.compile's ``_orig_mod.`` before its keys."""
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist") from None
    except Exception as error:  # torch.load has no error of its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"'{path}' is no file of tensors alone ({type(error).__name__}: {reason})") from None
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise UserError(f"'{path}' holds no state dict of tensors")
    return {str(name).removeprefix("_orig_mod."): tensor for name, tensor in state.items()}


def detect_generation(state: dict[str, Tensor], config: GPTConfig, path: Path) -> Generation:
    """The stretch of nanochat's history that has exactly these keys and shapes.

    Raises:
        UserError: none has, or the keys do not tell its constants.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    table = shapes.get("transformer.wte.weight", (0,))
    gates = {shape[-1] for name, shape in shapes.items() if name.endswith("ve_gate.weight")}
    if gates == {32}:
        raise UserError(
            f"'{path}' is of nanochat between 2026-01-16 and 2026-03-09, whose softcap the file does not tell: train "
            "it again with a newer nanochat"
        )
    for generation, keys in ((TODAY, _LAMBDAS | _SMEAR), (EARLY_MARCH, _LAMBDAS), (FIRST, _LAMBDAS), (FIRST, set())):
        if shapes == expected_shapes(config, generation, keys, table[0]) and table[0] in possible_embedding_rows(
            config
        ):
            return generation
    today = expected_shapes(config, TODAY, _LAMBDAS | _SMEAR, max(possible_embedding_rows(config)))
    odd = sorted(name for name in today.keys() | shapes.keys() if today.get(name) != shapes.get(name))
    raise UserError(
        f"'{path}' is of no nanochat that is known here: {len(odd)} tensors differ from today's, such as {odd[0]} "
        f"({shapes.get(odd[0], 'absent')}, today {today.get(odd[0], 'absent')})"
    )


def possible_embedding_rows(config: GPTConfig) -> set[int]:
    """Rows that a table of tokens can have: padded to 64, or not, as before 2025-12-09."""
    return {config.vocab_size, -(-config.vocab_size // 64) * 64}


def expected_shapes(
    config: GPTConfig, generation: Generation, scalars: set[str], table: int
) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a model of ``generation`` with ``table`` rows of tokens, of the lambdas ``scalars`` alone."""
    with torch.device("meta"):
        gpt = GPT(config, generation, rows=table)
    shapes = {name: tuple(tensor.shape) for name, tensor in gpt.state_dict().items()}
    return {name: shape for name, shape in shapes.items() if name not in (_LAMBDAS | _SMEAR) - scalars}
