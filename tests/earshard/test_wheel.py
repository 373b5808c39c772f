"""The wheel, built from the source archive, works in a folder from which the checkout cannot be imported."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny_whisper import write_tiny_whisper

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = """
import os, sys
from setuptools.build_meta import build_sdist, build_wheel
print((build_sdist if sys.argv[1] == "sdist" else build_wheel)(sys.argv[2]))
"""

pytestmark = pytest.mark.slow


def build(what: str, source: Path, out: Path) -> Path:
    """What a build frontend calls, without the network and without an environment of its own."""
    command = [sys.executable, "-c", BUILD, what, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):  # what a clone has
        if (ROOT / name).exists() or (ROOT / name).is_symlink():
            (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "clone" / name, follow_symlinks=False)
    source = build("sdist", folder / "clone", folder)
    shutil.unpack_archive(source, folder / "unpacked", filter="data")
    (inner,) = (folder / "unpacked").iterdir()
    return build("wheel", inner, folder)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A virtual environment with the wheel, and the dependencies of this one without the checkout."""
    folder = tmp_path_factory.mktemp("env") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    options = ["--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*command, *options, str(wheel)], check=True)
    # sys.path alone: the .pth files there, with which an editable install makes the checkout importable, are not read
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in site_packages()))
    return folder


def site_packages() -> list[str]:
    return [path for path in dict.fromkeys([*site.getsitepackages(), *sys.path]) if path.endswith("site-packages")]


def run(installed: Path, cwd: Path, *words: str) -> str:
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["EARSHARD_HOME"] = str(cwd / "home")
    command = [str(installed / "bin" / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stdout[-1000:]} {done.stderr[-1000:]}"
    return done.stdout


def test_the_wheel_has_the_configurations_and_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    for file in (ROOT / "configs").glob("*/*.yaml"):
        assert f"shards/config/builtin/{file.relative_to(ROOT / 'configs')}" in names
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"earshard", "shards", "pipeline", "train"}
    assert {f"{top}/py.typed" for top in tops} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "Classifier: Typing :: Typed" in metadata
    assert "Requires-Python: >=3.11" in metadata


def test_the_installed_wheel_extracts_trains_and_verifies_from_built_in_configurations(installed, tmp_path):
    asked = "import earshard, shards.config.origins as o; print(earshard.__file__, o.__file__, earshard.Cache.__name__)"
    said = run(installed, tmp_path, "python", "-c", asked)
    assert str(ROOT) not in said
    assert said.split()[-1] == "Cache"
    assert run(installed, tmp_path, "earshard", "--version").startswith("earshard ")
    assert "next: earshard extract --config speech" in run(installed, tmp_path, "earshard", "doctor")
    assert run(installed, tmp_path, "earshard", "train", "needs", "--config", "smoke") == "configs/extract/tones.yaml\n"
    whisper = write_tiny_whisper(tmp_path / "whisper")
    run(installed, tmp_path, "earshard", "extract", "--config", "tones", f"encoder.model=path:{whisper}")
    (cache,) = (tmp_path / "caches" / "tones").iterdir()
    words = [
        "name=smoke",
        f"caches={cache.relative_to(tmp_path)}",
        "lm.model=nanochat:d1",
        "steps=4",
        "min_loss_drop=0",
        "batch.size=2",
    ]
    run(installed, tmp_path, "earshard", "train", "fit", "--config", "smoke", *words)
    assert (tmp_path / "runs" / "smoke" / "report.html").is_file()
    assert "valid" in run(installed, tmp_path, "earshard", "shards", "verify", str(cache), "--deep")
