"""Caches pushed to a hub and to a filesystem, and pulled back; the hub's client runs in a process of its own."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import obstore
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tiny_cache import grow, make_cache
from tiny_faults import reseal
from tiny_hub import COMMIT, serve_hub
from tiny_objects import MemoryObjects
from tiny_objects import memory as objects_in_memory
from tiny_server import serve

from shards.__main__ import main, parser
from shards.commit.finalize import file_info
from shards.commit.folder import add_labels
from shards.errors import UserError, WorkFailed, run_command
from shards.format.layout import Layout
from shards.format.records import RELEASED, seal, unseal
from shards.inspect.verify import verify
from shards.labels.store import read_index
from shards.read.cache import Cache
from shards.remote import client as storage
from shards.share import transfer
from shards.share.dataset_card import LIST_MARK
from shards.share.publish import is_agreed
from shards.share.transfer import describe_push, pull, push

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
LICENCE = ["--licence", "cc-by-4.0", "--yes"]


@pytest.fixture(scope="module")
def near(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("near") / "cache", n=12, shards=4, seed=3)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "BACKOFF", (0.01,) * 3)
    monkeypatch.setenv("EARSHARD_CACHE", str(tmp_path / "mirrors"))


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


def labels_file(cache: Path) -> str:
    """The name of the file of the newest label set."""
    return read_index(cache).sets[-1].file.name


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
    assert hub.commits[-1] == ["labels/LABELS.json", "CACHE.json", "README.md"]
    assert hub.parents[-1] == COMMIT
    assert not any({"CACHE.json", "labels/LABELS.json"} & {*commit} for commit in hub.commits[:-1])
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
    assert "| label sets | `source` (12 rows) |" in text
    assert "| generations | 1 |" in text
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


def test_a_dry_run_tells_what_a_push_would_publish_and_sends_nothing(near, tmp_path):
    with serve_hub(NAME, {}) as hub:
        statuses, told = client(hub.url, tmp_path, ["push", str(near), URL, "--dry-run"])
    assert statuses == [0], told
    assert hub.requests == []
    files = contents(near)
    lines = [line.split(maxsplit=1) for line in told.splitlines() if line.startswith("  ")]
    facts = {" ".join(words[:-1]): words[-1] for words in lines if len(words) == 2}
    assert facts["files"] == f"{len(files):,}"
    assert facts["bytes"] == f"{sum(map(len, files.values())):,}"
    assert facts["utterances"] == "12"
    assert facts["texts"].startswith("12 ")
    assert facts["speakers"] == f"{len({*Cache.open(near).strings('speaker', range(12))} - {''})}"
    assert "local paths" in told


def test_nothing_becomes_public_before_a_yes(near, tmp_path, monkeypatch, capsys):
    with serve_hub(NAME, {}) as hub:
        statuses, told = client(hub.url, tmp_path, ["push", str(near), URL, *LICENCE[:2]])
    assert statuses == [2]
    assert hub.requests == []
    assert "would become public: add --yes to publish it, --private for a private repository" in told
    args = parser().parse_args(["push", str(near), URL])
    for answer, agreed in (("y\n", True), ("\n", False), ("", False)):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        if agreed:
            assert is_agreed(args, URL, describe_push(near))
        else:
            with pytest.raises(UserError, match="nothing was published"):
                is_agreed(args, URL, describe_push(near))
    assert "Anyone can then download it. Publish? [y/N]" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_private_push_makes_a_private_repository_and_refuses_a_public_one(near, tmp_path):
    words = ["push", str(near), URL, "--licence", "cc-by-4.0", "--private"]
    with serve_hub(NAME, {}) as hub:
        statuses, told = client(hub.url, tmp_path, words)
        assert (statuses, hub.private) == ([0], True), told
    with serve_hub(NAME, {"README.md": b"mine"}) as hub:
        statuses, told = client(hub.url, tmp_path / "again", words, [*words[:2], "memory://x/y", "--private"])
    assert statuses == [2, 2]
    assert "is already public: make it private on the hub" in told
    assert "--private is for repositories of a hub" in told
    assert hub.commits == []


def test_the_card_at_the_root_lists_the_caches_of_all_folders_unless_somebody_wrote_another(near, tmp_path):
    other = make_cache(tmp_path / "other", n=4, shards=1, seed=9)
    pushes = [["push", str(near), f"{URL}/layer 4", *LICENCE], ["push", str(other), f"{URL}/more/b", *LICENCE]]
    with serve_hub(NAME, {}) as hub:
        statuses, told = client(hub.url, tmp_path, *pushes)
        assert statuses == [0, 0], told
        _, header, text = hub.files["README.md"].decode().split("---\n", 2)
        assert yaml.safe_load(header)["configs"] == [
            {"config_name": "layer-4", "data_files": "layer 4/shards/*.tar"},
            {"config_name": "more-b", "data_files": "more/b/shards/*.tar"},
        ]
        for folder, link in (("layer 4", "layer%204"), ("more/b", "more/b")):
            assert f"| [`{folder}`]({link}/README.md) |" in text
        hub.files["README.md"] = b"# written by hand"
        assert client(hub.url, tmp_path, pushes[0])[0] == [0]
        assert hub.files["README.md"] == b"# written by hand"


@pytest.mark.slow
def test_the_card_of_a_cache_at_the_root_also_lists_the_caches_in_folders_whichever_was_first(near, tmp_path):
    other = make_cache(tmp_path / "other", n=4, shards=1, seed=9)
    root, below = ["push", str(near), URL, *LICENCE], ["push", str(other), f"{URL}/default", *LICENCE]

    def sections(hub) -> tuple[dict, str, str]:
        _, header, text = hub.files["README.md"].decode().split("---\n", 2)
        return yaml.safe_load(header), *text.split(LIST_MARK)

    with serve_hub(NAME, {}) as hub:
        statuses, told = client(hub.url, tmp_path, root, below)
        assert statuses == [0, 0], told
        header, of_root, listed = sections(hub)
        assert header["configs"] == [
            {"config_name": "default", "data_files": "shards/*.tar"},
            {"config_name": "default-", "data_files": "default/shards/*.tar"},
        ]
        assert "| utterances | 12 of 12 planned (0 failed) |" in of_root
        assert "| [`default`](default/README.md) |" in listed
        edited = hub.files["README.md"].replace(b"## License", b"## Thanks\n\n## License")
        hub.files["README.md"] = edited
        assert client(hub.url, tmp_path, below)[0] == [0]
        assert hub.files["README.md"] == edited  # listed once, and what a person added stays
        hub.files["README.md"] = b"# written by hand"
        assert client(hub.url, tmp_path, below)[0] == [0]
        assert hub.files["README.md"] == b"# written by hand"
    with serve_hub(NAME, {}) as hub:
        statuses, told = client(hub.url, tmp_path / "again", below, root)
        assert statuses == [0, 0], told
        assert sections(hub) == (header, of_root, listed)


def test_a_cache_is_pulled_from_a_folder(near, tmp_path, capsys):
    assert run_command(main, ["pull", str(near), str(tmp_path / "a copy")]) == 0
    assert contents(tmp_path / "a copy") == contents(near)
    assert run_command(main, ["pull", str(tmp_path / "nothing"), str(tmp_path / "b")]) == 2
    assert "does not exist" in capsys.readouterr().err


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


@pytest.fixture
def states(near, tmp_path) -> tuple[Path, Path]:
    """A cache, and the same after it has grown by two shards and a label set."""
    old = Path(shutil.copytree(near, tmp_path / "old"))
    new = Path(shutil.copytree(near, tmp_path / "new"))
    grow(new, n=6, shards=2, utt_00003="another recording")
    return old, new


def test_a_grown_cache_is_pushed_onto_its_earlier_state_and_only_the_new_is_sent(states, memory, monkeypatch, tmp_path):
    (old, new), url = states, "memory://exchange/cache"
    push(old, url)
    real, sent = type(memory).put_file, []

    def put_file(self, path, target, **kwargs):
        sent.append(target.partition("exchange/cache/")[2])
        assert verify(url) == []  # at any time, readers find the earlier state whole
        real(self, path, target, **kwargs)

    monkeypatch.setattr(type(memory), "put_file", put_file)
    push(new, url)
    assert set(sent) == {name for name, data in contents(new).items() if contents(old).get(name) != data}
    assert sent[-1] == "CACHE.json"
    sent.clear()
    push(new, url)
    assert sent == []
    pull(url, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(new)
    with pytest.raises(UserError, match=r"has 2 generations of this cache, '.*old' only 1: pull it first"):
        push(old, url)


def test_a_push_of_a_grown_cache_that_was_stopped_resumes(states, memory, monkeypatch):
    (old, new), url = states, "memory://exchange/cache"
    push(old, url)
    real, left = type(memory).put_file, [9]

    def put_file(self, *args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise PermissionError("the key has expired")
        real(self, *args, **kwargs)

    for number in (9, 3, 1, 0):
        left[0] = number
        monkeypatch.setattr(type(memory), "put_file", put_file)
        with pytest.raises(UserError, match="the key has expired"):
            push(new, url)
        assert [problem.file for problem in verify(url)] == []
    monkeypatch.undo()
    monkeypatch.setattr(storage, "BACKOFF", (0.01,) * 3)
    push(new, url)
    assert len(Cache.open(new)) == len(Cache.open(url)) == 18


def test_a_cache_that_grew_in_another_way_is_not_pushed_over(states, memory, tmp_path):
    (old, new), url = states, "memory://exchange/cache"
    other = Path(shutil.copytree(old, tmp_path / "other"))
    grow(other, n=5, shards=2, prefix="other")
    push(old, url)
    memory.put_file(str(Layout(other).plan(1)), "/exchange/cache/plans/001.parquet")  # its extraction is under way
    with pytest.raises(UserError, match="another extraction extends the cache at 'memory://exchange/cache'"):
        push(new, url)
    push(other, url)
    with pytest.raises(UserError, match="another cache exists at"):
        push(new, url)
    assert len(Cache.open(url)) == 17


def test_label_sets_of_both_sides_survive_a_push_and_a_pull(states, memory, tmp_path):
    (old, _), url = states, "memory://exchange/cache"
    push(old, url)
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    for folder in (theirs, mine):
        pull(url, folder)
    for text, name, folder in (("red", "theirs", theirs), ("blue", "mine", mine)):
        add_labels(Layout(folder), pa.table({"key": ["utt-00001"], "text": [text]}), name, "test")
    grow(theirs)
    push(theirs, url)
    pull(url, mine)
    push(mine, url)
    for where in (url, mine):
        assert verify(where, deep=True) == []
        assert [Cache.open(where, name).strings("text", [0]) for name in ("theirs", "mine")] == [["red"], ["blue"]]
        assert len(Cache.open(where)) == 18
    add_labels(Layout(theirs), pa.table({"key": ["utt-00001"], "text": ["green"]}), "mine", "test")
    for attempt in (lambda: push(theirs, url), lambda: pull(url, theirs)):
        with pytest.raises(UserError, match="have different label sets named 'mine'"):
            attempt()
    assert Cache.open(theirs, "mine").strings("text", [0]) == ["green"]


def test_a_set_that_both_sides_wrote_with_other_bytes_keeps_its_file_on_each(states, memory):
    """Another version of pyarrow writes other bytes for the same rows."""
    (old, _), url = states, "memory://exchange/cache"
    push(old, url)
    entry = read_index(old).sets[0]
    path = old / "labels" / entry.file.name
    pq.write_table(pq.read_table(path), path, compression="none", store_schema=False)
    about = file_info(path).model_dump()
    reseal(old / "labels" / "LABELS.json", lambda tree: tree["sets"][0]["file"].update(about))
    before = contents(old)
    push(old, url)
    pull(url, old)
    assert contents(old) == before
    assert verify(url, deep=True) == verify(old, deep=True) == []


def test_a_set_that_is_current_on_one_side_alone_is_the_current_one_after_a_transfer(states, memory):
    (old, new), url = states, "memory://exchange/cache"
    push(new, url)
    before = Cache.open(new).labels.id
    assert Cache.open(old).labels.id != before
    pull(url, old)
    assert Cache.open(old).labels.id == before
    assert contents(old) == contents(new)


def test_a_grown_cache_is_pulled_into_its_earlier_copy_and_only_what_is_new_is_fetched(states):
    old, new = states
    with serve(new) as server:
        pull(server.url, old)
        asked = {name for name, _ in server.asked if name.endswith((".tar", ".parquet"))}
    assert contents(old) == contents(new)
    names = {f"shards/{shard:06d}.{kind}" for shard in (4, 5) for kind in ("tar", "parquet")}
    tables = {f"{kind}/001.parquet" for kind in ("plans", "manifests", "failures")}
    assert asked == {*names, *tables, f"labels/{labels_file(new)}"}


def test_a_pull_that_does_not_verify_leaves_the_earlier_copy_readable_and_strangers_alone(states):
    old, new = states
    (stranger := old / "shards" / "notes.tar").write_bytes(b"mine")
    tar = Layout(new).tar(5)
    reseal(Layout(new).record(5), lambda tree: tree["tar"].update(sha256="0" * 64))
    with serve(new) as server, pytest.raises(UserError, match="its sha256 does not match"):
        pull(server.url, old)
    assert len(Cache.open(old)) == 12
    reseal(Layout(new).record(5), lambda tree: tree["tar"].update(sha256=hashlib.sha256(tar.read_bytes()).hexdigest()))
    reseal(Layout(new).cache, lambda tree: tree["generations"][1].update(manifest_id="0" * 64))
    with serve(new) as server, pytest.raises(WorkFailed, match="is not valid: "):
        pull(server.url, old)
    assert len(Cache.open(old)) == 12
    assert stranger.read_bytes() == b"mine"


def test_a_folder_with_anything_else_is_not_pulled_into(states, tmp_path):
    old, new = states
    other = Path(shutil.copytree(old, tmp_path / "other"))
    grow(other, n=5, shards=2, prefix="other")
    with serve(old) as server:
        with pytest.raises(UserError, match=r"has 2 generations of this cache, '.*' only 1: there is nothing to pull"):
            pull(server.url, new)
        server.folder = new
        with pytest.raises(UserError, match="contains another cache"):
            pull(server.url, other)
        shutil.copy(Layout(other).plan(1), Layout(old).plan(1))  # an extraction that is under way
        with pytest.raises(UserError, match="contains another cache"):
            pull(server.url, old)
        Layout(old).cache.unlink()
        with pytest.raises(UserError, match="contains another cache"):
            pull(server.url, old)
        Layout(old).plan(1).write_bytes(b"half a plan")  # nothing that anybody can go on with
        pull(server.url, old)
    assert contents(old) == contents(new)


@pytest.mark.parametrize("name", ["CACHE.json", "labels/LABELS.json"])
def test_a_store_with_conditional_writes_keeps_what_another_process_wrote_meanwhile(states, monkeypatch, name):
    old, new = states
    url = f"tiny://bucket/{uuid.uuid4().hex}"
    store = objects_in_memory(url)

    def put_file(self, path, target, **kwargs):
        obstore.put(store, target.split("/", 2)[2], Path(path).read_bytes())

    class Meddled(MemoryObjects):
        def put(self, written, data, expected):
            if written == name and meddle:
                obstore.put(store, name, meddle.pop())
            return super().put(written, data, expected)

    monkeypatch.setattr(type(fsspec.filesystem("tiny")), "put_file", put_file)
    monkeypatch.setattr(transfer, "SCHEMES", ("tiny",))
    monkeypatch.setattr(transfer, "Objects", Meddled)
    meddle: list[bytes] = []
    push(old, url)
    meddle.append(written := (old / name).read_bytes())
    with pytest.raises(UserError, match="was changed by another process meanwhile: push again"):
        push(new, url)
    assert bytes(obstore.get(store, name).bytes()) == written
    push(new, url)
    assert verify(url, deep=True) == []


def test_a_grown_cache_goes_to_a_hub_and_is_pulled_from_it(states, tmp_path):
    old, new = states
    with serve_hub(NAME, {}) as hub:
        commands = [["push", str(folder), URL, *LICENCE] for folder in (old, new, new, old)]
        statuses, told = client(hub.url, tmp_path, *commands, ["pull", URL, str(old)])
    assert statuses == [0, 0, 0, 2, 0], told
    assert "pull it first" in told
    assert {name: data for name, data in hub.files.items() if name != "README.md"} == contents(new) == contents(old)
    assert b"| generations | 2, 1 utterances extracted again since |" in hub.files["README.md"]


def test_a_push_names_the_places_of_this_machine_that_it_publishes_and_sends_every_byte(near, tmp_path, memory, capsys):
    cache = Path(shutil.copytree(near, tmp_path / "cache"))
    assert run_command(main, ["push", str(cache), "memory://exchange/open"]) == 0
    assert "paths of this machine" not in capsys.readouterr().err
    grow(cache)
    first = {
        "source": {"name": "mine", "root": "/home/ann/secret corpus"},
        "encoder": {"reference": "path:~/models/whisper", "hub": "hf://openai/whisper-base"},
    }
    second = {**first, "config": {"root": "caches", "encoder": {"model": ["wheel:whisper-base", "path:/opt/whisper"]}}}
    reseal(
        Layout(cache).cache,
        lambda tree: [
            entry.update(provenance=p) for entry, p in zip(tree["generations"], (first, second), strict=True)
        ],
    )
    add_labels(Layout(cache), pa.table({"key": ["utt-00000"], "text": ["x"]}), "mine", "/home/ann/labels.csv")
    assert run_command(main, ["push", str(cache), "memory://exchange/mine"]) == 0
    told = next(line for line in capsys.readouterr().err.splitlines() if "paths of this machine" in line)
    assert told.endswith(
        "encoder.reference 'path:~/models/whisper', source.root '/home/ann/secret corpus', "
        "config.encoder.model 'path:/opt/whisper', labels.mine.from '/home/ann/labels.csv'"
    )
    pull("memory://exchange/mine", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(cache)


def test_a_pull_over_a_bad_line_continues_where_it_was_cut(near, tmp_path):
    with serve(near) as server:
        server.faults["000001.tar"] = ["cut", "corrupt", "503"]
        server.faults["manifests/000.parquet"] = ["truncated"]
        server.faults["LABELS.json"] = ["corrupt", "page"]
        server.faults[labels_file(near)] = ["cut", "corrupt"]
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
        with pytest.raises(UserError, match=r"CACHE\.json' does not contain a valid feature spec"):
            pull(server.url, tmp_path / "y")
        spec = unseal(Layout(near).cache)["spec"]
        (served / "CACHE.json").write_bytes(seal({"spec": {**spec, "schema_version": 1}}))
        with pytest.raises(UserError, match="has cache format 1, this earshard reads 2: extract again with"):
            pull(server.url, tmp_path / "y")
        (served / "CACHE.json").write_bytes(seal({"spec": spec}))
        with pytest.raises(UserError, match=r"has a CACHE\.json with missing or invalid fields"):
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
    (tmp_path / "served" / "evil").write_bytes((served / "labels" / labels_file(near)).read_bytes())
    reseal(served / "labels" / "LABELS.json", lambda tree: tree["sets"][0]["file"].update(name="../../../evil"))
    with serve(tmp_path / "served") as server:
        with pytest.raises(UserError, match=r"LABELS\.json' is not a valid index of label sets"):
            pull(f"{server.url}/some/cache", tmp_path / "a" / "b" / "back")
        assert server.count("evil") == 0
    assert not list((tmp_path / "a").rglob("evil"))


def test_a_number_of_shards_that_the_plan_does_not_have_is_refused_before_any_is_asked_for(near, tmp_path):
    served = Path(shutil.copytree(near, tmp_path / "served"))

    def lie(tree):
        tree["generations"][0].update(shards=10**9)
        tree["counts"].update(shards=10**9)

    reseal(Layout(served).cache, lie)
    with serve(served) as server:
        with pytest.raises(
            UserError, match=r"the plan of generation 0 has 4 shards from 0, CACHE\.json says 1000000000"
        ):
            pull(server.url, tmp_path / "back")
        assert server.count("000000.json") == 0


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
