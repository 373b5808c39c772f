from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file
from tiny_cache import make_cache
from tiny_lm import save_tiny_lm
from tiny_run import make_config
from torch import nn

from train.trainer.fit import fit
from train.trainer.optim import Ema, swapped_parameters


def test_the_average_forgets_its_start_and_then_decays_as_configured():
    parameter = nn.Parameter(torch.zeros(2))
    ema = Ema({"p": parameter}, 0.9)
    expected = 0.0
    for step in range(1, 200):
        parameter.data.fill_(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        ema.update(step)
    torch.testing.assert_close(ema.averages["p"], torch.full((2,), expected))
    assert expected == pytest.approx(199 - 0.9 / 0.1, rel=1e-3)


def test_swapped_parameters_are_restored_even_after_an_error():
    parameter, other = nn.Parameter(torch.zeros(2)), {"p": torch.ones(2)}
    seen = []
    with suppress(KeyError), swapped_parameters({"p": parameter}, other):
        seen = parameter.tolist()
        raise KeyError
    assert seen == [1, 1]
    assert (parameter.tolist(), other["p"].tolist()) == ([0, 0], [1, 1])


def test_a_run_keeps_and_evaluates_the_averages_and_trains_on_with_the_weights(tmp_path):
    cache, lm = make_cache(tmp_path / "cache", 12, val_every=4), f"path:{save_tiny_lm(tmp_path / 'lm')}"
    runs = {
        decay: fit(make_config(tmp_path, cache, lm, name=f"run-{decay}", ema_decay=decay, decode_limit=1))
        for decay in (0.0, 0.5)
    }
    last = load_file(runs[0.5] / "checkpoints" / "step-000008.safetensors")
    plain, kept = (load_file(run / "projector.safetensors") for run in runs.values())
    for name in kept:
        assert torch.equal(last[name], plain[name])  # averaging changes no step
        assert torch.equal(kept[name], last[f"ema.{name}"])
        assert not torch.equal(kept[name], plain[name])
