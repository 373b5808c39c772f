from __future__ import annotations

import pytest
import torch
from tiny_cache import make_cache
from tiny_run import make_config

from shards.errors import UserError
from train.distributed.device import choose_device, choose_dtype, flushed_denormals
from train.trainer import trainer
from train.trainer.fit import fit


def test_auto_is_a_device_that_is_there():
    device = choose_device("auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_dtype("auto", device) in (torch.float32, torch.bfloat16)


def test_a_named_dtype_is_taken_as_it_is():
    assert choose_dtype("float32", torch.device("cpu")) == torch.float32
    assert choose_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize("name", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match="set device=auto"):
        choose_device(name)


def product_is_zero() -> bool:
    return bool(torch.full((1000,), 1e-30).mul(1e-10).max() == 0)  # 1e-40 is below the least normal float32


def test_denormal_numbers_are_zero_inside_and_numbers_again_outside():
    assert not product_is_zero()
    with flushed_denormals():
        assert product_is_zero()
        with flushed_denormals():
            pass
        assert product_is_zero()
    assert not product_is_zero()


def test_a_run_trains_and_is_evaluated_without_denormal_numbers(tmp_path, monkeypatch):
    """They make a step of CTC several times slower, and change no loss (bench/denormals.py)."""
    seen = []

    def watched(function):
        def call(*words, **keys):
            seen.append(product_is_zero())
            return function(*words, **keys)

        return call

    monkeypatch.setattr(trainer, "run_step", watched(trainer.run_step))
    monkeypatch.setattr(trainer, "evaluate_models", watched(trainer.evaluate_models))
    fit(make_config(tmp_path, make_cache(tmp_path / "cache", 8, val_every=4), "nanochat:d1", steps=2))
    assert len(seen) == 3
    assert all(seen)
    assert not product_is_zero()
