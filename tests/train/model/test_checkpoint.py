from __future__ import annotations

import os

import pytest
import torch
from safetensors import safe_open
from torch import nn

from shards.errors import UserError
from train.model.checkpoint import (
    checkpoints,
    load_checkpoint,
    restore,
    restore_parameters,
    save_checkpoint,
    write_tensors,
)
from train.runs.folder import write_json


class Model(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projector = nn.Linear(width, 2)
        self.lm = nn.Linear(2, 2).requires_grad_(False)


def make(width: int = 3):
    model = Model(width)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


def work(model, optimizer, steps: int) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model.lm(model.projector(torch.randn(4, 3))).square().mean().backward()
        optimizer.step()


def test_resuming_from_a_checkpoint_equals_an_uninterrupted_run(tmp_path):
    model, optimizer = make()
    work(model, optimizer, 3)
    save_checkpoint(tmp_path, 3, model, optimizer, {"counters": {"loss": 0.1}})
    work(model, optimizer, 4)
    other, fresh = make()
    path, tensors, state = load_checkpoint(tmp_path)
    restore(other, fresh, tensors, str(path))
    work(other, fresh, 4)
    assert (state["step"], state["counters"]) == (3, {"loss": 0.1})
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_frozen_parameters_are_not_saved(tmp_path):
    model, optimizer = make()
    path = save_checkpoint(tmp_path, 0, model, optimizer, {})
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"projector.weight", "projector.bias"}


def test_the_newest_two_checkpoints_are_kept_and_no_temporary_file(tmp_path):
    model, optimizer = make()
    for step in (5, 10, 1000000, 999999):
        save_checkpoint(tmp_path, step, model, optimizer, {})
    assert [path.name for path in checkpoints(tmp_path)] == ["step-1000000.safetensors", "step-999999.safetensors"]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\xff" * 64])
def test_a_corrupt_checkpoint_is_skipped_with_a_warning(tmp_path, capsys, damage):
    model, optimizer = make()
    save_checkpoint(tmp_path, 1, model, optimizer, {})
    newest = save_checkpoint(tmp_path, 2, model, optimizer, {})
    newest.write_bytes(damage(newest.read_bytes()))
    assert load_checkpoint(tmp_path)[2]["step"] == 1
    assert str(newest) in capsys.readouterr().err


def test_a_folder_without_checkpoints_is_rejected(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        load_checkpoint(tmp_path)


def test_the_error_for_a_tensor_of_another_shape_names_it(tmp_path):
    model, optimizer = make()
    path, tensors, _ = load_checkpoint(save_checkpoint(tmp_path, 1, model, optimizer, {}).parent)
    with pytest.raises(UserError, match=r"'projector\.weight' has shape \[2, 3\]"):
        restore_parameters(make(5)[0], tensors, str(path))
    del tensors["projector.bias"]
    with pytest.raises(UserError, match=r"'projector\.bias' is missing"):
        restore_parameters(model, tensors, str(path))


def test_a_folder_that_is_not_writable_is_reported_in_one_sentence(tmp_path):
    model, optimizer = make()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="saving a checkpoint failed"):
        save_checkpoint(tmp_path / "file", 1, model, optimizer, {})


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o000])
def test_weights_are_as_readable_as_other_files(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "projector.safetensors", {"x": torch.zeros(2)}, {})
        write_json(tmp_path / "other.json", {})
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("projector.safetensors", "other.json")]
    assert modes == [0o644 & ~umask] * 2
