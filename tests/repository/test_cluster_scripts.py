"""The scripts of ``configs/cluster/``, run as far as one machine can: stubs stand for srun, scontrol and ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from extraction import run, snapshot, words
from tiny_cache import make_cache
from tiny_run import losses, make_config, write_config

from train.trainer.fit import fit

CLUSTER = Path(__file__).parent.parent.parent / "configs" / "cluster"
SECONDS = 300
# what a cluster gives the scripts, on this machine: srun starts its command once a node, a job of Ray runs at once
STUBS = {
    "srun": 'for i in $(seq "${SLURM_NNODES:-1}"); do "$@" & ids="$ids $!"; done; for id in $ids; do wait "$id"; done',
    "scontrol": '[ "$*" = "show hostnames n[1-2]" ] && echo localhost && sleep 0.3 && echo elsewhere',
    "ray": 'while [ "$1" != "--" ]; do shift; done; shift; exec "$@"',
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, corpus, whisper) -> Path:
    root = tmp_path_factory.mktemp("alone")
    assert run(words(root, corpus, whisper)) == 0
    return root


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bin")
    for name, text in STUBS.items():
        (folder / name).write_text(f"#!/bin/bash\nset -e\n{text}\n")
        (folder / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "JOB_", "RAY_"))}
    return {**kept, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": sys.executable}


def script(name: str, argv: list[str], environment: dict[str, str], **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(CLUSTER / name), *argv],
        env={**environment, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, out
    return out


def extraction(folder: Path, root: Path, corpus: Path, whisper: Path) -> list[str]:
    """A configuration file, and the words that make it the extraction of :func:`words`."""
    (folder / "extract.yaml").write_text("source: {kind: manifest}\n")
    return [str(folder / "extract.yaml"), *words(root, corpus, whisper)[1:]]


@pytest.mark.parametrize("path", sorted(CLUSTER.iterdir()), ids=lambda path: path.name)
def test_every_file_is_well_formed_and_says_how_to_start_it(path):
    text = path.read_text()
    assert f"configs/cluster/{path.name}" in text
    if path.suffix == ".sh":
        subprocess.run(["bash", "-n", str(path)], check=True)
        assert text.startswith("#!/bin/bash\n")
        assert "\nset -euo pipefail\n" in text
    else:
        assert list(yaml.safe_load_all(text))


def test_a_slurm_task_takes_its_index_from_the_array_and_leaves_the_whole_cache(
    tmp_path, corpus, whisper, alone, environment
):
    argv = extraction(tmp_path, tmp_path / "root", corpus, whisper)
    slurm = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_COUNT": "2"}
    finish(script("slurm-extract.sh", argv, environment, **slurm))
    assert snapshot(tmp_path / "root") == snapshot(alone)
    bad = script("slurm-extract.sh", argv, environment, **{**slurm, "SLURM_ARRAY_TASK_ID": "?"})
    assert "SLURM_ARRAY_TASK_ID: expected a non-negative integer, got '?'" in bad.communicate(timeout=SECONDS)[0]
    assert bad.returncode == 2


@pytest.mark.slow
def test_a_slurm_array_of_three_tasks_makes_each_shard_once(tmp_path, corpus, whisper, alone, environment):
    argv = extraction(tmp_path, tmp_path / "root", corpus, whisper)
    tasks = [
        script(
            "slurm-extract.sh",
            argv,
            environment,
            SLURM_ARRAY_TASK_ID=str(i),
            SLURM_ARRAY_TASK_MIN="0",
            SLURM_ARRAY_TASK_COUNT="3",
        )
        for i in range(3)
    ]
    said = [finish(task) for task in tasks]
    assert snapshot(tmp_path / "root") == snapshot(alone)
    made = [int(line.split()[1]) for out in said for line in out.splitlines() if line.startswith("extracted ")]
    assert sum(made) == 24


def test_the_indexed_job_is_one_that_kubernetes_would_run_with_matching_numbers():
    config, job = yaml.safe_load_all((CLUSTER / "kubernetes-extract.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert (job["apiVersion"], job["kind"], job["spec"]["completionMode"]) == ("batch/v1", "Job", "Indexed")
    assert int(container["args"][container["args"].index("--num-workers") + 1]) == job["spec"]["completions"]
    volumes = {volume["name"]: volume for volume in job["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert yaml.safe_load(config["data"]["extract.yaml"])["encoder"]["dtype"] != "auto"  # pods of unlike nodes agree
    assert volumes["config"]["configMap"]["name"] == config["metadata"]["name"]
    assert all(isinstance(word, str) for word in container["command"] + container["args"])


@pytest.mark.slow
def test_the_pods_of_the_indexed_job_leave_the_whole_cache(tmp_path, corpus, whisper, alone, environment):
    config, job = yaml.safe_load_all((CLUSTER / "kubernetes-extract.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    for name, text in config["data"].items():
        (tmp_path / name).write_text(text)
    argv = [word.replace("/config/", f"{tmp_path}/") for word in container["command"] + container["args"]]
    ours = [f"root={tmp_path}/root", "source={kind: manifest}", *words(tmp_path / "root", corpus, whisper)[2:]]
    pods = [
        subprocess.Popen([sys.executable, *argv[1:], *ours], env={**environment, "JOB_COMPLETION_INDEX": str(index)})
        for index in (0, 5)  # the others come later, or never
    ]
    assert [pod.wait(SECONDS) for pod in pods] == [0, 0]
    assert snapshot(tmp_path / "root") == snapshot(alone)


@pytest.mark.slow
def test_the_ray_job_is_the_driver(tmp_path, corpus, whisper, alone, environment):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False)
    try:
        address = ray.get_runtime_context().gcs_address
        argv = extraction(tmp_path, tmp_path / "root", corpus, whisper)
        token = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}
        out = finish(script("ray-job.sh", [*argv, "--actor-cpus", "1"], environment, **token, RAY_ADDRESS=address))
    finally:
        ray.shutdown()
    assert "extracted 24 utterances" in out
    assert snapshot(tmp_path / "root") == snapshot(alone)


@pytest.mark.slow
def test_two_nodes_of_slurm_train_the_run_of_one_process_and_a_requeued_job_goes_on(tmp_path, environment):
    cache = make_cache(tmp_path / "cache", 12, val_every=4)
    keys: dict[str, Any] = {
        "batch": {"size": 2},
        "lm": {"model": "nanochat:d1", "train": True},
        "lr": 3e-3,
        "projector": {"kind": "mlp", "norm": "rms"},
        "eval_every": 0,
        "checkpoint_every": 4,
    }
    config = make_config(tmp_path, cache, "", **keys)
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "RUNS": str(tmp_path / "runs"),
    }
    file = write_config(tmp_path / "train.yaml", config)
    finish(script("slurm-train.sh", [str(file), "name=run"], environment, **slurm))
    whole = fit(config.model_copy(update={"name": "alone"}))
    assert losses(tmp_path / "runs" / "run") == pytest.approx(losses(whole), rel=1e-5)
    again = script("slurm-train.sh", [str(file), "name=run"], environment, **slurm)
    assert "is finished: evaluate it with" in again.communicate(timeout=SECONDS)[0]  # it tried to resume that run
