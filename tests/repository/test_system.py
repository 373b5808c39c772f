"""``.ci/system`` installs what tests use besides Python, where it may, and never ends a run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / ".ci" / "system"
pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs coreutils")


@pytest.fixture
def machine(tmp_path):
    """Runs the script on a machine that has the given programs and a user of the given number; out, calls of apt."""
    (tmp_path / "bin").mkdir()
    for name in ("bash", "env", "timeout", "sleep"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))

    def run(*packages: str, user: int = 0, seconds: str = "20", **programs: str) -> tuple[str, list[str]]:
        for name, body in {"id": f"echo {user}", **programs}.items():
            program = tmp_path / "bin" / name.replace("_", "-")
            program.write_text(f"#!{shutil.which('bash')}\n{body}\n")
            program.chmod(0o755)
        environment = {"PATH": str(tmp_path / "bin"), "HOME": os.environ.get("HOME", "/"), "APT_SECONDS": seconds}
        done = subprocess.run(["bash", SCRIPT, *packages], env=environment, capture_output=True, text=True, check=True)
        calls = tmp_path / "calls"
        return done.stdout + done.stderr, calls.read_text().splitlines() if calls.exists() else []

    return run


@pytest.fixture
def apt(tmp_path) -> str:
    return f'echo "$@" >> {tmp_path}/calls'


def test_what_stands_under_any_of_its_names_is_not_installed(machine, apt):
    assert machine("a-browser", "chromium", a_browser="true", google_chrome="true", apt_get=apt) == ("", [])


def test_what_is_absent_is_installed_and_nothing_else(machine, apt):
    said, calls = machine("no-such-browser", "a-browser", a_browser="true", apt_get=apt)
    assert (said, calls) == ("", ["update", "install -y --no-install-recommends no-such-browser"])


@pytest.mark.parametrize(
    ("user", "apt_get", "seconds", "reason"),
    [
        (1000, "true", "20", "not root"),
        (0, None, "20", "no apt-get"),
        (0, "exit 100", "20", "apt-get failed, or took too long"),
        (0, "exec sleep 60", "0.2", "apt-get failed, or took too long"),
    ],
)
def test_where_it_cannot_one_line_says_so_and_the_run_goes_on(machine, user, apt_get, seconds, reason):
    programs = {"apt_get": apt_get} if apt_get else {}
    said, _ = machine("no-such-browser", user=user, seconds=seconds, **programs)
    assert said == f"note: no-such-browser not installed ({reason}): tests that need it are skipped\n"
