"""Caches pushed to a hub and to a filesystem, and pulled back; the hub's client runs in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import yaml
from tiny_cache import make_cache
from tiny_hub import serve_hub
from tiny_server import serve

from shards.__main__ import main
from shards.errors import UserError, WorkFailed, run_command
from shards.format.layout import Layout
from shards.format.records import RELEASED, seal, unseal
from shards.inspect.verify import verify
from shards.remote import client as storage
from shards.share.transfer import pull, push

PROGRAM = """
import json, sys
from shards.remote import client as storage
from shards.__main__ import main
from shards.errors import run_command

storage.BACKOFF = (0.01,) * 3
for words in json.loads(sys.argv[1]):
    print("STATUS", run_command(main, words), flush=True)
"""
NAME = "someone/features"
URL = f"hf://datasets/{NAME}"
LICENCE = ["--licence", "cc-by-4.0"]


@pytest.fixture(scope="module")
def near(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("near") / "cache", n=12, shards=4, seed=3)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(storage, "BACKOFF", (0.01,) * 3)


def client(endpoint: str, home: Path, *commands: list[str], xet: bool = False) -> tuple[list[int], str]:
    """Exit statuses of ``python -m shards`` commands whose hub is at ``endpoint``, and what they printed."""
    env = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "0" if xet else "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_token",
        "HF_HOME": str(home),
        "EARSHARD_CACHE": str(home / "mirrors"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    program = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("STATUS")], (
        done.stdout + done.stderr
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("xet", [True, False])
def test_a_cache_goes_to_a_hub_and_comes_back_whole(near, tmp_path, xet):
    before = contents(near)
    with serve_hub(NAME, {}) as hub:
        hub.xet, hub.senders = tmp_path / "xet" if xet else None, near
        statuses, told = client(
            hub.url,
            tmp_path,
            ["push", str(near), URL, *LICENCE],
            ["verify", URL, "--deep"],
            ["head", URL, "--n", "1"],
            ["pull", URL, str(tmp_path / "back")],
            xet=xet,
        )
    assert statuses == [0, 0, 0, 0], told
    assert contents(tmp_path / "back") == contents(near)
    assert {name: data for name, data in hub.files.items() if name != "README.md"} == contents(near)
    assert contents(near) == before  # nothing of the hub's library is left in it
    assert any(line.startswith("PUT") for line in hub.requests) is not xet
    assert hub.commits[-1] == ["CACHE.json", "README.md"]
    assert not any("CACHE.json" in commit for commit in hub.commits[:-1])
    there: set[str] = set()
    for commit in hub.commits:  # a record is never there before its files
        there.update(commit)
        for name in commit:
            if name.startswith("shards/") and name.endswith(".json"):
                assert {name.replace(".json", ".tar"), name.replace(".json", ".parquet")} <= there


def test_the_card_says_what_the_features_are_and_how_to_open_them(near, tmp_path):
    with serve_hub(NAME, {}) as hub:
        statuses, told = client(hub.url, tmp_path, ["push", str(near), f"{URL}/layer 4", *LICENCE])
    assert statuses == [0], told
    _, header, text = hub.files["layer 4/README.md"].decode().split("---\n", 2)
    about = yaml.safe_load(header)
    assert about["license"] == "cc-by-4.0"
    assert about["configs"] == [{"config_name": "default", "data_files": "layer 4/shards/*.tar"}]
    assert "| utterances | 12 of 12 planned (0 failed) |" in text
    assert f'data = shards.open("{URL}/layer 4")' in text
    assert f"{NAME}/resolve/main/layer 4/shards/{{000000..000003}}.tar" in text
    info = json.loads((near / "CACHE.json").read_text())
    assert info["feature_id"] in text
    assert json.loads(text.split("```json\n")[1].split("```")[0]) == info["spec"]


@pytest.mark.parametrize("xet", [True, False])
def test_a_push_that_was_stopped_resumes_where_it_was(near, tmp_path, xet):
    push, pull = ["push", str(near), URL, *LICENCE], ["pull", URL, str(tmp_path / "x")]
    with serve_hub(NAME, {}) as hub:
        hub.xet, hub.senders = tmp_path / "xet" if xet else None, near
        hub.fail_at = 1
        statuses, told = client(hub.url, tmp_path, push, pull, xet=xet)
        assert statuses == [2, 2], told
        assert "error: the hub rejected" in told
        assert f"'{URL}/CACHE.json' does not exist" in told
        hub.fail_at = None
        statuses, told = client(hub.url, tmp_path, push, push, xet=xet)
        assert statuses == [0, 0], told
    uploads = [line for line in hub.requests if line.startswith("PUT")]
    assert len(uploads) == len(set(uploads))
    assert sorted(name for commit in hub.commits for name in commit) == sorted([*contents(near), "README.md"])


def test_a_hub_push_names_its_licence_a_dataset_and_no_place_of_another_cache(near, tmp_path):
    other = make_cache(tmp_path / "other", n=4, shards=1, seed=9)
    with serve_hub(NAME, {}) as hub:
        statuses, told = client(
            hub.url,
            tmp_path,
            ["push", str(near), URL],
            ["push", str(near), "hf://models/x", *LICENCE],
            ["push", str(near), "hf://datasets/other/features", *LICENCE],
            ["push", str(near), URL, *LICENCE],
            ["push", str(other), URL, *LICENCE],
        )
    assert statuses == [2, 2, 2, 0, 2]
    assert "add --licence" in told
    assert "is not a dataset URL: write hf://datasets/OWNER/NAME" in told
    assert "You don't have the rights" in told
    assert "another cache exists at" in told


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/exchange", recursive=True) if files.exists("/exchange") else None


def test_a_cache_goes_to_any_filesystem_that_fsspec_writes_and_is_resumed(near, tmp_path, memory):
    url = "memory://exchange/cache"
    push(near, url)
    assert verify(url, deep=True) == []
    memory.rm("/exchange/cache/CACHE.json")
    memory.rm("/exchange/cache/shards/000002.json")
    memory.pipe("/exchange/cache/shards/000002.tar", b"half")
    push(near, url)
    assert verify(url, deep=True) == []
    pull(url, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(near)
    memory.pipe("/exchange/cache/CACHE.json", RELEASED)  # of an extraction that gave up
    push(near, url)
    assert verify(url, deep=True) == []
    memory.pipe("/exchange/cache/CACHE.json", b'{"claim":"somebody"}')
    with pytest.raises(UserError, match="an extraction is running at 'memory://exchange/cache'"):
        push(near, url)
    memory.pipe("/exchange/cache/CACHE.json", Layout(near).cache.read_bytes())
    with pytest.raises(UserError, match="another cache exists at 'memory://exchange/cache'"):
        push(make_cache(tmp_path / "other", n=4, shards=1, seed=9), url)


def test_a_push_names_the_places_of_this_machine_that_it_publishes_and_sends_every_byte(near, tmp_path, memory, capsys):
    cache = Path(shutil.copytree(near, tmp_path / "cache"))
    assert run_command(main, ["push", str(cache), "memory://exchange/open"]) == 0
    assert "paths of this machine" not in capsys.readouterr().err
    tree = unseal(Layout(cache).cache)
    tree["provenance"] = {
        "source": {"name": "mine", "root": "/home/ann/secret corpus"},
        "encoder": {"reference": "path:~/models/whisper", "hub": "hf://openai/whisper-base"},
        "config": {"root": "caches", "encoder": {"model": ["wheel:whisper-base", "path:/opt/whisper"]}},
    }
    Layout(cache).cache.write_bytes(seal(tree))
    assert run_command(main, ["push", str(cache), "memory://exchange/mine"]) == 0
    told = next(line for line in capsys.readouterr().err.splitlines() if "paths of this machine" in line)
    assert told.endswith(
        "config.encoder.model 'path:/opt/whisper', encoder.reference 'path:~/models/whisper', "
        "source.root '/home/ann/secret corpus'"
    )
    pull("memory://exchange/mine", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(cache)


def test_a_pull_over_a_bad_line_continues_where_it_was_cut(near, tmp_path):
    with serve(near) as server:
        server.faults["000001.tar"] = ["cut", "corrupt", "503"]
        server.faults["manifest.parquet"] = ["truncated"]
        pull(server.url, tmp_path / "back")
        asked = server.count("000003.tar")
        (tmp_path / "back" / "CACHE.json").unlink()
        (tmp_path / "back" / "shards" / "000001.tar").unlink()
        pull(server.url, tmp_path / "back")
        assert server.count("000003.tar") == asked
    assert contents(tmp_path / "back") == contents(near)


def test_a_pull_removes_what_does_not_verify_and_the_next_one_fetches_it(near, tmp_path):
    back = tmp_path / "back"
    with serve(near) as server:
        pull(server.url, back)
        tar = Layout(back).tar(2)
        tar.write_bytes(bytes(tar.stat().st_size))
        with pytest.raises(WorkFailed, match=r"is not valid: shards/000002.tar"):
            pull(server.url, back)
        assert not tar.exists()
        pull(server.url, back)
    assert contents(back) == contents(near)


def test_what_cannot_be_pushed_or_pulled_is_reported_in_a_sentence(near, tmp_path):
    whole, served = (Path(shutil.copytree(near, tmp_path / name)) for name in ("cache", "served"))
    with serve(served) as server:
        with pytest.raises(UserError, match="is not writable: use hf://"):
            push(near, server.url)
        with pytest.raises(UserError, match=r"'.*/nothing/CACHE.json' does not exist"):
            pull(f"{server.url}/nothing", tmp_path / "x")
        with pytest.raises(UserError, match="contains another cache"):
            pull(server.url, make_cache(tmp_path / "other", n=4, shards=1))
        (served / "CACHE.json").write_text("{}")
        with pytest.raises(UserError, match=r"CACHE.json' could not be fetched .* does not match its own sha256"):
            pull(server.url, tmp_path / "y")
        (served / "CACHE.json").write_bytes(seal({"files": {}}))
        with pytest.raises(UserError, match=r"has a CACHE\.json of another format"):
            pull(server.url, tmp_path / "y")
    assert not (tmp_path / "y" / "CACHE.json").exists()
    Layout(whole).tar(1).unlink()
    with pytest.raises(WorkFailed, match=r"is not valid: shards/000001.tar is missing"):
        push(whole, "memory://exchange/cache")
    Layout(whole).cache.unlink()
    with pytest.raises(UserError, match="is not a complete cache"):
        push(whole, "memory://exchange/cache")


def test_a_record_that_comes_corrupt_is_fetched_again(near, tmp_path):
    with serve(near) as server:
        server.faults["000002.json"] = ["corrupt"]
        pull(server.url, tmp_path / "back")
        assert server.count("000002.json") == 2
    assert contents(tmp_path / "back") == contents(near)


def test_a_cache_that_names_other_files_writes_none_of_them(near, tmp_path):
    served = Path(shutil.copytree(near, tmp_path / "served" / "some" / "cache"))
    tree = unseal(Layout(served).cache)
    tree["files"]["../../evil"] = tree["files"]["failures.parquet"]
    Layout(served).cache.write_bytes(seal(tree))
    (tmp_path / "served" / "evil").write_bytes(Layout(served).failures.read_bytes())
    with serve(tmp_path / "served") as server:
        pull(f"{server.url}/some/cache", tmp_path / "a" / "b" / "back")
        assert server.count("evil") == 0
    assert not list((tmp_path / "a").rglob("evil"))


def test_a_cache_that_lacks_a_record_where_it_is_is_not_pulled(near, tmp_path):
    served = Path(shutil.copytree(near, tmp_path / "served"))
    Layout(served).record(1).unlink()
    with serve(served) as server, pytest.raises(UserError, match=r"'.*/shards/000001.json' does not exist"):
        pull(server.url, tmp_path / "back")
    assert not (tmp_path / "back" / "CACHE.json").exists()


def test_a_write_that_fails_for_a_moment_is_tried_again(near, memory, monkeypatch):
    real, troubles = type(memory).put_file, [OSError("the line broke"), TimeoutError()]

    def put_file(self, *args, **kwargs):
        if troubles:
            raise troubles.pop()
        real(self, *args, **kwargs)

    monkeypatch.setattr(type(memory), "put_file", put_file)
    seen: list[tuple[int, int]] = []
    push(near, "memory://exchange/cache", None, lambda *step: seen.append(step))
    assert not troubles
    assert verify("memory://exchange/cache", deep=True) == []
    assert seen[-1][0] == seen[-1][1] == sum(path.stat().st_size for path in near.rglob("*.*"))


def test_a_write_that_is_not_allowed_is_reported_at_once(near, memory, monkeypatch):
    asked: list[str] = []

    def put_file(self, path, target, **kwargs):
        asked.append(target)
        raise PermissionError("this key may only read")

    monkeypatch.setattr(type(memory), "put_file", put_file)
    with pytest.raises(UserError, match="this key may only read"):
        push(near, "memory://exchange/cache")
    assert len(asked) == len(set(asked)) > 0


def test_an_error_page_does_not_keep_its_connection(near):
    """Thousands of answers "not there" in a row, as for shards that are not made yet, take no thousands of sockets."""
    with serve(near) as server, pytest.raises(FileNotFoundError) as caught:
        next(storage.Remote(f"{server.url}/nothing").stream("CACHE.json", 0, 9))
    assert caught.value.__context__.closed
