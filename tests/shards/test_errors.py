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


CONTROL = "".join(map(chr, [*range(9), 11, 12, *range(14, 32), *range(127, 160), 0xD800, 0xDFFF]))


def test_no_control_character_of_what_a_command_prints_reaches_the_terminal(capsys):
    def command(argv):
        print(f"text\t{CONTROL}\x1b]0;title\x07\x1b[31mred\x1b[0m")
        print(f"note: {CONTROL}", file=sys.stderr)
        sys.stderr.writelines([CONTROL])
        raise UserError(f"'{CONTROL}\r\t' is not a cache")

    assert run_command(command, []) == 2
    out, err = capsys.readouterr()
    assert out == f"text\t{'�' * len(CONTROL)}�]0;title�red\n"
    assert (
        err == f"note: {'�' * len(CONTROL)}\n{'�' * len(CONTROL)}error: '{'�' * (len(CONTROL) + 2)}' is not a cache\n"
    )


def test_other_text_is_printed_as_it_is(capsys):
    text = "héllo हिन्दी فارسی\u200c می \u200f ไทย 中文 🎧\r\n"
    assert run_command(lambda argv: print(text, end=""), []) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:pa55@host/c", "https://***@host/c"),
        ("https://t0ken@host/c", "https://***@host/c"),
        ("s3://AKIA:pa55@bucket/c", "s3://***@bucket/c"),
        ("https://host/x?a=1&X-Amz-Signature=pa55&b=2", "https://host/x?a=1&X-Amz-Signature=***&b=2"),
        ("https://host/x?sv=1&sig=pa55", "https://host/x?sv=1&sig=***"),
        ("https://host/x?access_token=pa55#part", "https://host/x?access_token=***"),
        ("abfss://container@account.dfs.core.windows.net/c", "abfss://container@account.dfs.core.windows.net/c"),
        ("hf://datasets/me/mine@main/c", "hf://datasets/me/mine@main/c"),
    ],
)
def test_no_password_or_token_of_a_url_is_in_a_message_or_printed(url, shown, capsys):
    assert str(UserError(f"'{url}' is not there")) == f"'{shown}' is not there"
    assert run_command(lambda argv: print(url), []) == 0
    assert capsys.readouterr().out == f"{shown}\n"
