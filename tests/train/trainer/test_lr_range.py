from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
from tiny_cache import make_cache
from tiny_run import make_config, write_config

from shards.errors import UserError, run_command
from train.__main__ import command
from train.trainer.lr_range import DIVERGENCE_RATIO, LrPoint, lr_range, suggest_lr


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("lr") / "cache", 12, val_every=4)


def curve(loss):
    """Rates from 1e-6 to 10 with ``loss(log10 lr)``."""
    return [LrPoint(10**x, loss(x), loss(x)) for x in (-6 + 7 * i / 99 for i in range(100))]


def test_the_ramp_is_exponential_and_ends_where_the_loss_diverges(tmp_path, cache):
    lm = {"model": "nanochat:d1", "train": True}
    rates = lr_range(make_config(tmp_path, cache, "", lm=lm), 1e-6, 1e3, 20)
    ratios = [two.lr / one.lr for one, two in pairwise(rates)]
    assert ratios == pytest.approx([(1e9) ** (1 / 19)] * len(ratios))
    assert rates[0].lr == 1e-6
    lowest = min(rate.smoothed for rate in rates)
    assert all(rate.smoothed <= DIVERGENCE_RATIO * lowest for rate in rates[:-1])
    whole = lr_range(make_config(tmp_path, cache, "", lm=lm), 1e-6, 1e-4, 12)
    assert len(whole) == 12
    assert whole[-1].lr == pytest.approx(1e-4)
    assert not (tmp_path / "runs").exists()


def test_a_ramp_that_diverges_ends_early(tmp_path, cache, monkeypatch):
    from train.trainer import lr_range as module

    monkeypatch.setattr(module, "DIVERGENCE_RATIO", 1.0)  # any rise is too much
    rates = lr_range(make_config(tmp_path, cache, "nanochat:d1"), 1e-6, 1e2, 60)
    assert len(rates) < 60
    assert rates[-1].smoothed > min(rate.smoothed for rate in rates)


def test_the_steepest_fall_is_suggested_and_never_what_is_near_the_lowest_point():
    falling = curve(lambda x: 5 - 2 / (1 + math.exp(-4 * (x + 3))) + 40 * math.exp(3 * (x - 1)))
    found = suggest_lr(falling)
    assert found.lr == pytest.approx(1e-3, rel=0.3)
    assert "falls fastest at" in found.reason
    late = curve(lambda x: 5 - math.exp(2 * (x + 1)) if x < -1 else 4 + 10 * (x + 1))  # steepest just before the end
    assert suggest_lr(late).lr == pytest.approx(10**-1 / 3, rel=0.3)


def test_a_loss_that_never_falls_is_one_sentence():
    for rates in (curve(lambda x: 5 + x), curve(lambda x: 5.0)[:4]):
        with pytest.raises(UserError, match=r"never falls|diverged after 4 steps"):
            suggest_lr(rates)


def test_the_command_prints_table_and_suggestion_and_writes_json(tmp_path, cache, capsys, monkeypatch):
    config = write_config(
        tmp_path / "c.yaml", make_config(tmp_path, cache, "", lm={"model": "nanochat:d1", "train": True})
    )
    words = ["lr-range", "--config", str(config), "--low", "1e-4", "--high", "1e-1", "--steps", "30"]
    before = sorted(tmp_path.iterdir())
    assert run_command(command, [*words, "--json", str(tmp_path / "rates.json")]) == 0
    out = capsys.readouterr().out
    tree = json.loads((tmp_path / "rates.json").read_text())
    assert f"suggested: lr={tree['suggestion']['lr']:.1e}" in out
    assert tree["suggestion"]["reason"] in out
    assert tree["rates"][0]["lr"] == 1e-4
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "rates.json"])
    for more, message in [(["--low", "1", "--high", "1"], "0 < --low < --high"), (["--steps", "3"], "--steps >= 10")]:
        assert run_command(command, [*words, *more]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_command(command, words) == 2
    assert "without torchrun" in capsys.readouterr().err
