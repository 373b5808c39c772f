"""What the command lines share: the subcommand ``config``, the names of built-in configurations, shell completion.

    python -m train config --print --config configs/train/demo.yaml lr=5e-4
    source <(earshard completion bash)

Imports nothing heavy before a command runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def add_config(commands: Any, module: str, example: str, kind: str) -> None:
    """Add the subcommand ``config`` to ``python -m module``; ``example`` completes the example in its help.

    ``kind`` is the folder of configs/ whose files can be named without it.
    """
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
    config.add_argument("--config", metavar="FILE", type=config_file(kind), help="YAML file, or a built-in one's name")
    config.add_argument("--print", action="store_true", help="print every key, including those left at their defaults")
    config.add_argument("overrides", nargs="*", metavar=KEYS, help="override a key; the value is YAML")


def show_config(model: Any, args: argparse.Namespace) -> int:
    """Run ``config`` for ``model``, a :class:`shards.config.base.Config` class; returns the exit status."""
    import yaml

    from shards.config.base import load_config

    tree = load_config(model, args.config, args.overrides).model_dump(mode="json", exclude_unset=not args.print)
    print(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), end="")
    return 0


def config_file(*kinds: str) -> Callable[[str], str]:
    """Return the ``type=`` of an argument that names a YAML file or a built-in configuration of ``configs/KIND/``."""

    def convert(name: str) -> str:
        from shards.config.origins import builtin_config

        return builtin_config(name, *kinds)

    return convert


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers below ``parser`` by name; a change of the mapping changes the parser."""
    found = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return next(found, {})


def print_completion(
    parser: argparse.ArgumentParser, script: str, shell: str, keys: Mapping[str, Mapping[str, Sequence[str]]]
) -> int:
    """Print the completion script of ``script`` for ``shell``.

    Args:
        keys: complete the ``key=value`` of a subcommand: name -> key -> its values, if they are known.
    """
    import shtab

    preamble = {
        "bash": "".join(_bash_keys(name, words) for name, words in keys.items()),
        "zsh": "".join(_zsh_keys(name, words) for name, words in keys.items()),
    }
    for name, below in subcommands(parser).items():
        for action in _arguments(below):
            if action.metavar == KEYS and name in keys:
                action.complete = {"bash": f"_keys_{name}", "zsh": f"_keys_{name}", "preamble": preamble}  # type: ignore[attr-defined]
            elif action.metavar in (*FILES, *FOLDERS):
                action.complete = shtab.FILE if action.metavar in FILES else shtab.DIRECTORY  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell, preamble="") + (_bash_no_space(script) if shell == "bash" else ""))
    return 0


def _arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _arguments(below)
        else:
            yield action


def _bash_keys(name: str, keys: Mapping[str, Sequence[str]]) -> str:
    """A function that completes keys and, since bash splits words at ``=``, values by the words before the cursor."""
    named = {key: " ".join(values) for key, values in keys.items() if values}
    cases = "".join(f'    {key}) compgen -W "{values}" -- "${{1#=}}";;\n' for key, values in named.items())
    return (
        f"_keys_{name}() {{\n"
        "  local key=\n"
        '  if [[ $1 == "=" ]]; then key=${COMP_WORDS[COMP_CWORD-1]}\n'
        '  elif [[ ${COMP_WORDS[COMP_CWORD-1]} == "=" ]]; then key=${COMP_WORDS[COMP_CWORD-2]}; fi\n'
        "  case $key in\n"
        f'    "") compgen -W "{" ".join(f"{key}=" for key in keys)}" -- "$1";;\n'
        f"{cases}  esac\n}}\n"
    )


def _zsh_keys(name: str, keys: Mapping[str, Sequence[str]]) -> str:
    cases = "".join(f"      {key}) compadd -- {' '.join(values)};;\n" for key, values in keys.items() if values)
    return (
        f"_keys_{name}() {{\n  if compset -P '*='; then\n    case ${{IPREFIX%=}} in\n{cases}    esac\n"
        f"  else\n    compadd -S = -- {' '.join(keys)}\n  fi\n}}\n"
    )


def _bash_no_space(script: str) -> str:
    """Suppress the space after a completed ``key=``, so that the value can be typed directly."""
    inner, outer = f"_shtab_{script}", f"_{script}"
    return (
        f'\n{outer}() {{\n  {inner} "$@"\n'
        "  if [[ ${COMPREPLY[0]-} == *= ]]; then compopt -o nospace 2>/dev/null || :; fi\n}\n"
        f"complete -o bashdefault -F {outer} {script}"
    )
