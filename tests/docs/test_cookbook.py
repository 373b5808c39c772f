"""Every block of docs/cookbook.md is run, in its order and in one folder, with few utterances and steps.

python -m pytest -m slow tests/docs/test_cookbook.py
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from docs_text import ROOT, blocks, sections
from tiny_corpus import librispeech_files, write_tree

COOKBOOK = sections((ROOT / "docs" / "cookbook.md").read_text(encoding="utf-8"))
TASKS = [title for title in COOKBOOK if re.match(r"\d+\. ", title)]
FIT = "steps=2 warmup=0 batch.size=2 eval_every=null checkpoint_every=null val.limit=2 decode_limit=1 max_new_tokens=4"
# A `python` that is first on the path: it appends what makes a long command short.
WRAPPER = f"""#!/bin/sh
case "$*" in
  "-m pipeline extract "*limit=*) set -- "$@" shard_mb=1;;
  "-m pipeline extract "*) set -- "$@" limit=16 shard_mb=1;;
  "-m train fit "*) set -- "$@" {FIT} retrieval_limit=0;;
  "-m train sweep "*) for word in {FIT} retrieval_limit=0; do set -- "$@" "change.$word"; done;;
  "-m train evaluate "*) set -- "$@" val.limit=2 decode_limit=1 max_new_tokens=4 retrieval_limit=0;;
esac
exec {shlex.quote(sys.executable)} "$@"
"""


class Kitchen:
    """The folder that the blocks run in, and how many of them have run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.done = folder, 0
        (folder / "configs").symlink_to(ROOT / "configs")
        write_tree(folder / "data" / "LibriSpeech", librispeech_files(["train-clean-100"]))
        self._own_recordings(folder / "my recordings")
        wrapper = folder / "bin" / "python"
        wrapper.parent.mkdir()
        wrapper.write_text(WRAPPER)
        wrapper.chmod(0o755)
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = server.getsockname()[1]

    def _own_recordings(self, folder: Path) -> None:
        """What task 3 shows, spoken, and more of it."""
        from pipeline.sources import SourceConfig, open_source

        (shown,) = blocks(COOKBOOK["3. Your own recordings"], "csv")
        head, *rows = shown.splitlines()
        rows += [f'Tuesday/take {n}.mp3,"Another one, please.",anna' for n in range(1, 5)]
        paths = [*(row.split(",")[0] for row in rows), "Wednesday/take 1.mp3"]  # task 5 adds the last one to the list
        source = open_source(SourceConfig(kind="speech", num_sentences=len(paths)))
        for name, utterance in zip(paths, list(source.utterances()), strict=True):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            ((_, data),) = source.read([utterance.audio])
            wave = path.with_suffix(".wav")
            wave.write_bytes(data)
            soundfile.write(path, *soundfile.read(wave, dtype="float32"), format="MP3")
            wave.unlink()
        (folder / "clips.csv").write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")

    def cook(self, title: str) -> subprocess.CompletedProcess[str]:
        """Run the block of one task; every line of it must succeed."""
        (script,) = blocks(COOKBOOK[title], "bash")
        script = re.sub(r"(localhost:|http\.server )8000", rf"\g<1>{self.port}", script)
        path = f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=900,
        )


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory):
    return Kitchen(tmp_path_factory.mktemp("cookbook"))


def test_there_are_fifteen_tasks_in_order():
    assert [int(title.split(".")[0]) for title in TASKS] == list(range(1, 16))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(TASKS)), ids=[title.split(".")[0] for title in TASKS])
def test_every_command_of_the_cookbook_works(kitchen, number):
    while kitchen.done <= number:  # a task uses what earlier ones made
        done = kitchen.cook(TASKS[kitchen.done])
        assert done.returncode == 0, f"{TASKS[kitchen.done]}\n{done.stdout}\n{done.stderr}"
        kitchen.done += 1
        output = done.stdout
    if TASKS[number].startswith("4."):
        assert '"encoded": 0, "reused": 0, "relabelled": true' in output
        assert "1 text changed" in output
    if TASKS[number].startswith("5."):
        assert "1 new utterance (generation 1) of clips" in output
        assert "4 of 4 utterances reused from caches/clips/" in output
    if TASKS[number].startswith("15."):
        assert "of the rows are variants" in output
    if TASKS[number].startswith("7."):
        assert "is not valid" in done.stderr
        assert "fixed: " in output
        assert ": valid (every byte of every shard)" in output
