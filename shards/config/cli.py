"""Subcommands shared by the three command lines: ``config`` (check and print settings) and ``completion``.

    python -m train config --print --config configs/train/demo.yaml lr=5e-4
    source <(earshard-train completion bash)

Adds the subcommands to an argparse parser and runs them. Imports nothing heavy before a command runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SHELLS = ("bash", "zsh")
FILES, FOLDERS, KEYS = ("FILE", "WAV"), ("CACHE", "RUN", "FOLDER", "DIR"), "key=value"  # metavars


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Like ``parser.parse_args``, but ``key=value`` words and options may be mixed in any order."""
    args, rest = parser.parse_known_args(argv)
    if not hasattr(args, "overrides") or any("=" not in word or word.startswith("-") for word in rest):
        return parser.parse_args(argv)  # reports the unknown arguments and exits
    args.overrides = [*args.overrides, *rest]
    return args


def add_config(commands: Any, module: str, example: str) -> None:
    """Add the subcommand ``config`` to ``python -m module``; ``example`` completes the example in its help."""
    text = "check a configuration and print the keys that it sets"
    config = commands.add_parser(
        "config",
        help=text,
        description=(
            "Check a configuration and print the keys set by the file and the command line. The output is YAML and can "
            "be saved as a configuration file."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example:\n  python -m {module} config --print {example}",
    )
    config.add_argument("--config", metavar="FILE", help="YAML file")
    config.add_argument("--print", action="store_true", help="print every key, including those left at their defaults")
    config.add_argument("overrides", nargs="*", metavar=KEYS, help="override a key; the value is YAML")


def show_config(model: Any, args: argparse.Namespace) -> int:
    """Run ``config`` for ``model``, a :class:`shards.config.base.Config` class; returns the exit status."""
    import yaml

    from shards.config.base import load_config

    tree = load_config(model, args.config, args.overrides).model_dump(mode="json", exclude_unset=not args.print)
    print(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), end="")
    return 0


def add_completion(commands: Any, script: str) -> None:
    """Add the subcommand ``completion`` for the console script ``script``."""
    completion = commands.add_parser(
        "completion",
        help="print a shell completion script",
        description=f"Print a shell script that completes commands, options, files and keys of {script}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example:\n  source <({script} completion bash)        # to keep it, add this line to ~/.bashrc",
    )
    completion.add_argument("shell", choices=SHELLS)


def print_completion(
    parser: argparse.ArgumentParser, script: str, shell: str, keys: Mapping[str, Sequence[str]] | None = None
) -> int:
    """Print the completion script of ``script`` for ``shell``.

    Args:
        keys: complete ``key=value`` arguments: key -> its values, if they are known.
    """
    import shtab

    keys = keys or {}
    words = {
        "bash": f"_{_word(script)}_keys",
        "zsh": f"_{_word(script)}_keys",
        "preamble": {"bash": _bash_keys(script, keys), "zsh": _zsh_keys(script, keys)},
    }
    for action in _arguments(parser):
        if action.metavar == KEYS:
            action.complete = words  # type: ignore[attr-defined]
        elif action.metavar in (*FILES, *FOLDERS):
            action.complete = shtab.FILE if action.metavar in FILES else shtab.DIRECTORY  # type: ignore[attr-defined]
    parser.prog = script
    text = shtab.complete(parser, shell)
    print(text + (_bash_no_space(script) if shell == "bash" else ""))
    return 0


def _arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _arguments(below)
        else:
            yield action


def _word(script: str) -> str:
    return script.replace("-", "_")


def _bash_keys(script: str, keys: Mapping[str, Sequence[str]]) -> str:
    """A function that completes keys and, since bash splits words at ``=``, values by the words before the cursor."""
    named = {key: " ".join(values) for key, values in keys.items() if values}
    cases = "".join(f'    {key}) compgen -W "{values}" -- "${{1#=}}";;\n' for key, values in named.items())
    return (
        f"_{_word(script)}_keys() {{\n"
        "  local key=\n"
        '  if [[ $1 == "=" ]]; then key=${COMP_WORDS[COMP_CWORD-1]}\n'
        '  elif [[ ${COMP_WORDS[COMP_CWORD-1]} == "=" ]]; then key=${COMP_WORDS[COMP_CWORD-2]}; fi\n'
        "  case $key in\n"
        f'    "") compgen -W "{" ".join(f"{key}=" for key in keys)}" -- "$1";;\n'
        f"{cases}  esac\n}}\n"
    )


def _zsh_keys(script: str, keys: Mapping[str, Sequence[str]]) -> str:
    cases = "".join(f"      {key}) compadd -- {' '.join(values)};;\n" for key, values in keys.items() if values)
    return (
        f"_{_word(script)}_keys() {{\n  if compset -P '*='; then\n    case ${{IPREFIX%=}} in\n{cases}    esac\n"
        f"  else\n    compadd -S = -- {' '.join(keys)}\n  fi\n}}\n"
    )


def _bash_no_space(script: str) -> str:
    """Suppress the space after a completed ``key=``, so that the value can be typed directly."""
    inner, outer = f"_shtab_{_word(script)}", f"_{_word(script)}"
    return (
        f'\n{outer}() {{\n  {inner} "$@"\n'
        "  if [[ ${COMPREPLY[0]-} == *= ]]; then compopt -o nospace 2>/dev/null || :; fi\n}\n"
        f"complete -o bashdefault -F {outer} {script}"
    )
