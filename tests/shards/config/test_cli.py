"""What holds for all three command lines: quick help with examples that parse, completion, the resolved settings."""

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

import pipeline.__main__
import shards.__main__
import train.__main__
from pipeline.config import ExtractConfig
from shards.config import cli as commandline
from shards.config.base import load_config
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
    if command == "completion":
        assert f"source <(earshard-{'extract' if name == 'pipeline' else name} completion bash)" in text
        return
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


def complete(name: str, words: list[str]) -> list[str]:
    """What bash offers for the last of ``words``."""
    script = {"pipeline": "earshard-extract"}.get(name, f"earshard-{name}")
    printed = subprocess.run(
        [sys.executable, "-m", name, "completion", "bash"], capture_output=True, text=True, check=True
    ).stdout
    line = " ".join(shlex.quote(word) for word in [script, *words])
    ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _{script.replace('-', '_')} {script} ''\n"
    done = subprocess.run(
        ["bash", "--norc", "-c", f"{printed}\n{ask}" + 'printf "%s\\n" "${COMPREPLY[@]}"'],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_and_keys():
    assert complete("train", ["ev"]) == ["evaluate"]
    assert "--resume" in complete("train", ["fit", "--"])
    assert set(complete("train", ["fit", "--config", "x.yaml", "lm.lora."])) == {
        "lm.lora.rank=",
        "lm.lora.alpha=",
        "lm.lora.target_modules=",
    }
    assert complete("pipeline", ["extract", "source.spl"]) == ["source.splits="]
    assert complete("pipeline", ["extract", "codec", "=", "f"]) == ["f16", "fp8"]  # as bash splits codec=f
    assert complete("train", ["fit", "lm.train", "="]) == ["true", "false"]
    assert complete("shards", ["ver"]) == ["verify"]


@pytest.mark.parametrize("name", MODULES)
def test_zsh_gets_a_script_for_the_console_command(name):
    done = subprocess.run([sys.executable, "-m", name, "completion", "zsh"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"#compdef earshard-{'extract' if name == 'pipeline' else name}\n")
    if zsh := shutil.which("zsh"):
        subprocess.run([zsh, "-n"], input=done.stdout, text=True, check=True)


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
