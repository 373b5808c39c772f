"""Write hashes into the locks, after an edit of a version: `python .ci/lock.py [LOCK …]`.

pip resolves each lock for x86-64 and for 64-bit ARM, and reports the files that it would install: the core's lock for
every Python that CI tests, the others for 3.11. torch is in
the Makefile instead: its builds for a CPU and for a GPU share one version, and the latter needs further packages.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

MACHINES = ("x86_64", "aarch64")
PYTHONS = {"requirements.lock": ("3.11", "3.12", "3.13")}
LIBC = ("2_34", "2_28", "2_27", "2_24", "2_17", "2_5")
LOCKS = ("requirements.lock", "requirements-test-all.lock", "requirements-bench.lock", "requirements-audit.lock")


def canonical(name: str) -> str:
    """Return the canonical name of a package, given its name or ``name==version``."""
    return re.sub(r"[-_.]+", "-", name.split("==")[0]).lower()


def report(pins: list[str], machine: str, python: str, folder: str) -> dict[str, str]:
    """Return the sha256 by name of the files that pip would install on ``machine``, among those that have one."""
    tags = [f"manylinux_{libc}_{machine}" for libc in LIBC] + [f"manylinux{year}_{machine}" for year in (2014, 2010, 1)]
    platforms = [word for tag in [*tags, f"linux_{machine}"] for word in ("--platform", tag)]
    listed, out = Path(folder) / "pins.txt", Path(folder) / "report.json"
    listed.write_text("\n".join(pins))
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--dry-run",
        "--no-deps",
    ]
    options = ["--ignore-installed", "--only-binary=:all:", "--target", folder, "--python-version", python, *platforms]
    subprocess.run([*command, *options, "--report", str(out), "-r", str(listed)], check=True)
    found = json.loads(out.read_text())["install"]
    return {
        canonical(each["metadata"]["name"]): each["download_info"]["archive_info"]["hashes"]["sha256"] for each in found
    }


def write(lock: Path) -> None:
    """Rewrite a lock: its comments, then one line per package, with hashes."""
    lines = lock.read_text().splitlines()
    comments = [line for line in lines if line.startswith("#")]
    pins = sorted({line.split()[0] for line in lines if "==" in line and not line.startswith("#")}, key=str.lower)
    hashes: defaultdict[str, set[str]] = defaultdict(set)
    with tempfile.TemporaryDirectory() as folder:
        for machine, python in itertools.product(MACHINES, PYTHONS.get(lock.name, ("3.11",))):
            for name, digest in report(pins, machine, python, folder).items():
                hashes[name].add(digest)
    text = [" ".join([pin, *(f"--hash=sha256:{each}" for each in sorted(hashes[canonical(pin)]))]) for pin in pins]
    lock.write_text("\n".join([*comments, *text]) + "\n")
    print(f"{lock}: {len(pins)} packages, {sum(map(len, hashes.values()))} files")


for name in sys.argv[1:] or LOCKS:
    write(Path(name))
