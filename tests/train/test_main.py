from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from tiny_cache import make_cache
from tiny_run import make_config, write_config

from shards.errors import UserError, run_command
from train.__main__ import command
from train.runs.folder import find_run

FAST = {"lm": {"model": "nanochat:d1", "train": True}, "steps": 3, "val": {"limit": 2}, "decode_limit": 1}


def run(*words: object) -> int:
    return run_command(command, [str(word) for word in words])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("main") / "cache", 12, val_every=4)


@pytest.fixture
def config(tmp_path, cache):
    return write_config(tmp_path / "c.yaml", make_config(tmp_path, cache, "", **FAST))


def test_help_is_quick_because_it_imports_nothing_heavy():
    words = [sys.executable, "-X", "importtime", "-m", "train", "fit", "--help"]
    start = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 10
    assert "example:" in done.stdout
    for heavy in ("torch", "numpy", "pyarrow", "pydantic", "transformers"):
        assert f" {heavy}\n" not in done.stderr


def test_fit_evaluate_and_report_on_one_run(config, cache, tmp_path, capsys):
    assert run("fit", "--config", config, "lr=1e-3") == 0
    folder = tmp_path / "runs" / "run"
    assert capsys.readouterr().out.rstrip().endswith(f"report: {folder / 'report.html'}")
    summary = json.loads((folder / "summary.json").read_text())

    assert run("evaluate", folder, "--json", tmp_path / "e.json") == 0
    printed, written = json.loads(capsys.readouterr().out), json.loads((tmp_path / "e.json").read_text())
    assert printed == written
    assert summary.keys() <= written.keys()
    assert written["val_loss"] == summary["val_loss"]

    assert run("evaluate", "--config", config, "--cache", cache, "val.limit=null") == 0
    assert json.loads(capsys.readouterr().out)["n_val"] == 3

    (folder / "report.html").unlink()
    assert run("report", folder) == 0
    assert (folder / "report.html").is_file()

    assert run("fit", "--config", config) == 2
    assert "choose another name=" in capsys.readouterr().err
    assert run("fit", "--resume", folder) == 2
    assert "is finished" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"'other' is not a run.*runs under '.*runs': run$"):
        find_run("other", str(tmp_path / "runs"))


def test_resume_without_a_run_takes_that_of_the_config_and_refuses_a_changed_key(config, tmp_path, capsys):
    assert run("fit", "--config", config, "checkpoint_every=1", "eval_every=0") == 0
    (tmp_path / "runs" / "run" / "summary.json").unlink()
    assert run("fit", "--resume", "lr=0.5", "--config", config) == 2
    assert "lr: 0.01, not 0.5" in capsys.readouterr().err
    assert run("fit", "--config", config, "eval_every=0", "--resume") == 0


def test_a_loss_that_falls_too_little_is_exit_status_1(config, capsys):
    assert run("fit", "--config", config, "min_loss_drop=99", "eval_every=0") == 1
    assert "failed: the training loss went from" in capsys.readouterr().err


def test_needs_prints_the_extractions_of_absent_caches_one_a_line(config, tmp_path, capsys):
    assert run("needs", "--config", config, "extract=[a.yaml]") == 0
    assert capsys.readouterr().out == ""
    assert run("needs", "--config", config, f"caches=[{tmp_path}/x,{tmp_path}/y]", "extract=[a.yaml,b.yaml]") == 0
    assert capsys.readouterr().out == "a.yaml\nb.yaml\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit"], "--config"),
        (["fit", "--config", "no.yaml"], "configuration file 'no.yaml' does not exist"),
        (["fit", "lr=1e-3"], "key 'caches' is missing in the command line"),
        (["fit", "caches=[http://127.0.0.1:9/x/*]"], "a glob pattern in a URL, and servers cannot be listed"),
        (["fit", "--resume", "no-run"], "'no-run' is not a run"),
        (["evaluate", "no-run"], "'no-run' is not a run"),
        (["report", "no-run"], "'no-run' is not a run"),
        (["transcribe", "no-run", "a.wav"], "'no-run' is not a run"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(words, said, capsys):
    assert run(*words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


def test_an_absent_cache_and_a_cuda_that_is_not_there_are_refused_before_anything_is_made(config, tmp_path, capsys):
    assert run("fit", "--config", config, "caches=[gone]", "extract=[a.yaml]") == 2
    assert "make extract CONFIG=a.yaml" in capsys.readouterr().err
    assert run("fit", "--config", config, "device=nonsense") == 2
    assert "device=auto" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
