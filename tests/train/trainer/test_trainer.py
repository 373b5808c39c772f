from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tiny_cache import make_cache
from tiny_lm import save_tiny_lm
from tiny_run import forget_after, losses, make_config, write_config

from shards.errors import UserError, WorkFailed
from train.config.train import TrainConfig
from train.data.caches import open_data
from train.data.padding import pad
from train.distributed.group import ProcessGroup, RankLost
from train.model.build import build_model
from train.runs.folder import create_run_folder, new_run_folder
from train.trainer.fit import fit
from train.trainer.optim import learning_rate
from train.trainer.state import RunState
from train.trainer.step import next_batches
from train.trainer.trainer import Trainer

CPU = torch.device("cpu")
DROPOUT = {"kind": "residual", "stack": 3, "blocks": 1, "hidden": 16, "dropout": 0.2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("loop") / "cache", 24, val_every=6)


def test_a_clock_that_jumps_a_day_changes_no_training(cache, lm, tmp_path, monkeypatch):
    still = fit(make_config(tmp_path / "still", cache, lm, steps=4, checkpoint_every=2, eval_every=2))
    now, days = time.time, itertools.cycle((0, 1, -1))
    monkeypatch.setattr(time, "time", lambda: now() + 86_400 * next(days))
    jumped = make_config(tmp_path / "jumped", cache, lm, steps=4, checkpoint_every=2, eval_every=2)
    run = fit(jumped)
    forget_after(run, 2)
    assert losses(fit(jumped, run)) == losses(still)
    assert all(0 <= json.loads(line)["seconds"] < 60 for line in (run / "metrics.jsonl").read_text().splitlines())


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return f"path:{save_tiny_lm(tmp_path_factory.mktemp('loop') / 'lm')}"


@pytest.mark.parametrize(
    "keys",
    [
        {"projector": DROPOUT, "gradient_accumulation_steps": 2, "eval_every": 2},
        {"lm": {"model": "nanochat:d1", "train": True}, "weight_decay": 0.1},
    ],
    ids=["dropout, accumulation, evaluations", "trained LM"],
)
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, cache, lm, keys):
    config = make_config(tmp_path, cache, lm, **{"checkpoint_every": 4, **keys})
    whole = fit(config)
    halved = tmp_path / "runs" / "halved"
    shutil.copytree(whole, halved)
    forget_after(halved, 4)
    fit(config.model_copy(update={"name": "halved"}), halved)
    assert losses(halved) == losses(whole)
    assert len(losses(whole)) == 8
    one, two = (json.loads((run / "summary.json").read_text()) for run in (whole, halved))
    timed = {"seconds", "data_wait_fraction", "frames_per_second", "eval_seconds"}
    timed |= {"training_seconds", "evaluation_seconds"}
    assert {key: one[key] for key in one if key not in timed} == {key: two[key] for key in two if key not in timed}
    for name in ("projector.safetensors", "checkpoints/step-000008.safetensors"):
        ours, theirs = load_file(whole / name), load_file(halved / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert len((whole / "evaluations.jsonl").read_text().splitlines()) == (4 if "eval_every" in keys else 1)
    assert len((halved / "evaluations.jsonl").read_text().splitlines()) == (4 if "eval_every" in keys else 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_says_how_to_resume_and_resumes_exactly(tmp_path, cache, number):
    keys = {"lm": {"model": "nanochat:d1", "train": True}, "steps": 150, "eval_every": 0, "checkpoint_every": None}
    config = make_config(tmp_path, cache, "", **keys)
    command = [sys.executable, "-m", "train", "fit"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--config", write_config(tmp_path / "c.yaml", config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step      1/"):
            process.send_signal(number)
            break
    _, err = process.communicate()
    assert process.returncode == 130, err
    run = tmp_path / "runs" / "run"
    assert f"python -m train fit --resume {run}" in err
    assert "Traceback" not in err
    done = len(losses(run))
    assert 1 <= done < 150
    assert f"Interrupted at step {done} of 150" in err
    fit(config, run)
    never_stopped = fit(config.model_copy(update={"name": "whole"}))
    assert losses(run) == losses(never_stopped)
    assert len(losses(run)) == 150


def test_the_gradient_of_a_step_is_that_of_its_tokens_together(tmp_path, cache, lm):
    """Two batches of unequal token counts give the gradient of the mean over all their tokens, as one batch would."""
    config = make_config(tmp_path, cache, lm, gradient_accumulation_steps=3, max_grad_norm=1e9)
    data = open_data(config)
    model = build_model(config, 8, CPU, torch.float32)
    run = new_run_folder(config)
    create_run_folder(run, config, data)
    state, other = (RunState(config, data, model, torch.float32, run, ProcessGroup()) for _ in range(2))
    batches = [batch for batch, _ in zip(other.stream, range(3), strict=False)]
    arrays = [batch.features[i, :n].numpy() for batch in batches for i, n in enumerate(batch.lengths)]
    features, mask = pad(arrays)
    out = model.nll(features, mask, [text for batch in batches for text in batch.texts])
    loss = out.nll.sum() / out.tokens.sum()
    loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with Trainer(config, state, CPU) as trainer:
        trainer.train_step(*next_batches(iter(state.stream), 3))
    assert losses(run)[0] == pytest.approx(float(loss.detach()), rel=1e-6)
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-7)
    assert wanted


def test_a_frozen_language_model_keeps_its_weights_and_the_projector_learns(tmp_path, cache, lm):
    config = make_config(tmp_path, cache, lm, steps=30, lr=3e-2, eval_every=0)
    before = build_model(config, 8, CPU, torch.float32)
    run = fit(config)
    trained = load_file(run / "projector.safetensors")
    assert all(name.startswith("projector.") for name in trained)
    assert not torch.equal(trained["projector.fc1.weight"], before.projector.fc1.weight)
    assert sum(losses(run)[-5:]) < sum(losses(run)[:5])


def test_a_run_leaves_what_is_promised(tmp_path, cache, lm, capsys):
    run = fit(make_config(tmp_path, cache, lm, eval_every=4))
    summary = json.loads((run / "summary.json").read_text())
    promised = "val_loss val_loss_shuffled audio_gain wer cer steps seconds data_wait_fraction padding_fraction"
    assert {*promised.split(), "projector_rms_ratio"} <= summary.keys()
    assert summary["audio_gain"] == summary["val_loss_shuffled"] - summary["val_loss"]
    assert summary["steps"] == 8
    assert 0 <= summary["data_wait_fraction"] <= 1
    assert 0 <= summary["padding_fraction"] < 1
    assert (run.parent / "latest").resolve() == run.resolve()
    for name in ("config.yaml", "caches.json", "report.html", "projector.safetensors"):
        assert (run / name).is_file(), name
    printed = capsys.readouterr().out
    assert f" training utterances, {summary['n_val']} held-out utterances\nfirst batch: features [4, " in printed
    assert "step      8/8  loss" in printed
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert {"step", "loss", "lr", "grad_norm", "projector_rms_ratio", "seconds", "data_wait", "padding"} <= line.keys()


def test_a_run_folder_that_exists_is_refused(tmp_path, cache, lm):
    config = make_config(tmp_path, cache, lm, steps=1)
    (tmp_path / "runs" / "run").mkdir(parents=True)
    with pytest.raises(UserError, match=r"choose another name=.* --resume"):
        fit(config)


def test_latest_points_at_the_newest_run(tmp_path, cache, lm):
    config = make_config(tmp_path, cache, lm, steps=1, eval_every=0)
    fit(config)
    newest = fit(config.model_copy(update={"name": None}))
    assert (tmp_path / "runs" / "latest").resolve() == newest.resolve()
    assert newest.name.endswith("-mlp")


def test_resume_refuses_changed_settings_and_names_them(tmp_path, cache, lm):
    config = make_config(tmp_path, cache, lm, steps=2, checkpoint_every=1, eval_every=0)
    run = fit(config)
    with pytest.raises(UserError, match="is finished"):
        fit(config, run)
    forget_after(run, 1)
    with pytest.raises(UserError, match=r"lr: 0\.01, not 0\.1"):
        fit(config.model_copy(update={"lr": 0.1}), run)


def test_text_rules_give_the_losses_of_a_cache_that_was_written_so(tmp_path, cache, lm):
    capitals = make_cache(tmp_path / "capitals", 24, val_every=6, spell=lambda text: f"“{text.upper()}!”")
    rules = {"case": "lower", "punctuation": "strip"}
    plain = fit(make_config(tmp_path, cache, lm, name="plain"))
    ruled = fit(make_config(tmp_path, capitals, lm, name="ruled", text=rules))
    assert losses(ruled) == losses(plain)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (plain, ruled)]
    assert summaries[0]["val_loss"] == summaries[1]["val_loss"]
    tables = [pq.read_table(run / "utterances.parquet", columns=["reference"]) for run in (plain, ruled)]
    assert tables[0] == tables[1]


def test_a_resumed_run_may_not_change_its_text_rules(tmp_path, cache, lm):
    config = make_config(tmp_path, cache, lm, steps=2, checkpoint_every=1, eval_every=0)
    run = fit(config)
    forget_after(run, 1)
    with pytest.raises(UserError, match=r"text\.case: keep, not lower"):
        fit(make_config(tmp_path, cache, lm, steps=2, checkpoint_every=1, eval_every=0, text={"case": "lower"}), run)


def test_texts_that_were_punctuation_alone_are_reported(tmp_path, lm, capsys):
    dots = make_cache(tmp_path / "dots", 12, spell=lambda text: "…" if "e" in text else text)
    fit(make_config(tmp_path, dots, lm, steps=1, eval_every=0, text={"punctuation": "strip"}))
    assert "texts are empty without their punctuation" in "".join(capsys.readouterr())


def test_resume_refuses_another_cache(tmp_path, cache, lm):
    config = make_config(tmp_path, cache, lm, steps=2, checkpoint_every=1, eval_every=0)
    run = fit(config)
    forget_after(run, 1)
    other = make_cache(tmp_path / "other", 24, seed=5)
    with pytest.raises(UserError, match="has changed since the run was trained"):
        fit(config.model_copy(update={"caches": [str(other)]}), run)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, cache, lm):
    with pytest.raises(WorkFailed, match="is not finite: lower lr"):
        fit(make_config(tmp_path, cache, lm, lr=3e37, warmup=0, projector={"kind": "mlp"}, eval_every=0))


def test_a_loss_that_falls_too_little_fails_the_run_after_everything_is_written(tmp_path, cache, lm):
    with pytest.raises(WorkFailed, match=r"fell by less than min_loss_drop=50\.0"):
        fit(make_config(tmp_path, cache, lm, steps=2, min_loss_drop=50, eval_every=0))
    assert (tmp_path / "runs" / "run" / "summary.json").is_file()


def schedule(**keys) -> list[float]:
    config = TrainConfig.model_validate({"caches": ["a"], "lr": 1.0, "steps": 100, **keys})
    return [learning_rate(config, step) for step in range(config.steps)]


def test_the_rate_warms_up_linearly_and_falls_as_a_cosine():
    rates = schedule(warmup=10, min_lr=0.1)
    assert rates[:11] == pytest.approx([0.1 * i for i in range(1, 11)] + [1.0])
    assert rates[55] == pytest.approx(0.55)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_a_linear_rate_falls_by_the_same_amount_each_step():
    rates = schedule(warmup=10, min_lr=0.1, schedule="linear")
    assert rates[9:] == pytest.approx([1.0] + [1.0 - 0.01 * i for i in range(90)])


def test_a_constant_rate_stays_after_warm_up():
    assert schedule(warmup=2, schedule="constant") == [0.5] + [1.0] * 99
    assert schedule(warmup=0, schedule="constant") == [1.0] * 100


class LosesRank(ProcessGroup):
    """A group whose other rank is lost in step 3, before the sums of gradients or after them."""

    def __init__(self, before: bool) -> None:
        self.before, self.steps, self.lost = before, 0, False

    def all_reduce_gradients(self, parameters, loss):
        self.steps += 1
        self.lost = self.steps == 3
        return loss * torch.nan if self.lost and self.before else loss

    def all_reduce_sum(self, values):
        if self.lost:
            raise RankLost("rank 1 of 2 exited before the run finished")
        return list(values)


@pytest.mark.parametrize(("before", "saved"), [(True, 2), (False, 3)])
def test_a_rank_that_is_lost_in_a_step_leaves_the_weights_and_the_number_of_the_same_step(
    cache, lm, tmp_path, before, saved
):
    config = make_config(tmp_path, cache, lm, steps=6, eval_every=0, ema_decay=0.5)
    whole = losses(fit(config))
    with pytest.raises(RankLost, match=f"step {saved} of 6 is saved"):
        fit(config.model_copy(update={"name": "lost"}), group=LosesRank(before))
    run = fit(config, tmp_path / "runs" / "lost")
    kept = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in kept if line["step"] > saved] == whole[saved:]
