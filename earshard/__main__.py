"""The command line ``earshard``: the three command lines of the packages under one name.

    earshard extract --config speech         python -m pipeline extract …; also earshard extract check|repair|weights
    earshard train fit --config demo         python -m train …
    earshard shards verify CACHE             python -m shards …
    earshard doctor                          what this machine has, what is missing, and which command to run next
    source <(earshard completion bash)       completion of commands, options, files and keys; zsh works too

A configuration is a YAML file, or the name of a built-in one. Exit status: 0 done, 1 the work failed, 2 bad input,
130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import pipeline.__main__
import shards.__main__
import train.__main__
from shards import VERSION
from shards.config.cli import SHELLS, print_completion, subcommands
from shards.errors import run_command

SCRIPT = "earshard"
PARSERS = {"extract": pipeline.__main__.parser, "train": train.__main__.parser, "shards": shards.__main__.parser}


def parser() -> argparse.ArgumentParser:
    """Return the argument parser, with those of the packages below it. Imports no heavy modules."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog=SCRIPT, description=__doc__, formatter_class=raw)
    top.add_argument("--version", action="version", version=f"{SCRIPT} {VERSION}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in {
        "extract": "run a frozen speech encoder over a corpus once",
        "train": "train and evaluate a projector into a frozen language model",
        "shards": "look at, check and share caches",
    }.items():
        commands.add_parser(name, help=text)
        commands.choices[name] = PARSERS[name]()
    doctor = commands.add_parser("doctor", help="show what this machine has, what is missing, what to run next")
    doctor.add_argument("--hubs", action="store_true", help="also check that the model hubs can be reached")
    completion = commands.add_parser("completion", help="print a shell completion script")
    completion.add_argument("shell", choices=SHELLS)
    return top


def route(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Return the package whose command line runs ``argv`` ("" for none) and the words for it."""
    first, rest = (argv[0], list(argv[1:])) if argv else ("", [])
    if first == "extract":
        known = (*subcommands(PARSERS[first]()), "-h", "--help")
        return "pipeline", rest if rest and rest[0] in known else ["extract", *rest]
    if first == "doctor":
        return "pipeline", list(argv)
    return (first, rest) if first in PARSERS else ("", list(argv))


def command(argv: Sequence[str]) -> int | None:
    """Run one command and return its exit status."""
    package, words = route(argv)
    if package == "pipeline":
        return pipeline.__main__.command(words)
    if package == "train":
        return train.__main__.command(words)
    if package == "shards":
        return shards.__main__.main(words)
    return _completion(parser().parse_args(words).shell)


def _completion(shell: str) -> int:
    from pipeline.config import ExtractConfig
    from shards.config.fields import choices
    from train.config.train import TrainConfig

    top = parser()
    packages = subcommands(top)
    packages["extract"] = subcommands(packages["extract"])["extract"]
    return print_completion(top, SCRIPT, shell, {"extract": choices(ExtractConfig), "train": choices(TrainConfig)})


def console() -> None:
    """Entry point of the script ``earshard``."""
    sys.exit(run_command(command))


if __name__ == "__main__":
    console()
