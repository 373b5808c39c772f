"""Export, report and sweep killed at any file operation, and on a full disk: whole files, and the next one works."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from extraction import Kill
from extraction import run as run_process
from tiny_cache import make_cache
from tiny_disk import small_disk
from tiny_run import make_config
from tiny_sweep import make_sweep, same_run

from shards.errors import run_command
from train.__main__ import command
from train.inference.export import export
from train.runs.folder import hold
from train.sweeps.sweep import run_sweep
from train.trainer.fit import fit

EVERY = [None, pytest.param(7, marks=pytest.mark.slow)]  # file operations between two kills


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("storage")
    cache = make_cache(folder / "cache", 12, val_every=4)
    keys = {"lm": {"model": "nanochat:d1", "train": True}, "steps": 2, "eval_every": 0}
    return fit(make_config(folder, cache, "", **keys))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def kills(count: Path, words: list[str], every: int | None) -> list[Kill]:
    """Kills at three operations of ``train <words>``, or at every one and in each way."""
    assert run_process(words, count=count, package="train") == 0
    last = int(count.read_text())
    if every is None:
        return [Kill(last // 3, "inside"), Kill(last - 4, "before"), Kill(last, "after")]
    return [Kill(at, when) for at in range(1, last + 1, every) for when in ("before", "inside", "after")]


def test_a_resumed_run_removes_the_files_of_dead_writers_and_no_others(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    dead = run_dead_process()
    names = {
        f"checkpoints/step-9.safetensors.tmp-{dead}-0123456789ab": False,
        f"summary.json.tmp-{dead}-0123456789ab": False,
        f"summary.json.tmp-{os.getpid()}-0123456789ab": True,
        f"my.tmp-{dead}-notes": True,
        "x.tmp-99999999999999999999-0123456789ab": True,
    }
    for name in names:
        (run / name).write_text("half")
    with hold(run):
        assert {name: (run / name).exists() for name in names} == names


def run_dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("every", EVERY)
def test_a_killed_export_leaves_no_half_folder_and_the_next_one_is_whole(every, trained, tmp_path):
    whole = files(export(trained, tmp_path / "whole" / "demo"))
    struck = 0
    for number, kill in enumerate(kills(tmp_path / "count", ["export", str(trained), f"{tmp_path}/counted"], every)):
        folder = tmp_path / str(number) / "demo"
        struck += run_process(["export", str(trained), str(folder)], kill, package="train") == -signal.SIGKILL
        if folder.exists():
            assert files(folder) == whole
            shutil.rmtree(folder)
        export(trained, folder)
        assert files(folder.parent) == {f"demo/{name}": data for name, data in whole.items()}
    assert struck > 0.9 * number  # the last ones may come after the end


@pytest.mark.parametrize("every", EVERY)
def test_a_killed_report_leaves_the_earlier_page_or_the_new_one(every, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    words = ["report", str(tmp_path / "run")]
    for kill in kills(tmp_path / "count", words, every):
        page = tmp_path / "run" / "report.html"
        new = page.read_bytes()
        page.write_text("earlier")
        assert run_process(words, kill, package="train") in (0, -signal.SIGKILL)
        assert page.read_bytes() in (b"earlier", new)
        assert run_command(command, words) == 0
        assert page.read_bytes() == new
        assert not list((tmp_path / "run").glob("*.tmp-*"))


def error(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_an_export_on_a_full_disk_leaves_nothing_and_the_next_one_is_whole(trained, tmp_path, capsys):
    whole = files(export(trained, tmp_path / "demo"))
    size = sum(map(len, whole.values())) // 1024
    with small_disk(tmp_path / "disk", 4) as disk:
        for part in (0.1, 0.5, 0.95):
            disk.set(f"size={max(4, int(part * size))}k")
            capsys.readouterr()
            assert run_command(command, ["export", str(trained), f"{tmp_path}/disk/demo"]) == 2
            assert "the disk is full; free space" in error(capsys)
            assert files(tmp_path / "disk") == {}
        disk.set(f"size={2 * size + 200}k")
        assert run_command(command, ["export", str(trained), f"{tmp_path}/disk/demo"]) == 0
        assert files(tmp_path / "disk" / "demo") == whole


def test_a_report_on_a_full_disk_keeps_the_earlier_page(trained, tmp_path, capsys):
    size = sum(path.stat().st_size + 4096 for path in trained.rglob("*") if path.is_file()) // 1024
    with small_disk(tmp_path / "disk", 2 * size) as disk:
        run = shutil.copytree(trained, tmp_path / "disk" / "run")
        before = files(run)
        used = shutil.disk_usage(tmp_path / "disk").used // 1024
        disk.set(f"size={used + 4}k")
        capsys.readouterr()
        assert run_command(command, ["report", str(run)]) == 2
        assert "the disk is full; free space" in error(capsys)
        assert files(run) == before
        disk.set(f"size={2 * size}k")
        assert run_command(command, ["report", str(run)]) == 0


def test_a_sweep_on_a_full_disk_ends_in_one_sentence_and_resumes(tmp_path, capsys):
    cache = make_cache(tmp_path / "cache", 12, val_every=4)
    base = {"lm": {"model": "nanochat:d1", "train": True}, "steps": 3, "checkpoint_every": 1, "eval_every": 0}
    experiments = [{"name": "one"}, {"name": "two", "lr": 2e-2}]
    free = make_sweep(tmp_path / "free", cache, "", base, experiments=experiments)
    whole = run_sweep(free)
    checkpoint = max((whole / "one" / "checkpoints").iterdir()).stat().st_size // 1024
    config = tmp_path / "sweep.yaml"
    tree = free.model_dump(mode="json", exclude_unset=True) | {"runs": f"{tmp_path}/disk/runs"}
    config.write_text(json.dumps(tree))
    with small_disk(tmp_path / "disk", 3 * checkpoint) as disk:
        capsys.readouterr()
        assert run_command(command, ["sweep", "--config", str(config)]) == 2
        assert "the disk is full; free space" in error(capsys)
        assert not [path for path in (tmp_path / "disk").rglob("*") if ".tmp-" in path.name]
        kept = {name: data for name, data in files(tmp_path / "disk").items() if "checkpoints/" in name}
        assert kept
        disk.set(f"size={20 * checkpoint + 4000}k")
        assert run_command(command, ["sweep", "--resume", f"{tmp_path}/disk/runs/sweep"]) == 0
        assert {name: files(tmp_path / "disk").get(name, data) for name, data in kept.items()} == kept
        folder = tmp_path / "disk" / "runs" / "sweep"
        for name in ("one", "two"):
            same_run(folder / name, whole / name)
