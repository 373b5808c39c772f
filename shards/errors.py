"""The exceptions that end a command with a one-line message, and its exit status.

Exit statuses: 0 done, 1 the work itself failed (a corrupt cache, a loss that did not fall), 2 bad input,
130 interrupted.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


_SECRETS = re.compile(
    r"(?<=://)[^/@\s'\"]*:[^/@\s'\"]*@"  # user:password@ of a URL
    r"|(?<=http://)[^/@\s'\"]+@|(?<=https://)[^/@\s'\"]+@"
    r"|(?<=[?&])(?:[\w.-]*(?:token|secret|signature|passw|credential|key)[\w.-]*|sig|auth)=[^&\s'\"]*",
    re.IGNORECASE,
)
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # all but tab, line feed, carriage return


def without_secrets(text: str) -> str:
    """Return ``text`` without the passwords and tokens of the URLs in it."""
    return _SECRETS.sub(lambda found: "***@" if found[0].endswith("@") else f"{found[0].partition('=')[0]}=***", text)


def printable(text: str) -> str:
    """Return ``text`` as it may reach a terminal: no control characters but those of lines, no secrets of URLs."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", without_secrets(_COLOR.sub("", text)))


class UserError(Exception):
    """Bad input. One sentence: what is wrong, where, and which command or setting fixes it.

    The command exits with status 2 and prints no traceback. Passwords and tokens of URLs are left out of the sentence.
    """

    def __str__(self) -> str:
        return without_secrets(super().__str__())


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
    """Call ``command(argv)`` and turn any exception into an exit status and one line on standard error.

    Whatever the command prints meanwhile is :func:`printable`.
    """
    with _printable_output():
        return _run(command, argv)


def _run(command: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None) -> int:
    try:
        return command(sys.argv[1:] if argv is None else argv) or 0
    except UserError as error:
        print(f"error: {_line(error)}", file=sys.stderr)
        return 2
    except WorkFailed as error:
        print(f"failed: {_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `… | head` closed the pipe: exit quietly, as other Unix tools do
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _line(error: Exception) -> str:
    return re.sub(r"[\r\t]", "\N{REPLACEMENT CHARACTER}", str(error))


class _PrintableStream:
    """A text stream through which only :func:`printable` text passes; everything else is that of ``stream``."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)


@contextmanager
def _printable_output() -> Iterator[None]:
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_PrintableStream(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def first_validation_error(error: ValidationError) -> str:
    """Return ``field: message`` on one line. The field name is escaped, because it may come from an untrusted file."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    return f"{field.encode('unicode_escape').decode():.100}: {first['msg']}"
