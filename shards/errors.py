"""The one exception that a user can cause, and how a command line ends.

In: any exception that a command raises. Out: an exit status — 0 done, 1 the work itself failed (a cache that is not
sound, a loss that did not fall), 2 the input was bad, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(Exception):
    """One sentence: what is wrong, where, and which command or setting mends it. Exit status 2, no traceback."""


def install_command(extra: str) -> str:
    """What installs the packages of an extra, also for a checkout: there pip finds that earshard is installed."""
    return f"`python -m pip install 'earshard[{extra}]'`"


def missing_package(feature: str, package: str, extra: str) -> UserError:
    """What to raise when a package of an optional feature is not installed."""
    return UserError(
        f"{feature} needs the Python package {package}, which is not installed: run {install_command(extra)}"
    )


class WorkFailed(Exception):
    """The input was fine and the work was not (an unsound cache, too many failures). Exit status 1, no traceback."""


def run_command(command: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Call ``command(argv)`` and turn what it raises into an exit status and one line on standard error."""
    try:
        return command(sys.argv[1:] if argv is None else argv) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WorkFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `… | head` closed the pipe: leave quietly, as other Unix tools do
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def first_validation_error(error: ValidationError) -> str:
    """``field: what is wrong with it`` on one line; a file that nobody vouches for may name its fields anything."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    return f"{field.encode('unicode_escape').decode():.100}: {first['msg']}"
