"""One run folder, one process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from tiny_cache import make_cache
from tiny_run import make_config

from shards.errors import UserError
from train.runs.folder import hold
from train.sweeps.config import SweepConfig
from train.sweeps.sweep import run_sweep
from train.trainer import fit as fit_module
from train.trainer.fit import fit

HOLDER = """
import sys
from pathlib import Path
from train.runs.folder import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that trains in the run folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "runs" / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("lock") / "cache", 12, val_every=4)


def config(tmp_path, cache):
    return make_config(tmp_path, cache, "nanochat:d1", steps=2, val={"limit": 2}, decode_limit=1, checkpoint_every=1)


def test_a_second_process_is_refused_in_one_sentence_before_the_model_loads(tmp_path, cache, holder, monkeypatch):
    def build_model(*words, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(fit_module, "build_model", build_model)
    by = f"process {holder.pid} on {socket.gethostname()} is training in '.*run': wait until it ends"
    with pytest.raises(UserError, match=by):
        fit(config(tmp_path, cache))
    (tmp_path / "runs" / "run").mkdir()
    with pytest.raises(UserError, match=by):
        fit(config(tmp_path, cache), tmp_path / "runs" / "run")
    sweep = SweepConfig(base={"caches": [str(cache)]}, name="run", runs=str(tmp_path / "runs"), experiments=[{}])
    with pytest.raises(UserError, match=by):
        run_sweep(sweep)


def test_a_killed_process_blocks_nobody(tmp_path, cache, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / "runs" / ".run.lock").read_text())["pid"] == holder.pid
    run = fit(config(tmp_path, cache))
    assert sorted(path.name for path in run.parent.iterdir()) == ["latest", "run"]
    (run / "summary.json").unlink()
    fit(config(tmp_path, cache), run)
    with pytest.raises(UserError, match="already exists"):
        fit(config(tmp_path, cache))


def test_an_error_inside_keeps_its_own_words(tmp_path):
    with pytest.raises(PermissionError, match="of another file"), hold(tmp_path / "run"):
        raise PermissionError(13, "of another file")
