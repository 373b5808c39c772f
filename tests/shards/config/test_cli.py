"""What holds for all command lines: quick help with examples that parse, completion, the resolved settings."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import earshard.__main__
import pipeline.__main__
import shards.__main__
import train.__main__
from pipeline.config import ExtractConfig
from shards.config import cli as commandline
from shards.config.base import load_config
from shards.config.origins import builtin_config
from shards.errors import UserError
from train.config.train import TrainConfig

MODULES = {"pipeline": pipeline.__main__, "shards": shards.__main__, "train": train.__main__}
CONFIGS = Path(__file__).resolve().parent.parent.parent.parent / "configs"
FILES = sorted(file for folder in ("extract", "train") for file in (CONFIGS / folder).glob("*.yaml"))
HEAVY = {"torch", "pandas", "numpy", "pyarrow", "transformers", "datasets", "pydantic", "fsspec", "soundfile", "shtab"}


def subcommands(name: str) -> dict[str, argparse.ArgumentParser]:
    top = MODULES[name].parser()
    return next(action.choices for action in top._actions if isinstance(action, argparse._SubParsersAction))


def examples(text: str) -> list[tuple[str, list[str]]]:
    """(module, words) of each ``python -m module words`` in ``text``; comments of the shell are cut off."""
    found = re.findall(r"-m (pipeline|shards|train) ((?:(?!\s{2,}).)+)", text)
    return [(module, shlex.split(words, comments=True)) for module, words in found]


EACH = [(name, command) for name in MODULES for command in subcommands(name)]


@pytest.mark.parametrize("name", MODULES)
def test_help_imports_no_library(name):
    words = [["--help"], *([command, "--help"] for command in subcommands(name))]
    code = (
        "import contextlib, io, sys\n"
        f"from {name}.__main__ import parser\n"
        f"for words in {words!r}:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        parser().parse_args(words)\n"
        f"print(*sorted({HEAVY!r} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(("name", "command"), EACH)
def test_every_command_shows_an_example_that_parses(name, command):
    text = subcommands(name)[command].epilog or ""
    shown = [words for module, words in examples(text) if module == name and words[0] == command]
    assert shown, text
    for words in shown:
        assert MODULES[name].parser().parse_args(words).command == command


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_the_whole_command_parse(name):
    top = MODULES[name].parser()
    shown = examples(f"{top.description}\n{top.epilog}")
    assert len(shown) >= 4
    for module, words in shown:
        MODULES[module].parser().parse_args(words)


def test_overrides_may_stand_before_and_behind_options(capsys):
    words = ["config", "source.kind=tones", "--config", "x.yaml", "limit=3", "--print", "codec=int8"]
    args = commandline.parse_args(pipeline.__main__.parser(), words)
    assert (args.overrides, args.config, args.print) == (["source.kind=tones", "limit=3", "codec=int8"], "x.yaml", True)
    for wrong in (["fit", "--config", "x.yaml", "lr=1", "--stepz=3"], ["report", "runs/x", "lr=1"]):
        with pytest.raises(SystemExit):
            commandline.parse_args(train.__main__.parser(), wrong)
    assert "unrecognized arguments: lr=1" in capsys.readouterr().err


def complete(*words: str) -> list[str]:
    """What bash offers for the last of ``words``."""
    printed = subprocess.run(
        [sys.executable, "-m", "earshard", "completion", "bash"], capture_output=True, text=True, check=True
    ).stdout
    line = " ".join(shlex.quote(word) for word in ["earshard", *words])
    ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _earshard earshard ''\n"
    done = subprocess.run(
        ["bash", "--norc", "-c", f"{printed}\n{ask}" + 'printf "%s\\n" "${COMPREPLY[@]}"'],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_and_keys():
    assert complete("tr") == ["train"]
    assert complete("train", "ev") == ["evaluate"]
    assert "--resume" in complete("train", "fit", "--")
    assert set(complete("train", "fit", "--config", "x.yaml", "lm.lora.")) == {
        "lm.lora.rank=",
        "lm.lora.alpha=",
        "lm.lora.target_modules=",
    }
    assert complete("extract", "--config", "x.yaml", "source.spl") == ["source.splits="]
    assert complete("extract", "codec", "=", "f") == ["f16", "fp8"]  # as bash splits codec=f
    assert complete("train", "fit", "lm.train", "=") == ["true", "false"]
    assert complete("shards", "ver") == ["verify"]


def test_zsh_gets_a_script_for_the_console_command():
    done = subprocess.run(
        [sys.executable, "-m", "earshard", "completion", "zsh"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("#compdef earshard\n")
    if zsh := shutil.which("zsh"):
        subprocess.run([zsh, "-n"], input=done.stdout, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "module", "passed"),
    [
        (["extract", "--config", "tones", "limit=3"], "pipeline", ["extract", "--config", "tones", "limit=3"]),
        (["extract", "check", "CACHE"], "pipeline", ["check", "CACHE"]),
        (["train", "report"], "train", ["report"]),
        (["shards", "ls", "CACHE"], "shards", ["ls", "CACHE"]),
        (["doctor", "--hubs"], "pipeline", ["doctor", "--hubs"]),
    ],
)
def test_earshard_hands_the_words_to_the_command_line_of_the_package(words, module, passed, monkeypatch):
    got = []
    monkeypatch.setattr(MODULES[module], "main" if module == "shards" else "command", got.append)
    earshard.__main__.command(words)
    assert got == [passed]


def test_a_built_in_configuration_is_named_without_its_folder_and_the_users_files_go_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    speech = load_config(ExtractConfig, CONFIGS / "extract" / "speech.yaml")
    assert builtin_config("speech", "extract") == "configs/extract/speech.yaml"
    assert builtin_config("lr", "train", "sweep") == "configs/sweep/lr.yaml"
    assert builtin_config("lr", "train") == "lr"
    assert load_config(ExtractConfig, "configs/extract/speech.yaml") == speech
    for outside in ("configs/../configs/extract/speech.yaml", "configs/cluster/slurm-train.sh/x", "speech.yaml", ""):
        with pytest.raises(UserError, match="does not exist"):
            load_config(ExtractConfig, outside)
    (tmp_path / "speech").write_text("source: {kind: tones}\nlimit: 1\n")
    (tmp_path / "configs" / "extract").mkdir(parents=True)
    (tmp_path / "configs" / "extract" / "speech.yaml").write_text("source: {kind: tones}\nlimit: 2\n")
    assert load_config(ExtractConfig, builtin_config("speech", "extract")).limit == 1
    assert load_config(ExtractConfig, "configs/extract/speech.yaml").limit == 2


def test_config_prints_what_is_set_or_every_key_and_checks_them(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("caches: [a]\nclip: 2\nprojector: {kind: linear}\n")
    words = ["--config", str(file), "lr=5e-4"]
    assert train.__main__.command(["config", *words]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == {
        "caches": ["a"],
        "projector": {"kind": "linear"},
        "lr": 5e-4,
        "max_grad_norm": 2.0,
    }
    assert train.__main__.command(["config", "--print", *words]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == load_config(TrainConfig, file, ["lr=5e-4"]).model_dump(
        mode="json"
    )
    assert pipeline.__main__.main(["config", "source.kid=tones"]) == 2
    assert "unknown key 'source.kid' in the argument 'source.kid=tones'" in capsys.readouterr().err


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_print_of_every_configuration_of_this_repository_is_that_configuration(path, tmp_path, capsys):
    model, main = {"extract": (ExtractConfig, pipeline.__main__), "train": (TrainConfig, train.__main__)}[
        path.parent.name
    ]
    for words in ([], ["--print"]):
        assert main.command(["config", "--config", str(path), *words]) == 0
        (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
        assert load_config(model, tmp_path / "again.yaml") == load_config(model, path)
