"""Keeps transformers from reading masks and positions, for which a GPU makes the host wait.

Without a mask, transformers looks at the positions of a batch for several sequences in one row; with one, whether it
masks anything. Here a row is one sequence, and on a GPU every mask is used as if it masked something.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

from torch import Tensor

_one_sequence_a_row: ContextVar[bool] = ContextVar("one sequence a row", default=False)


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Context manager in which transformers makes masks without a look at values on a GPU."""
    _wrap_questions()
    token = _one_sequence_a_row.set(True)
    try:
        yield
    finally:
        _one_sequence_a_row.reset(token)


@cache
def _wrap_questions() -> None:
    """Answer the questions of ``transformers.masking_utils`` in that context; others are answered as before."""
    from transformers import masking_utils

    library: Any = masking_utils
    packed, fast_all = library.find_packed_sequence_indices, library.fast_all

    def find_packed_sequence_indices(position_ids: Tensor) -> Tensor | None:
        found: Tensor | None = None if _one_sequence_a_row.get() else packed(position_ids)
        return found

    def masks_nothing(mask: Tensor) -> Tensor | bool:
        known = _one_sequence_a_row.get() and mask.device.type != "cpu"
        answer: Tensor | bool = False if known else fast_all(mask)
        return answer

    library.find_packed_sequence_indices, library.fast_all = find_packed_sequence_indices, masks_nothing
