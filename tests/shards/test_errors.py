from __future__ import annotations

import subprocess
import sys

import pytest

from shards.errors import UserError, WorkFailed, run_command


def raising(error: BaseException):
    def command(argv):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no such cache"), 2, "error: no such cache\n"),
        (WorkFailed("not valid"), 1, "failed: not valid\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_a_user_can_cause_ends_in_one_line_and_its_status(error, status, line, capsys):
    assert run_command(raising(error), []) == status
    assert capsys.readouterr().err == line


def test_a_bug_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()), [])


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (3, 3)])
def test_a_command_that_returns_decides_its_status(returned, status):
    assert run_command(lambda argv: returned, []) == status


def test_a_reader_that_closes_the_pipe_gets_no_traceback():
    program = (
        "from shards.errors import run_command\n"
        "def command(argv):\n"
        "    for i in range(100000): print('line', i)\n"
        "raise SystemExit(run_command(command, []))\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 0
