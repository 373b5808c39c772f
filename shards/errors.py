"""The exceptions that end a command with a one-line message, and its exit status.

Exit statuses: 0 done, 1 the work itself failed (a corrupt cache, a loss that did not fall), 2 bad input,
130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(Exception):
    """Bad input. One sentence: what is wrong, where, and which command or setting fixes it.

    The command exits with status 2 and prints no traceback.
    """


def install_command(extra: str) -> str:
    """Return the command that installs an extra. It also works in a checkout, where earshard is already installed."""
    return f"`python -m pip install 'earshard[{extra}]'`"


def missing_package(feature: str, package: str, extra: str) -> UserError:
    """Return the error to raise when ``package``, which an optional feature needs, is not installed."""
    return UserError(
        f"{feature} needs the Python package {package}, which is not installed: run {install_command(extra)}"
    )


class WorkFailed(Exception):
    """The input was valid but the work failed (a corrupt cache, too many failures).

    The command exits with status 1 and prints no traceback.
    """


def run_command(command: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Call ``command(argv)`` and turn any exception into an exit status and one line on standard error."""
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
    except BrokenPipeError:  # `… | head` closed the pipe: exit quietly, as other Unix tools do
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def first_validation_error(error: ValidationError) -> str:
    """Return ``field: message`` on one line. The field name is escaped, because it may come from an untrusted file."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    return f"{field.encode('unicode_escape').decode():.100}: {first['msg']}"
