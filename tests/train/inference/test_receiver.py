"""An export at its receiver: a process with transformers, and without earshard, runs the lines of the model card."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_encoders import write_tiny
from tiny_hub import serve_hub
from tiny_lm import save_tiny_lm
from tiny_run import make_config
from tiny_whisper import write_tiny_whisper

from pipeline.__main__ import command as pipeline_command
from pipeline.audio import decode, encode_wav
from pipeline.encoders.recording import open_encoder
from shards.errors import run_command
from train.__main__ import command
from train.data.live import encode_features, feature_specs
from train.data.padding import pad
from train.inference.export import export, load_projector
from train.inference.transcribe import find_recordings, transcribe
from train.model.build import load_model
from train.runs.folder import read_cache_info
from train.trainer.fit import fit

SAMPLES = {"short": 4000, "middle": 20_001, "long": 33 * 16_000}  # the last one spans two windows
RATES = {"middle": 22_050}

ROOT = Path(__file__).parents[3]
OWN_SOURCE = """
from torch import nn
from train import Projector
from train.projectors.base import stack_frames

class Mine(Projector):
    def __init__(self, channels, width, embedding_rms, *, stack=2):
        super().__init__()
        self.stack, self.fc = stack, nn.Linear(stack * channels, width)

    def init_weights(self, generator):
        nn.init.normal_(self.fc.weight, generator=generator)

    def soft_frames(self, frames):
        return -(-frames // self.stack)

    def forward(self, features, mask):
        x, mask = stack_frames(features, mask, self.stack)
        return self.fc(x).tanh(), mask
"""

RECEIVER = """
import json, os, sys
import soundfile
hidden = ["train", "pipeline", "shards", "pydantic", "pyarrow", "webdataset", "jiwer"]
sys.modules.update(dict.fromkeys([*hidden, *os.environ.get("HIDDEN", "").split()]))
from safetensors.torch import save_file
results = {}
for name, code in json.loads(sys.argv[1]).items():
    try:
        exec(code, space := {})
    except ValueError as error:
        results[name] = str(error)
        continue
    if "asr" in space:
        samples, rate = soundfile.read("middle.wav", dtype="float32")
        given = {"raw": samples, "sampling_rate": rate}
        stereo = {"array": [samples, samples], "sampling_rate": rate}
        same = ["middle.wav", given, open("middle.wav", "rb").read(), stereo]
        results[name] = {
            "list": [each["text"] for each in space["asr"]([f"{key}.wav" for key in sys.argv[2:]])],
            "one by one": [space["asr"](each)["text"] for each in same],
            "generator": [each["text"] for each in space["asr"]((each for each in same), batch_size=1)],
            "shorter": space["asr"]("middle.wav", generate_kwargs={"max_new_tokens": 1})["text"],
        }
        continue
    save_file({key: space["model"].soft_tokens(f"{key}.wav").contiguous() for key in sys.argv[2:]}, f"{name}.soft")
    results[name] = space["model"].transcribe([f"{key}.wav" for key in sys.argv[2:]])
print(json.dumps(results))
"""


def noise(samples: int, seed: int) -> np.ndarray:
    return (np.random.RandomState(seed).uniform(-0.3, 0.3, samples) * 32767).astype(np.int16)


def receive(folder: Path, codes: dict[str, str], **variables: str) -> tuple[dict[str, Any], str]:
    """Run each of ``codes`` in one process in ``folder``; return its results or errors by name, and what it printed."""
    hidden = {"PYTHONPATH", "PYTEST_CURRENT_TEST"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder / "modules"),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    words = [sys.executable, "-P", "-c", RECEIVER, json.dumps(codes), *SAMPLES]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    return json.loads(last), "\n".join(printed)


def card_lines(folder: Path, block: int = 0) -> str:
    """Return a block of code of the model card, with the names of the files of these tests."""
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.S)[block]
    return code.replace('"ENCODER"', '"encoder"').replace('"LM"', '"lm"').replace("speech.wav", "short.wav")


def make_world(folder: Path, encoder: Path, kinds: dict[str, dict[str, Any]], **extraction: Any) -> tuple[Any, ...]:
    """Return (folder, runs, results, printed): tiny runs, and what a receiver of their exports computed.

    ``{one}`` and ``{two}`` in ``kinds`` are caches of two layers.
    """
    rows = []
    for number, (key, samples) in enumerate(SAMPLES.items()):
        (folder / f"{key}.wav").write_bytes(encode_wav(noise(samples, number), RATES.get(key, 16_000)))
        rows.append(json.dumps({"audio": f"{key}.wav", "text": f"text {number}", "key": key}))
    (folder / "manifest.jsonl").write_text("\n".join(rows) + "\n")
    settings = {
        "root": str(folder / "caches"),
        "source": {"kind": "manifest", "path": str(folder / "manifest.jsonl")},
        "encoder": {"model": f"path:{encoder}", "dtype": "float32", "device": "cpu", "layers": [1, 2]},
        **extraction,
    }
    (folder / "extract.yaml").write_text(json.dumps(settings))
    assert run_command(pipeline_command, ["extract", "--config", str(folder / "extract.yaml")]) == 0
    one, two = f"{folder}/caches/*/*-L2-*", f"{folder}/caches/*/*-L1-*"
    lm = save_tiny_lm(folder / "lm")
    runs, codes = {}, {}
    for name, keys in kinds.items():
        keys = json.loads(json.dumps(keys).replace("{one}", one).replace("{two}", two))
        keys["lm"] = {"model": f"path:{lm}", **keys.get("lm", {})}
        keys = {"steps": 2, "val": {"caches": [one]}, "eval_every": 0, "name": name, "max_new_tokens": 12, **keys}
        config = make_config(folder, one, "", **keys)
        runs[name] = fit(config), config
        kind = config.projector.kind if name == "own" else None
        codes[name] = card_lines(export(runs[name][0], folder / f"export-{name}", kind))
    if (folder / "lm-other").exists():
        first = codes["plain"]
        codes["encoder"] = first.replace('encoder="encoder"', 'encoder="encoder-other"')
        codes["lm"] = first.replace('"lm"', '"lm-other"')
        codes["nothing"] = first.replace(', encoder="encoder"', "")
        codes["pipeline"] = second = card_lines(folder / "export-plain", 1)
        codes["pipeline, lm"] = second.replace('"lm": "lm"', '"lm": "lm-other"')
        codes["pipeline, device"] = second.replace("model_kwargs", 'device="meta", model_kwargs')
        codes["no place"] = card_lines(folder / "export-own").replace('"short.wav"', '"short.wav", "Translate."')
    return folder, runs, *receive(folder, codes)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("receiver")
    write_tiny_whisper(folder / "encoder-other", seed=1)
    save_tiny_lm(folder / "lm-other", seed=1)
    (folder / "own_receiver.py").write_text(OWN_SOURCE)
    own = {"projector": {"kind": "own_receiver:Mine", "settings": {"stack": 3}}}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        whisper = write_tiny_whisper(folder / "encoder")
        yield make_world(folder, whisper, {"plain": {"prompt": {"template": "chat"}}, "own": own}, codec="int8")
    sys.modules.pop("own_receiver", None)


def assert_same(world: tuple[Any, ...], name: str) -> None:
    folder, runs, results, printed = world
    run, config = runs[name]
    texts = [
        text for _, text in transcribe(run, config, find_recordings([str(folder / f"{key}.wav") for key in SAMPLES]))
    ]
    assert results[name] == texts
    assert name not in list(runs)[:1] or printed.splitlines()[0] == texts[0]
    cache_info, soft = read_cache_info(run), load_file(folder / f"{name}.soft")
    encoder = open_encoder(cache_info["spec"], cache_info["encoder"])
    model = load_model(run, config, torch.device("cpu"), torch.float32)
    for key in SAMPLES:
        samples = decode((folder / f"{key}.wav").read_bytes())
        features, mask = pad([encode_features(samples, encoder, feature_specs(cache_info))])
        with torch.no_grad():
            found, valid = model.soft_tokens(features, mask)
        assert torch.equal(found[0, valid[0]], soft[key])


@pytest.mark.parametrize("name", ["plain", "own"])
def test_three_lines_of_the_card_compute_the_soft_tokens_and_texts_of_transcribe_without_earshard(world, name):
    assert_same(world, name)
    assert any(world[2][name])


def test_three_lines_of_the_card_make_a_pipeline_of_transformers_whose_texts_are_those_of_transcribe(world):
    found = world[2]["pipeline"]
    assert found["list"] == world[2]["plain"]
    single = found["one by one"][0]
    assert single
    assert found["one by one"] == found["generator"] == [single] * 4
    assert len(found["shorter"]) < len(single)
    assert len(card_lines(world[0] / "export-plain", 1).splitlines()) == 3


@pytest.mark.slow
def test_a_trained_lm_mixed_layers_and_a_ctc_head_in_decoding_are_received_alike(tmp_path):
    mixed = {"caches": [["{one}", "{two}"]], "val": {"caches": [["{one}", "{two}"]]}}
    head = {
        "projector": {"kind": "posterior", "hidden": 12, "read_spelling": True},
        "decode": {"ctc_weight": 0.5, "beam_size": 2},
    }
    kinds = {"trained": {"lm": {"train": True}}, "mixed": mixed, "head": head}
    whisper = write_tiny_whisper(tmp_path / "encoder")
    world = make_world(tmp_path, whisper, kinds, window="tight", margin=1)
    for name in kinds:
        assert_same(world, name)
    card = (tmp_path / "export-head" / "README.md").read_text()
    assert "| text | decoded by the CTC head and the LM together (weights 0.5 and 0.5, 2 hypotheses)" in card
    assert "(`read_spelling`)" in card


@pytest.mark.slow
def test_adapters_of_the_lm_are_received_alike_and_their_package_is_named_where_it_is_missing(tmp_path):
    pytest.importorskip("peft")
    whisper = write_tiny_whisper(tmp_path / "encoder")
    world = make_world(tmp_path, whisper, {"lora": {"lm": {"lora": {"rank": 2}}, "lr": 0.1, "steps": 4}})
    assert_same(world, "lora")
    card = (tmp_path / "export-lora" / "README.md").read_text()
    assert "and peft. It runs the code" in card
    assert "frozen, with trained LoRA adapters of rank 2, which are in `lm.safetensors`" in card
    without, _ = receive(tmp_path, {"lora": card_lines(tmp_path / "export-lora")}, HIDDEN="peft")
    assert without["lora"] == "the language model of this export needs peft: install it with pip"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["hubert", "wav2vec2-bert"])
def test_an_encoder_without_a_fixed_window_is_received_alike(family, tmp_path):
    assert_same(make_world(tmp_path, write_tiny(tmp_path / "encoder", family), {"plain": {}}, codec="f16"), "plain")


def test_the_card_has_three_lines_and_earshard_reads_the_same_folder(world):
    folder, runs, _, _ = world
    assert len(card_lines(folder / "export-plain").splitlines()) == 3
    tensors = load_file(runs["plain"][0] / "projector.safetensors")
    assert set(tensors) == {f"projector.{name}" for name in load_projector(folder / "export-plain").state_dict()}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("encoder", r"did not make these features .*sha256.*: name the same encoder as encoder="),
        ("lm", r"the weights in '.*lm-other' are not those with which .* was trained"),
        ("nothing", r"the encoder of this export is on no hub .*: pass encoder= its folder"),
        ("pipeline, lm", r"the weights in '.*lm-other' are not those with which .* was trained"),
    ],
)
def test_an_encoder_or_a_language_model_that_is_not_that_of_the_training_is_refused(world, name, reason):
    assert isinstance(world[2][name], str)
    assert re.search(reason, world[2][name])


def test_a_run_that_decodes_with_a_head_outside_of_the_projector_is_exported_without_code_and_its_card_says_why(world):
    folder, runs, _, _ = world
    decoding = {"ctc": {"weight": 0.5}, "decode": {"ctc_weight": 0.5}}
    lm, caches = runs["plain"][1].lm.model_dump(), runs["plain"][1].caches
    config = make_config(folder, caches[0], "", **decoding, lm=lm, steps=1, val={"caches": caches}, name="outside")
    target = export(fit(config), folder / "export-outside")
    assert not (target / "modeling_earshard.py").exists()
    assert json.loads((target / "config.json").read_text())["custom_pipelines"] == {}
    assert (
        "transformers does not load this export, because its text is decoded by the CTC head and the LM together "
        "(weights 0.5 and 0.5, 6 hypotheses); the LM reads the prompt and the soft tokens, and that head "
        "(`ctc.weight`) is not in the projector."
    ) in (target / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pipeline, device", "in place of device=, pass model_kwargs={'device': 'meta'}"),
        ("no place", "the prompt of this export has no place for an instruction: leave out instruction="),
    ],
)
def test_a_device_that_the_encoder_is_not_on_and_an_instruction_that_nobody_would_read_are_refused(world, name, reason):
    assert reason in world[2][name]


@pytest.mark.slow
def test_an_export_is_pushed_to_a_hub_and_loaded_by_its_name(world, tmp_path, capsys):
    folder, _, results, _ = world
    target, url = folder / "export-plain", "hf://someone/demo"
    assert run_command(command, ["push", str(target), url, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert f"would push to {url}, a public repository:" in told
    assert f"encoder 'path:{folder / 'encoder'}'" in told
    assert run_command(command, ["push", str(target), url]) == 2
    assert "would become public: add --yes" in capsys.readouterr().err
    with serve_hub("someone/demo", {}, "model") as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_token"}
        environment |= {"HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        words = [sys.executable, "-m", "train", "push", str(target), url, "--private"]
        assert subprocess.run(words, env={**os.environ, **environment}, cwd=ROOT, check=False).returncode == 0
        assert hub.private
        assert set(hub.files) == {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
        codes = [card_lines(target, block).replace('"export-plain"', '"someone/demo"') for block in (0, 1)]
        found, _ = receive(folder, {"hub": codes[0], "pipeline": codes[1]}, **environment)
    assert found["hub"] == results["plain"] == found["pipeline"]["list"]
