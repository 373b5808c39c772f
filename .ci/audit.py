"""Check the packages of lock files for known vulnerabilities, with the service that pip-audit uses.

    make audit                                   (.venv/audit/bin/python .ci/audit.py requirements.lock …)

Reads lock files (``name==version`` lines) and prints a line for each vulnerability. The exit status is 0 if every
package was looked up and none is known to be vulnerable, 1 if one is, and 2 if the service did not answer for all of
them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def ask(lock: str) -> list[dict[str, Any]]:
    """Return pip-audit's list of dependencies; raise SystemExit after one error line if the service did not answer."""
    words = ["--progress-spinner", "off", "--disable-pip", "--no-deps", "--format", "json", "--requirement", lock]
    done = subprocess.run(
        [str(Path(sys.executable).parent / "pip-audit"), *words], capture_output=True, text=True, check=False
    )
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:160]
        print(f"error: {lock} could not be audited ({reason}): check the network connection", file=sys.stderr)
        raise SystemExit(2) from None
    return found


def report(lock: str, found: list[dict[str, Any]]) -> int:
    """Print the vulnerable packages and those that could not be looked up; return the exit status."""
    vulnerable = [package for package in found if package.get("vulns")]
    unknown = [package["name"] for package in found if "skip_reason" in package]
    for package in vulnerable:
        for hole in package["vulns"]:
            fixed = ", ".join(hole.get("fix_versions") or []) or "no version yet"
            print(f"{package['name']} {package['version']}: {hole['id']}, fixed in {fixed}")
    print(f"{lock}: {len(found) - len(unknown)} packages looked up, {len(vulnerable)} vulnerable")
    if unknown:
        print(
            f"error: {len(unknown)} packages of {lock} are unknown to the service ({', '.join(unknown[:3])} …): "
            "check the network connection",
            file=sys.stderr,
        )
    return 1 if vulnerable else 2 if unknown else 0


if __name__ == "__main__":
    sys.exit(max((report(lock, ask(lock)) for lock in sys.argv[1:]), default=0))
