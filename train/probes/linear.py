"""Cross-validated linear probes of one vector per utterance, and intervals over groups of utterances.

Takes vectors [rows, D], values and the fold of each row; each row is predicted by a probe that was fitted on the other
folds. Standardisation and the strength of L2 come from those folds alone: the strength is the best of ``STRENGTHS`` on
one of them, fitted on the rest. Everything is convex and starts at zero, so there is no random state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # of L2, relative to the mean loss of a row
FOLDS = 5
RESAMPLES = 1000

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Score:
    """A score of held-out rows, its 95 % interval by a bootstrap over groups, and what a constant guess scores."""

    value: float
    low: float
    high: float
    chance: float


def classify(vectors: Tensor, classes: Ints, folds: Ints) -> Ints:
    """Return the class of each row, int64 [rows], as predicted by multinomial logistic regression."""
    count = int(classes.max()) + 1
    labels = torch.from_numpy(classes)
    found = np.zeros_like(classes)
    for fold in np.unique(folds):
        test, train, inner, inner_test = _parts(folds, int(fold))

        def errors(strength: float, inner: Tensor = inner, inner_test: Tensor = inner_test) -> float:
            scores = _logistic(vectors, labels, inner, inner_test, count, strength)
            return float(F.cross_entropy(scores, labels[inner_test]))

        best = min(STRENGTHS, key=errors)
        found[test.numpy()] = _logistic(vectors, labels, train, test, count, best).argmax(dim=1).numpy()
    return found


def regress(vectors: Tensor, values: Floats, folds: Ints) -> tuple[Floats, Floats]:
    """Return the value of each row as predicted by ridge regression, and the mean of the other folds."""
    target = torch.from_numpy(values).to(torch.float64)
    found, guessed = np.zeros_like(values), np.zeros_like(values)
    for fold in np.unique(folds):
        test, train, inner, inner_test = _parts(folds, int(fold))
        errors = [float((p - target[inner_test]).square().mean()) for p in _ridge(vectors, target, inner, inner_test)]
        best = int(np.argmin(errors))
        found[test.numpy()] = _ridge(vectors, target, train, test)[best].numpy()
        guessed[test.numpy()] = values[train.numpy()].mean()
    return found, guessed


def interval(parts: Floats, wholes: Floats, groups: Sequence[str], seed: int) -> tuple[float, float, float]:
    """Return sum(parts) / sum(wholes), and its 95 % interval by a bootstrap over whole groups of rows."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    part, whole = np.bincount(index, parts), np.bincount(index, wholes)
    draws = np.random.default_rng(seed).multinomial(len(part), np.full(len(part), 1 / len(part)), size=RESAMPLES)
    ratios = (draws @ part) / np.maximum(draws @ whole, 1e-12)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(part.sum() / whole.sum()), float(low), float(high)


def _parts(folds: Ints, fold: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the rows of ``fold``, the others, and of these the ones to choose a strength: fitted on, and judged by."""
    others = [int(other) for other in np.unique(folds) if other != fold]
    judge = others[fold % len(others)]
    masks = (folds == fold, folds != fold, (folds != fold) & (folds != judge), folds == judge)
    test, train, inner, inner_test = (torch.from_numpy(np.flatnonzero(mask)) for mask in masks)
    return test, train, inner, inner_test


def _standardised(vectors: Tensor, train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = vectors[train].mean(dim=0), vectors[train].std(dim=0, correction=0)
    scale = 1 / std.clamp(min=1e-6)
    return (vectors[train] - mean) * scale, (vectors[test] - mean) * scale


def _logistic(vectors: Tensor, labels: Tensor, train: Tensor, test: Tensor, count: int, strength: float) -> Tensor:
    """Return the scores [test rows, count] of multinomial logistic regression, fitted by L-BFGS."""
    x, x_test = _standardised(vectors, train, test)
    scale = x.shape[1] ** -0.5  # so that a strength means the same for any number of channels
    x, x_test, y = x * scale, x_test * scale, labels[train]
    weight = torch.zeros(x.shape[1], count, requires_grad=True)
    bias = torch.zeros(count, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=60, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + 0.01 * strength * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    scores: Tensor = (x_test @ weight + bias).detach()
    return scores


def _ridge(vectors: Tensor, target: Tensor, train: Tensor, test: Tensor) -> list[Tensor]:
    """Return the predictions [test rows] of ridge regression for each of ``STRENGTHS``."""
    x, x_test = (each.to(torch.float64) for each in _standardised(vectors, train, test))
    mean = target[train].mean()
    left, singular, right = torch.linalg.svd(x, full_matrices=False)
    projected, along = left.T @ (target[train] - mean), x_test @ right.T
    size = x.shape[0] * x.shape[1]  # the sum of the squares of x
    return [along @ (projected * singular / (singular.square() + s * size / 10)) + mean for s in STRENGTHS]
