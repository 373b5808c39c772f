"""The table of all projectors at their defaults: parameters counted and by the formula, and where gradients reach.

In: encoder channels and the LM's width. Out: one :class:`Row` a kind, and for kinds of two shapes one each. Gradients
are those of a random direction in the soft tokens of two utterances of odd lengths, one of them padded.

    python -m train projectors --channels 512 --width 576        # exit status 1 if any row does not hold
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.config.model import KINDS, ConvConfig, KindConfig, MoeConfig
from train.projectors import build_projector
from train.projectors.base import Projector

LENGTHS = (61, 37)  # frames of the two utterances
STEPS = 3  # gradient steps within which every parameter must have been reached


@dataclass(frozen=True, slots=True)
class Row:
    """One kind at its default settings."""

    name: str
    rate: int  # frames a soft token, on average
    soft: int  # tokens of the longer utterance, by `soft_frames`
    counted: int  # the same, as its mask has them
    parameters: int
    formula: str
    by_formula: int
    tensors: int
    reached: int  # tensors with a gradient in every step that the last of them needed
    step: int  # the gradient step from which on all are reached; STEPS + 1: never
    frames_reached: bool  # a gradient at every valid frame and at none of the padding

    @property
    def holds(self) -> bool:
        """Whether counts are those of the formulas and gradients reach all that they should."""
        counts = self.parameters == self.by_formula and self.soft == self.counted
        return counts and self.reached == self.tensors and self.frames_reached


def table(channels: int, width: int) -> list[Row]:
    """Every kind, built and probed one after another; seconds from 512 to 576."""
    return [_row(name, config, channels, width) for name, config in _defaults()]


def render(rows: list[Row]) -> str:
    """The table as text."""
    lines = [
        f"{'kind':<13}{'frames a token':>14} {f'tokens of {LENGTHS[0]}':>12}  {'parameters':>11} {'by formula':>11}  "
        f"{'gradient reaches':<40} formula"
    ]
    for row in rows:
        reach = f"{row.reached} of {row.tensors} tensors"
        if 1 < row.step <= STEPS:
            reach += f" from step {row.step} on"
        reach += ", each frame" if row.frames_reached else ", NOT each frame"
        mark = "" if row.holds else "   <- does not hold"
        counts = f"{row.rate:>14} {row.counted:>12}  {row.parameters:>11,} {row.by_formula:>11,}"
        lines.append(f"{row.name:<13}{counts}  {reach:<40} {row.formula.split(' [')[0]}{mark}")
    return "\n".join(lines)


def evaluate_formula(formula: str, letters: dict[str, int]) -> int:
    """The number that a projector's ``formula`` (up to its brackets) gives for ``letters``."""
    words = formula.split(" [")[0].replace("log2 k", "log2k").replace("·", "*").replace("²", "**2").replace("/", "//")
    known = {**letters, "log2k": letters.get("k", 1).bit_length() - 1}
    return int(eval(words, {"__builtins__": {}}, known))  # the formulas are this package's own


def letters_of(config: KindConfig, projector: Projector, channels: int, width: int) -> dict[str, int]:
    """What the letters of a formula stand for: the projector's settings, with the defaults that sizes decide."""
    told: dict[str, Any] = config.model_dump()
    wide = told.get("variant") == "mosa" or told.get("routing") == "dense"  # MOSA's
    narrow = {"mlp": width, "residual": 4 * width, "qformer": channels, "conv": 2048, "moe": width}
    h = told.get("hidden") or (4096 if wide else narrow.get(told["kind"], 0))
    return {
        "C": channels,
        "D": width,
        "k": getattr(projector, "stack", 1),
        "H": h,
        "M": told.get("intermediate") or 4 * h,
        **{letter: told[key] for letter, key in _COUNTS.items() if key in told},
    }


_COUNTS = {"N": "blocks", "L": "layers", "Q": "queries", "E": "experts"}


def _defaults() -> Iterator[tuple[str, KindConfig]]:
    for name, model in KINDS.items():
        yield name, model()
        if name == "conv":
            yield "conv (mosa)", ConvConfig(variant="mosa")
        if name == "moe":
            yield "moe (top2)", MoeConfig(routing="top2")


def _row(name: str, config: KindConfig, channels: int, width: int) -> Row:
    projector = build_projector(config, channels, width, 1.0).eval()  # type: ignore[arg-type]
    letters = letters_of(config, projector, channels, width)
    reached, step, frames, counted = _probe(projector, channels, width)
    return Row(
        name=name,
        rate=round(3000 / projector.soft_frames(3000)),
        soft=projector.soft_frames(LENGTHS[0]),
        counted=counted,
        parameters=sum(parameter.numel() for parameter in projector.parameters()),
        formula=projector.formula,
        by_formula=evaluate_formula(projector.formula, letters),
        tensors=len(list(projector.parameters())),
        reached=reached,
        step=step,
        frames_reached=frames,
    )


def _probe(projector: Projector, channels: int, width: int) -> tuple[int, int, bool, int]:
    """Tensors reached, the first step that reaches all, whether each valid frame and no other is reached; and how many
    soft tokens the longer utterance has.

    A matrix that starts at zero, as W1's second does, hides what stands before it until it has made one step.
    """
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(len(LENGTHS), max(LENGTHS), channels, generator=draw)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    direction = torch.randn(width, generator=draw)
    reached, frames, counted = 0, False, 0
    for step in range(1, STEPS + 1):
        inputs = features.clone().requires_grad_()
        soft, soft_mask = projector(inputs, mask)
        counted = int(soft_mask[0].sum())
        projector.zero_grad()
        (soft[soft_mask] * direction).sum().backward()
        reached = sum(_has_gradient(parameter.grad) for parameter in projector.parameters())
        found = inputs.grad if inputs.grad is not None else torch.zeros_like(inputs)
        frames = torch.equal(found.abs().sum(-1) > 0, mask)
        if reached == len(list(projector.parameters())) and frames:
            return reached, step, frames, counted
        with torch.no_grad():
            for parameter in projector.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=1e-3)
    return reached, STEPS + 1, frames, counted


def _has_gradient(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())
