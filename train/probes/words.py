"""The probe for words: a linear map from each frame to characters, trained by CTC; its error rate on held-out rows.

No context, no hidden layer, no language model: it tells whether the characters of a text can be read, in order, off
single frames. A low rate says that the layer carries words in a form that is linear; a high one does not say that a
projector with more than one layer could not find them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEPS, BATCH, RATE = 300, 8, 1e-2

Read = Callable[[int], npt.NDArray[np.floating]]


def character_errors(
    read: Read, texts: Sequence[str], train: Sequence[int], test: Sequence[int], pool: int = 1, steps: int = STEPS
) -> npt.NDArray[np.int64]:
    """Train on the rows ``train`` and return the wrong characters of each row of ``test``: int64 [rows].

    Args:
        read: the features of a row, [frames, channels].
        texts: one per row.
        pool: this many neighbouring frames are averaged first.
    """
    import jiwer

    characters = sorted({letter for row in train for letter in texts[row]})
    number = {letter: index + 1 for index, letter in enumerate(characters)}  # 0 is the blank

    def frames(row: int) -> Tensor:
        return pooled(torch.from_numpy(np.asarray(read(row), dtype=np.float32)), pool)

    total, square, count = torch.zeros(1), torch.zeros(1), 0
    for row in train:
        x = frames(row)
        total, square, count = total + x.sum(dim=0), square + x.square().sum(dim=0), count + len(x)
    mean = total / count
    scale = 1 / (square / count - mean.square()).clamp(min=1e-8).sqrt()

    head = nn.Linear(len(mean), len(characters) + 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    solver = torch.optim.Adam(head.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(solver, RATE, total_steps=steps)
    for step in range(steps):
        rows = _batch(train, step)
        inputs = [(frames(row) - mean) * scale for row in rows]
        targets = [torch.tensor([number[letter] for letter in texts[row]]) for row in rows]
        lengths = torch.tensor([len(x) for x in inputs])
        scores = head(nn.utils.rnn.pad_sequence(inputs)).log_softmax(dim=-1)  # [T, B, 1 + characters]
        sizes = torch.tensor([len(each) for each in targets])
        loss = F.ctc_loss(scores, torch.cat(targets), lengths, sizes, zero_infinity=True)
        solver.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(head.parameters(), 5.0)
        solver.step()
        schedule.step()
    wrong = []
    with torch.no_grad():
        for row in test:
            best = torch.unique_consecutive(head((frames(row) - mean) * scale).argmax(dim=-1)).tolist()
            heard = "".join(characters[index - 1] for index in best if index)
            output = jiwer.process_characters(texts[row], heard)
            wrong.append(output.substitutions + output.deletions + output.insertions)
    return np.array(wrong, dtype=np.int64)


def pooled(x: Tensor, size: int) -> Tensor:
    """Return the means of ``size`` neighbouring frames [ceil(T / size), C]; the last mean may be of fewer."""
    return x if size == 1 else torch.stack([x[at : at + size].mean(dim=0) for at in range(0, len(x), size)])


def _batch(rows: Sequence[int], step: int) -> list[int]:
    """Return the rows of a step: the training rows in an order that a hash draws for each epoch."""
    size = min(BATCH, len(rows))
    per_epoch = len(rows) // size
    epoch, place = divmod(step, per_epoch)
    order = sorted(rows, key=lambda row: hashlib.sha256(f"{epoch}\0{row}".encode()).digest())
    return order[place * size : (place + 1) * size]
