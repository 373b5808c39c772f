"""Real processes under torchrun, on models that take milliseconds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from launch import SECONDS, at_step, finish, popen, ranks_of, torchrun
from tiny_cache import make_cache
from tiny_run import losses, make_config, write_config

from train.evaluation.run import evaluate_run
from train.model.checkpoint import checkpoints
from train.runs.folder import run_config
from train.runs.metrics_log import read_jsonl
from train.trainer.fit import fit

# 9 training rows in batches of at most 2: in one batch of an epoch, one of two processes has nothing to do
KEYS: dict[str, Any] = {
    "batch": {"size": 2},
    "lm": {"model": "nanochat:d1", "train": True},
    "lr": 3e-3,
    "eval_batch_size": 2,
    "projector": {"kind": "mlp", "norm": "rms"},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("distributed") / "cache", 12, val_every=4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache) -> Path:
    """The same run in this process."""
    folder = tmp_path_factory.mktemp("alone")
    return fit(make_config(folder, cache, "", **KEYS, eval_every=4))


def test_two_processes_under_torchrun_give_the_run_of_one(tmp_path, cache, alone):
    config = make_config(tmp_path, cache, "", **KEYS, eval_every=4)
    out, err = finish(torchrun(2, "--config", write_config(tmp_path / "c.yaml", config)))
    run = tmp_path / "runs" / "run"
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
    one, two = (json.loads((each / "summary.json").read_text()) for each in (alone, run))
    for name in ("val_loss", "val_loss_shuffled", "projector_rms_ratio"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    for name in ("utterances", "n_val", "n_decoded", "steps"):
        assert two[name] == one[name], name
    norms = [[line["grad_norm"] for line in read_jsonl(each / "metrics.jsonl")] for each in (alone, run)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    assert out.count("first batch:") == out.count("report: ") == 1  # only rank 0 prints
    assert err == ""


LONG = {**KEYS, "lr": 1e-3, "steps": 150, "eval_every": 0, "checkpoint_every": 10}


def sentence_of(err: str) -> str:
    """The single line in which the run itself reports its end; the launcher prints more."""
    (sentence,) = [line for line in err.splitlines() if line.startswith(("failed: ", "error: ", "Interrupted "))]
    return sentence


def saved(run: Path) -> int:
    """Step of the newest checkpoint."""
    return int(checkpoints(run / "checkpoints")[0].stem.split("-")[1])


def test_a_killed_rank_ends_the_run_with_a_sentence_and_one_process_finishes_it_with_the_same_batches(tmp_path, cache):
    config = make_config(tmp_path, cache, "", **LONG)
    process = torchrun(2, "--config", write_config(tmp_path / "c.yaml", config))
    at_step(process, 15, 150)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    run = tmp_path / "runs" / "run"
    assert process.returncode != 0
    sentence = sentence_of(err)
    assert "rank 1 of 2 exited before the run finished" in sentence
    assert f"step {saved(run)} of 150 is saved" in sentence
    assert f"python -m train fit --resume {run}" in sentence
    assert 15 <= saved(run) < 150
    fit(config, run)
    whole = fit(config.model_copy(update={"name": "whole"}))
    assert losses(run) == pytest.approx(losses(whole), rel=1e-3)


@pytest.mark.slow
def test_four_processes_of_which_two_are_often_idle_give_the_run_of_one(tmp_path, cache, alone):
    config = make_config(tmp_path, cache, "", **KEYS, eval_every=4)
    finish(torchrun(4, "--config", write_config(tmp_path / "c.yaml", config)))
    run = tmp_path / "runs" / "run"
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
    samples = [
        json.loads((each / "evaluations.jsonl").read_text().splitlines()[-1])["samples"] for each in (alone, run)
    ]
    assert samples[0] == samples[1]


@pytest.mark.slow
def test_two_processes_evaluate_a_run_together_and_get_the_metrics_of_one(tmp_path, cache, alone):
    shutil.copytree(alone, tmp_path / "run")
    one = evaluate_run(tmp_path / "run", run_config(tmp_path / "run"))
    out, err = finish(torchrun(2, tmp_path / "run", "--json", tmp_path / "two.json", job="evaluate"))
    two = json.loads((tmp_path / "two.json").read_text())
    assert json.loads(out) == two  # only rank 0 prints
    assert two.keys() == one.keys()
    for name in ("val_loss", "val_loss_shuffled", "wer", "projector_rms_ratio", "n_val", "n_decoded"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    assert err == ""


@pytest.mark.slow
def test_an_evaluation_error_is_reported_once_for_all_processes(tmp_path):
    process = torchrun(2, tmp_path / "absent", job="evaluate")
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert "absent" in sentence_of(err)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_saves_and_ends_every_rank(tmp_path, cache, number):
    config = make_config(tmp_path, cache, "", **LONG)
    process = torchrun(2, "--config", write_config(tmp_path / "c.yaml", config))
    at_step(process, 15, 150)
    ranks = ranks_of(process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    run = tmp_path / "runs" / "run"
    interrupted = f"Interrupted at step {saved(run)} of 150; the run is saved. Resume with: python -m train fit"
    assert sentence_of(err).startswith(interrupted)
    assert len(losses(run)) == saved(run)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


@pytest.mark.slow
def test_a_run_goes_through_two_one_four_and_two_processes_and_is_the_run_of_one(tmp_path, cache):
    config = make_config(tmp_path, cache, "", **LONG)
    file, run = write_config(tmp_path / "c.yaml", config), tmp_path / "runs" / "run"
    for world, step, rank, number in (
        (2, 15, 0, signal.SIGTERM),
        (1, 60, 0, signal.SIGINT),
        (4, 105, 3, signal.SIGKILL),
    ):
        process = torchrun(world, *(["--resume"] if run.exists() else []), "--config", file)
        at_step(process, step, 150)
        os.kill(ranks_of(process)[rank], number)
        process.communicate(timeout=60)
        assert process.returncode != 0
        assert step <= saved(run) < 150
    finish(torchrun(2, "--resume", "--config", file))
    whole = fit(config.model_copy(update={"name": "whole"}))
    assert losses(run) == pytest.approx(losses(whole), rel=1e-3)


@pytest.mark.slow
def test_two_machines_train_one_run_and_the_loss_of_one_ends_it(tmp_path, cache):
    config = make_config(tmp_path, cache, "", **LONG)
    file, run = write_config(tmp_path / "c.yaml", config), tmp_path / "runs" / "run"
    machines = on_two_machines(lambda launcher: torchrun(1, "--config", file, launcher=launcher))
    at_step(machines[0], 15, 150)
    (rank_1,) = ranks_of(machines[1]).values()
    machines[1].kill()
    os.kill(rank_1, signal.SIGKILL)
    _, err = machines[0].communicate(timeout=60)
    machines[1].communicate(timeout=60)
    assert "rank 1 of 2 exited before the run finished" in sentence_of(err)
    for machine in on_two_machines(lambda launcher: torchrun(1, "--resume", "--config", file, launcher=launcher)):
        finish(machine)
    whole = fit(config.model_copy(update={"name": "whole"}))
    assert losses(run) == pytest.approx(losses(whole), rel=1e-3)


def on_two_machines(start: Callable[[Sequence[object]], subprocess.Popen[str]]) -> list[subprocess.Popen[str]]:
    """Two launchers that meet on a port of the loopback interface."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    place = ("--nnodes", 2, "--master-addr", "127.0.0.1", "--master-port", port)
    return [start((*place, "--node-rank", node)) for node in range(2)]


def ranks_without_launcher(code: str) -> list[subprocess.Popen[str]]:
    """Two processes that run ``code`` inside ``with open_process_group() as group``, as `srun` would start them."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    lines = [
        "import os, signal, threading, sys",
        "from train.distributed.group import *",
        "from shards.errors import *",
    ]
    lines += [
        "def main(words):",
        "    with open_process_group() as group:",
        *(f"        {line}" for line in code.splitlines()),
    ]
    text = "\n".join([*lines, "sys.exit(run_command(main, []))"])
    place = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [popen([sys.executable, "-c", text], RANK=rank, LOCAL_RANK=rank, **place) for rank in range(2)]


@pytest.mark.slow
def test_rank_0_reports_the_error_of_another_rank_and_all_exit(tmp_path):
    code = """with group.raise_on_all_ranks():
    if group.rank == 1:
        raise UserError("no cache here")"""
    ends = [(process.communicate(timeout=SECONDS)[1], process.returncode) for process in ranks_without_launcher(code)]
    assert ends == [("error: rank 1: no cache here\n", 2), ("", 2)]


@pytest.mark.slow
def test_ranks_with_different_settings_are_refused():
    code = 'group.assert_same({"dtype": ["float32", "bfloat16"][group.rank]})'
    ends = [(process.communicate(timeout=SECONDS)[1], process.returncode) for process in ranks_without_launcher(code)]
    assert "rank 1 differs from rank 0 in dtype (expected float32, got bfloat16)" in ends[0][0]
    assert ends[1] == ("", 2)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_waits_where_no_error_reaches_it_ends_when_another_is_killed(killed):
    code = f"""if group.rank == {killed}:
    os.kill(os.getpid(), signal.SIGKILL)
threading.Event().wait()"""
    processes = ranks_without_launcher(code)
    _, err = processes[1 - killed].communicate(timeout=SECONDS)
    processes[killed].communicate(timeout=SECONDS)
    assert processes[1 - killed].returncode == 1
    assert err == f"failed: rank {killed} of 2 exited before the run finished\n"


@pytest.mark.slow
def test_the_sentence_about_a_lost_rank_comes_although_the_launcher_ends_this_one_meanwhile():
    code = """if group.rank == 1: os.kill(os.getpid(), signal.SIGKILL)
try:
    group.all_gather(0)
finally:
    os.kill(os.getpid(), signal.SIGTERM)"""
    processes = ranks_without_launcher(code)
    _, err = processes[0].communicate(timeout=SECONDS)
    processes[1].communicate(timeout=SECONDS)
    assert (err, processes[0].returncode) == ("failed: rank 1 of 2 exited before the run finished\n", 1)


@pytest.mark.slow
def test_sigterm_ends_a_rank_when_no_other_is_lost():
    code = """if group.rank == 0: os.kill(os.getpid(), signal.SIGTERM)
threading.Event().wait()"""
    processes = ranks_without_launcher(code)
    for process in processes:
        process.communicate(timeout=SECONDS)
    assert [process.returncode for process in processes] == [-signal.SIGTERM, 1]


def test_without_a_launcher_a_run_is_a_group_of_one_that_loads_no_torch():
    code = """import sys
from train.distributed.group import open_process_group
with open_process_group() as group: print(group.world_size, 'torch' in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1 False\n"
