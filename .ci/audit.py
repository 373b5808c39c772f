"""Known vulnerabilities of the packages in a lock, asked of the service that pip-audit uses.

    make audit                                   (.venv/audit/bin/python .ci/audit.py requirements.lock …)

In: lock files (``name==version`` lines). Out: a line for each vulnerable package. Exit status 0 when every package was
looked up and none is known to be vulnerable, 1 when one is, 2 when the service could not be asked: no answer is not "no
vulnerability".
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def ask(lock: str) -> list[dict[str, Any]]:
    """pip-audit's list of dependencies; SystemExit with one sentence when it got no answer."""
    words = ["--progress-spinner", "off", "--disable-pip", "--no-deps", "--format", "json", "--requirement", lock]
    done = subprocess.run(
        [str(Path(sys.executable).parent / "pip-audit"), *words], capture_output=True, text=True, check=False
    )
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:160]
        print(f"error: {lock} could not be audited ({reason}): try again where there is a network", file=sys.stderr)
        raise SystemExit(2) from None
    return found


def report(lock: str, found: list[dict[str, Any]]) -> int:
    """Print what is vulnerable and what could not be looked up; the exit status."""
    vulnerable = [package for package in found if package.get("vulns")]
    unknown = [package["name"] for package in found if "skip_reason" in package]
    for package in vulnerable:
        for hole in package["vulns"]:
            mended = ", ".join(hole.get("fix_versions") or []) or "no version yet"
            print(f"{package['name']} {package['version']}: {hole['id']}, mended in {mended}")
    print(f"{lock}: {len(found) - len(unknown)} packages looked up, {len(vulnerable)} vulnerable")
    if unknown:
        print(
            f"error: {len(unknown)} packages of {lock} are unknown to the service ({', '.join(unknown[:3])} …): "
            "it may not be reached from here, try again where there is a network",
            file=sys.stderr,
        )
    return 1 if vulnerable else 2 if unknown else 0


if __name__ == "__main__":
    sys.exit(max((report(lock, ask(lock)) for lock in sys.argv[1:]), default=0))
