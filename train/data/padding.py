"""Batches of arrays of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch


def pad(arrays: Sequence[npt.NDArray[Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad arrays [T_i, C] with zeros to one tensor [B, T, C]; return it and its mask, bool [B, T], True at frames."""
    import torch

    features = np.zeros((len(arrays), max(map(len, arrays)), arrays[0].shape[1]), dtype=arrays[0].dtype)
    mask = np.zeros(features.shape[:2], dtype=bool)
    for row, array in enumerate(arrays):
        features[row, : len(array)] = array
        mask[row, : len(array)] = True
    return torch.from_numpy(features), torch.from_numpy(mask)
