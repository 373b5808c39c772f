"""Caches pushed to ModelScope and pulled back; the hub's library runs in a process of its own, the hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_cache import make_cache
from tiny_modelscope import ModelScope, serve_modelscope

NAME = "someone/features"
URL = f"modelscope://datasets/{NAME}"
LICENCE = ["--licence", "cc-by-4.0", "--yes"]
PROGRAM = """
import json, sys
from shards.remote import client as storage
from shards.__main__ import main
from shards.errors import run_command

storage.BACKOFF = (0.01,) * 3
if sys.argv[2]:
    sys.modules[sys.argv[2]] = None
for words in json.loads(sys.argv[1]):
    print("STATUS", run_command(main, words), flush=True)
"""


def client(hub: ModelScope, home: Path, *commands: list[str], without: str = "") -> tuple[list[int], str]:
    """Exit statuses of ``python -m shards`` commands, and what they printed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MODELSCOPE_")}
    environment = {
        **clean,
        "MODELSCOPE_ENDPOINT": hub.url,
        "MODELSCOPE_API_TOKEN": "ms-token",
        "MODELSCOPE_CACHE": str(home / "ms"),
        "EARSHARD_CACHE": str(home / "mirrors"),
        "HOME": str(home),
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    program = [sys.executable, "-c", PROGRAM, json.dumps(commands), without]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = done.stdout + done.stderr
    return [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("STATUS")], told


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def near(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("near") / "cache", n=12, shards=4, seed=3)


def test_a_cache_goes_to_modelscope_and_comes_back_whole(near, tmp_path):
    before = contents(near)
    with serve_modelscope(NAME, {}) as hub:
        push = ["push", str(near), URL, *LICENCE]
        commands = [push, ["verify", URL, "--deep"], ["head", URL, "--n", "1"], ["pull", URL, str(tmp_path / "back")]]
        statuses, told = client(hub, tmp_path, *commands, push)
    assert statuses == [0] * 5, told
    assert contents(tmp_path / "back") == before == contents(near)  # nothing of the hub's library is left in it
    files = hub.revisions["master"]
    assert {name: data for name, data in files.items() if name != "README.md"} == before
    assert f'data = shards.open("{URL}")' in files["README.md"].decode()
    last = ["CACHE.json", "README.md", "labels/LABELS.json"]
    assert sorted(hub.commits[-1]) == sorted(hub.commits[-2]) == last  # the second push sends no feature again
    assert not {*last} & {name for commit in hub.commits[:-2] for name in commit}
    there: set[str] = set()
    for commit in hub.commits:  # a record is never there before its files
        there.update(commit)
        records = [name for name in commit if name.startswith("shards/") and name.endswith(".json")]
        assert {name.replace(".json", ".tar") for name in records} <= there
    assert {authorization for _, authorization in hub.writes} == {"Bearer ms-token"}


def test_two_folders_of_a_dataset_on_modelscope_have_one_card_at_the_root(near, tmp_path):
    other = make_cache(tmp_path / "other", n=4, shards=1, seed=9)
    pushes = [["push", str(near), f"{URL}/a", *LICENCE], ["push", str(other), f"{URL}/more/b", *LICENCE]]
    with serve_modelscope(NAME, {}) as hub:
        hub.redirects = True
        statuses, told = client(hub, tmp_path, *pushes, ["pull", f"{URL}/more/b", str(tmp_path / "back")])
    assert statuses == [0, 0, 0], told
    assert {*hub.store} == {""}  # the token stays with the hub
    text = hub.revisions["master"]["README.md"].decode()
    assert "| [`a`](a/README.md) |" in text
    assert "| [`more/b`](more/b/README.md) |" in text
    assert f'shards.open("{URL}/a")' in text
    assert contents(tmp_path / "back") == contents(other)


def test_what_would_become_public_on_modelscope_is_asked_and_private_means_private(near, tmp_path):
    push, licence = ["push", str(near), URL], LICENCE[:2]
    with serve_modelscope(NAME, {}) as hub:
        statuses, told = client(hub, tmp_path, [*push, "--dry-run"], [*push, *licence], push)
        assert not hub.writes
        private = client(hub, tmp_path, [*push, *licence, "--private"])
        assert (private[0], hub.visibility) == ([0], 1), private[1]
    assert statuses == [0, 2, 2]
    assert f"would push to {URL}, a public repository:" in told
    assert "would become public: add --yes to publish it" in told
    assert "add --licence" in told


def test_a_public_dataset_of_modelscope_takes_no_private_push(near, tmp_path):
    with serve_modelscope(NAME, {"master": {"README.md": b"mine"}}) as hub:
        statuses, told = client(hub, tmp_path, ["push", str(near), f"{URL}/a", *LICENCE[:2], "--private"])
    assert statuses == [2]
    assert "is already public: make it private on the hub" in told
    assert not hub.commits


def test_what_modelscope_refuses_and_a_missing_library_are_one_sentence(near, tmp_path):
    words = ["push", str(near), URL, *LICENCE]
    with serve_modelscope(NAME, {}) as hub:
        hub.refuse = True
        statuses, told = client(hub, tmp_path, words, ["pull", URL, str(tmp_path / "x")], ["pull", f"{URL}@v/", "y"])
        assert statuses == [2, 2, 2], told
        assert f"error: the hub rejected '{URL}' (" in told
        assert "check `modelscope login`, permissions and connection" in told
        assert f"'{URL}/CACHE.json' does not exist" in told
        statuses, told = client(hub, tmp_path, words, ["pull", "modelscope://x", "y"], without="modelscope_hub")
    assert statuses == [2, 2]
    assert "needs the package modelscope_hub: run `python -m pip install modelscope-hub`" in told
    assert "is not a dataset URL: write modelscope://datasets/OWNER/NAME" in told
    assert "Traceback" not in told
